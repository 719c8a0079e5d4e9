"""The model card (README.md) of an exported folder, and what it takes over from the base's."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from megatron_deft.convert.hf_folder import is_hub_name
from megatron_deft.revision import revision

LICENSE_KEYS = ("license", "license_name", "license_link")
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
logger = logging.getLogger(__name__)


def read_license(folder: Path) -> dict[str, Any]:
    """The licence that the folder's README.md names in its front matter; empty when it names none.

    Nothing else is taken from that card: it describes another model.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    found = FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        logger.warning("%s: its front matter is not YAML; no licence is taken from it", path)
        return {}
    named = front if isinstance(front, dict) else {}
    return {k: named[k] for k in LICENSE_KEYS if isinstance(named.get(k), str | list)}


def model_card(manifest: Mapping[str, Any], library: str = "transformers") -> str:
    """README.md: what the model is, what it was trained from and on, with which objective, how far.

    manifest: of the exported folder; what an earlier version did not record is left out
    library:  that loads it: transformers, or peft for adapters alone
    """
    base, objective = manifest.get("base"), manifest.get("objective")
    trained = manifest["kind"] == "training"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    front |= manifest.get("license") or {}
    if base and is_hub_name(base):
        front["base_model"] = base
        relation = "adapter" if library == "peft" else "finetune"
        front |= {"base_model_relation": relation} if trained else {}
    front["tags"] = ["megatron_deft"]
    if objective:
        front["tags"].append(re.split(r"\W", objective)[0])  # deft of deft(eps=1e-06)
    facts = {"Family": manifest["spec"]["family"], "Base model": base}
    facts |= _training(manifest) if trained else {}
    facts |= {"Adapters": _adapters(manifest, library)}
    facts["Exported by"] = f"megatron_deft {revision()}"
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    title = "Fine-tuned with megatron_deft" if trained else "Converted by megatron_deft"
    return f"---\n{head}---\n\n# {title}\n\n" + "\n".join(lines) + "\n"


def _training(manifest: Mapping[str, Any]) -> dict[str, Any]:
    config = manifest.get("config") or {}
    data = config.get("data") or {}
    tokens = manifest.get("tokens")
    revised = manifest.get("revision")
    return {
        "Objective": manifest.get("objective"),
        "Reduction": config.get("reduction"),
        "Training data": _files(data.get("train_files")),
        "Validation data": _files(data.get("val_files")),
        "Optimizer steps": manifest.get("step"),
        "Samples seen": manifest.get("consumed"),
        "Tokens seen": None if tokens is None else f"{tokens} (prompts and responses)",
        "Trained by": f"megatron_deft {revised}" if revised else None,
    }


def _adapters(manifest: Mapping[str, Any], library: str) -> str | None:
    if not (adapter := manifest.get("adapter")):
        return None
    merged = "" if library == "peft" else ", merged"
    targets = ", ".join(adapter["targets"])
    return f"rank {adapter['rank']}, alpha {adapter['alpha']:g} on {targets}{merged}"


def _files(paths: list[str] | None) -> str | None:
    """Each file with its folder: the rest of a path is of one machine, and no one else's matter."""
    return ", ".join("/".join(PurePath(p).parts[-2:]) for p in paths) if paths else None
