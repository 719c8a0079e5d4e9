"""What a run is and how it is read; a leaf that knows no torch.

`load_config(path, overrides) -> RunConfig`, `RunConfig.validate(world_size, spec)`,
`to_dict`, `dump_yaml`, and `config_help`, the list of every key.
"""

from megatron_deft.config.data import DataConfig
from megatron_deft.config.load import config_help, dump_yaml, load_config, to_dict
from megatron_deft.config.lora import LoraConfig
from megatron_deft.config.model import LossConfig, ModelConfig, ParallelConfig
from megatron_deft.config.schema import RunConfig
from megatron_deft.config.train import CheckpointConfig, MonitorConfig, OptimConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "config_help",
    "dump_yaml",
    "load_config",
    "to_dict",
]
