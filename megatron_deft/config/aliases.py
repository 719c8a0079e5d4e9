"""Keys of the released trainers, read as ours: DEFT and DFT (verl), EAFT (LLaMA-Factory, ms-swift).

A released key is renamed, accepted without effect (it changes speed or memory there, never the
result), accepted with the one value that means what this project does, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from megatron_deft.config.source import Setting
from megatron_deft.errors import UserError

Renamed = dict[str, Any]  # our key -> value


def _to(name: str, **values: Any) -> Callable[[Any], Renamed]:
    """Rename to `name`; `values` maps released spellings (of words and truth values) to ours."""
    table = {spelling.strip("_"): value for spelling, value in values.items()}
    return lambda value: {name: table.get(str(value), value)}


def _interval(name: str) -> Callable[[Any], Renamed]:
    """A number of steps where -1 means never."""
    return _to(name, **{"-1": None})


def _given(name: str) -> Callable[[Any], Renamed]:
    """Rename to `name`; null means that the released default, which is ours too, applies."""
    return lambda value: {} if value is None else {name: value}


def _positive(name: str) -> Callable[[Any], Renamed]:
    """Rename to `name`; 0 means "use the ratio" there."""
    return lambda value: {} if value == 0 else {name: value}


def _loggers(value: Any) -> Renamed:
    """verl's list of loggers; the console and metrics.jsonl are always written here."""
    names = [value] if isinstance(value, str) else value
    legal = {"console": {}, "file": {}, "wandb": {"monitor.wandb": True},
             "tensorboard": {"monitor.tensorboard": True}}  # fmt: skip
    if not isinstance(names, list):
        raise UserError(f"expected a list of {', '.join(legal)}")
    if unknown := [name for name in names if name not in legal]:
        raise UserError(f"logger {unknown[0]!r} is not supported: legal are {', '.join(legal)}")
    return {key: setting for name in names for key, setting in legal[name].items()}


def _multiturn(value: Any) -> Renamed:
    return {"data.format": "messages"} if value is True else {}


def _dft(value: Any) -> Renamed:
    return {"objective": "dft"} if value is True else {}


RENAMED: dict[str, Callable[[Any], Renamed]] = {
    # verl: DEFT, Beyond-Log-Likelihood, DFT
    "trainer.objective_trans": _to("objective"),
    "data.train_batch_size": _to("train.global_batch"),
    "data.micro_batch_size_per_gpu": _to("train.micro_batch"),
    "data.micro_batch_size": _given("train.micro_batch"),
    "data.multiturn.enable": _multiturn,
    "data.multiturn.messages_key": _to("data.messages_key"),
    "model.partial_pretrain": _to("model.load"),
    "model.enable_gradient_checkpointing": _to("model.recompute", True_="full", False_="none"),
    "model.fsdp_config.model_dtype": _to("model.dtype", bfloat16="bf16", float32="fp32"),
    "optim.warmup_steps_ratio": _to("optim.warmup_ratio"),
    "optim.lr_scheduler": _to("optim.schedule"),
    "ulysses_sequence_parallel_size": _to("parallel.context"),
    "trainer.default_local_dir": _to("run_dir"),
    "trainer.project_name": _to("monitor.project"),
    "trainer.experiment_name": _to("monitor.experiment"),
    "trainer.logger": _loggers,
    "trainer.seed": _to("seed"),
    "trainer.total_epochs": _to("train.epochs"),
    "trainer.total_training_steps": _given("train.steps"),
    "trainer.save_freq": _interval("train.save_every"),
    "trainer.test_freq": _interval("train.val_every"),
    "trainer.max_ckpt_to_keep": _to("train.keep_checkpoints"),
    "trainer.resume_mode": _to("train.resume", disable="no"),
    "trainer.resume_from_path": _given("train.resume"),
    # LLaMA-Factory and ms-swift: the keys of their DFT and EAFT recipes
    "use_dft_loss": _dft,
    "enable_dft_loss": _dft,
    "learning_rate": _to("optim.lr"),
    "lr": _to("optim.lr"),
    "min_lr": _to("optim.min_lr"),
    "lr_scheduler_type": _to(
        "optim.schedule", constant_with_warmup="constant", warmup_stable_decay="wsd"
    ),
    "warmup_ratio": _to("optim.warmup_ratio"),
    "lr_warmup_fraction": _to("optim.warmup_ratio"),
    "warmup_steps": _positive("optim.warmup_steps"),
    "weight_decay": _to("optim.weight_decay"),
    "max_grad_norm": _to("optim.clip_grad"),
    "per_device_train_batch_size": _to("train.micro_batch"),
    "micro_batch_size": _to("train.micro_batch"),
    "global_batch_size": _to("train.global_batch"),
    "num_train_epochs": _to("train.epochs"),
    "max_epochs": _to("train.epochs"),
    "max_steps": _interval("train.steps"),
    "save_steps": _to("train.save_every"),
    "save_interval": _to("train.save_every"),
    "save_total_limit": _to("train.keep_checkpoints"),
    "eval_steps": _to("train.val_every"),
    "logging_steps": _to("train.log_every"),
    "cutoff_len": _to("data.max_length"),
    "max_length": _to("data.max_length"),
    "model_name_or_path": _to("model.load"),
    "output_dir": _to("run_dir"),
    "tensor_model_parallel_size": _to("parallel.tensor"),
    "pipeline_model_parallel_size": _to("parallel.pipeline"),
    "sequence_parallel": _to("parallel.sequence"),
}

NO_EFFECT: dict[str, str] = {
    "model.use_liger": "the loss kernels here are always fused",
    "model.strategy": "Megatron's distributed optimizer takes FSDP's place",
    "model.fsdp_config.wrap_policy.min_num_params": "Megatron's distributed optimizer takes FSDP's place",
    "model.use_shm": "weights are read where they are",
    "data.use_shm": "data are read where they are",
    "use_remove_padding": "padding tokens never count, with or without it",
    "trainer.device": "the device is found",
    "model.lora_alpha": "used with model.lora_rank > 0 only",
    "model.target_modules": "used with model.lora_rank > 0 only",
    "data.multiturn.enable_thinking_key": "used by templates that ask for it only",
}

_NONE = (None, "", 0, False)
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "data.balance_dp_token": (
        (False,), "reduction=token (the default) already weighs every token alike over all ranks"),
    "data.chat_template": (_NONE, "the template of the model's tokenizer is used"),
    "data.custom_cls.path": (_NONE, "data.format selects how rows are read"),
    "data.custom_cls.name": (_NONE, "data.format selects how rows are read"),
    "data.multiturn.tools_key": ((None, "tools"), "tool definitions are not supported"),
    "model.external_lib": (_NONE, "no code is loaded from a configuration"),
    "model.trust_remote_code": (_NONE, "no code is loaded from a model folder"),
    "model.lora_rank": (_NONE, "every weight is trained; low-rank adapters are not supported"),
    "model.fsdp_config.cpu_offload": (_NONE, "weights stay on the device"),
    "model.fsdp_config.offload_params": (_NONE, "weights stay on the device"),
    "trainer.default_hdfs_dir": (_NONE, "checkpoints go to run_dir alone"),
    "trainer.nnodes": ((1,), "processes are started by `megatron-deft train --nnodes`"),
    "trainer.n_gpus_per_node": ((), "processes are started by `megatron-deft train --nproc-per-node`"),
    "gradient_accumulation_steps": (
        (), "set train.global_batch = micro-batch x accumulation steps x data-parallel ranks"),
    "use_asft_loss": (_NONE, "ASFT is no objective here; `megatron-deft objectives` lists them"),
}  # fmt: skip

_EAFT = ("use_eaft_loss", "enable_eaft_loss")


def released_names() -> list[str]:
    """Every released key that is understood, for suggestions."""
    return [*RENAMED, *NO_EFFECT, *ONLY, *_EAFT, "eaft_alpha"]


def translate(settings: Iterable[Setting]) -> list[Setting]:
    """The same settings under our names. Errors: UserError naming a released key and the reason."""
    by_name = {setting.name: setting for setting in settings}
    translated = _eaft(by_name)
    for name, setting in by_name.items():
        if name in ONLY:
            legal, reason = ONLY[name]
            if not any(setting.value is value or setting.value == value for value in legal):
                raise UserError(f"{setting.where}: {name}={setting.value} is not supported: {reason}")
        elif name in RENAMED and name != "trainer.resume_mode":
            try:
                ours = RENAMED[name](setting.value)
            except UserError as error:
                raise UserError(f"{setting.where}: {name}={setting.value}: {error}") from None
            translated += [replace(setting, name=key, value=value) for key, value in ours.items()]
        elif name not in NO_EFFECT:
            translated.append(setting)
    return translated


def _eaft(by_name: dict[str, Setting]) -> list[Setting]:
    """`use_eaft_loss` with `eaft_alpha`: two released keys that are one objective; removed here."""
    alpha = by_name.pop("eaft_alpha", None)
    flags = [by_name.pop(name) for name in _EAFT if name in by_name]
    switched_on = [flag for flag in flags if flag.value is True]
    if not switched_on:
        return []  # there, too, alpha alone does nothing
    power = alpha.value if alpha else 1.0
    override = switched_on[0].override or bool(alpha and alpha.override)
    return [replace(switched_on[0], name="objective", value=f"eaft(power={power})", override=override)]
