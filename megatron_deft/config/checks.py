"""Which runs can be: what depends on several keys, on the number of processes or on the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from megatron_deft.config.stages import COUNTED, GIVEN, check_stages, divisors
from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from megatron_deft.config.schema import RunConfig


class ModelShape(Protocol):
    """What `validate` asks of a model: `models.families.ModelSpec` has it."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def ffn_hidden_size(self) -> int:
        """Channels inside the feed-forward block."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_query_groups(self) -> int:
        """Key-value heads."""

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Layers that have experts in place of the feed-forward block."""

    @property
    def experts(self) -> int:
        """Experts of each such layer."""

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Channels inside one expert."""

    @property
    def context_length(self) -> int:
        """Positions the model is made for."""

    def matrices(self, layer: int) -> Iterable[tuple[str, int, int, int]]:
        """Name, inputs and outputs of its matrices, and how many such a token meets."""


def validate(cfg: RunConfig, world_size: int, spec: ModelShape | None) -> None:
    """See RunConfig.validate."""
    # config is imported by everything; it needs the objectives' parser here alone.
    from megatron_deft.objectives import parse

    parse(cfg.objective)
    _check_training(cfg)
    _check_layout(cfg, world_size)
    _check_interleaving(cfg, world_size)
    _check_experts(cfg, world_size, spec)
    check_stages(cfg.parallel, None if spec is None else spec.num_layers)
    if spec is not None:
        _check_model(cfg, spec)


def _check_training(cfg: RunConfig) -> None:
    optim, train = cfg.optim, cfg.train
    if optim.min_lr > optim.lr:
        raise UserError(f"optim.min_lr={optim.min_lr:g}: must be <= optim.lr={optim.lr:g}")
    if optim.warmup_steps and train.steps and optim.warmup_steps > train.steps:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps}: must be <= train.steps={train.steps}"
        )
    if optim.cpu_offload and not cfg.parallel.distributed_optimizer:
        raise UserError(
            f"optim.cpu_offload={optim.cpu_offload:g} with parallel.distributed_optimizer=false: "
            "megatron-core can only with the distributed one; set it to true (one process will "
            "do), or cpu_offload to 0"
        )
    _check_loss_scale(cfg)
    export = cfg.checkpoint.export_hf
    if export == "last" and not train.save_at_end:
        raise UserError(
            "checkpoint.export_hf=last needs the last checkpoint: set train.save_at_end=true"
        )
    if export == "every_save" and not (train.save_every or train.save_at_end):
        raise UserError(
            "checkpoint.export_hf=every_save, but nothing is saved: set train.save_every"
        )
    if cfg.model.mtp_layers and cfg.lora.rank is not None:
        raise UserError(
            f"model.mtp_layers={cfg.model.mtp_layers} with lora.rank={cfg.lora.rank}: the heads "
            "are new layers, and adapters alone are trained; set mtp_layers to 0, or rank to null"
        )
    if cfg.model.mtp_layers and cfg.reduction != "token":
        raise UserError(
            f"reduction={cfg.reduction} with model.mtp_layers={cfg.model.mtp_layers}: "
            "megatron-core sums the losses of those heads over tokens; set reduction=token, or "
            "mtp_layers to 0"
        )
    data = cfg.data
    if train.val_every is not None and not (data.val_files or data.val_sets or data.split):
        raise UserError(
            f"train.val_every={train.val_every} needs data.val_sets, data.val_files or data.split: "
            "name some, or set null"
        )


def _check_loss_scale(cfg: RunConfig) -> None:
    optim, plain = cfg.optim, type(cfg.optim)()
    moving = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    for name in ("loss_scale", *moving):
        value = getattr(optim, name)
        if value == getattr(plain, name):
            continue
        if cfg.model.dtype != "fp16":
            raise UserError(
                f"optim.{name}={value:g} with model.dtype={cfg.model.dtype}: only fp16 scales the "
                "loss; leave it out, or set model.dtype=fp16"
            )
        if name in moving and optim.loss_scale is not None:
            raise UserError(
                f"optim.{name}={value:g} with optim.loss_scale={optim.loss_scale:g}: a fixed scale "
                "does not move; leave one out"
            )
    if optim.min_loss_scale > optim.initial_loss_scale:
        raise UserError(
            f"optim.min_loss_scale={optim.min_loss_scale:g}: must be <= "
            f"optim.initial_loss_scale={optim.initial_loss_scale:g}"
        )


def _check_layout(cfg: RunConfig, world_size: int) -> None:
    parallel, train = cfg.parallel, cfg.train
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence=true with parallel.tensor=1: it shards among tensor ranks; "
            "set it to false, or parallel.tensor to 2 or more"
        )
    if parallel.overlap_param_gather:
        _check_param_gather(cfg)
    if parallel.context > 1:
        _check_context(cfg)
    elif parallel.context_comm is not None:
        raise UserError(
            f"parallel.context_comm={parallel.context_comm} with parallel.context=1: no sequence "
            "is shared; set it to null, or parallel.context to 2 or more"
        )
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size < 1 or world_size % model_size:
        raise UserError(
            f"{world_size} processes cannot hold parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} x parallel.context={parallel.context}: "
            f"start a multiple of {model_size} (--nproc-per-node x --nnodes)"
        )
    ranks = cfg.data_parallel(world_size)
    if train.global_batch % (train.micro_batch * ranks):
        raise UserError(
            f"train.global_batch={train.global_batch}: must be a multiple of "
            f"train.micro_batch={train.micro_batch} x {ranks} data-parallel ranks = "
            f"{train.micro_batch * ranks}"
        )


def _check_param_gather(cfg: RunConfig) -> None:
    for key in ("distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(cfg.parallel, key):
            raise UserError(
                f"parallel.overlap_param_gather=true with parallel.{key}=false: parameters are "
                "gathered bucket by bucket from the ranks that updated them; set both to true"
            )


def _check_context(cfg: RunConfig) -> None:
    name, model, data = f"parallel.context={cfg.parallel.context}", cfg.model, cfg.data
    for key, dropout in (
        ("model.attention_dropout", model.attention_dropout),
        ("model.hidden_dropout", model.hidden_dropout),
        ("lora.dropout", cfg.lora.dropout),
    ):
        if dropout:
            raise UserError(
                f"{key}={dropout:g} with {name}: the ranks that share a sequence "
                "would drop alike; set it to 0"
            )
    multiple = 2 * cfg.parallel.context
    if data.pack and data.max_length % multiple:
        raise UserError(
            f"data.max_length={data.max_length} with data.pack=true and {name}: must be a multiple "
            f"of {multiple}, such as {-(-data.max_length // multiple) * multiple}"
        )


def _check_interleaving(cfg: RunConfig, world_size: int) -> None:
    parallel, train = cfg.parallel, cfg.train
    name = f"parallel.virtual_pipeline={parallel.virtual_pipeline}"
    if parallel.chunks == 1:
        return
    if parallel.pipeline == 1:
        raise UserError(
            f"{name} with parallel.pipeline=1: it divides the layers of pipeline processes; "
            "set it to null, or parallel.pipeline to 2 or more"
        )
    # megatron-core's interleaved schedule; validation passes have as many micro-batches.
    if cfg.micro_batches(world_size) % parallel.pipeline:
        group = train.micro_batch * cfg.data_parallel(world_size) * parallel.pipeline
        raise UserError(
            f"{name}: the {cfg.micro_batches(world_size)} micro-batches of a step must be a "
            f"multiple of parallel.pipeline={parallel.pipeline}; make train.global_batch a "
            f"multiple of {group}, or set parallel.virtual_pipeline=null"
        )


def _check_experts(cfg: RunConfig, world_size: int, spec: ModelShape | None) -> None:
    parallel, (key, tensor) = cfg.parallel, _expert_tensor(cfg)
    ranks = world_size // (tensor * parallel.pipeline)
    if parallel.expert_tensor is not None and (
        world_size % (tensor * parallel.pipeline) or parallel.tensor % tensor
    ):
        raise UserError(
            f"parallel.expert_tensor={tensor}: must divide parallel.tensor={parallel.tensor}: "
            f"{divisors(parallel.tensor)}"
        )
    if ranks % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert}: must divide the {ranks} data-parallel ranks "
            f"({world_size} processes / parallel.{key}={tensor} / "
            f"parallel.pipeline={parallel.pipeline}): {divisors(ranks)}"
        )
    if spec is not None and not spec.expert_layers:
        for name, legal in (("expert", 1), ("expert_tensor", None)):
            if (value := getattr(parallel, name)) not in (1, None):
                raise UserError(
                    f"parallel.{name}={value}: the model has no experts to share; set it to "
                    f"{legal or 'null'}"
                )
    has_experts = bool(spec.expert_layers) if spec is not None else parallel.expert > 1
    if has_experts and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(
            f"parallel.sequence=false with parallel.tensor={parallel.tensor}: megatron-core "
            "trains experts on tensor ranks only with true; set it to true, or "
            "parallel.tensor to 1"
        )


def _expert_tensor(cfg: RunConfig) -> tuple[str, int]:
    """By which key, and among how many ranks, an expert's matrices are shared."""
    size = cfg.parallel.expert_tensor
    return ("tensor", cfg.parallel.tensor) if size is None else ("expert_tensor", size)


def _check_model(cfg: RunConfig, spec: ModelShape) -> None:
    parallel = cfg.parallel
    rules = [
        ("tensor", spec.num_attention_heads, "attention heads"),
        ("tensor", spec.num_query_groups, "key-value heads (query groups)"),
        ("tensor", spec.ffn_hidden_size, "feed-forward channels"),
    ]
    if spec.expert_layers:
        rules.append((_expert_tensor(cfg)[0], spec.expert_ffn_hidden_size, "channels of an expert"))
        rules.append(("expert", spec.experts, "experts"))
    if parallel.context_comm == "a2a" and not spec.num_query_groups % parallel.tensor:
        heads = spec.num_query_groups // parallel.tensor
        rules.append(("context", heads, "key-value heads of a tensor rank, which a2a trades"))
    for name, size, what in rules:
        parts = getattr(parallel, name)
        if size % parts:
            raise UserError(
                f"parallel.{name}={parts}: must divide the model's {size} {what}: {divisors(size)}"
            )
    _check_recomputation(cfg, spec)
    _check_adapters(cfg, spec)
    if cfg.data.max_length > spec.context_length:
        raise UserError(
            f"data.max_length={cfg.data.max_length}: must be <= the model's "
            f"context of {spec.context_length} positions"
        )


def _check_adapters(cfg: RunConfig, spec: ModelShape) -> None:
    rank = cfg.lora.rank
    if rank is None:
        return
    side, name = min(
        (min(inputs, outputs), name)
        for layer in range(spec.num_layers)
        for name, inputs, outputs, _ in spec.matrices(layer)
        if name in cfg.lora.targets
    )
    # peft takes any rank
    if rank > side:
        raise UserError(
            f"lora.rank={rank}: must be <= {side}, the shorter side of {name}: its adapter would "
            "hold more numbers than the matrix itself; lower it, name other lora.targets, or set "
            "lora.rank=null to train every weight"
        )


def _check_recomputation(cfg: RunConfig, spec: ModelShape) -> None:
    model, parallel = cfg.model, cfg.parallel
    sparse = len(spec.expert_layers)
    for name, layers, what in (
        ("mlp", spec.num_layers - sparse, "no layer without experts"),
        ("moe", sparse, "no experts"),
    ):
        if name in model.recompute_modules and not layers:
            raise UserError(f"model.recompute_modules={name}: the model has {what}; leave it out")
    layers = model.recompute_layers or 1
    if any(getattr(parallel, name) for name in (*COUNTED, *GIVEN)):
        if layers > 1 and model.recompute_method == "uniform":
            raise UserError(
                f"model.recompute_layers={layers}: it cannot divide stages of several lengths; set "
                "it to 1, or model.recompute_method=block"
            )
        return
    block = spec.num_layers // (parallel.pipeline * parallel.chunks)
    if model.recompute_method == "uniform" and block % layers:
        raise UserError(
            f"model.recompute_layers={layers}: must divide the {block} layers that a process "
            f"holds in a row: {divisors(block)}"
        )
    if layers > block:
        raise UserError(
            f"model.recompute_layers={layers}: must be <= the {block} layers that a process "
            "holds in a row"
        )
