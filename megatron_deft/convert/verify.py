"""Proof that a Megatron folder and a Hugging Face folder are the same model: their logits agree.

Both run in fp32 on the same tokens. A loss that falls proves nothing (a model with scrambled heads
learns too), and equal checksums prove only that tensors were moved, not that they mean the same.
"""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert.state import load_model
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec
from megatron_deft.platform import backend, cpu_platform, device, initialize, shutdown

TOLERANCE = 1e-4  # of the largest reference value; two fp32 implementations differ by about 1e-6
SENTENCE = "Conversion is proven by what the model says: 12 + 30 = 42, naïve or not."
RANDOM_TOKENS = 256  # long enough for scaled rotary frequencies to matter
SEED = 20240917
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Stage name -> its values [b, s, ...], in the order of computation.
Stages = dict[str, Tensor]


@dataclass(frozen=True)
class Report:
    """How far two models are apart on the same tokens."""

    stages: dict[str, float]  # stage -> max |difference| / max |reference|; "logits" is the last
    tokens: int

    @property
    def relative(self) -> float:
        """Largest difference of the logits as a fraction of the logits' scale."""
        return self.stages["logits"]

    @property
    def ok(self) -> bool:
        """Whether the logits agree within TOLERANCE; nan does not."""
        return self.relative <= TOLERANCE

    @property
    def first_difference(self) -> str | None:
        """The first stage (embedding, layer 0) beyond TOLERANCE; None when the logits agree."""
        beyond = (name for name, value in self.stages.items() if not value <= TOLERANCE)
        return None if self.ok else next(beyond)


def verify(
    hf_dir: str | Path,
    megatron_folder: str | Path,
    prompts: Sequence[str] | None = None,
    dtype: str | None = None,
) -> Report:
    """Compare the logits of both models, and every layer's output on the way.

    The models are held one after the other in fp32. Tokens: fixed random ids, and a sentence (or
    `prompts`) where hf_dir has a tokenizer.

    Args:
        hf_dir: a Hugging Face folder.
        megatron_folder: a weights, checkpoint or run folder.
        prompts: texts in place of the built-in sentence.
        dtype: round both models' weights to it first ("fp32", "bf16"); None takes what the
            folder's import converted to.

    Errors: UserError in a run of several processes, or when a folder cannot be read.
    """
    hf_dir, folder = Path(hf_dir), folders.resolve(megatron_folder)
    manifest = folders.read_manifest(folder)
    spec = ModelSpec.from_json(manifest["spec"])
    rounding = DTYPES[dtype or manifest.get("dtype") or "fp32"]
    samples = _samples(hf_dir, spec, prompts)
    with torch.no_grad():
        reference = _run_transformers(hf_dir, samples, rounding)
        gc.collect()
        ours = _run_megatron(folder, spec, samples, rounding)
    stages = {
        name: max(_relative(a[name], b[name]) for a, b in zip(ours, reference, strict=True))
        for name in reference[0]
    }
    return Report(stages, sum(sample.numel() for sample in samples))


def require_equal(hf_dir: Path, megatron_folder: Path, dtype: str | None = None) -> Report:
    """verify(), with a difference as an error. Errors: UserError naming the first layer."""
    report = verify(hf_dir, megatron_folder, dtype=dtype)
    if not report.ok:
        raise UserError(
            f"the converted model is not the same: logits differ by {report.relative:.1e} of their "
            f"scale (at most {TOLERANCE:.0e}), first at {report.first_difference}; nothing was "
            "written: please report it with the model's config.json"
        )
    return report


def _relative(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / max |reference|; nan if either holds one."""
    scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours - reference).abs().max() / scale)


def _samples(hf_dir: Path, spec: ModelSpec, prompts: Sequence[str] | None) -> list[Tensor]:
    """Token ids, each [1, s] int64."""
    length = min(RANDOM_TOKENS, spec.max_position_embeddings)
    generator = torch.Generator().manual_seed(SEED)
    samples = [torch.randint(spec.vocab_size, (1, length), generator=generator)]
    if any((hf_dir / name).exists() for name in TOKENIZER_FILES):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        for text in prompts or [SENTENCE]:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            samples.append(ids[:, : spec.max_position_embeddings])
    elif prompts:
        raise UserError(f"{hf_dir} has no tokenizer for the prompts: copy it there or pass none")
    return samples


def _run_transformers(hf_dir: Path, samples: list[Tensor], rounding: torch.dtype) -> list[Stages]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    _round(model, rounding)
    model.to(device()).eval()
    decoder = model.model
    stages = {
        "embedding": decoder.embed_tokens,
        **{f"layer {i}": layer for i, layer in enumerate(decoder.layers)},
        "final norm": decoder.norm,
    }
    return [
        _record(stages, partial(_transformers_logits, model, ids.to(device()))) for ids in samples
    ]


def _transformers_logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def _run_megatron(
    folder: Path, spec: ModelSpec, samples: list[Tensor], rounding: torch.dtype
) -> list[Stages]:
    with single_process():
        from megatron_deft.models.build import build_model, transformer_config

        config = transformer_config(spec, perform_initialization=False)
        model: Any = build_model(spec, config).eval()
        load_model(model, folder / "state")
        _round(model, rounding)
        decoder = model.decoder
        stages = {
            "embedding": model.embedding,
            **{f"layer {i}": layer for i, layer in enumerate(decoder.layers)},
            "final norm": decoder.final_layernorm,
        }
        recorded = [
            _record(stages, partial(_megatron_logits, model, ids.to(device()))) for ids in samples
        ]
    return [
        {
            # Hidden states are [s, b, h]; padding follows the vocabulary's own columns.
            name: v[..., : spec.vocab_size] if name == "logits" else v.transpose(0, 1)
            for name, v in found.items()
        }
        for found in recorded
    ]


def _megatron_logits(model: Any, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return model(ids, positions, None)


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))


def _record(stages: dict[str, torch.nn.Module], run: Callable[[], Tensor]) -> Stages:
    """What each module puts out during `run`, in order, then its result as "logits"; on the CPU."""
    found: Stages = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[name] = output.detach().float().cpu()

        return hook

    with ExitStack() as stack:
        for name, module in stages.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        logits = run()
    return found | {"logits": logits.detach().float().cpu()}


@contextmanager
def single_process() -> Iterator[None]:
    """megatron-core for one process, everything as it was afterwards.

    Starts torch.distributed (a world of one, whatever torchrun's variables say) and megatron's
    parallel state, each only if it is not running, and stops what it started. Random generators
    continue as if nothing had been drawn. Errors: UserError in a run of several processes.
    """
    with ExitStack() as stack:
        stack.enter_context(_same_random_numbers())
        stack.enter_context(cpu_platform())
        from megatron.core import parallel_state

        if not dist.is_initialized():
            dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
        elif dist.get_world_size() > 1:
            raise UserError(
                f"verifying runs in one process, here are {dist.get_world_size()}: run "
                "`megatron-deft convert` outside torchrun, or pass verify=False"
            )
        if not parallel_state.model_parallel_is_initialized():
            initialize()
            stack.callback(shutdown)
        yield


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
