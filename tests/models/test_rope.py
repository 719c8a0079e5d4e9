"""Rotary parameters in every place they are written, against transformers' own rotary embedding."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_deft.errors import UserError
from megatron_deft.models.families import rope, spec_from_hf
from megatron_deft.models.rotary import inverse_frequencies

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 4096,
    "rope_theta": 5000.0,
}
FACTORS: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
}
LENGTH = "original_max_position_embeddings"


def written(kind: str, beside: int | None, among: int | None) -> dict[str, Any]:
    """A config with the length it was pretrained with in either place, or in both."""
    scaling = {"rope_type": kind, **FACTORS[kind]} | ({LENGTH: among} if among else {})
    return {**BASE, "rope_scaling": scaling} | ({LENGTH: beside} if beside else {})


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize(
    ("beside", "among", "length"),
    [(None, 512, 512), (512, 512, 512), (None, None, 4096), (4096, None, 4096), (512, None, 512)],
)
def test_frequencies_are_those_of_transformers(
    kind: str, beside: int | None, among: int | None, length: int
) -> None:
    """With a length beside the parameters alone, 4 reads another for yarn and fails for llama3."""
    config = written(kind, beside, among)
    if kind == "yarn" and (beside, among) == (512, None):
        with pytest.raises(UserError, match=rf"{LENGTH} is 512 beside .* and 4096 \(max_position"):
            spec_from_hf(config)
        return
    spec = spec_from_hf(config)
    assert spec.rope_scaling is not None
    assert spec.rope_scaling[LENGTH] == length
    if kind == "llama3" and among is None and transformers.__version__.startswith("4."):
        return
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**deepcopy(config)))
    assert torch.equal(inverse_frequencies(spec), theirs.inv_freq)
    assert rope.attention_factor(spec.rope_scaling) == theirs.attention_scaling


@pytest.mark.parametrize("kind", FACTORS)
def test_two_lengths_are_refused(kind: str) -> None:
    """The installed transformers 5 takes the one beside, 4 the one among the parameters."""
    config = written(kind, 1024, 512)
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**deepcopy(config))).inv_freq
    taken = 512 if transformers.__version__.startswith("4.") else 1024
    assert torch.equal(theirs, inverse_frequencies(spec_from_hf(written(kind, taken, taken))))
    with pytest.raises(UserError, match=rf"{LENGTH} is 1024 beside .* and 512 among them: transf"):
        spec_from_hf(config)


def test_a_length_that_nothing_reads_is_let_be() -> None:
    """Phi-3's config has it always."""
    assert spec_from_hf({**BASE, LENGTH: 7}) == spec_from_hf(BASE)
    linear = {"rope_type": "linear", "factor": 2.0}
    spec = spec_from_hf({**BASE, LENGTH: 7, "rope_scaling": linear})
    assert spec.rope_scaling == linear
