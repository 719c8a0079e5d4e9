"""A model of transformers with one layer in memory computes what it computes as a whole."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_deft.convert import stages
from megatron_deft.convert.reference import HuggingFace
from megatron_deft.convert.stages import Batch
from tests.convert.tiny_models import COMMON, make, tensors

SIZES = {**COMMON, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 99}
# pad_token_id: the defaults of these families are beyond so small a vocabulary.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
    "glm4": Glm4Config(**SIZES, head_dim=8, attention_bias=True, pad_token_id=0),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=12, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=8,
        num_experts=12,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
    ),
}
BATCH = Batch(torch.arange(24).reshape(2, 12), torch.tensor([*range(8), 20, 50, 51, 127]), 12)


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_the_whole_model(case: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", CONFIGS[case])
    if case in ("mixtral", "qwen3_moe"):
        assert any(".experts.11." in name for name in tensors(folder)), "one tensor per expert"
    side = HuggingFace(folder)
    found: dict[str, torch.Tensor] = {}
    side.run(BATCH, side.tensors, found.__setitem__)
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        output = whole.eval()(
            BATCH.ids,
            position_ids=BATCH.positions.expand_as(BATCH.ids),
            attention_mask=torch.ones_like(BATCH.ids),
            output_hidden_states=True,
        )
    names = [name for name in found if not name.startswith(stages.MARGIN)]
    assert names[2:] == ["layer 0", "layer 1", "final norm", "logits"]
    assert torch.equal(found["logits"], output.logits)
    assert torch.equal(found["embedding"], output.hidden_states[0])
    assert torch.equal(found["layer 0"], output.hidden_states[1])
    assert torch.equal(found["final norm"], output.hidden_states[2])


@pytest.mark.parametrize(("case", "layers"), [("mixtral", 2), ("qwen3_moe", 1), ("llama", 0)])
def test_how_clearly_experts_are_chosen(case: str, layers: int, tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", CONFIGS[case])
    side = HuggingFace(folder)
    found: dict[str, torch.Tensor] = {}
    side.run(BATCH, side.tensors, found.__setitem__)
    margins = {name: value for name, value in found.items() if name.startswith(stages.MARGIN)}
    assert list(margins) == [f"margin of layer {i}" for i in range(layers)]
    for margin in margins.values():
        assert margin.shape == BATCH.ids.shape
        assert bool((margin > 0).all())
        assert bool((margin < 1).all())


def test_layers_go_on_from_what_is_forced(tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", CONFIGS["llama"])
    side = HuggingFace(folder)
    free: dict[str, torch.Tensor] = {}
    side.run(BATCH, side.tensors, free.__setitem__)
    same: dict[str, torch.Tensor] = {}
    side.run(BATCH, side.tensors, same.__setitem__, forced=free)
    assert all(torch.equal(same[name], free[name]) for name in free)
    found: dict[str, torch.Tensor] = {}
    zero = {**free, "layer 0": torch.zeros_like(free["layer 0"])}
    side.run(BATCH, side.tensors, found.__setitem__, forced=zero)
    assert torch.equal(found["layer 0"], free["layer 0"]), "reported as it was computed"
    assert not found["layer 1"].any()
    assert torch.equal(found["logits"], free["logits"]), "layer 1 is forced again"


@pytest.mark.parametrize("case", CONFIGS)
def test_parts_of_a_layer(case: str, tmp_path: Path) -> None:
    side = HuggingFace(make(tmp_path / "hf", CONFIGS[case]))
    found: dict[str, torch.Tensor] = {}
    side.run(BATCH, side.tensors, found.__setitem__, inside=1)
    names = [
        stages.ATTENTION_NORM, *stages.QKV, stages.ATTENTION, stages.MLP_NORM, stages.MLP,
    ]  # fmt: skip
    assert list(found) == names
    widths = [found[name].shape[-1] for name in names]
    assert widths == [32, 32, 16, 16, 32, 32, 32]


def test_weights_are_rounded_first(tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", CONFIGS["llama"])
    side = HuggingFace(folder)
    rounded = make(tmp_path / "bf16", CONFIGS["llama"], torch.bfloat16)
    found: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    bf16 = dict.fromkeys(side.tensors, torch.bfloat16)
    side.run(BATCH, side.tensors, found[0].__setitem__)
    side.run(BATCH, bf16, found[1].__setitem__)
    HuggingFace(rounded).run(BATCH, bf16, found[2].__setitem__)
    assert not torch.equal(found[0]["logits"], found[1]["logits"])
    assert torch.equal(found[1]["logits"], found[2]["logits"])
