"""Where the ranks of a run meet: torch.distributed's store, and who has not come to it."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(minutes=5)  # for all ranks to come; as torch waits itself
SHOWN = 20  # ranks that are named, of those that are missing


def meet(patience: timedelta | None = None) -> dict[str, Any]:
    """What torch.distributed.init_process_group needs, once every rank is there.

    From torchrun's environment. torch's own meeting was rejected: it tells how many ranks have not
    come, not which, and for some stores nothing.

    patience: how long to wait for the others; None: PATIENCE
    returns:  {"store", "rank", "world_size"}
    Errors:   RuntimeError naming the ranks that have not come.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = patience or PATIENCE
    try:
        store = _store(rank, patience)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RuntimeError(_absent([0], world, patience, f", at {where}: {error}")) from None
    store.set(_key(rank), "")
    keys = [_key(other) for other in range(world)]
    try:
        store.wait(keys, patience)
    except dist.DistStoreError:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(_absent(missing, world, patience)) from None
    return {"store": store, "rank": rank, "world_size": world}


def _store(rank: int, patience: timedelta) -> dist.Store:
    """Rank 0's, or that of the agent, as torchrun says.

    An agent's store outlives its ranks: what the first attempt wrote there, addresses of processes
    that are dead by now, would be taken for this one's (torch 2.13 hangs then, or fails). Several
    nodes count their restarts apart, so they need a new store: launch.py says how.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(
            host, port, is_master=rank == 0, timeout=patience, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    store = dist.TCPStore(host, port, is_master=False, timeout=patience)
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _key(rank: int) -> str:
    return f"megatron_deft/here/{rank}"


def _absent(ranks: list[int], world: int, patience: timedelta, more: str = "") -> str:
    names = ", ".join(map(str, ranks[:SHOWN])) + ", ..." * (len(ranks) > SHOWN)
    return (
        f"{'rank' if len(ranks) == 1 else 'ranks'} {names} of {world} did not come to the start of "
        f"the run within {patience.total_seconds() / 60:.3g} minutes: stopped, hanging in an "
        f"import, or gone{more}"
    )
