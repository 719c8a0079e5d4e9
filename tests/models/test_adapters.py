"""What adapters are; what their layers compute is in tests/training/test_lora.py."""

from megatron_deft.models.adapters import TARGETS, Adapters


def test_scale() -> None:
    plain = Adapters(rank=16, alpha=8.0, rslora=False, dropout=0.0, targets=TARGETS)
    assert plain.scale == 0.5
    stable = Adapters(rank=16, alpha=8.0, rslora=True, dropout=0.0, targets=TARGETS)
    assert stable.scale == 2.0
