"""The redirections: who sees them, where, and that they can be taken back."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_deft.platform import (
    cpu,
    cpu_platform,
    enter_cpu_platform,
    initialize,
    leave_cpu_platform,
    shutdown,
)
from tests.platform import tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def code_of_megatron(source: str) -> Callable[[], Tensor]:
    """A function that stands, as far as Python can tell, in megatron-core."""
    namespace = {"__name__": "megatron.core.somewhere", "torch": torch}
    exec(f"def function(): return {source}", namespace)
    return namespace["function"]  # type: ignore[return-value]


cuda_zeros = code_of_megatron("torch.zeros(2, device='cuda')")


@pytest.fixture
def outside() -> Iterator[None]:
    """Start without redirections, whatever ran before; put them back after."""
    entered = cpu._stack is not None
    leave_cpu_platform()
    yield
    leave_cpu_platform()
    if entered:
        enter_cpu_platform()


@pytest.fixture
def model_parallel() -> Iterator[None]:
    initialize(seed=11)
    yield
    shutdown()


@pytest.mark.usefixtures("outside")
def test_blocks_nest_and_leave_nothing() -> None:
    before = {name: getattr(torch.cuda, name) for name in ("manual_seed", "synchronize")}
    with cpu_platform(), cpu_platform():
        assert torch.cuda.current_device() == torch.device("cpu")
        enter_cpu_platform()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        cuda_zeros()
    assert {name: getattr(torch.cuda, name) for name in before} == before


@pytest.mark.usefixtures("outside")
def test_nothing_happens_next_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current_device = torch.cuda.current_device
    with cpu_platform():
        assert torch.cuda.current_device is current_device
        assert cpu._stack is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.zeros(2, device='cuda')", torch.zeros(2)),
        ("torch.tensor([1], device=torch.device('cuda'))", torch.tensor([1])),
        ("torch.empty_like(torch.ones(0), device='cuda:0')", torch.ones(0)),
        ("torch.ones(2).cuda()", torch.ones(2)),
        ("torch.ones(2).cuda(torch.cuda.current_device())", torch.ones(2)),
        ("torch.ones(2, device=torch.cuda.current_device())", torch.ones(2)),
        ("torch.ones(2).type()", "torch.cuda.FloatTensor"),
        ("torch.ones(2).bfloat16().type()", "torch.cuda.BFloat16Tensor"),
        ("torch.ones(2).type(torch.float64)", torch.ones(2).double()),
    ],
)
def test_only_megatron_is_answered(source: str, expected: Tensor | str) -> None:
    with cpu_platform():
        answer = code_of_megatron(source)()
        if isinstance(expected, str):
            assert answer == expected
        else:
            torch.testing.assert_close(answer, expected)
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2).cuda()
        assert torch.zeros(2).type() == "torch.FloatTensor"


class AskInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x + cuda_zeros()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient + cuda_zeros()


@pytest.mark.parametrize("start", [Tensor.backward, torch.autograd.backward])
def test_backward_passes_are_seen(start: Callable[[Tensor], None]) -> None:
    """Hooks, autograd functions, gradient accumulation and a backward inside a backward."""
    calls: list[Tensor | None] = []

    def hook(*_: object) -> None:
        calls.append(cuda_zeros())
        inner = torch.ones(2, requires_grad=True)
        with torch.enable_grad():
            start(AskInBackward.apply(inner).sum())
        calls.append(inner.grad)

    with cpu_platform():
        x = torch.ones(2, requires_grad=True)
        graph: Any = x.expand_as(x).grad_fn
        accumulate = graph.next_functions[0][0]  # as megatron's DDP does
        accumulate.register_hook(hook)
        x.register_post_accumulate_grad_hook(hook)
        y = AskInBackward.apply(x)
        y.register_hook(lambda gradient: gradient + cuda_zeros())
        start(y.sum())
    assert len(calls) == 4
    torch.testing.assert_close(x.grad, torch.ones(2))


@pytest.mark.usefixtures("model_parallel")
def test_rng_tracker_keeps_streams_apart(caplog: pytest.LogCaptureFixture) -> None:
    def draws() -> list[Tensor]:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        outside = torch.rand(3)
        with tracker.fork():
            first = torch.rand(3)
        with tracker.fork():
            second = torch.rand(3)
        return [outside, first, second, torch.rand(3)]

    with caplog.at_level(logging.WARNING):
        tensor_parallel.model_parallel_cuda_manual_seed(5)
        once = draws()
        tensor_parallel.model_parallel_cuda_manual_seed(5)
        again = draws()
    assert not caplog.records
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({tuple(draw.tolist()) for draw in once}) == 4
    torch.manual_seed(5)
    assert torch.equal(torch.rand(6), torch.cat([once[0], once[3]]))  # fork() left no trace


@pytest.mark.usefixtures("model_parallel")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_full_recompute_gives_the_same_gradients(dropout: float) -> None:
    models = [
        tiny.build(tiny.Layout(recompute=recompute, dropout=dropout))
        for recompute in ("none", "full")
    ]
    models[1].load_state_dict(models[0].state_dict())
    batch = tiny.micro_batches(0)[0]
    outputs, gradients = [], []
    for model in models:
        tensor_parallel.model_parallel_cuda_manual_seed(5)
        output = model(batch["tokens"], batch["position_ids"], None)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append([p.grad for p in model.parameters()])
    assert torch.equal(*outputs)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.equal(outputs[0], models[0](batch["tokens"], batch["position_ids"], None)) == (
        dropout == 0
    )


def test_transformer_engine_that_finds_no_gpu_does_not_matter(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    script = (
        "from megatron_deft.platform import import_megatron; import_megatron(); "
        "import megatron.core.models.gpt, torch; torch.compile.__module__ == 'torch' or exit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
