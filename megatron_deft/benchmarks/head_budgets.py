"""What `fused_linear_loss` has to achieve: the budgets of `bench head`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_deft.benchmarks.arguments import HEAD_PLANS
from megatron_deft.benchmarks.budgets import Budget, HalfIgnored, Row, Rows


@dataclass(frozen=True)
class Figure:
    """A figure of a contender's row; the worst over the ignored fractions unless one is named."""

    of: tuple[str, ...]
    figure: Callable[[Row], float | None]
    ignored: float | None = None

    def __call__(self, rows: Rows) -> float | None:
        """None where a part of it was not measured."""
        found = [
            self.figure(row)
            for (name, ignored), row in rows.items()
            if name in self.of and self.ignored in (None, ignored) and row["status"] == "measured"
        ]
        known = [value for value in found if value is not None]
        return max(known) if known and len(known) == len(found) else None


def _time_over_logits(row: Row) -> float | None:
    value: float | None = row["time_over"]["logits-main-grad"]
    return value


def _peak_over(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["peak_over"][name]


def _twice_in_chunks(row: Row) -> float | None:
    """Peak with twice the tokens, less the gradient of the added hidden states, in chunks.

    And not over the peak with once the tokens: that would be a test of malloc, whose heap is some
    MB larger in one run than in the next.
    """
    twice, chunk = row["peak_bytes_at_twice"], row["chunk_bytes"]
    if twice is None or not chunk:
        return None
    value: float = (twice - row["hidden_gradient_bytes"]) / chunk
    return value


def _milliseconds(row: Row) -> float | None:
    value: float | None = row["median_ms"]
    return value


_OURS, _PLAIN = ("fused-main-grad",), ("fused",)
_most = partial(Budget, at_least=False)
_cpu = partial(_most, device="cpu", threads=2)
_cuda = partial(_most, device="cuda")
_TIMED = HEAD_PLANS["cuda"][0]
BUDGETS = (
    *(_cpu(f"deft into main_grad{name}", measure, required, plan=plan)
      for plan in HEAD_PLANS["cpu"]
      for name, measure, required in (
          (": time over the logits path's", Figure(_OURS, _time_over_logits, 0.0), 1.0),
          (", half ignored: time over the logits path's",
           Figure(_OURS, _time_over_logits, 0.5), 0.6),
          (": peak over the logits path's", Figure(_OURS, _peak_over("logits-main-grad")), 1 / 8),
          (": peak in chunks of logits", Figure(_OURS, _peak_over("chunk_bytes")), 1.2),
          (": peak in chunks, twice the tokens", Figure(_OURS, _twice_in_chunks), 1.2),
      )),
    _cuda("deft: milliseconds", Figure(_PLAIN, _milliseconds, 0.0), 17.3, plan=_TIMED),
    _cuda("deft: half ignored over none ignored", HalfIgnored(_PLAIN), 0.55, plan=_TIMED),
    _cuda("deft: peak in chunks of logits", Figure(_PLAIN, _peak_over("chunk_bytes")), 1.2,
          plan=_TIMED),
    _cuda("deft into main_grad: peak in chunks of logits",
          Figure(_OURS, _peak_over("chunk_bytes")), 1.2),
)  # fmt: skip
