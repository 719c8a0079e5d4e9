"""The proof can fail: every fault that users lose weeks to is caught, layer and part are named."""

import gc
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megatron_deft.convert import hf as convert_hf
from megatron_deft.convert import mapping
from megatron_deft.convert import verify as module
from megatron_deft.convert.hf import import_hf
from megatron_deft.convert.mapping import Transform
from megatron_deft.convert.ours import Megatron
from megatron_deft.convert.reference import HuggingFace
from megatron_deft.convert.stages import Batch, Facts, Side
from megatron_deft.convert.tokens import make_batch
from megatron_deft.convert.verify import Report, Tensors, require_equal, single_process, verify
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec
from megatron_deft.platform import initialize, shutdown
from tests.convert.spoiling import (
    Spoil,
    reconfigured,
    spoiled,
    swap_two_heads,
)


def swap_gate_and_up(tensors: dict[str, Tensor]) -> None:
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def one_nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.down_proj.bias"][0] = float("nan")


def one_row_of_the_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][-1] += 0.01


def more(name: str) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] += 0.1

    return spoil


def without(name: str) -> Spoil:
    """A bias that was dropped: it is all zero in the model."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].zero_()

    return spoil


ATTENTION, MLP = "model.layers.1.self_attn.", "model.layers.1.mlp."


NORM = "model.layers.1.{}_layernorm.weight"


FAULTS = {
    "scrambled heads": (swap_two_heads, "layer 2", "qkv query"),
    "dropped key bias": (without(ATTENTION + "k_proj.bias"), "layer 1", "qkv key"),
    "dropped value bias": (without(ATTENTION + "v_proj.bias"), "layer 1", "qkv value"),
    "dropped output bias": (without(ATTENTION + "o_proj.bias"), "layer 1", "attention output"),
    "dropped mlp bias": (without(MLP + "down_proj.bias"), "layer 1", "mlp"),
    "gate and up": (swap_gate_and_up, "layer 1", "mlp"),
    "nan": (one_nan, "layer 3", "mlp"),
    "first norm": (more(NORM.format("input")), "layer 1", "attention norm"),
    "second norm": (more(NORM.format("post_attention")), "layer 1", "mlp norm"),
    "final norm": (more("model.norm.weight"), "final norm", None),
    "embedding": (more("model.embed_tokens.weight"), "embedding", None),
    "head": (one_row_of_the_head, "logits", None),
}  # fmt: skip


def test_equal_models(source: Path, weights: Path) -> None:
    report = verify(source, weights)
    assert report.ok
    assert report.first_difference is None
    assert report.faults == []
    assert list(report.stages) == [
        "rotary positions", "embedding", "layer 0", "layer 1", "layer 2", "layer 3", "final norm",
        "logits",
    ]  # fmt: skip
    assert max(report.stages.values()) < 1e-5
    assert (report.tokens, report.furthest) == (128, 127)
    assert report.tensors == Tensors(compared=len(load_file(source / "model.safetensors")))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_its_place_named(
    source: Path, weights: Path, tmp_path: Path, fault: str
) -> None:
    spoil, stage, part = FAULTS[fault]
    report = verify(spoiled(source, tmp_path / "hf", spoil), weights)
    assert not report.ok
    assert (report.first_difference, report.part) == (stage, part)
    assert report.tensors.different


def test_scrambled_heads_in_the_mapping_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k, v one behind the other where megatron wants group by group. The way back undoes it, so
    every tensor survives the round trip; only what the model computes gives it away."""

    def split(tensor: Tensor, spec: ModelSpec) -> tuple[Tensor, ...]:
        return tensor.split([32, 16, 16])

    scrambled = Transform(lambda tensors, spec: torch.cat(tuple(tensors)), split)
    monkeypatch.setitem(mapping.TRANSFORMS, "qkv", scrambled)
    with pytest.raises(UserError, match=r"first at layer 0 \(qkv query\)") as error:
        import_hf(source, tmp_path / "weights")
    assert "tensors differ" not in str(error.value)
    assert not (tmp_path / "weights").exists()


def test_a_row_that_no_token_uses(source: Path, weights: Path, tmp_path: Path) -> None:
    """The logits agree; the tensor does not."""
    used = set(make_batch([source], Facts(4, 32, 1003, 128), None).ids.flatten().tolist())
    row = next(i for i in range(1003) if i not in used)

    def other_sign(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][row] *= -1

    other = spoiled(source, tmp_path / "hf", other_sign)
    report = verify(other, weights)
    assert report.logits_ok
    assert not report.ok
    assert report.tensors.different == ("model.embed_tokens.weight",)
    with pytest.raises(
        UserError, match=r"1 of 67 tensors differ: model\.embed_tokens\.weight; noth"
    ):
        require_equal(other, weights)


def test_tensors_are_compared_to_the_last_bit(source: Path, tmp_path: Path) -> None:
    def with_norm(value: float) -> Path:
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"].fill_(value)

        return spoiled(source, tmp_path / str(value), spoil)

    plus, minus, nan = with_norm(0.0), with_norm(-0.0), with_norm(float("nan"))
    assert verify(plus, minus).tensors.different == ("model.norm.weight",)
    assert verify(nan, nan).tensors.ok
    assert not verify(nan, nan).logits_ok


def test_a_source_with_nan_is_told_as_that(source: Path, tmp_path: Path) -> None:
    hf = spoiled(source, tmp_path / "hf", one_nan)
    with pytest.raises(UserError, match=r"nan or inf in model\.layers\.3\.mlp\.down_proj\.bias"):
        import_hf(hf, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
    assert import_hf(hf, tmp_path / "weights", verify=False).is_dir()


def test_values_that_overflow_are_told_as_that(source: Path, tmp_path: Path) -> None:
    def huge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e10

    hf = spoiled(source, tmp_path / "hf", huge)
    with pytest.raises(UserError, match="values overflow at layer 1, in fp32 and on both sides"):
        import_hf(hf, tmp_path / "weights")


def test_an_untied_head_where_the_config_ties_it(
    tied: Path, tied_weights: Path, tmp_path: Path
) -> None:
    def own_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.01

    report = verify(spoiled(tied, tmp_path / "hf", own_head), tied_weights)
    assert (report.first_difference, report.part) == ("logits", None)
    (missing,) = report.tensors.missing
    assert missing.startswith("lm_head.weight (not in ")


def test_a_head_that_repeats_the_embedding(tied: Path, tied_weights: Path, tmp_path: Path) -> None:
    def copied_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert verify(spoiled(tied, tmp_path / "hf", copied_head), tied_weights).ok


def test_any_two_folders_in_any_order(source: Path, weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    shutil.copytree(weights, run / "step_00000001")
    (run / "latest").write_text("step_00000001")
    other = spoiled(source, tmp_path / "hf", swap_two_heads)
    changed = import_hf(other, tmp_path / "weights", verify=False)
    for a, b in ((weights, source), (source, source), (weights, tmp_path / "run")):
        assert verify(a, b).ok
    for a, b in ((changed, source), (source, other), (weights, changed)):
        report = verify(a, b)
        assert (report.first_difference, report.part) == ("layer 2", "qkv query")


def test_equal_parts_in_any_order(source: Path, weights: Path) -> None:
    """Whichever side is kept in memory while the other runs."""
    sides: list[Side] = [HuggingFace(source), Megatron(weights)]
    batch = make_batch([], sides[0].facts, None)
    for a, b in (sides, reversed(sides)):
        reference: dict[str, Tensor] = {}
        a.run(batch, a.tensors, reference.__setitem__, inside=1)
        parts = module._compare(b, reference, batch, a.tensors, inside=1)
        assert list(parts) == [
            "attention norm", "qkv query", "qkv key", "qkv value", "attention output", "mlp norm",
            "mlp",
        ]  # fmt: skip
        assert max(parts.values()) < 1e-5


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 reads it")
def test_a_config_that_transformers_refuses(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is converted, and in one line."""
    monkeypatch.setattr(convert_hf, "write_state", pytest.fail)
    hf = reconfigured(source, tmp_path / "hf", use_cache=None)
    with pytest.raises(
        UserError, match=r"cannot read config\.json \(.*use_cache.*\): correct that"
    ):
        import_hf(hf, tmp_path / "weights")


def test_folders_that_cannot_be_compared(source: Path, tied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different architectures: vocab_size 1003 and 260; only"):
        verify(source, tied)
    with pytest.raises(UserError, match="does not exist"):
        verify(source, tmp_path / "none")
    short = spoiled(source, tmp_path / "short", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"has no tensor for model\.norm\.weight: down"):
        verify(short, source)
    stray = spoiled(source, tmp_path / "stray", lambda tensors: tensors.update(x=torch.ones(1)))
    with pytest.raises(UserError, match="has no x: config and weights are of different models"):
        verify(stray, source)


def parameter_bytes() -> int:
    """Of every parameter of this process that has values."""
    found = (o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and not o.is_meta)
    return sum(p.untyped_storage().nbytes() for p in found)


@pytest.mark.parametrize("kind", ["hf", "weights"])
def test_one_layer_in_memory(source: Path, weights: Path, kind: str) -> None:
    side: Side = HuggingFace(source) if kind == "hf" else Megatron(weights)
    batch = Batch(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8), 8)
    layer = [
        t for name, t in load_file(source / "model.safetensors").items() if "layers.3." in name
    ]
    gc.collect()
    before, seen = parameter_bytes(), []
    side.run(batch, side.tensors, lambda *_: seen.append(parameter_bytes() - before), inside=3)
    size = sum(4 * tensor.numel() for tensor in layer)
    assert set(seen) == {size}
    seen.clear()
    side.run(batch, side.tensors, lambda *_: seen.append(parameter_bytes() - before))
    assert set(seen) == {0, size}, "before the first layer and between the modules"


PROMPTS: tuple[Sequence[str] | None, ...] = (None, ["ab", "c"])


def test_prompts_are_read_with_the_folders_tokenizer(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", ["to be or not to be"], layers=1, hidden_size=16)
    weights = import_hf(hf, tmp_path / "weights", verify=False)
    facts = HuggingFace(hf).facts
    built_in, own = (make_batch([tmp_path, weights / "hf"], facts, p) for p in PROMPTS)
    assert torch.equal(built_in.ids[0], own.ids[0])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    text = tokenizer.decode(built_in.ids[1:].flatten())
    assert "12 + 30 = 42" in text
    assert tokenizer.decode(own.ids[1]).startswith("abc")
    report = verify(weights, hf, ["ab", "c"])
    assert report.ok
    assert report.tokens == own.ids.numel() == 512


def test_prompts_need_a_tokenizer(source: Path, weights: Path) -> None:
    with pytest.raises(UserError, match="have no tokenizer"):
        verify(source, weights, ["hello"])


def test_a_tokenizer_beyond_the_vocabulary(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", ["to be or not to be"], layers=1, hidden_size=16)
    with pytest.raises(UserError, match="the model has 40 embeddings: tokenizer and model do not"):
        make_batch([hf], Facts(1, 16, 40, 128), None)


def test_rounding_is_part_of_the_comparison(source: Path, tmp_path: Path) -> None:
    """fp32 weights converted to bf16 equal transformers' weights in bf16, not those in fp32."""
    weights = import_hf(source, tmp_path / "weights", dtype="bf16", verify=False)
    assert verify(source, weights).ok
    assert verify(weights, source).ok
    report = verify(source, weights, dtype="fp32")
    assert not report.logits_ok
    assert len(report.tensors.different) > 50


def test_report_takes_nan_as_a_difference() -> None:
    nan = float("nan")
    assert not Report({"logits": nan}, 1, nan).ok
    assert Report({"embedding": nan, "logits": nan}, 1, nan).first_difference == "embedding"


def test_leaves_nothing_running_and_no_random_number_drawn(
    source: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    assert verify(source, weights).ok
    assert not dist.is_initialized()
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(numpy.random.get_state())) == before[1:]


def test_works_where_megatron_runs_already(source: Path, weights: Path) -> None:
    initialize()
    try:
        from megatron.core import parallel_state

        assert verify(source, weights).ok
        assert dist.is_initialized()
        assert parallel_state.model_parallel_is_initialized()
    finally:
        shutdown()
    assert not dist.is_initialized()


def test_works_where_only_torch_distributed_runs(source: Path, weights: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert verify(source, weights).ok
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_stops_what_it_started_when_the_block_fails() -> None:
    def fail() -> None:
        with single_process():
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not dist.is_initialized()
