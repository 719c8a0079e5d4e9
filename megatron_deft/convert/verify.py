"""Proof that two folders hold the same model, whatever their formats.

Two things are compared. Every tensor, bit for bit, under its Hugging Face name: what is read back
from a Megatron state is what the Hugging Face folder holds. And what the models compute, in fp32 on
the same tokens: rotary angles, every layer's output, logits. Neither is enough alone. A loss that
falls proves nothing (a model with scrambled heads learns too), equal tensors prove only that they
were moved, not that they mean the same, and equal logits say nothing of a row that no token used.

Both models run their ordinary forward pass, with the weights of one layer in memory: once each, and
the second again from the first one's layers where the two part from each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path

import torch
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import stages
from megatron_deft.convert.hf_folder import locate, some
from megatron_deft.convert.ours import Megatron, single_process
from megatron_deft.convert.reference import HuggingFace
from megatron_deft.convert.stages import Batch, Dtypes, Side
from megatron_deft.convert.tokens import make_batch
from megatron_deft.errors import UserError

__all__ = ["DTYPES", "Report", "Tensors", "require_equal", "single_process", "verify"]

TOLERANCE = 1e-4  # of a token's largest value; two fp32 implementations differ by about 1e-6
# Of a value, what adding to it in fp32 and taking it away again may change, twice on either side.
ROUNDING = 4 * torch.finfo(torch.float32).eps
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 2**24  # values compared at a time
# A router's scores that are closer, as a fraction of the largest, may be ordered either way.
CLOSE = 1e-5
# Of a spec, what does not enter a forward pass, or is compared under another name.
NO_SETTINGS = (
    "family",
    "initializer_range",
    "max_position_embeddings",
    "attention_scale",
    "window",
    "window_layers",
)
MOST_UNDECIDED = 0.5  # of all choices; with more, too little would be left to compare


@dataclass(frozen=True)
class Tensors:
    """Every tensor of both folders, bit for bit."""

    compared: int = 0
    different: tuple[str, ...] = ()  # names, in the order of the model
    missing: tuple[str, ...] = ()  # "NAME (not in FOLDER)"

    @property
    def ok(self) -> bool:
        """Whether both hold the same."""
        return not (self.different or self.missing)


@dataclass(frozen=True)
class Report:
    """How far two models are apart."""

    stages: dict[str, float]  # stage -> difference as a fraction (_relative); "logits" is the last
    tokens: int
    relative: float  # of the logits, from end to end
    part: str | None = None  # the first part that differs of the layer that differs first
    tensors: Tensors = field(default_factory=Tensors)
    furthest: int = 0  # the last position compared, from 0
    undecided: int | None = None  # choices of experts left out; None: all agreed from end to end
    choices: int = 0  # of experts, by all tokens in all layers that have them
    settings: tuple[str, ...] = ()  # of the two configs that differ: "NAME A and B"
    not_finite: tuple[str, ...] = ()  # tensors that hold nan or inf, looked for when logits do

    @property
    def logits_ok(self) -> bool:
        """Whether every stage agrees within TOLERANCE, from end to end or from equal inputs."""
        return all(map(_near, self.stages.values()))

    @property
    def by_layer(self) -> bool:
        """Whether every layer was compared by itself, from equal inputs."""
        return self.undecided is not None

    @property
    def ok(self) -> bool:
        """Whether settings and stages agree and every tensor is the same."""
        return self.logits_ok and self.tensors.ok and not self.settings and self.decided

    @property
    def decided(self) -> bool:
        """Whether enough tokens go to the same experts for certain to tell of all."""
        return (self.undecided or 0) <= MOST_UNDECIDED * self.choices

    @property
    def first_difference(self) -> str | None:
        """The first stage (embedding, layer 0) beyond TOLERANCE; None when all agree."""
        return next((name for name, value in self.stages.items() if not _near(value)), None)

    def _where(self) -> str:
        stage = self.first_difference or ""
        where = f"first at {stage} ({self.part})" if self.part else f"first at {stage}"
        return (
            f"logits differ by {self.relative:.1e} of their scale, {where}, which differs by "
            f"{self.stages[stage]:.1e} (at most {TOLERANCE:.0e})"
        )

    @property
    def faults(self) -> list[str]:
        """What is different, one line each; none when the models are the same."""
        found = [] if self.logits_ok else [self._where()]
        if not self.decided:
            found.append(
                f"{self.undecided} of {self.choices} choices of experts are too close to call in "
                "fp32: the routers' weights are too small for what the models compute to be equal"
            )
        found += [f"settings differ: {some(self.settings)}"] * bool(self.settings)
        found += [f"nan or inf in {some(self.not_finite)}"] * bool(self.not_finite)
        different, missing = self.tensors.different, self.tensors.missing
        count = f"{len(different)} of {self.tensors.compared}"
        found += [f"{count} tensors differ: {some(different)}"] * bool(different)
        found += [f"only one has {some(missing)}"] * bool(missing)
        return found


def verify(
    a: str | Path,
    b: str | Path,
    prompts: Sequence[str] | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
) -> Report:
    """Compare two models: every tensor, and on some tokens every layer's output and the logits.

    Two ways of computing the same model part from each other by rounding alone: softmax over large
    scores amplifies an error from layer to layer, and a router sends a token to another one of two
    experts that are equally good. Where logits or any stage before them differ from end to end, the
    models are compared once more layer by layer: each layer of the one goes on from what the other
    has put out before it, and is compared on the tokens whose experts are beyond doubt. That
    comparison decides.

    Tokens, positions and windows: see convert/tokens.py; they reach to the last position the model
    allows.
    The models run in fp32, one after the other, each with the weights of one layer in memory. When
    a layer differs, both run once more up to it to tell which of its parts differs first.

    Args:
        a, b: each a Hugging Face folder, or a weights, checkpoint or run folder. Differences are
            fractions of a's values, or the one Hugging Face folder's (_relative).
        prompts: texts in place of the built-in ones; they need a tokenizer in one of the folders.
        dtype: round all weights to it first ("fp32", "bf16"); None takes for every tensor the
            coarser of the two that are stored, so a bf16 model equals what it was rounded from.
        base: where the base of a checkpoint of adapters lies now, if not where it was.

    Errors: UserError in a run of several processes, when a folder cannot be read, or when the two
    are of different sizes.
    """
    sides = _open(locate(a), base), _open(locate(b), base)
    _require_same_facts(*sides)
    dtypes = _dtypes(*sides, DTYPES[dtype] if dtype else None)
    tensors = _compare_tensors(*sides, dtypes)
    # b's first: that of a weights folder is spelled for every transformers
    batch = make_batch([side.tokenizer for side in reversed(sides)], sides[0].facts, prompts)
    # The transformers side leads: it tells its routers' scores.
    leader, follower = sides if isinstance(sides[0], HuggingFace) else sides[::-1]
    reference: dict[str, Tensor] = {}
    leader.run(batch, dtypes, reference.__setitem__)
    found = _compare(follower, reference, batch, dtypes)
    report = Report(
        found,
        batch.ids.numel(),
        found[stages.LOGITS],
        tensors=tensors,
        furthest=int(batch.positions[-1]),
        settings=_different_settings(*sides),
    )
    if report.logits_ok:
        return report
    if isnan(report.relative):
        report = replace(report, not_finite=tuple(n for side in sides for n in _not_finite(side)))
    clear = _clear_choices(reference)
    report = replace(
        report,
        stages=_compare(follower, reference, batch, dtypes, forced=reference, clear=clear),
        undecided=sum(int((~tokens).sum()) for tokens in clear.values()),
        choices=sum(tokens.numel() for tokens in clear.values()),
    )
    layer = stages.layer_of(report.first_difference or "")
    if layer is None:
        return report
    inside: dict[str, Tensor] = {}
    leader.run(batch, dtypes, inside.__setitem__, layer, reference)
    parts = _compare(follower, inside, batch, dtypes, layer, reference)
    return replace(report, part=next((p for p, value in parts.items() if not _near(value)), None))


def require_equal(
    hf_dir: Path, megatron_folder: Path, dtype: str | None = None, base: str | Path | None = None
) -> Report:
    """verify(), with a difference as an error. Errors: UserError naming the first layer."""
    report = verify(hf_dir, megatron_folder, dtype=dtype, base=base)
    if report.tensors.ok and isnan(report.relative):
        raise UserError(
            f"{_what_is_not_finite(report)}: the model cannot be proven, nor used; start from "
            "another copy, or pass --no-verify to convert it as it is"
        )
    if not report.ok:
        raise UserError(
            f"the converted model is not the same: {'; '.join(report.faults)}; nothing was "
            "written: please report it with the model's config.json"
        )
    return report


def require_readable(hf_dir: Path) -> None:
    """What verify() will ask of the folder's config, before hours of conversion.

    Errors: UserError when this transformers cannot read it.
    """
    HuggingFace(hf_dir).facts  # noqa: B018 (read for its errors)


def _what_is_not_finite(report: Report) -> str:
    if report.not_finite:
        return f"nan or inf in {some(report.not_finite)}"
    first = report.first_difference
    return f"the model's values overflow at {first}, in fp32 and on both sides"


def _not_finite(side: Side) -> Iterable[str]:
    return (f"{n} of {side.path}" for n in side.tensors if not _is_finite(side.load(n)))


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(block.isfinite().all()) for block in tensor.reshape(-1).split(BLOCK))


def _open(path: Path, base: str | Path | None = None) -> Side:
    """The kind of folder it is: a Hugging Face folder has a config.json and no manifest."""
    if (path / "config.json").is_file() and not (path / folders.MANIFEST).exists():
        return HuggingFace(path)
    return Megatron(path, base)


def _require_same_facts(a: Side, b: Side) -> None:
    pairs = {name: (value, vars(b.facts)[name]) for name, value in vars(a.facts).items()}
    if wrong := [f"{name} {x} and {y}" for name, (x, y) in pairs.items() if x != y]:
        raise UserError(
            f"{a.path} and {b.path} are different architectures: {', '.join(wrong)}; only models "
            "of the same sizes can be compared"
        )


def _different_settings(a: Side, b: Side) -> tuple[str, ...]:
    """What the two configs say otherwise of the same computation: tiny weights can hide a soft cap,
    and no row of the batch is as long as a window."""
    pairs = {n: (x, vars(b.spec)[n]) for n, x in vars(a.spec).items() if n not in NO_SETTINGS}
    scales = [side.spec.attention_scale or side.spec.head_dim**-0.5 for side in (a, b)]
    pairs["attention_scale"] = scales[0], scales[1]
    windows = zip(a.windows, b.windows, strict=True)
    pairs |= {f"sliding window of layer {i}": pair for i, pair in enumerate(windows)}
    return tuple(f"{name} {x} and {y}" for name, (x, y) in pairs.items() if x != y)


def _dtypes(a: Side, b: Side, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """What each tensor is rounded to on both sides."""
    names = dict.fromkeys([*a.tensors, *b.tensors])
    return {n: dtype or _coarser(s.tensors[n] for s in (a, b) if n in s.tensors) for n in names}


def _coarser(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _compare_tensors(a: Side, b: Side, dtypes: Dtypes) -> Tensors:
    """One tensor at a time, in b's order: the parts of a Megatron parameter follow each other."""
    missing = [f"{name} (not in {b.path})" for name in a.tensors if name not in b.tensors]
    missing += [f"{name} (not in {a.path})" for name in b.tensors if name not in a.tensors]
    both = [name for name in b.tensors if name in a.tensors]
    different = [n for n in both if not _same_bits(a.load(n), b.load(n), dtypes[n])]
    return Tensors(len(both), tuple(different), tuple(missing))


def _same_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether both are the same after rounding, -0 and every nan told apart."""
    if a.shape != b.shape:
        return False
    blocks = zip(a.reshape(-1).split(BLOCK), b.reshape(-1).split(BLOCK), strict=True)
    return all(
        torch.equal(x.to(dtype).view(torch.uint8), y.to(dtype).view(torch.uint8)) for x, y in blocks
    )


def _compare(
    side: Side,
    reference: Mapping[str, Tensor],
    batch: Batch,
    dtypes: Dtypes,
    inside: int | None = None,
    forced: Mapping[str, Tensor] | None = None,
    clear: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The difference of every stage that `side` and `reference` have, as they are computed.

    Args:
        side: the model that runs.
        reference: what the other one has put out, by stage.
        inside, forced: see Side.run; with `forced` every layer goes on from the other's inputs.
        clear: of a layer, the tokens [b, s] to compare; the others are left out.
    """
    found: dict[str, float] = {}
    hidden: dict[str, Tensor] = {}  # what the next layer of `side` goes on from

    def compare(stage: str, value: Tensor) -> None:
        if stage not in reference or stage.startswith(stages.MARGIN):
            return
        before = stages.input_of(stage)
        inputs = None
        if before is not None:
            inputs = forced[before] if forced else hidden.pop(before), reference[before]
        found[stage] = _relative(value, reference[stage], inputs, (clear or {}).get(stage))
        if stage == stages.EMBEDDING or before is not None:
            hidden[stage] = value

    side.run(batch, dtypes, compare, inside, forced)
    return found


def _clear_choices(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For every layer with experts the tokens [b, s] whose experts no rounding error changes."""
    return {
        stage.removeprefix(stages.MARGIN): margin > CLOSE
        for stage, margin in reference.items()
        if stage.startswith(stages.MARGIN)
    }


def _near(difference: float) -> bool:
    """Whether it is a rounding error; nan is not."""
    return difference <= TOLERANCE


def _relative(
    value: Tensor,
    reference: Tensor,
    inputs: tuple[Tensor, Tensor] | None = None,
    tokens: Tensor | None = None,
) -> float:
    """max |value - reference| / max |reference| of each token, the largest; nan if one holds nan.

    Layers are compared by what they add to their inputs, less what rounding does to such a sum: the
    hidden states of real models carry a few values that are thousands of times the others
    ("massive activations", arXiv 2402.17762), beside which every fault would look small. For the
    same reason a token's difference is measured by that token's values. One that is smaller than
    most is measured by the median token's, for its own may be nothing but rounding.

    Args:
        value, reference: [b, s, ...] float32.
        inputs: of the layer, on either side, [b, s, h]; None: this is no layer.
        tokens: [b, s] bool, those to compare; None: all.
    """
    if value.shape != reference.shape:
        return float("nan")
    if inputs is None:
        difference = value - reference
    else:
        mine, theirs = inputs
        rounding = ROUNDING * (theirs.abs() + reference.abs())
        value, reference = value - mine, reference - theirs
        difference = ((value - reference).abs() - rounding).clamp(min=0)
    largest, scale = map(_largest, (difference, reference))
    scale = torch.maximum(scale, scale.median()).clamp(min=torch.finfo(torch.float32).tiny)
    fractions = largest / scale
    fractions = fractions if tokens is None else fractions[tokens]
    return float(fractions.max()) if fractions.numel() else float("nan")


def _largest(values: Tensor) -> Tensor:
    """[b, s, ...] -> [b, s], the largest magnitude, without a second tensor of that size."""
    return torch.linalg.vector_norm(values.flatten(2), ord=torch.inf, dim=-1)
