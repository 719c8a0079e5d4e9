"""Keys of the released trainers, read as ours: DEFT and DFT (verl), EAFT (LLaMA-Factory, ms-swift).

A released key is renamed, accepted without effect (it changes speed or memory there, never the
result), accepted with the one value that means what this project does, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_deft.config.source import Setting
from megatron_deft.errors import UserError


class Rename(NamedTuple):
    """Our key for a released one, and the values that are spelled otherwise there.

    unset:  values that mean "not given" there
    switch: true and false alone are legal
    """

    key: str
    values: Mapping[Any, Any] = {}
    unset: tuple[Any, ...] = ()
    switch: bool = False


def _switch(name: str, value_if_true: str) -> Rename:
    """A released switch that, when true, is one value of ours."""
    return Rename(name, {True: value_if_true}, unset=(False,), switch=True)


RENAMED: dict[str, Rename] = {
    # verl: DEFT, Beyond-Log-Likelihood, DFT
    "trainer.objective_trans": Rename("objective"),
    "data.train_batch_size": Rename("train.global_batch"),
    "data.micro_batch_size_per_gpu": Rename("train.micro_batch"),
    "data.micro_batch_size": Rename("train.micro_batch", unset=(None,)),
    "data.multiturn.enable": _switch("data.format", "messages"),
    "data.multiturn.messages_key": Rename("data.messages_key"),
    "data.multiturn.tools_key": Rename("data.tools_key", unset=(None,)),
    "data.chat_template": Rename("data.template", unset=("",)),
    "model.partial_pretrain": Rename("model.hf"),
    "model.enable_gradient_checkpointing": Rename("model.recompute", {True: "full", False: "none"}),
    "model.lora_rank": Rename("lora.rank", {0: None}),
    "model.lora_alpha": Rename("lora.alpha", unset=(None,)),
    "model.target_modules": Rename("lora.targets", unset=(None,)),
    "model.fsdp_config.model_dtype": Rename("model.dtype", {"bfloat16": "bf16", "float32": "fp32"}),
    "optim.warmup_steps_ratio": Rename("optim.warmup_ratio"),
    "optim.lr_scheduler": Rename("optim.schedule"),
    "ulysses_sequence_parallel_size": Rename("parallel.context"),
    "trainer.default_local_dir": Rename("run_dir"),
    "trainer.project_name": Rename("monitor.project"),
    "trainer.experiment_name": Rename("monitor.experiment"),
    "trainer.seed": Rename("seed"),
    "trainer.total_epochs": Rename("train.epochs"),
    "trainer.total_training_steps": Rename("train.steps", unset=(None,)),
    "trainer.save_freq": Rename("train.save_every", {-1: None}),
    "trainer.test_freq": Rename("train.val_every", {-1: None}),
    "trainer.max_ckpt_to_keep": Rename("train.keep_checkpoints"),
    "trainer.resume_mode": Rename("train.resume", {"disable": "no"}, unset=("resume_path",)),
    "trainer.resume_from_path": Rename("train.resume", unset=(None,)),
    # LLaMA-Factory and ms-swift: the keys of their DFT and EAFT recipes
    "use_dft_loss": _switch("objective", "dft"),
    "enable_dft_loss": _switch("objective", "dft"),
    "learning_rate": Rename("optim.lr"),
    "lr": Rename("optim.lr"),
    "min_lr": Rename("optim.min_lr"),
    "lr_scheduler_type": Rename(
        "optim.schedule", {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
    ),
    "warmup_ratio": Rename("optim.warmup_ratio"),
    "lr_warmup_fraction": Rename("optim.warmup_ratio"),
    "weight_decay": Rename("optim.weight_decay"),
    "max_grad_norm": Rename("optim.clip_grad"),
    "per_device_train_batch_size": Rename("train.micro_batch"),
    "micro_batch_size": Rename("train.micro_batch"),
    "global_batch_size": Rename("train.global_batch"),
    "num_train_epochs": Rename("train.epochs"),
    "max_epochs": Rename("train.epochs"),
    "max_steps": Rename("train.steps", unset=(-1,)),
    "save_steps": Rename("train.save_every"),
    "save_interval": Rename("train.save_every"),
    "save_total_limit": Rename("train.keep_checkpoints"),
    "eval_steps": Rename("train.val_every"),
    "logging_steps": Rename("train.log_every"),
    "cutoff_len": Rename("data.max_length"),
    "max_length": Rename("data.max_length"),
    "model_name_or_path": Rename("model.hf"),
    "output_dir": Rename("run_dir"),
    "tensor_model_parallel_size": Rename("parallel.tensor"),
    "pipeline_model_parallel_size": Rename("parallel.pipeline"),
    "expert_model_parallel_size": Rename("parallel.expert"),
    "sequence_parallel": Rename("parallel.sequence"),
    "context_parallel_size": Rename("parallel.context"),
    "packing": Rename("data.pack"),
    "neat_packing": Rename("data.pack"),
    "preprocessing_num_workers": Rename("data.prepare_workers"),
    "lora_rank": Rename("lora.rank"),
    "lora_alpha": Rename("lora.alpha"),
    "lora_dropout": Rename("lora.dropout"),
    "lora_target": Rename("lora.targets", {"all": "all-linear"}),
    "target_modules": Rename("lora.targets"),
    "use_rslora": Rename("lora.rslora"),
    "dataloader_num_workers": Rename("data.workers"),
}

NO_EFFECT: dict[str, str] = {
    "model.use_liger": "the loss kernels here are always fused",
    "model.strategy": "Megatron's distributed optimizer takes FSDP's place",
    "model.fsdp_config.wrap_policy.min_num_params": "FSDP is not used",
    "model.use_shm": "weights are read where they are",
    "data.use_shm": "data are read where they are",
    "use_remove_padding": "padding tokens never count, with or without it",
    "trainer.device": "the device is found",
    "data.multiturn.enable_thinking_key": "used by templates that ask for it only",
}

_NONE = (None, "", 0, False)
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "data.balance_dp_token": (
        (False,), "reduction=token already weighs every token alike over all ranks"),
    "data.custom_cls.path": (_NONE, "data.format selects how rows are read"),
    "data.custom_cls.name": (_NONE, "data.format selects how rows are read"),
    "model.external_lib": (_NONE, "no code is loaded from a configuration"),
    "model.trust_remote_code": (_NONE, "no code is loaded from a model folder"),
    "model.fsdp_config.cpu_offload": (_NONE, "weights stay on the device"),
    "model.fsdp_config.offload_params": (_NONE, "weights stay on the device"),
    "trainer.default_hdfs_dir": (_NONE, "checkpoints go to run_dir alone"),
    "trainer.nnodes": ((1,), "processes are started by `megatron-deft train --nnodes`"),
    "trainer.n_gpus_per_node": (
        (), "processes are started by `megatron-deft train --nproc-per-node`"),
    "gradient_accumulation_steps": (
        (), "set train.global_batch = micro-batch x accumulation steps x data-parallel ranks"),
    "use_asft_loss": (_NONE, "ASFT is no objective here; `megatron-deft objectives` lists them"),
}  # fmt: skip

LOGGERS: dict[str, str | None] = {
    "console": None,  # always on here
    "file": None,
    "wandb": "monitor.wandb",
    "tensorboard": "monitor.tensorboard",
}
"""What the names in verl's list `trainer.logger` switch on."""

_EAFT = ("use_eaft_loss", "enable_eaft_loss")


def released_names() -> list[str]:
    """Every released key that is understood, for suggestions."""
    return [*RENAMED, *NO_EFFECT, *ONLY, *_EAFT, "eaft_alpha", "trainer.logger"]


def released_help() -> list[str]:
    """One line per released key that has a counterpart here: `theirs -> ours`."""
    special = {
        "trainer.logger": "monitor.wandb, monitor.tensorboard",
        "use_eaft_loss, enable_eaft_loss, eaft_alpha": "objective=eaft(power=ALPHA)",
    }
    rows = {name: rename.key for name, rename in RENAMED.items()} | special
    return [f"{name} -> {ours}" for name, ours in rows.items()]


def translate(settings: Iterable[Setting]) -> list[Setting]:
    """The same settings under our names. Errors: UserError naming a released key and the reason.

    Only spellings are translated: a key that is absent has this project's default.
    """
    by_name = {setting.name: setting for setting in settings}
    _drop_unused_lora(by_name)
    translated = _eaft(by_name) + _loggers(by_name)
    for name, setting in by_name.items():
        if name in ONLY:
            legal, reason = ONLY[name]
            if setting.value not in legal:
                raise _refusal(setting, f"not supported, leave it out: {reason}")
        elif name in RENAMED:
            translated += _renamed(setting, RENAMED[name])
        elif name not in NO_EFFECT:
            translated.append(setting)
    return translated


def _refusal(setting: Setting, reason: str) -> UserError:
    return UserError(f"{setting.where}: {setting.name}={setting.value}: {reason}")


def _renamed(setting: Setting, rename: Rename) -> list[Setting]:
    value = setting.value
    if rename.switch and not isinstance(value, bool):
        raise _refusal(setting, "expected true or false")
    if isinstance(value, Hashable):
        if value in rename.unset:
            return []
        value = rename.values.get(value, value)
    return [replace(setting, name=rename.key, value=value, written=setting.name)]


def _drop_unused_lora(by_name: dict[str, Setting]) -> None:
    """verl's files always have these keys, which do nothing beside a `lora_rank` of 0."""
    rank = by_name.get("model.lora_rank")
    if rank is not None and rank.value == 0:
        for name in ("model.lora_alpha", "model.target_modules"):
            by_name.pop(name, None)


def _eaft(by_name: dict[str, Setting]) -> list[Setting]:
    """`use_eaft_loss` with `eaft_alpha`: two released keys that are one objective; removed here."""
    alpha = by_name.pop("eaft_alpha", None)
    flags = [by_name.pop(name) for name in _EAFT if name in by_name]
    power = alpha.value if alpha else 1.0
    rename = _switch("objective", f"eaft(power={power})")
    overridden = bool(alpha and alpha.override)
    return [
        # Without the switch alpha does nothing, there too.
        replace(setting, override=setting.override or overridden)
        for flag in flags
        for setting in _renamed(flag, rename)
    ]


def _loggers(by_name: dict[str, Setting]) -> list[Setting]:
    """verl's `trainer.logger`, one name or a list; removed here."""
    setting = by_name.pop("trainer.logger", None)
    if setting is None:
        return []
    names = [setting.value] if isinstance(setting.value, str) else setting.value
    if not isinstance(names, list) or any(name not in LOGGERS for name in names):
        raise _refusal(setting, f"expected a list of {', '.join(LOGGERS)}")
    keys = [LOGGERS[name] for name in names]
    return [replace(setting, name=key, value=True, written=setting.name) for key in keys if key]
