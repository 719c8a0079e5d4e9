"""Low-rank adapters: which matrices get them, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_deft.config.section import Section
from megatron_deft.config.values import ABOVE_0, AT_LEAST_1, BELOW_1, NAMES, key
from megatron_deft.errors import UserError

# A fused matrix and what Hugging Face's families call its parts, or the whole of it.
PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "linear_qkv": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "linear_proj": (("o_proj",),),
    "linear_fc1": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "linear_fc2": (("down_proj",),),
}
ALL = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Adapters that are trained in place of the weights (LoRA, arXiv 2106.09685)."""

    path: ClassVar[str] = "lora."
    rank: int | None = key(
        "rank of the adapters, which alone are trained: y = W x + scale * B (A x); "
        "null: none, every weight is trained", None, AT_LEAST_1
    )  # fmt: skip
    alpha: float | None = key("scale is alpha / rank; null: twice the rank", None, ABOVE_0)
    rslora: bool = key("scale is alpha / sqrt(rank) (arXiv 2312.03732)", False)
    dropout: float = key("probability of dropping an input of an adapter", 0.0, BELOW_1)
    targets: tuple[str, ...] = key(
        "matrices of every layer, and of every expert, that get adapters: linear_qkv, linear_proj, "
        "linear_fc1, linear_fc2, or all-linear; or q_proj, k_proj, v_proj together, o_proj, "
        "gate_proj with up_proj, down_proj", (ALL,), NAMES
    )  # fmt: skip

    def __post_init__(self) -> None:
        """The targets under our names, and in our order."""
        super().__post_init__()
        object.__setattr__(self, "targets", _whole(self.targets))
        if self.rank is None:
            asked = {"alpha": self.alpha, "rslora": self.rslora, "dropout": self.dropout}
            given = [f"lora.{name}={value}" for name, value in asked.items() if value]
            if self.targets != _whole((ALL,)):
                given.append(f"lora.targets={', '.join(self.targets)}")
            if given:
                raise UserError(
                    f"{', '.join(given)} without lora.rank: every weight would be trained; set "
                    "lora.rank, or leave them out"
                )

    @property
    def alpha_used(self) -> float:
        """The scale's numerator; rank is set."""
        assert self.rank is not None
        return 2.0 * self.rank if self.alpha is None else self.alpha


def _whole(names: tuple[str, ...]) -> tuple[str, ...]:
    """Errors: UserError for a name that is unknown, or is a part of a matrix without the rest."""
    left = {part.strip() for name in names for part in name.split(",")}  # as LLaMA-Factory has it
    if not left:
        raise UserError(f"lora.targets=[]: name at least one of {', '.join(PARTS)}, or {ALL}")
    found = set(PARTS) if ALL in left else left & set(PARTS)
    left -= found | {ALL}
    for fused, ways in PARTS.items():
        for parts in ways:
            given = [part for part in parts if part in left]
            if given and len(given) < len(parts) and fused not in found:
                rest = [part for part in parts if part not in given]
                raise UserError(
                    f"lora.targets={', '.join(given)} without {', '.join(rest)}: they are one "
                    f"matrix here, with one A: name {', '.join(parts)}, or {fused}"
                )
            found |= {fused} if given else set()
            left -= set(given)
    if left:
        raise UserError(
            f"lora.targets={', '.join(sorted(left))}: not a matrix that can have adapters: legal "
            f"are {', '.join(PARTS)}, {ALL}, and "
            f"{', '.join(part for ways in PARTS.values() for parts in ways for part in parts)}"
        )
    return tuple(fused for fused in PARTS if fused in found)
