"""Engines against transformers' own generate, against themselves in other batches, and vLLM's API
against a stand-in that checks what it is given.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_deft.errors import UserError
from megatron_deft.evaluation import engines
from megatron_deft.evaluation.engines import (
    Generation,
    Sampling,
    TransformersEngine,
    engine_name,
    make_engine,
)
from megatron_deft.evaluation.folder import end_ids

LENGTHS = (3, 40, 1, 17, 8, 40, 2)
PROMPTS = [[3 + (7 * i + 11 * j) % 250 for j in range(n)] for i, n in enumerate(LENGTHS)]
GREEDY = Sampling(12)
DRAWN = Sampling(12, temperature=1.0, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, batch_size=4, dtype="fp32")
    yield engine
    engine.close()


def test_greedy_equals_transformers_generate(model: Path, engine: TransformersEngine) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = list(engine.generate(PROMPTS, GREEDY))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(engine.ends),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert answer.tokens == len(whole)
        assert answer.finished == (whole[-1] in engine.ends)
        assert answer.text == engine.tokenizer.decode(whole, skip_special_tokens=True)
    assert len({answer.text for answer in answers}) > 3  # the model does look at its prompt


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_no_answer_depends_on_its_batch(model: Path, sampling: Sampling) -> None:
    by_size = [
        list(TransformersEngine(model, size, "fp32").generate(PROMPTS, sampling))
        for size in (1, 3, 16)
    ]
    assert by_size[0] == by_size[1] == by_size[2]


def test_a_stream_belongs_to_its_number(engine: TransformersEngine) -> None:
    answers = list(engine.generate(PROMPTS, DRAWN))
    backwards = list(engine.generate(PROMPTS[::-1], DRAWN, range(len(PROMPTS))[::-1]))
    assert backwards[::-1] == answers
    assert list(engine.generate(PROMPTS, Sampling(12, 1.0, 0.9, seed=6))) != answers


def test_streams_of_one_prompt_differ(engine: TransformersEngine) -> None:
    texts = {answer.text for answer in engine.generate([PROMPTS[1]] * 8, DRAWN)}
    assert len(texts) > 4


def test_drawing_follows_the_probabilities() -> None:
    count = 20_000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(count, 4)
    draws = engines._chooser(Sampling(1, temperature=1.0, seed=3), range(count))(logits)
    shares = torch.bincount(draws, minlength=4) / count
    assert shares.tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.014)  # 4 standard errors
    cool = engines._chooser(Sampling(1, temperature=0.5, seed=3), range(count))(logits)
    squares = torch.tensor([0.01, 0.16, 0.04, 0.09]) / 0.30
    assert (torch.bincount(cool, minlength=4) / count).tolist() == pytest.approx(
        squares.tolist(), abs=0.014
    )


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    count = 5000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(count, 4)
    for top_p, kept in ((0.05, {1}), (0.5, {1, 3}), (0.8, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        draws = engines._chooser(Sampling(1, 1.0, top_p, seed=2), range(count))(logits)
        assert set(draws.tolist()) == kept
    half = engines._chooser(Sampling(1, 1.0, 0.5, seed=2), range(count))(logits)
    assert (half == 1).float().mean().item() == pytest.approx(4 / 7, abs=0.028)  # 4 standard errors


def test_it_stops_at_an_end_token(model: Path) -> None:
    engine = TransformersEngine(model, batch_size=4)
    before = list(engine.generate(PROMPTS, GREEDY))
    prompt = torch.tensor([PROMPTS[1]])
    second = engine.model.generate(prompt, do_sample=False, max_new_tokens=2)[0, -1].item()
    engine.ends = frozenset({second})
    after = list(engine.generate(PROMPTS, GREEDY))
    assert before[1].tokens > 2
    assert (after[1].tokens, after[1].finished) == (2, True)
    assert before[1].text.startswith(after[1].text)
    assert any(answer.tokens == 12 and not answer.finished for answer in after)


def test_generation_config_does_not_change_greedy_decoding(
    model: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    config = json.loads((copy / "generation_config.json").read_text())
    config |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0}
    (copy / "generation_config.json").write_text(json.dumps(config))
    answers = list(TransformersEngine(copy, 4, "fp32").generate(PROMPTS, GREEDY))
    assert answers == list(engine.generate(PROMPTS, GREEDY))


def test_end_ids_are_every_one_that_is_named(
    model: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    ids = engine.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_ids(engine.tokenizer, model) == engine.ends == frozenset(ids)
    (tmp_path / "config.json").write_text('{"eos_token_id": 77}')
    assert end_ids(engine.tokenizer, tmp_path) == frozenset([*ids, 77])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [78, 79]}')
    assert end_ids(engine.tokenizer, tmp_path) == frozenset([*ids, 77, 78, 79])


def test_dtypes(model: Path) -> None:
    assert make_engine("transformers", model, dtype="bf16").dtype == "bf16"
    if not torch.cuda.is_available():
        assert make_engine("auto", model).dtype == "fp32"


def test_an_answer_ends_where_the_positions_do(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = 44
    (copy / "config.json").write_text(json.dumps(config))
    short = TransformersEngine(copy, batch_size=4, dtype="fp32")
    short.ends = frozenset()
    answers = list(short.generate(PROMPTS, GREEDY))
    assert [answer.tokens for answer in answers] == [12, 4, 12, 12, 12, 4, 12]
    assert "44 positions: 2 of 7 answers end after fewer than 12 new tokens" in caplog.text
    long = TransformersEngine(model, batch_size=4, dtype="fp32")
    long.ends = frozenset()
    for answer, whole in zip(answers, long.generate(PROMPTS, GREEDY), strict=True):
        assert whole.text.startswith(answer.text)


def test_prompts_without_any_room_are_refused_before_any_work(engine: TransformersEngine) -> None:
    with pytest.raises(UserError, match=r"prompt 1 has 4096 tokens, and the model 4096 positions"):
        next(iter(engine.generate([[5], [5] * 4096], GREEDY)))
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        next(iter(engine.generate([[]], GREEDY)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "megatron_deft.json").write_text("{}"), "convert export"),
        (lambda folder: (folder / "checkpoints").mkdir(), "convert export"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not readable"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load it"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer does not load"),
    ],
)
def test_folders_that_are_no_model(model: Path, tmp_path: Path, change: Any, message: str) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    change(copy)
    with pytest.raises(UserError, match=message) as caught:
        make_engine("transformers", copy)
    assert "\n" not in str(caught.value)


def test_bad_options(model: Path) -> None:
    for name, dtype in (("tgi", "auto"), ("auto", "int4")):
        with pytest.raises(UserError, match="is needed"):
            make_engine(name, model, dtype=dtype)
    with pytest.raises(UserError, match="batch_size=0"):
        make_engine("transformers", model, 0)
    for bad in ((0, 0.0, 1.0), (1, -1.0, 1.0), (1, 1.0, 0.0), (1, 1.0, 1.5)):
        with pytest.raises(UserError, match="is needed"):
            Sampling(*bad)


def test_vllm_asked_for_and_missing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_has_vllm", lambda: False)
    with pytest.raises(UserError, match="vllm is not installed"):
        make_engine("vllm", model)
    assert engine_name("auto") == "transformers"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in with the documented names, that decodes with the other engine."""

    class LLM:
        def __init__(self, *, model: str, dtype: str, seed: int, trust_remote_code: bool) -> None:
            assert not trust_remote_code
            assert dtype in ("auto", "float32", "bfloat16")
            self.engine = TransformersEngine(model, 4, "fp32")
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))

        def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> list[Any]:
            outputs = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                assert set(prompt) == {"prompt_token_ids"}
                ids = prompt["prompt_token_ids"]
                most = params.max_tokens
                tokens = self.engine._batch([ids], [most], Sampling(most), [0])[0]
                result = SimpleNamespace(token_ids=tuple(tokens), text="")  # not detokenised
                outputs.append(SimpleNamespace(outputs=[result]))
            return outputs

    class SamplingParams:
        seen: list["SamplingParams"] = []  # noqa: RUF012

        def __init__(
            self,
            *,
            temperature: float,
            top_p: float,
            max_tokens: int,
            seed: int,
            stop_token_ids: list[int],
            detokenize: bool,
        ) -> None:
            self.__dict__ |= {key: value for key, value in locals().items() if key != "self"}
            SamplingParams.seen.append(self)

    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_answers_as_transformers_does(
    vllm: Any, model: Path, engine: TransformersEngine
) -> None:
    other = make_engine("vllm", model, dtype="fp32")
    answers: list[Generation] = list(other.generate(PROMPTS, GREEDY, range(10, 17)))
    assert answers == list(engine.generate(PROMPTS, GREEDY))
    first = vllm.SamplingParams.seen[0]
    assert (first.temperature, first.top_p, first.max_tokens) == (0.0, 1.0, 12)
    assert set(first.stop_token_ids) == engine.ends
    assert len({params.seed for params in vllm.SamplingParams.seen}) == len(PROMPTS)
    other.close()
    assert not hasattr(other, "llm")


def test_auto_takes_vllm_on_a_gpu_alone(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in (("cuda", "vllm"), ("cpu", "transformers")):
        monkeypatch.setattr(engines, "device", lambda kind=kind: torch.device(kind))
        assert engine_name("auto") == name


def test_a_model_that_is_not_whole(model: Path, tmp_path: Path) -> None:
    """transformers would draw what is missing, and answer all the same."""
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=f"has no tensor {re.escape(name)}, which its config.json"):
        TransformersEngine(folder)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=f"another size of tensor {re.escape(name)}, which"):
        TransformersEngine(folder)
    whole = (model / "model.safetensors").read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="transformers cannot load it"):
        TransformersEngine(folder)
