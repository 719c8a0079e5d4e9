"""The megatron side of a verification: the model that training builds, one layer in memory.

The model is built in memory that nothing has written to and runs its ordinary forward pass. The
embedding, each layer, the final norm and the output layer read their parameters from the state when
their turn comes and give them back behind it.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import mapping, stages
from megatron_deft.convert.adapters import open_ours
from megatron_deft.convert.mapping import LAYERS, Parameter
from megatron_deft.convert.stages import Batch, Dtypes, Facts, Read, Sink, Unit
from megatron_deft.errors import UserError
from megatron_deft.platform import backend, cpu_platform, device, initialize, shutdown

OUTPUT, WORDS = "output_layer.weight", "embedding.word_embeddings.weight"


class Megatron:
    """A weights, checkpoint or run folder as a Side; of adapters, merged with their base.

    base: where that lies now, if not where it was
    Errors: UserError when it is no such folder, or when its state is not the model of its spec.
    """

    def __init__(self, folder: Path, base: str | Path | None = None) -> None:
        self.path = folders.resolve(folder)
        self.tokenizer = self.path / "hf"
        self.source = open_ours(self.path, base=base)
        self.spec = spec = self.source.spec
        self.facts = Facts(spec.num_layers, spec.hidden_size, spec.vocab_size, spec.context_length)
        self.windows = spec.windows
        self.parameters = {p.megatron: p for p in self.source.parameters}
        self._owners = {name: p for p in self.source.parameters for name in p.hf}
        self.tensors = {name: self.source.dtypes(p)[0] for name, p in self._owners.items()}
        self._last: tuple[Parameter | None, Mapping[str, Tensor]] = (None, {})

    def load(self, name: str) -> Tensor:
        """One tensor under its Hugging Face name, as stored. Its neighbours in the same Megatron
        parameter are kept until another parameter is asked for."""
        owner = self._owners[name]
        if self._last[0] is not owner:
            self._last = (None, {})  # before the next one is read
            whole = self.source.read(owner, self.tensors[name])
            self._last = (owner, mapping.split(owner, whole, self.spec))
        return self._last[1][name]

    def run(
        self,
        batch: Batch,
        dtypes: Dtypes,
        sink: Sink,
        inside: int | None = None,
        forced: Mapping[str, Tensor] | None = None,
    ) -> None:
        """See Side. Errors: UserError in a run of several processes."""
        self._last = (None, {})
        with torch.no_grad(), single_process():
            from megatron_deft.models.build import build_model, transformer_config

            spec = replace(self.spec, window=batch.shortened(self.spec.window))
            config = transformer_config(spec, perform_initialization=False)
            model: Any = build_model(spec, config).eval()
            model.rotary_pos_emb.register_forward_hook(partial(_take_positions, batch))
            whole, parts = _stages(model), partial(_parts, config)
            with (
                stages.streamed(_Loader(self, model, dtypes).units()),
                stages.reported(model.decoder.layers, whole, parts, _swap, sink, inside, forced),
            ):
                logits = _logits(model, batch)[..., : self.spec.vocab_size]
                stages.report(sink, {stages.LOGITS: logits})


def _stages(model: Any) -> Iterator[tuple[torch.nn.Module, Read]]:
    """The modules that put out what is compared."""
    for i, layer in enumerate(model.decoder.layers):
        yield layer, _named(stages.layer_stage(i))
    yield model.decoder.final_layernorm, _named(stages.FINAL_NORM)
    yield model.rotary_pos_emb, partial(_angles, model.config.rotary_interleaved)


class _Loader:
    """Brings parameters of a state into a model."""

    def __init__(self, side: Megatron, model: Any, dtypes: Dtypes) -> None:
        self._side, self._model, self._dtypes = side, model, dtypes
        self._targets = dict(model.named_parameters(remove_duplicate=False))
        self._shapes = {name: target.shape for name, target in self._targets.items()}

    def units(self) -> list[Unit]:
        """Embedding, layers, final norm and output layer; every parameter is in one of them."""
        model, names = self._model, self._targets.keys()
        layers = [(layer, f"{LAYERS}{i}.") for i, layer in enumerate(model.decoder.layers)]
        places = [
            (model.embedding, "embedding."),
            *layers,
            (model.decoder.final_layernorm, "decoder.final_layernorm."),
        ]
        owned = [(module, [n for n in names if n.startswith(start)]) for module, start in places]
        owned.append((model.output_layer, [OUTPUT if OUTPUT in names else WORDS]))
        known = {name for _, own in owned for name in own}
        assert known == set(names) == set(self._side.parameters), (
            known ^ set(names),
            known ^ set(self._side.parameters),
        )
        return [Unit(m, partial(self._fill, own), partial(self._drop, own)) for m, own in owned]

    def _fill(self, names: list[str]) -> None:
        for name in names:
            parameter = self._side.parameters[name]
            tensor = self._side.source.read(parameter, self._dtype(parameter))
            target = self._targets[name]
            if tensor.shape != self._shapes[name]:
                assert parameter.padded, (name, tensor.shape, self._shapes[name])
                target.data = torch.zeros(self._shapes[name], device=device())
                target.data[: tensor.shape[0]] = tensor
            else:
                target.data = tensor.to(device(), torch.float32)

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        """What to round it to: the coarsest of its Hugging Face tensors."""
        found = [self._dtypes.get(name, torch.float32) for name in parameter.hf]
        return min(found, key=lambda dtype: dtype.itemsize)

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._targets[name].data = torch.empty(0, device=device())


def _logits(model: Any, batch: Batch) -> Tensor:
    """[b, s, padded v]."""
    ids = batch.ids.to(device())
    logits: Tensor = model(ids, batch.positions.to(device()).expand_as(ids), None)
    return logits


def _take_positions(batch: Batch, module: Any, inputs: Any, output: Any) -> Any:
    """The rotary table of the batch's positions in place of 0, 1, 2...

    megatron-core's rotary ignores position_ids; its own `offset` makes every run of positions.
    """
    rows = [module.forward(length, offset=start) for length, start in batch.runs()]
    if isinstance(output, tuple):
        return torch.cat([row[0] for row in rows]), *output[1:]
    return torch.cat(rows)


def _hidden(output: Any) -> Tensor:
    """[s, b, h] -> [b, s, h] of a module's output, its separate bias added."""
    value, bias = output if isinstance(output, tuple) else (output, None)
    return _swap(value if bias is None else value + bias)


def _swap(hidden: Tensor) -> Tensor:
    """[s, b, h] <-> [b, s, h]"""
    return hidden.transpose(0, 1)


def _named(stage: str) -> Read:
    """A layer returns its hidden states and a context for cross attention."""
    return lambda output: {stage: _swap(output[0] if isinstance(output, tuple) else output)}


def _angles(interleaved: bool, output: Any) -> dict[str, Tensor]:
    """[s, 1, 1, pairs * 2] angles, each pair's twice: side by side, or in the second half."""
    table = (output[0] if isinstance(output, tuple) else output).flatten(1)
    pairs = table[:, ::2] if interleaved else table[:, : table.shape[-1] // 2]
    return stages.angles(pairs.cos(), pairs.sin())


def _parts(config: Any, layer: Any) -> Iterator[tuple[torch.nn.Module, Read]]:
    """The modules of a layer that have a counterpart on the other side."""
    yield layer.input_layernorm, _named(stages.ATTENTION_NORM)
    yield layer.self_attention.linear_qkv, partial(_qkv, config)
    yield layer.self_attention, lambda output: {stages.ATTENTION: _hidden(output)}
    yield layer.pre_mlp_layernorm, _named(stages.MLP_NORM)
    yield layer.mlp, lambda output: {stages.MLP: _hidden(output)}


def _qkv(config: Any, output: Any) -> dict[str, Tensor]:
    """Query, key and value as megatron-core takes them out of linear_qkv's output, group by group.

    get_query_key_value_tensors of megatron/core/transformer/attention.py, and on purpose not
    convert/mapping.py: a mistake there must not hide itself here.
    """
    mixed, groups, size = _hidden(output), config.num_query_groups, config.kv_channels
    heads = config.num_attention_heads // groups
    grouped = mixed.unflatten(-1, (groups, (heads + 2) * size))
    parts = grouped.split([heads * size, size, size], dim=-1)
    return {name: part.flatten(2) for name, part in zip(stages.QKV, parts, strict=True)}


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
