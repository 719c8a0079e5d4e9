"""Runs on prepared sets: packed, blended, weighed, over context ranks, resumed at another size."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from megatron_deft.config import RunConfig
from megatron_deft.data.indexed import write_index
from megatron_deft.data.prepare.settings import RowSettings
from megatron_deft.data.prepare.tokenise import prepare_set
from megatron_deft.data.pretraining import TextRows
from megatron_deft.files import hold_folder
from megatron_deft.training.run import run
from tests.convert.test_pickles import Bomb
from tests.distributed import run_ranks
from tests.training.ranks import (
    config,
    metrics,
    train_all,
    train_and_hear,
)
from tests.training.test_trainer import refused, same_but_time


@pytest.fixture(scope="module")
def sets(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets one, two (their samples differ in length) and text."""
    root = tmp_path_factory.mktemp("sets")
    rows = (base / "train.jsonl").read_text().splitlines()
    for name, lines in (("one", rows[:40]), ("two", rows[40:])):
        (root / f"{name}.jsonl").write_text("\n".join(lines))
        prepare_set(root / name, [str(root / f"{name}.jsonl")], base / "hf")
    texts = [{"text": f"number {i} and then {i * i} " * (1 + i % 5)} for i in range(60)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    prepare_set(root / "text", [str(root / "text.jsonl")], base / "hf", RowSettings(format="text"))
    return root


def on(sets: Path, *names: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run on those sets."""
    listed = ", ".join(str(sets / name) for name in names)
    return {"data.train_files": "[]", "data.train_sets": f"[{listed}]", **changes}


def losses(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(run_dir)]


PACKED = {"data.pack": "true", "train.micro_batch": 1, "train.steps": 4}
LAYOUTS = {
    "PP2": (2, {"parallel.pipeline": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "CP2 x TP2 sequence": (
        4,
        {"parallel.context": 2, "parallel.tensor": 2, "parallel.sequence": "true"},
    ),
}


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_packed_runs_have_the_losses_of_one_process(
    base: Path, sets: Path, tmp_path: Path, reduction: str
) -> None:
    """Packs depend on the context size where it pads samples: 64 rows of one sample each do not."""
    whole = config(base, tmp_path / "whole", reduction=reduction, **on(sets, "one"), **PACKED)
    run_ranks(1, train_all, [whole])
    expected = losses(tmp_path / "whole")
    assert expected[0][0] != pytest.approx(expected[-1][0], rel=1e-3), "nothing learned"
    piped = config(
        base, tmp_path / "PP2", reduction=reduction, **on(sets, "one"), **PACKED,
        **{"parallel.pipeline": 2},
    )  # fmt: skip
    run_ranks(2, train_all, [piped])
    for got, want in zip(losses(tmp_path / "PP2"), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("reduction", ["token", "micro_batch", "sample"])
@pytest.mark.parametrize("name", ["CP2", "CP2 x TP2 sequence"])
def test_context_parallel_runs_have_the_losses_of_one_process(
    base: Path, sets: Path, tmp_path: Path, name: str, reduction: str
) -> None:
    world, layout = LAYOUTS[name]
    same = {"train.steps": 3, "train.global_batch": 8, "reduction": reduction}
    run_ranks(1, train_all, [config(base, tmp_path / "whole", **on(sets, "one"), **same)])
    run_ranks(
        world, train_all, [config(base, tmp_path / "cp", **on(sets, "one"), **same, **layout)]
    )
    for got, want in zip(losses(tmp_path / "cp"), losses(tmp_path / "whole"), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_a_packed_context_parallel_run_trains_on_the_same_samples(
    base: Path, sets: Path, tmp_path: Path
) -> None:
    """One step over all packs: the packs may be others, the samples are not."""
    whole_set = {"train.steps": 1, "train.global_batch": 1, "train.micro_batch": 1}
    one = {"data.max_length": 4096, "data.pack": "true"}
    cfg = config(base, tmp_path / "whole", **on(sets, "one"), **whole_set, **one)
    run_ranks(1, train_all, [cfg])
    split = {"parallel.context": 2}
    cfg = config(base, tmp_path / "cp", **on(sets, "one"), **whole_set, **one, **split)
    run_ranks(2, train_all, [cfg])
    assert losses(tmp_path / "cp")[0] == pytest.approx(losses(tmp_path / "whole")[0], rel=1e-5)
    lines = [metrics(tmp_path / name)[0]["kept_tokens"] for name in ("whole", "cp")]
    assert lines[0] == lines[1] > 0


@pytest.mark.parametrize("pack", ["true", "false"])
def test_resume_at_another_data_parallel_size_goes_on_with_the_next_row(
    base: Path, sets: Path, tmp_path: Path, pack: str
) -> None:
    """Blended, read by a process of its own, from two ranks to one and back to two."""
    common = on(
        sets, "one", "two", **{
            "data.train_weights": "[3, 1]", "data.pack": pack, "data.workers": 1,
            "train.micro_batch": 1, "train.global_batch": 4, "train.save_every": 2,
            "optim.schedule": "constant",
        },
    )  # fmt: skip
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    run_ranks(2, train_all, [config(base, whole, **common, **{"train.steps": 6})])
    for steps, world in ((2, 2), (4, 1), (6, 2)):
        resume = "no" if steps == 2 else "must"
        cfg = config(base, run_dir, **common, **{"train.steps": steps, "train.resume": resume})
        run_ranks(world, train_all, [cfg])
    assert [line["tokens"] for line in metrics(run_dir)] == [
        line["tokens"] for line in metrics(whole)
    ]
    for got, want in zip(losses(run_dir), losses(whole), strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_weights_are_what_tokens_count_for(base: Path, tmp_path: Path) -> None:
    """A turn of weight 2 counts as the turn twice, one of weight 0.5 as half of it."""
    turns = [("2 + 2", "it is 4", 1.0), ("3 + 1", "4, it is", 2.0), ("1 + 3", "is it 4", 0.5)]

    def conversation(user: str, answer: str, weight: float) -> str:
        turn = {"role": "assistant", "content": answer, "weight": weight}
        return json.dumps({"messages": [{"role": "user", "content": user}, turn]})

    weighed = [conversation(*turn) for turn in turns]
    # twice everything: 2, 4 and 1 copies of weight 1
    copies = [conversation(u, a, 1.0) for u, a, w in turns for _ in range(int(2 * w))]
    runs = []
    for name, lines in (("weighed", weighed), ("copies", copies)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        size = len(lines)
        runs.append(config(base, tmp_path / name, objective="dft", **{
            "data.train_files": f"[{tmp_path / name}.jsonl]", "data.format": "messages",
            "train.steps": 1, "train.global_batch": size, "train.micro_batch": size,
        }))  # fmt: skip
    run_ranks(1, train_all, runs)
    one, other = (metrics(tmp_path / name)[0] for name in ("weighed", "copies"))
    for key in ("loss", "grad_norm", "ce", "p", "gate", "entropy", "gate_histogram_0"):
        assert one[key] == pytest.approx(other[key], rel=1e-5), key


def test_pretraining_on_running_text(base: Path, sets: Path, tmp_path: Path) -> None:
    """Split, blended with an indexed dataset that has no manifest, resumed for longer."""
    bare = tmp_path / "bare"
    for ending in ("bin", "idx"):
        (tmp_path / f"bare.{ending}").write_bytes((sets / "text" / f"tokens.{ending}").read_bytes())
    common = {
        "data.train_files": "[]", "data.train_sets": f"[{sets / 'text'}, {bare}]",
        "data.train_weights": "[1, 2]", "data.split": "[8, 2]", "data.max_length": 32,
        "train.micro_batch": 2, "train.global_batch": 8, "train.save_every": 2,
        "optim.schedule": "constant", "objective": "eaft",
    }  # fmt: skip
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    run_ranks(2, train_all, [config(base, whole, **common, **{"train.steps": 4})])
    run_ranks(1, train_all, [config(base, run_dir, **common, **{"train.steps": 2})])
    resumed = {"train.steps": 4, "train.resume": "must", "parallel.context": 2}
    run_ranks(2, train_all, [config(base, run_dir, **common, **resumed)])
    lines = metrics(whole)
    assert [line["kept_tokens"] for line in lines] == [8 * 32] * 4
    assert lines[-1]["val_kept_tokens"] % 32 == 0
    assert lines[-1]["val_kept_tokens"] > 0
    for got, want in zip(losses(run_dir), losses(whole), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("content", ["a pickle", "objects", "nothing"])
def test_an_index_that_is_no_plain_array_is_made_again(
    sets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    """numpy, as GPTDataset calls it, would run what such a file names."""
    cache, mark = tmp_path / "index", tmp_path / "mark"

    def read() -> TextRows:
        prefix = str(sets / "text" / "tokens")
        return TextRows([prefix], 32, (0.0, 1.0), cache, 1, 10**6, lambda build: build())

    rows = read().documents(0)[0].tokens.tolist()
    (path,) = cache.glob("*/*-document_index.npy")
    if content == "objects":
        np.save(path, np.array([Bomb(mark)], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)) if content == "a pickle" else b"")
    assert read().documents(0)[0].tokens.tolist() == rows
    assert not mark.exists()
    assert "the indices are made again" in caplog.text


def test_text_that_was_prepared_again_is_read_anew(base: Path, tmp_path: Path) -> None:
    """Under the same name, so that what GPTDataset remembers of it no longer fits."""
    file, out, run_dir = tmp_path / "text.jsonl", tmp_path / "set", tmp_path / "run"

    def prepare(number: int) -> None:
        texts = [{"text": f"number {i} and then {i * i}"} for i in range(number)]
        file.write_text("\n".join(map(json.dumps, texts)))
        form = RowSettings(format="text")
        prepare_set(out, [str(file)], base / "hf", form, overwrite=True)

    settings = {
        "data.train_files": "[]", "data.train_sets": f"[{out}]", "data.max_length": 32,
        "train.epochs": 1, "train.steps": "null", "train.global_batch": 1, "train.micro_batch": 1,
        "optim.lr": 1e-30,
    }  # fmt: skip
    prepare(60)
    run_ranks(1, train_all, [config(base, run_dir, **settings, **{"train.save_at_end": "true"})])
    before = len(metrics(run_dir))
    prepare(90)
    more = {**settings, "train.epochs": 2, "train.resume": "must"}
    said = run_ranks(1, train_and_hear, config(base, run_dir, **more))[0]
    assert "the data, or how samples are packed, changed since" in said
    assert len(metrics(run_dir)) > 2 * 1.4 * before
    prepare(20)
    fewer = {**settings, "train.epochs": 20, "train.resume": "must", "train.save_at_end": "false"}
    run_ranks(1, train_and_hear, config(base, run_dir, **fewer))


def killed_reader(rank: int, world: int, cfg: RunConfig) -> str:
    """What the run says whose reader is killed between two looks at what it has read."""

    def kill() -> None:
        seen = Path(cfg.run_dir) / "metrics.jsonl"
        while not seen.exists() or not seen.stat().st_size:
            time.sleep(0.05)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    Thread(target=kill, daemon=True).start()
    return refused(rank, world, cfg)


def test_a_reader_that_is_killed_during_a_step_is_one_line(
    base: Path, sets: Path, tmp_path: Path
) -> None:
    endless = {"data.workers": 1, "train.steps": 10**6}
    cfg = config(base, tmp_path / "run", **on(sets, "one", **endless))
    said = run_ranks(1, killed_reader, cfg)[0]
    assert "data.workers=1: a process that reads the data died" in said


def test_files_are_tokenised_once(base: Path, tmp_path: Path) -> None:
    """By one rank, into the run's folder; a resumed run uses the set, another file is read anew."""
    run_dir = tmp_path / "run"
    one = {"train.steps": 1, "train.save_every": 1}
    run_ranks(2, train_all, [config(base, run_dir, **one)])
    made = (run_dir / "data" / "train" / "tokens.bin").stat()
    on_again = {"train.steps": 2, "train.resume": "must", "train.save_every": 1}
    run_ranks(2, train_all, [config(base, run_dir, **on_again)])
    again = (run_dir / "data" / "train" / "tokens.bin").stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    other = {
        "train.steps": 3,
        "train.resume": "must",
        "data.train_files": f"[{base / 'val.jsonl'}]",
    }
    said = run_ranks(1, train_and_hear, config(base, run_dir, **other))[0]
    assert "the data, or how samples are packed, changed since" in said
    assert (run_dir / "data" / "train" / "tokens.bin").stat().st_size < made.st_size


def test_the_template_of_the_data_becomes_that_of_the_model(base: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    run_dir = tmp_path / "run"
    own = {"train.steps": 1, "train.save_every": 1, "data.template": template}
    run_ranks(1, train_all, [config(base, run_dir, **own)])
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(run_dir / "checkpoints" / "step_00000001" / "hf")
    assert saved.chat_template == template.read_text()
    # and the set that was made with it is refused without it
    unlike = config(base, tmp_path / "other", **on(run_dir / "data", "train", **{"train.steps": 1}))
    assert "made with another chat template" in run_ranks(1, refused, unlike)[0]


REFUSED = {
    "other tokenizer": ("one", {}, "made with another tokenizer"),
    "too long": ("one", {"data.max_length": 8}, "its longest sample has"),
    "no set": (".", {}, "is no prepared set"),
    "nowhere": ("nowhere", {}, "no such file"),
    "mixed": ("one, text", {}, "do not mix"),
    "split of samples": ("one", {"data.split": "[9, 1]"}, "data.split is for pretraining"),
    "packed text": ("text", {"data.pack": "true"}, "data.pack is for samples"),
    "text too short": ("text", {"data.max_length": 4090}, "too few for a row of 4090"),
}


def all_refused(rank: int, world: int, cfgs: dict[str, RunConfig]) -> dict[str, str]:
    return {name: refused(rank, world, cfg) for name, cfg in cfgs.items()}


def test_data_that_cannot_be_used_is_one_line_on_every_rank(
    base: Path, sets: Path, tmp_path: Path
) -> None:
    from megatron_deft.convert.hf import import_hf
    from megatron_deft.data.tiny import make_tiny_llama

    other = make_tiny_llama(tmp_path / "hf", ["abc def"], vocab_size=290, hidden_size=32)
    import_hf(other, tmp_path / "weights", verify=False)
    cfgs = {}
    for name, (chosen, changes, _) in REFUSED.items():
        settings = on(sets, *chosen.split(", "), **changes)
        if name == "other tokenizer":
            settings["model.load"] = tmp_path / "weights"
        cfgs[name] = config(base, tmp_path / name, **settings)
    for name, keep in (("foreign", None), ("cut", -2)):
        ids = np.arange(100, dtype=np.uint16)
        (tmp_path / f"{name}.bin").write_bytes((ids * 40).tobytes()[:keep])
        write_index(tmp_path / f"{name}.idx", [np.array([60, 40], np.int32)], "uint16")
        cfgs[name] = config(base, tmp_path / f"run {name}", **on(tmp_path, name))
    for name, at in (("changed", 9), ("changed text", 0)):
        shutil.copytree(sets / ("one" if at else "text"), tmp_path / name)
        ids = np.fromfile(tmp_path / name / "tokens.bin", np.uint16)
        ids[at] ^= 1
        ids.tofile(tmp_path / name / "tokens.bin")
        cfgs[name] = config(base, tmp_path / f"run {name}", **on(tmp_path, name))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [}\n')
    cfgs["broken file"] = config(base, tmp_path / "b", **{"data.train_files": f"[{broken}]"})
    heard = run_ranks(2, all_refused, cfgs)
    for name, (*_, message) in REFUSED.items():
        assert message in heard[0][name], name
    assert "broken.jsonl line 1" in heard[0]["broken file"]
    assert "foreign.bin holds token 3960, the model's tokenizer has" in heard[0]["foreign"]
    assert "cut.bin is damaged: it has 198 bytes, its index names 200" in heard[0]["cut"]
    for name in ("changed", "changed text"):
        path = tmp_path / name / "tokens.bin"
        assert f"{path} is damaged: it does not match its checksum: prepare" in heard[0][name]
    assert heard[0] == heard[1]


def broken(rank: int, world: int, cfg: RunConfig) -> str:
    with pytest.raises(NotADirectoryError) as caught:
        run(cfg)
    return f"{caught.value.filename}: {caught.value.strerror}"


def test_a_folder_that_cannot_be_written_fails_alike_on_every_rank(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").touch()
    heard = run_ranks(2, broken, config(base, tmp_path / "run"))
    assert heard[0] == heard[1]
    assert str(tmp_path / "run" / "data") in heard[0]


def test_a_second_run_in_the_same_folder_is_refused(base: Path, tmp_path: Path) -> None:
    cfg = config(base, tmp_path / "run", **{"train.steps": 1})
    with hold_folder(tmp_path / "run", "run_dir"):
        heard = run_ranks(2, refused, cfg)
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"run is written by {who} at this moment" in heard[0]
    assert heard[0] == heard[1]
    run_ranks(2, train_all, [cfg])  # the lock is gone with its holder


def test_same_run_twice_is_the_same_to_the_last_digit(
    base: Path, sets: Path, tmp_path: Path
) -> None:
    runs = [
        config(base, tmp_path / name, **on(sets, "one", "two"), **PACKED) for name in ("a", "b")
    ]
    run_ranks(1, train_all, runs)
    assert same_but_time(metrics(tmp_path / "a")) == same_but_time(metrics(tmp_path / "b"))
    samples = [line["samples"] for line in metrics(tmp_path / "a")]
    assert samples == np.arange(8, 40, 8).tolist()
