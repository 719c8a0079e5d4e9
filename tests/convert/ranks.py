"""What the ranks of test_layouts.py do; apart from it, so that they need not load transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert.direct import load_hf
from megatron_deft.convert.sources import HFSource
from megatron_deft.convert.state import load_model
from megatron_deft.models.families import ModelSpec
from megatron_deft.platform import initialize, shutdown


class Layout(NamedTuple):
    """Parallel sizes, and the multiple that the vocabulary is padded to."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual: int | None = None
    pad: int = 128


# At 128 x 2 a vocabulary of 128 leaves the second tensor-parallel rank nothing but padding, one of
# 260 at 256 x 2 leaves it four rows.
RUNS: dict[str, tuple[Layout, ...]] = {
    "llama_mha_untied": (Layout(4), Layout(2, 2, pad=1)),
    "llama_gqa_tied": (Layout(1, 2, pad=7), Layout(2, 2, pad=256)),
    "llama_biases_odd_vocab": (Layout(2, 2), Layout(1, 2, virtual=2)),
    "qwen2_biases": (Layout(2, 1), Layout(2, 2, pad=64)),
    "mistral_wide_heads": (Layout(2, 2),),
    "mistral_window": (Layout(1, 2, virtual=2),),
    "llama_yarn": (Layout(2, 2),),
    "qwen2_windows": (Layout(2, 2),),
    "qwen3_tied": (Layout(2, 1), Layout(2, 2)),
    "gemma2": (Layout(2, 1), Layout(2, 2)),
    "phi3_partial": (Layout(2, 2),),
    "glm": (Layout(2, 2),),
    "glm4": (Layout(1, 2), Layout(1, 2, virtual=2)),
    "mixtral": (Layout(1, 2, expert=2), Layout(1, 1, expert=4)),
    "qwen3_moe": (Layout(2, 2), Layout(1, 1, expert=2)),
    "qwen3_moe_mixed": (Layout(1, 2, expert=2),),
}
# Every family at every one of these; what the ranks save at one is exported too.
GRID = tuple(Layout(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2))
IDS = torch.arange(64).reshape(2, 32)


def forward(chunks: Sequence[Any], ids: Tensor, hidden: int) -> Tensor | None:
    """Logits [b, s, padded vocabulary / tensor] on the last pipeline stage, else None.

    The stages take turns: the first chunk of each, then the second of each.
    """
    from megatron.core import parallel_state as ps

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    output = None
    for number, chunk in enumerate(chunks):
        if number or not ps.is_pipeline_first_stage():
            received = torch.empty(ids.shape[1], ids.shape[0], hidden)
            if ps.get_pipeline_model_parallel_world_size() > 1:
                dist.recv(received, ps.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(received)
        output = chunk(ids, positions, None)
        if number == len(chunks) - 1 and ps.is_pipeline_last_stage():
            return output
        dist.send(output, ps.get_pipeline_model_parallel_next_rank())
    return None


def save(chunks: Sequence[Any], folder: Path, manifest: dict[str, Any]) -> None:
    """A checkpoint as training writes it: the model's tensors beside an optimizer's."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    state = {f"model{i}": dict(chunk.sharded_state_dict()) for i, chunk in enumerate(chunks)}
    state["optimizer"] = {"param_groups": [{"lr": 0.1}], "step": 1}
    state["moment"] = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        torch.full((4,), float(dist.get_rank())),
        (0, dist.get_rank(), dist.get_world_size()),
    )
    (folder / "state").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder / "state"))
    if dist.get_rank() == 0:
        fields = {name: manifest[name] for name in ("spec", "base", "tied_copy")}
        folders.write_manifest(folder, kind="training", step=1, objective="deft", **fields)
    dist.barrier()


Runs = Mapping[str, Sequence[Layout]]


def run_layouts(rank: int, world_size: int, root: Path, runs: Runs) -> dict[str, Any]:
    """The process groups of a layout are made once, for all models that have it."""
    results: dict[str, Any] = {}
    for layout in dict.fromkeys(layout for layouts in runs.values() for layout in layouts):
        initialize(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            expert=layout.expert,
            virtual=layout.virtual,
        )
        for case, layouts in runs.items():
            if layout in layouts:
                results[f"{case} {layout}"] = run_layout(root / case, layout)
        shutdown()
    return results


def run_dir(root: Path, layout: Layout) -> Path:
    """Where the ranks of a layout save the model of `root`."""
    return root / f"run_{'_'.join(map(str, layout))}"


def _forget(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.fill_(float("nan"))


@torch.no_grad()
def run_layout(root: Path, layout: Layout) -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    from megatron_deft.models.build import build_model, transformer_config

    manifest = folders.read_manifest(root / "weights")
    spec = ModelSpec.from_json(manifest["spec"])
    sizes = layout._asdict()
    pad = sizes.pop("pad")
    config = transformer_config(spec, **sizes, sequence=layout.expert > 1)
    stages = range(layout.virtual) if layout.virtual else (None,)
    chunks = [build_model(spec, config, vocab_pad_multiple=pad, vp_stage=s).eval() for s in stages]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    _forget(parameters)
    load_hf(chunks, HFSource(root / "hf"))
    direct = [parameter.clone() for parameter in parameters]
    _forget(parameters)
    load_model(chunks, root / "weights" / "state")
    vocab: Sequence[Tensor] = [
        p
        for chunk in chunks
        for n, p in chunk.named_parameters()
        if "word_embeddings" in n or "output_layer" in n
    ]
    first_row = ps.get_tensor_model_parallel_rank() * len(vocab[0]) if vocab else 0
    padding = [table[max(0, spec.vocab_size - first_row) :] for table in vocab]
    shard = forward(chunks, IDS, spec.hidden_size)
    save(chunks, run_dir(root, layout) / "checkpoints" / folders.step_name(1), manifest)
    return {
        "direct_is_imported": all(map(torch.equal, direct, parameters)),
        "data": ps.get_data_parallel_rank(),
        "tensor": ps.get_tensor_model_parallel_rank(),
        "shard": shard,
        "tables": [table.clone() for table in vocab],
        "padded_rows": sum(len(rows) for rows in padding),
        "padding_is_zero": all(bool((rows == 0).all()) for rows in padding),
    }
