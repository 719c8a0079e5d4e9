"""The transformers side of a verification: the library's own model, one layer in memory.

The model is built without weights and runs its ordinary forward pass. The embedding, each layer,
the final norm and the head take their tensors from the folder when their turn comes and give them
back behind it. How tensors of the files become parameters (one per expert in the files, one per
layer in the memory of transformers 5) is asked of transformers itself; in transformers 4 the
parameters are the files' tensors.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_deft.convert import mapping, portable, stages
from megatron_deft.convert.hf_folder import Weights, read_json, some
from megatron_deft.convert.stages import Batch, Dtypes, Facts, Read, Sink, Unit
from megatron_deft.errors import UserError
from megatron_deft.models.families import spec_from_hf
from megatron_deft.platform import device


class HuggingFace:
    """A Hugging Face folder as a Side. Errors: UserError naming the file or field at fault."""

    def __init__(self, folder: Path) -> None:
        self.path = self.tokenizer = folder
        self._written = read_json(folder / "config.json", "model's config")
        self._weights = Weights(folder)
        self.spec = spec_from_hf(self._written)

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig, __version__

        try:
            if __version__.startswith("4.") and portable.only_5_reads(self._written):
                return AutoConfig.for_model(**portable.portable_config(self._written, self.spec))
            return AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of many kinds: what the checks of config classes raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.path}: this transformers cannot read config.json ({reason}): correct that "
                "field, or use the transformers that wrote it"
            ) from None

    @cached_property
    def facts(self) -> Facts:
        """Of the config."""
        c, context = self._config, self.spec.context_length
        return Facts(c.num_hidden_layers, c.hidden_size, c.vocab_size, context)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """See Side; by transformers' own reading of the config."""
        return _windows(self._config)

    @cached_property
    def tensors(self) -> dict[str, torch.dtype]:
        """The files' tensors without those that follow from the config or repeat the embedding."""
        found = {
            name: stored.dtype
            for name, stored in self._weights.tensors.items()
            if not name.endswith(mapping.IGNORED_SUFFIXES)
        }
        copy, original = mapping.TIED_COPY
        if (
            self._config.tie_word_embeddings
            and {copy, original} <= found.keys()
            and torch.equal(self.load(copy), self.load(original))
        ):
            del found[copy]
        return found

    def load(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self._weights.load(name)

    def run(
        self,
        batch: Batch,
        dtypes: Dtypes,
        sink: Sink,
        inside: int | None = None,
        forced: Mapping[str, Tensor] | None = None,
    ) -> None:
        """See Side. A head that is stored is used, even where the config ties it: transformers 4
        would leave it unread and 5 would not, so a difference has to show."""
        model = _without_weights(_with_window(self._config, batch))
        layers = model.get_decoder().layers
        whole = _stages(model, batch)
        parts = partial(_parts, self._config)
        with (
            torch.no_grad(),
            stages.streamed(_Loader(self, model, dtypes).units()),
            stages.reported(layers, whole, parts, lambda x: x, sink, inside, forced),
        ):
            stages.report(sink, {stages.LOGITS: _logits(model, batch)})


def _windows(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer, as transformers' models take it from their config.

    A config keeps every key it is given; only those whose class has the field mean a window by it.
    """
    has_windows = hasattr(type(config)(), "sliding_window")
    window = config.sliding_window if has_windows else None
    kinds = getattr(config, "layer_types", None)
    kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _with_window(config: Any, batch: Batch) -> Any:
    """A copy of `config` with the batch's sliding window."""
    config = deepcopy(config)
    if any(_windows(config)):
        config.sliding_window = batch.shortened(config.sliding_window)
    return config


def _stages(model: Any, batch: Batch) -> Iterator[tuple[torch.nn.Module, Read]]:
    """The modules that put out what is compared, and the routers."""
    decoder = model.get_decoder()
    for i, layer in enumerate(decoder.layers):
        name = stages.layer_stage(i)
        yield layer, _named(name)
        block = getattr(layer, "block_sparse_moe", None) or layer.mlp
        if hasattr(block, "gate"):
            chosen = model.config.num_experts_per_tok
            yield block.gate, partial(_margin, stages.MARGIN + name, chosen, batch.ids.shape)
    yield decoder.norm, _named(stages.FINAL_NORM)
    if hasattr(decoder, "rotary_emb"):
        yield decoder.rotary_emb, _angles


def _logits(model: Any, batch: Batch) -> Tensor:
    """Positions with gaps look like several packed samples; a mask of ones says that they are not.

    returns: [b, s, v]
    """
    ids = batch.ids.to(device())
    positions = batch.positions.to(device()).expand_as(ids)
    mask = torch.ones_like(ids)
    logits: Tensor = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits


def _without_weights(config: Any) -> Any:
    """The model with parameters on the meta device and real buffers, in evaluation mode.

    torch.device("meta") was rejected: it takes the buffers too, and rotary frequencies would have
    to be made again module by module.
    """
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not lost, f"buffers without values: {lost}"
    for owner in model.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device())
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def move(module: Any, name: str, parameter: Any) -> torch.nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


class _Source(NamedTuple):
    """The tensors of the files that make one parameter, or several (transformers' converter)."""

    converter: Any  # None: the one tensor as it is
    names: list[tuple[str, str]]  # (pattern of the converter, name), experts in their order


class _Loader:
    """Brings tensors of a folder into a model without weights."""

    def __init__(self, side: HuggingFace, model: Any, dtypes: Dtypes) -> None:
        self._side, self._model, self._dtypes = side, model, dtypes
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._sources = self._find_sources()

    def units(self) -> list[Unit]:
        """Embedding, layers, final norm and head. Errors: UserError for what is in none of them."""
        model, decoder = self._model, self._model.get_decoder()
        modules = [
            model.get_input_embeddings(),
            *decoder.layers,
            decoder.norm,
            model.get_output_embeddings(),
        ]
        names = {module: name for name, module in model.named_modules()}
        found: list[Unit] = []
        left = set(self._empty)
        for module in modules:
            own = [name for name in self._empty if name.startswith(names[module] + ".")]
            left -= set(own)
            found.append(Unit(module, partial(self._fill, own), partial(self._drop, own)))
        if left:
            raise UserError(
                f"{self._side.path}: {some(sorted(left))} are outside embedding, layers, norm and "
                "head: this architecture cannot be verified"
            )
        return found

    def _find_sources(self) -> dict[str, _Source]:
        rename, converters = _renaming(self._model, self._empty)
        found: dict[str, _Source] = {}
        unknown: list[str] = []
        for name in sorted(self._side._weights.tensors, key=_natural):
            target, pattern = rename(name)
            if target in self._empty:
                source = _Source(converters.get(pattern), [])
                found.setdefault(target, source).names.append((pattern or "", name))
            elif not name.endswith(mapping.IGNORED_SUFFIXES):
                unknown.append(name)
        if unknown:
            raise UserError(
                f"{self._side.path}: the model of its config.json has no {some(unknown)}: config "
                "and weights are of different models"
            )
        copy, original = mapping.TIED_COPY
        if copy not in found and self._model.config.tie_word_embeddings and original in found:
            found[copy] = found[original]
        return found

    def _fill(self, names: list[str]) -> None:
        missing = set(names)
        for name in names:
            if name in missing and name in self._sources:
                for target, value in self._made(name).items():
                    self._set(target, value)
                    missing.discard(target)
        if missing:
            raise UserError(
                f"{self._side.path} has no tensor for {some(sorted(missing))}: download the whole "
                "model, or correct config.json"
            )

    def _made(self, target: str) -> Mapping[str, Tensor]:
        source = self._sources[target]
        if source.converter is None:
            return {target: self._tensor(source.names[0][1])}
        converter = deepcopy(source.converter)
        for pattern, name in source.names:
            converter.add_tensor(target, name, pattern, partial(self._tensor, name))
        made = converter.convert(target, model=self._model, config=self._model.config)
        made = made[0] if isinstance(made, tuple) else made  # 5.0 adds a dict of errors
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}

    def _tensor(self, name: str) -> Tensor:
        tensor = self._side.load(name)
        return tensor.to(self._dtypes.get(name, tensor.dtype)).to(device(), torch.float32)

    def _set(self, name: str, value: Tensor) -> None:
        if value.shape != self._empty[name].shape:
            raise UserError(
                f"{self._side.path}: {name} has shape {list(value.shape)}, config.json says "
                f"{list(self._empty[name].shape)}: config and weights are of different models"
            )
        self._put(name, torch.nn.Parameter(value, requires_grad=False))

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._put(name, self._empty[name])

    def _put(self, name: str, parameter: torch.nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(owner), leaf, parameter)


Rename = Callable[[str], tuple[str, Any]]


def _renaming(model: Any, parameters: dict[str, Any]) -> tuple[Rename, Mapping[Any, Any]]:
    """Which parameter a file's tensor belongs to, and the converters by pattern.

    transformers 5's own tables, the ones that from_pretrained uses; 4 renames nothing here.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return lambda name: (name, None), {}
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def rename(name: str) -> tuple[str, Any]:
        prefix = model.base_model_prefix
        found: tuple[str, Any] = rename_source_key(name, renamings, converters, prefix, parameters)
        # As from_pretrained does: a name that the model knows stays what it is.
        return (name, None) if found[0] not in parameters and name in parameters else found

    return rename, {pattern: entry for entry in converters for pattern in entry.source_patterns}


def _natural(name: str) -> list[str | int]:
    """Sorts expert 10 behind expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _hidden(output: Any) -> Tensor:
    """Without the attention weights or router logits that some modules add."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def _named(stage: str) -> Read:
    return lambda output: {stage: _hidden(output)}


def _angles(output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """(cos, sin) [b, s, pairs * 2], each pair twice: the second half repeats the first."""
    cos, sin = (t[0, :, : t.shape[-1] // 2] for t in output)
    return stages.angles(cos, sin)


ALIKE = 0.1  # of a router's logits; times verify.CLOSE it is ten times fp32's rounding of 1


def _margin(name: str, chosen: int, shape: torch.Size, output: Any) -> dict[str, Tensor]:
    """Between the last expert chosen and the first one left out, of the largest score.

    Of ALIKE at least: probabilities of smaller scores are too alike for fp32 to keep their order.
    """
    scores = _hidden(output).reshape(*shape, -1)
    if chosen == scores.shape[-1]:  # none is left out
        return {name: torch.full(shape, torch.inf)}
    top = scores.topk(chosen + 1, dim=-1).values
    return {name: (top[..., -2] - top[..., -1]) / scores.abs().amax(dim=-1).clamp(min=ALIKE)}


# Which modules put out the parts of a layer: the first line whose key is a module of the layer.
USUAL = {stages.ATTENTION: "self_attn", stages.MLP_NORM: "post_attention_layernorm"}
KINDS: Mapping[str, dict[str, str]] = {
    "pre_feedforward_layernorm": {  # Gemma: norms around both halves
        stages.ATTENTION: "post_attention_layernorm",
        stages.MLP_NORM: "pre_feedforward_layernorm",
        stages.MLP: "post_feedforward_layernorm",
    },
    "post_self_attn_layernorm": {  # GLM-4: the same, under other names
        stages.ATTENTION: "post_self_attn_layernorm",
        stages.MLP_NORM: "post_attention_layernorm",
        stages.MLP: "post_mlp_layernorm",
    },
    "block_sparse_moe": {**USUAL, stages.MLP: "block_sparse_moe"},  # Mixtral of transformers 4
    "mlp": {**USUAL, stages.MLP: "mlp"},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _parts(config: Any, layer: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Read]]:
    """The modules of a layer that have a counterpart on the other side."""
    yield layer.get_submodule("input_layernorm"), _named(stages.ATTENTION_NORM)
    attention = layer.get_submodule("self_attn")
    if hasattr(attention, "qkv_proj"):
        yield attention.get_submodule("qkv_proj"), partial(_packed, config)
    for part, name in zip(stages.QKV, PROJECTIONS, strict=True):
        if hasattr(attention, name):
            yield attention.get_submodule(name), _named(part)
    names = next(names for marker, names in KINDS.items() if hasattr(layer, marker))
    for part, name in names.items():
        yield layer.get_submodule(name), _named(part)


def _packed(config: Any, output: Tensor) -> dict[str, Tensor]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = output.shape[-1] // (heads + 2 * groups)
    parts = output.split([heads * size, groups * size, groups * size], dim=-1)
    return dict(zip(stages.QKV, parts, strict=True))
