"""What the ranks of test_layouts.py do; apart from it, so that they need not load transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert.state import load_model
from megatron_deft.models.families import ModelSpec
from megatron_deft.platform import initialize, shutdown

# case -> (tensor, pipeline, vocabulary padding). At 128 x 2 a vocabulary of 128 leaves the second
# tensor-parallel rank nothing but padding, one of 260 at 256 x 2 leaves it four rows.
RUNS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "llama_mha_untied": ((2, 1, 128), (2, 2, 1)),
    "llama_gqa_tied": ((1, 2, 7), (2, 2, 256)),
    "llama_biases_odd_vocab": ((2, 2, 128),),
    "qwen2_biases": ((2, 2, 64),),
    "mistral_wide_heads": ((2, 2, 128),),
}
SAVED = ("llama_biases_odd_vocab", "llama_gqa_tied", "qwen2_biases")  # at TP2 x PP2
IDS = torch.arange(64).reshape(2, 32)


def forward(model: Any, ids: Tensor, hidden: int) -> Tensor | None:
    """Logits [b, s, padded vocabulary / tensor] on the last pipeline stage, else None."""
    from megatron.core import parallel_state as ps

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if not ps.is_pipeline_first_stage():
        received = torch.empty(ids.shape[1], ids.shape[0], hidden)
        dist.recv(received, ps.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    output = model(ids, positions, None)
    if ps.is_pipeline_last_stage():
        return output
    dist.send(output, ps.get_pipeline_model_parallel_next_rank())
    return None


def save(model: Any, folder: Path, manifest: dict[str, Any]) -> None:
    """A checkpoint as training writes it: the model's tensors beside an optimizer's."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    state = dict(model.sharded_state_dict())
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


def run_layouts(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, layouts in RUNS.items():
        for tensor, pipeline, pad in layouts:
            initialize(tensor=tensor, pipeline=pipeline)
            results[f"{case} {tensor} {pipeline} {pad}"] = run_layout(
                root / case, tensor, pipeline, pad
            )
            shutdown()
    return results


@torch.no_grad()
def run_layout(root: Path, tensor: int, pipeline: int, pad: int) -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    from megatron_deft.models.build import build_model, transformer_config

    manifest = folders.read_manifest(root / "weights")
    spec = ModelSpec.from_json(manifest["spec"])
    config = transformer_config(spec, tensor=tensor, pipeline=pipeline)
    model = build_model(spec, config, vocab_pad_multiple=pad).eval()
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    load_model(model, root / "weights" / "state")
    vocab: Sequence[Tensor] = [
        p for n, p in model.named_parameters() if "word_embeddings" in n or "output_layer" in n
    ]
    first_row = ps.get_tensor_model_parallel_rank() * len(vocab[0]) if vocab else 0
    padding = [table[max(0, spec.vocab_size - first_row) :] for table in vocab]
    shard = forward(model, IDS, spec.hidden_size)
    if (tensor, pipeline) == (2, 2) and root.name in SAVED:
        save(model, root / "run" / "checkpoints" / folders.step_name(1), manifest)
    return {
        "data": ps.get_data_parallel_rank(),
        "tensor": ps.get_tensor_model_parallel_rank(),
        "shard": shard,
        "padded_rows": sum(len(rows) for rows in padding),
        "padding_is_zero": all(bool((rows == 0).all()) for rows in padding),
    }
