"""What low-rank adapters are, apart from the modules that compute them; knows no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
A, B = "lora_a", "lora_b"  # parameters of an adapted linear layer: [rank, in], [out, rank]


@dataclass(frozen=True)
class Adapters:
    """y = W x + scale * B (A x) in the linear layers of `targets` (LoRA, arXiv 2106.09685).

    Query, key and value are one matrix here, as gate and up are: they share their A.

    rslora: scale is alpha / sqrt(rank) and not alpha / rank (arXiv 2312.03732)
    """

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def has(self, weight: str) -> bool:
        """Whether the Megatron parameter `weight` is a matrix with adapters."""
        module, _, last = weight.rpartition(".")
        return last == "weight" and module.rpartition(".")[2] in self.targets

    def to_json(self) -> dict[str, Any]:
        """As in a checkpoint's manifest."""
        return {**asdict(self), "targets": list(self.targets)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Adapters":
        """The inverse; entries of the manifest beside these are left alone."""
        names = ("rank", "alpha", "rslora", "dropout")
        return Adapters(**{name: data[name] for name in names}, targets=tuple(data["targets"]))


def is_adapter(name: str) -> bool:
    """Whether a parameter or a checkpoint's key belongs to an adapter."""
    return name.rpartition(".")[2] in (A, B)


def adapters_alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state belongs to adapters."""
    return {name: value for name, value in state.items() if is_adapter(name)}
