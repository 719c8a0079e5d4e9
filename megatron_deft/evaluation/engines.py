"""Engines that continue prompts, behind one interface: transformers anywhere, vLLM on a GPU.

Prompts are token ids, so that every engine starts from the same ones. What is generated for a
prompt depends on neither the batch that it was in nor on the prompts before it.

Rejected: `model.generate`, which applies the folder's generation_config (Qwen2.5's holds a
repetition penalty) to greedy decoding too, and samples a whole batch from one global generator.
"""

import gc
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_deft.data.task import one_line
from megatron_deft.errors import UserError
from megatron_deft.evaluation.folder import (
    check_attention,
    check_folder,
    check_loaded,
    end_ids,
    load_tokenizer,
)
from megatron_deft.platform import device

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VLLM_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
_VLLM_PROMPTS_AT_ONCE = 1024  # it batches by itself; results come back after so many


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most likely one at temperature 0, else drawn from the `top_p`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: at least 1 is needed")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: 0 (greedy) or more is needed")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: more than 0 and at most 1 is needed")


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt: its text without special tokens, its length in tokens (the
    end token counts), and whether it ended by itself.
    """

    text: str
    tokens: int
    finished: bool


class Engine(Protocol):
    """One loaded model."""

    name: str
    dtype: str  # fp32, bf16 or, where vLLM decides, auto
    tokenizer: Any

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        streams: Sequence[int] | None = None,
    ) -> Iterator[Generation]:
        """Continue each prompt; yields in order, each as soon as its batch is done.

        `streams[i]` >= 0 numbers the random stream of prompts[i] (its position, unless given). An
        answer ends where the model's positions do; how many prompts have less room than
        max_new_tokens is logged.
        Errors: UserError when a prompt is empty or leaves no position for an answer.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


def load_model(folder: Path, dtype: str) -> Any:
    """transformers' model of a folder, on the device; `dtype` as of TransformersEngine.

    Errors: UserError where it cannot be loaded whole.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    automatic = "auto" if device().type == "cuda" else torch.float32
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_attention(folder, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES.get(dtype, automatic), local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )  # fmt: skip
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {one_line(error)}") from error
    model, found = loaded
    check_loaded(folder, found)
    return model.to(device()).eval()


class TransformersEngine:
    """Batched decoding with a KV cache; prompts are padded on the left."""

    name = "transformers"

    def __init__(self, folder: str | Path, batch_size: int = 16, dtype: str = "auto") -> None:
        """Load `folder`; `dtype` "auto" is the stored one on a GPU and fp32 on the CPU."""
        folder = check_folder(folder)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least 1 is needed")
        self.device = device()
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, dtype)
        known = {value: key for key, value in DTYPES.items()}
        self.dtype = known.get(self.model.dtype, str(self.model.dtype).removeprefix("torch."))
        self.ends = end_ids(self.tokenizer, folder)
        self.positions = int(self.model.config.max_position_embeddings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        streams: Sequence[int] | None = None,
    ) -> Iterator[Generation]:
        """See Engine.generate."""
        rooms = _rooms(prompts, sampling, self.positions)
        streams = range(len(prompts)) if streams is None else streams
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            for tokens in self._batch(prompts[part], rooms[part], sampling, streams[part]):
                yield _generation(self.tokenizer, tokens, self.ends)

    @torch.inference_mode()
    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        sampling: Sampling,
        streams: Sequence[int],
    ) -> list[list[int]]:
        """The new tokens of each prompt of one batch [b], up to and with its end token.

        rooms: how many each has at the most.
        """
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)  # 0 stands under the mask
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        pick = _chooser(sampling, streams)
        ended, room = torch.zeros(len(prompts), dtype=torch.bool), torch.tensor(rooms)
        cache, chosen = None, list[Tensor]()
        while not ended.all():
            step = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = step.past_key_values
            ids = pick(step.logits[:, -1].float())[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            # those of an answer that has ended are not used, and stay where there are some
            positions = (positions[:, -1:] + 1).clamp(max=self.positions - 1)
            chosen.append(ids.cpu())
            ended |= torch.isin(chosen[-1][:, 0], torch.tensor(sorted(self.ends)))
            ended |= room <= len(chosen)
        rows = torch.cat(chosen, 1).tolist()
        return [_until_end(row[:most], self.ends) for row, most in zip(rows, rooms, strict=True)]

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        _free()


class VllmEngine:
    """vLLM's offline `LLM`: continuous batching, its own kernels; the choice on a GPU."""

    name = "vllm"

    def __init__(self, folder: str | Path, batch_size: int = 16, dtype: str = "auto") -> None:
        """Load `folder`. `batch_size` is the other engine's: vLLM finds its own."""
        del batch_size
        folder = check_folder(folder)
        if not _has_vllm():
            raise UserError(
                "engine vllm: vllm is not installed here: pip install vllm in an environment of "
                "its own, or pass --engine transformers"
            )
        from vllm import LLM

        self.dtype = dtype
        self.tokenizer = load_tokenizer(folder)
        self.llm = LLM(
            model=str(folder), dtype=_VLLM_DTYPES[dtype], seed=0, trust_remote_code=False
        )
        self.ends = end_ids(self.tokenizer, folder)
        self.positions = int(self.llm.llm_engine.model_config.max_model_len)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        streams: Sequence[int] | None = None,
    ) -> Iterator[Generation]:
        """See Engine.generate."""
        from vllm import SamplingParams

        rooms = _rooms(prompts, sampling, self.positions)
        streams = range(len(prompts)) if streams is None else streams
        for start in range(0, len(prompts), _VLLM_PROMPTS_AT_ONCE):
            part = slice(start, start + _VLLM_PROMPTS_AT_ONCE)
            inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts[part]]
            params = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=room,
                    seed=_stream_seed(sampling.seed, stream),
                    stop_token_ids=sorted(self.ends),
                    detokenize=False,  # the tokenizer here does, the same way for every engine
                )
                for stream, room in zip(streams[part], rooms[part], strict=True)
            ]
            for output in self.llm.generate(inputs, params, use_tqdm=False):
                tokens = _until_end(list(output.outputs[0].token_ids), self.ends)
                yield _generation(self.tokenizer, tokens, self.ends)

    def close(self) -> None:
        """Free the model's memory: vLLM's worker ends with the object."""
        del self.llm
        _free()


ENGINES: dict[str, Callable[..., Engine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
}


def make_engine(name: str, folder: str | Path, batch_size: int = 16, dtype: str = "auto") -> Engine:
    """Load a Hugging Face folder; "auto" takes vLLM on a GPU where it is installed.

    Errors: UserError for a name that is none, a folder that is no model, vLLM asked for and absent.
    """
    if dtype not in _VLLM_DTYPES:
        raise UserError(f"dtype={dtype}: one of {', '.join(_VLLM_DTYPES)} is needed")
    return ENGINES[engine_name(name)](folder, batch_size, dtype)


def engine_name(name: str) -> str:
    """The engine that `name` means on this machine."""
    if name == "auto":
        return "vllm" if device().type == "cuda" and _has_vllm() else "transformers"
    if name not in ENGINES:
        raise UserError(f"engine={name}: one of auto, {', '.join(ENGINES)} is needed")
    return name


def _chooser(sampling: Sampling, streams: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A function from logits fp32 [b, v] to the chosen tokens int64 [b]."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    # One generator per prompt, on the CPU: a draw is the same in every batch and on every device.
    generators = [
        torch.Generator().manual_seed(_stream_seed(sampling.seed, stream)) for stream in streams
    ]

    def draw(logits: Tensor) -> Tensor:
        ordered, tokens = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
        kept = ordered.where(before < sampling.top_p, 0.0).cumsum(-1)
        uniform = torch.cat([torch.rand(1, generator=g) for g in generators])[:, None]
        index = torch.searchsorted(kept, uniform.to(kept.device) * kept[:, -1:], right=True)
        last = (before < sampling.top_p).sum(-1, keepdim=True) - 1  # when rounding goes past it
        return tokens.gather(-1, index.minimum(last))[:, 0]

    return draw


def _stream_seed(seed: int, stream: int) -> int:
    """A hash, since torch's CPU generator looks at the low 32 bits alone: (seed << 32) + stream
    would give every seed the same streams.
    """
    digest = blake2b(f"{seed} {stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # vLLM wants a signed 64-bit number


def _rooms(prompts: Sequence[Sequence[int]], sampling: Sampling, positions: int) -> list[int]:
    """How many tokens each prompt's answer may have."""
    rooms = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens: leave it out")
        if len(prompt) >= positions:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, and the model {positions} positions: "
                "leave the prompt out, or take a model that has more"
            )
        rooms.append(min(sampling.max_new_tokens, positions - len(prompt)))
    less = [room for room in rooms if room < sampling.max_new_tokens]
    if less:
        logger.warning(
            "the model has %d positions: %d of %d answers end after fewer than %d new tokens, the "
            "shortest after %d",
            positions, len(less), len(rooms), sampling.max_new_tokens, min(less),
        )  # fmt: skip
    return rooms


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """`tokens` up to the first end token, and with it."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def _generation(tokenizer: Any, tokens: list[int], ends: frozenset[int]) -> Generation:
    finished = tokens[-1] in ends
    text = tokenizer.decode(
        tokens[:-1] if finished else tokens,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return Generation(text, len(tokens), finished)


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
