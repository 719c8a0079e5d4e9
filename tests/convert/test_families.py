"""Every family against transformers: logits, and the gradient of every tensor."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_deft.convert import mapping
from megatron_deft.convert.hf import import_hf
from megatron_deft.convert.state import load_model
from megatron_deft.convert.verify import single_process
from megatron_deft.models.families import FAMILIES, spec_from_hf
from tests.convert.tiny_models import CONFIGS, make

LENGTH = 40  # beyond every window of CONFIGS


def test_every_family_is_among_the_tiny_models() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_and_every_gradient_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS[case])
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    spec = spec_from_hf(theirs.config.to_dict())
    tokens = torch.arange(2 * LENGTH).remainder(spec.vocab_size).reshape(2, LENGTH)
    wanted = theirs(tokens).logits
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    (wanted * weights).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}

    folder = import_hf(source, tmp_path / "weights", verify=False)
    with single_process():
        from megatron_deft.models.build import build_model, transformer_config

        model = build_model(spec, transformer_config(spec), vocab_pad_multiple=7)
        load_model(model, folder / "state")
        found = model(tokens, torch.arange(LENGTH).expand(2, -1), None)[..., : spec.vocab_size]
        (found * weights).sum().backward()
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * scale
    ours = dict(model.named_parameters())
    compared = 0
    for parameter in mapping.parameters(spec):
        gradient = ours[parameter.megatron].grad
        assert gradient is not None, parameter.megatron
        rows = mapping.megatron_shape(parameter, spec)[0]
        for name, part in mapping.split(parameter, gradient[:rows], spec).items():
            reference = gradients[name] if name in gradients else of_expert(gradients, name)
            assert reference is not None, name
            limit = 1e-4 * reference.abs().max() + 1e-7
            assert (part - reference).abs().max() <= limit, name
            compared += 1
    assert compared >= len(gradients)


def of_expert(gradients: dict[str, torch.Tensor | None], name: str) -> torch.Tensor:
    """The part of transformers 5's fused expert tensors that a file's tensor is."""
    name = name.replace("block_sparse_moe", "mlp")
    if name.endswith(".gate.weight"):  # the router, which Mixtral's files name otherwise
        gradient = gradients[name]
        assert gradient is not None
        return gradient
    prefix, _, rest = name.partition(".experts.")
    number, kind = rest.split(".")[:2]
    fused = "down_proj" if kind in ("down_proj", "w2") else "gate_up_proj"
    gradient = gradients[f"{prefix}.experts.{fused}"]
    assert gradient is not None
    if fused == "down_proj":
        return gradient[int(number)]
    gate, up = gradient[int(number)].chunk(2)
    return gate if kind in ("gate_proj", "w1") else up
