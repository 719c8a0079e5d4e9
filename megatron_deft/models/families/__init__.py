"""Model families: one file each, found by being here. Knows no torch.

A file of a family defines FAMILY (families/table.py): how its config.json reads and which Hugging
Face tensors make which Megatron parameter.
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.models.families.modelspec import ModelSpec
from megatron_deft.models.families.reading import read_spec
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import shown

__all__ = ["FAMILIES", "Family", "ModelSpec", "spec_from_hf"]


def _find() -> dict[str, Family]:
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    families = [m.FAMILY for m in modules if hasattr(m, "FAMILY")]
    return {family.model_type: family for family in families}


FAMILIES: Mapping[str, Family] = _find()


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The ModelSpec of a Hugging Face config.json, as written by transformers 4 or 5.

    Absent keys mean what they mean to transformers. Errors: UserError for an unknown model_type and
    for anything that would not be reproduced exactly.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {shown(model_type)} is not one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return read_spec(FAMILIES[model_type], config)
