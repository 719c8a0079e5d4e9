"""Start and end of torch.distributed and megatron-core's groups."""

import random
import socket
from collections.abc import Iterator

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_deft.errors import UserError
from megatron_deft.platform import TORCHRUN_ENVIRONMENT, backend, device, initialize, shutdown


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in TORCHRUN_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    yield
    shutdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_cpu_and_gloo() -> None:
    assert (device(), backend()) == (torch.device("cpu"), "gloo")


def test_a_plain_process_is_a_world_of_one_as_often_as_it_likes() -> None:
    for _ in range(2):
        initialize()
        assert dist.get_world_size() == 1
        assert dist.get_backend() == backend()
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        total = torch.ones(1, device=device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        assert total == 1
        shutdown()
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
    shutdown()


def test_torchrun_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    values = ("0", "1", "127.0.0.1", str(port))
    for name, value in zip(TORCHRUN_ENVIRONMENT, values, strict=True):
        monkeypatch.setenv(name, value)
    initialize()
    dist.barrier()
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass  # the rendezvous listens there


def test_half_a_torchrun_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT not set"):
        initialize()


def test_layout_must_divide_the_world() -> None:
    with pytest.raises(UserError, match=r"tensor 2 x pipeline 1 x context 1 = 2 .* 1 started"):
        initialize(tensor=2)
    assert not dist.is_initialized()
    initialize()


def test_running_process_group_is_used_and_left_running() -> None:
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        own = dist.new_group([0])
        before = {*dist.distributed_c10d._world.pg_map}
        initialize()
        assert {*dist.distributed_c10d._world.pg_map} > before
        shutdown()
        assert {*dist.distributed_c10d._world.pg_map} == before, "each group keeps threads"
        dist.barrier(own)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_seed_decides_every_generator() -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        initialize(seed=seed)
        numbers = (random.random(), float(numpy.random.rand()), float(torch.rand(1)))
        shutdown()
        return numbers

    assert draws(7) == draws(7)
    assert all(a != b for a, b in zip(draws(7), draws(8), strict=True))
