"""The arguments of `megatron-deft bench ...`; imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple

from megatron_deft.errors import UserError

DTYPES = ("bf16", "fp16", "fp32")
BANDWIDTH, KERNEL, WHOLE_ROW, STEP = "bandwidth", "kernel", "whole-row kernel", "step"
KERNELS = (BANDWIDTH, KERNEL, WHOLE_ROW)
EVERYTHING = (*KERNELS, STEP)
CONVERT_SHAPES = ("tiny", "1b", "8b")
REPETITIONS = {"cpu": 9, "cuda": 20}


class Plan(NamedTuple):
    """One interleaved run: logits [tokens, vocabulary], and the kinds of contender in it."""

    tokens: int
    vocabulary: int
    dtype: str
    kinds: tuple[str, ...] = EVERYTHING

    @property
    def title(self) -> str:
        """Such as "512 x 151936 bf16"."""
        return f"{self.tokens} x {self.vocabulary} {self.dtype}"


# Llama 3, Qwen 2.5 and Llama 2 vocabularies.
SHAPES = {"cpu": ((512, 151936),), "cuda": ((8192, 128256), (4096, 151936), (16384, 32000))}
TENSOR_PARALLEL = (2, 4, 8)  # whose shards of the first two CUDA shapes the kernels are timed on


def plans(device: str, shapes: list[str] | None, dtypes: list[str] | None) -> list[Plan]:
    """The runs that the arguments ask for; with neither shape nor type, the device's own list."""
    chosen = [parse_shape(shape) for shape in shapes] if shapes else list(SHAPES[device])
    runs = [Plan(*shape, dtype) for shape in chosen for dtype in dtypes or ("bf16",)]
    if device == "cpu" or shapes or dtypes:
        return runs
    shards = [(n, v // ranks) for n, v in SHAPES["cuda"][:2] for ranks in TENSOR_PARALLEL]
    runs += [Plan(*shape, "fp32", KERNELS) for shape in chosen]
    return runs + [
        Plan(*s, dtype, (BANDWIDTH, KERNEL)) for dtype in ("bf16", "fp32") for s in shards
    ]


def parse_shape(text: str) -> tuple[int, int]:
    """(tokens, vocabulary) of "512x151936"."""
    tokens, vocabulary = _sizes(text, "TOKENSxVOCABULARY", "512x151936")
    return tokens, vocabulary


def parse_head_shape(text: str) -> tuple[int, int, int]:
    """(tokens, hidden size, vocabulary) of "512x512x151936"."""
    tokens, hidden, vocabulary = _sizes(text, "TOKENSxHIDDENxVOCABULARY", "512x512x151936")
    return tokens, hidden, vocabulary


def _sizes(text: str, names: str, example: str) -> list[int]:
    sizes = [int(size) for size in text.split("x")] if re.fullmatch(r"\d+(x\d+)+", text) else []
    if len(sizes) != len(names.split("x")) or min(sizes) < 1:
        raise UserError(f"--shape {text}: expected {names}, such as {example}")
    return sizes


class HeadPlan(NamedTuple):
    """One interleaved run: hidden states [tokens, hidden] and a head [vocabulary, hidden].

    ignored: fractions of the tokens whose label is ignored
    """

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    ignored: tuple[float, ...] = (0.0, 0.5)

    @property
    def title(self) -> str:
        """Such as "512 x 512 x 151936 bf16"."""
        return f"{self.tokens} x {self.hidden} x {self.vocabulary} {self.dtype}"


# A tiny Llama's head; Llama 3.1 8B's, and the same with four times the tokens, for the memory.
HEAD_PLANS = {
    "cpu": tuple(HeadPlan(512, 512, 151936, dtype) for dtype in ("bf16", "fp32")),
    "cuda": (
        HeadPlan(4096, 4096, 128256, "bf16"),
        HeadPlan(16384, 4096, 128256, "bf16", (0.5,)),
    ),
}


def head_plans(
    device: str,
    shapes: list[str] | None,
    dtypes: list[str] | None,
    ignored: list[float] | None = None,
) -> list[HeadPlan]:
    """The runs that the arguments ask for; with neither shape nor type, the device's own list."""
    runs = list(HEAD_PLANS[device])
    if shapes or dtypes:
        given = [parse_head_shape(shape) for shape in shapes or ()]
        sizes = given or list(dict.fromkeys((r.tokens, r.hidden, r.vocabulary) for r in runs))
        runs = [HeadPlan(n, h, v, dtype) for n, h, v in sizes for dtype in dtypes or ("bf16",)]
    if ignored is not None:
        runs = [run._replace(ignored=tuple(dict.fromkeys(ignored))) for run in runs]
    return runs


class TrainPlan(NamedTuple):
    """One interleaved run: a Llama, and batches of samples that all have `length` tokens.

    ignored: fraction of the tokens that are not trained
    """

    layers: int
    hidden: int
    vocabulary: int
    length: int
    dtype: str
    batch: int = 8
    micro_batch: int = 2
    ignored: float = 0.5

    @property
    def title(self) -> str:
        """Such as "4 layers x 256, vocabulary 32000, 8 x 256 tokens, fp32"."""
        return (
            f"{self.layers} layers x {self.hidden}, vocabulary {self.vocabulary}, "
            f"{self.batch} x {self.length} tokens, {self.dtype}"
        )


TRAIN_PLANS = {
    "cpu": TrainPlan(4, 256, 32000, 256, "fp32"),
    "cuda": TrainPlan(16, 2048, 128256, 2048, "bf16"),
}


def train_plan(device: str, shape: str | None, dtype: str | None) -> TrainPlan:
    """The run that the arguments ask for; without any, the device's own."""
    plan = TRAIN_PLANS[device]
    if shape is not None:
        names = "LAYERSxHIDDENxVOCABULARYxLENGTH"
        layers, hidden, vocabulary, length = _sizes(shape, names, "4x256x32000x256")
        plan = plan._replace(layers=layers, hidden=hidden, vocabulary=vocabulary, length=length)
    return plan if dtype is None else plan._replace(dtype=dtype)


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench loss`; a value of None means the device's default."""
    add = parser.add_argument
    add("--shape", action="append", metavar="TOKENSxVOCAB", help="of the logits; repeatable")
    add("--dtype", action="append", choices=DTYPES, help="of the logits; repeatable [bf16]")
    add("--objective", default="deft", help="what token_loss computes beside nll [deft]")
    _add_measurement_arguments(parser)


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench head`; a value of None means the device's default."""
    add = parser.add_argument
    add("--shape", action="append", metavar="TOKENSxHIDDENxVOCAB", help="repeatable")
    add("--dtype", action="append", choices=DTYPES, help="of hidden states and weight; repeatable")
    add("--objective", default="deft", help="what ours compute; others compute nll [deft]")
    _add_measurement_arguments(parser)


def _add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="where to measure [cuda when there is one]")
    add(
        "--ignored", action="append", type=float, metavar="FRACTION",
        help="of tokens whose label is ignored; repeatable [0 and 0.5]",
    )  # fmt: skip
    add("--threads", type=int, metavar="N", help="CPU threads [as many as torch takes]")
    shown = ", ".join(f"{device} {count}" for device, count in REPETITIONS.items())
    add("--repetitions", type=int, metavar="N", help=f"timed runs of each contender [{shown}]")
    add("--only", metavar="NAME,...", help="contenders to measure, by their names in the table")
    add("--json", metavar="FILE", help="write everything measured to it")
    add("--strict", action="store_true", help="exit with 1 when a budget is not met")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench convert`."""
    add = parser.add_argument
    add("--shape", choices=CONVERT_SHAPES, default="8b", help="Llama 3's of that size [8b]")
    add("--dir", default=".", metavar="DIR", help="on the disk to be measured [.]")
    add("--warm", action="store_true", help="leave the page caches alone [emptied in between]")
    add("--json", metavar="FILE", help="write everything measured to it")
    add("--strict", action="store_true", help="exit with 1 when a budget is not met")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench train`; a value of None means the device's default."""
    add = parser.add_argument
    add("--shape", metavar="LAYERSxHIDDENxVOCABxLENGTH", help="of the Llama and its samples")
    add("--dtype", choices=("fp32", "bf16"), help="[fp32 on a CPU, bf16 on a GPU]")
    add("--threads", type=int, metavar="N", help="CPU threads [as many as torch takes]")
    shown = ", ".join(f"{device} {count}" for device, count in REPETITIONS.items())
    add("--repetitions", type=int, metavar="N", help=f"timed steps of each contender [{shown}]")
    add("--only", metavar="NAME,...", help="contenders to measure, by their names in the table")
    add("--json", metavar="FILE", help="write everything measured to it")
    add("--strict", action="store_true", help="exit with 1 when a budget is not met")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench data`."""
    add = parser.add_argument
    add("--dir", default=".", metavar="DIR", help="on the disk to be measured [.]")
    add("--rows", type=int, default=40_000, metavar="N", help="rows to tokenise [40000]")
    add("--samples", type=int, default=10**7, metavar="N", help="of the set to open [10000000]")
    add("--steps", type=int, default=40, metavar="N", help="of training, for the loader [40]")
    add("--repetitions", type=int, default=3, metavar="N", help="of tokenising, in turn [3]")
    add(
        "--math", nargs="+", metavar="FILE",
        help="parquet or JSONL as prepare math reads it, to be packed [nothing]",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write everything measured to it")
    add("--strict", action="store_true", help="exit with 1 when a budget is not met")


class Benchmark(NamedTuple):
    """A command of `bench`, run by the module of its name in this package."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    text: str
    example: str


BENCHMARKS = {
    "loss": Benchmark(
        add_loss_arguments,
        "Measure the loss and its gradient: time and memory, ours beside the same in eager torch, "
        "megatron-core, Liger and TransformerEngine, interleaved in one run. Every contender is "
        "checked against float64 first; with --json everything measured is kept.",
        "--shape 512x32000",
    ),
    "head": Benchmark(
        add_head_arguments,
        "Measure the language-model head with its loss, from hidden states to the gradients of "
        "hidden states and weight: time and memory of fused_linear_loss beside the path over the "
        "logits, megatron-core and Liger, interleaved in one run. Every contender is checked "
        "against float64 first; with --json everything measured is kept.",
        "--shape 256x512x32000 --dtype bf16",
    ),
    "convert": Benchmark(
        add_convert_arguments,
        "Measure import and export: time and peak memory on a random Llama, beside cp on the same "
        "disk in the same run. Needs twice the model's room there, 32 GB for 8b, and leaves "
        "nothing behind. What comes back is compared bit by bit.",
        "--shape 1b --dir /data",
    ),
    "data": Benchmark(
        add_data_arguments,
        "Measure the data side. Tokenising beside the tokenizer's own encode_batch, how long "
        "training waits for data, opening a set of millions of samples, and how full packed rows "
        "are. Takes some minutes and 3 GB in DIR, and leaves nothing behind.",
        "--dir /data --math math/train.parquet",
    ),
    "train": Benchmark(
        add_train_arguments,
        "Measure whole optimizer steps of `megatron-deft train` beside the same with "
        "megatron-core's own cross-entropy, and beside Hugging Face Trainer with the released DEFT "
        "formula, on the same model and data, in turn. Losses are compared first.",
        "--shape 2x64x1000x64 --repetitions 3",
    ),
}
