"""Where settings come from: a YAML file and `a.b=value` overrides, as one flat list.

YAML is read by the 1.2 rules, not PyYAML's 1.1: `2e-5` is a number (1.1 asks for `2.0e-5`), `no`
and `off` are words (1.1 makes them false, and `resume: no` is a key of ours), `010` is ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_deft.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One key (dotted), its value, where it stands, and what the user wrote if not `name`."""

    name: str
    value: Any
    where: str
    override: bool = False
    written: str = ""

    @property
    def place(self) -> str:
        """Where it stands, in words for an error."""
        return f"{self.where} ({self.written})" if self.written else self.where


_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core rules for plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _decimal(loader: Any, node: Any) -> int:
    """SafeLoader reads 010 as octal 8 and refuses 08; both are plain decimals in YAML 1.2."""
    return int(loader.construct_scalar(node))


Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def _one_line(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    return f"{problem} ({context})" if context else problem


def read_yaml(path: str | Path) -> list[Setting]:
    """Settings of a YAML file, each knowing its line. Errors: UserError naming file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): is it YAML?") from None
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise UserError(
                f"{path} is empty: `megatron-deft train --help-config` prints every key"
            )
        settings = list(_flatten(loader, node, "", str(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {_one_line(error)}") from None
    finally:
        loader.dispose()
    _refuse_duplicates(settings)
    return settings


def _flatten(loader: Loader, node: yaml.Node, prefix: str, path: str) -> Iterator[Setting]:
    """Depth first: `optim: {lr: 1}` and `optim.lr: 1` are both the setting `optim.lr`."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: expected `key: value` lines at the top of the file")
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: a key must be a word")
        name = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode):
            yield from _flatten(loader, value_node, f"{name}.", path)
        else:
            yield Setting(name, loader.construct_object(value_node, deep=True), where)


def _refuse_duplicates(settings: Sequence[Setting]) -> None:
    seen: dict[str, Setting] = {}
    for setting in settings:
        if setting.name in seen:
            first = seen[setting.name].where.rpartition(":")[2]
            raise UserError(
                f"{setting.where}: key {setting.name} stands on line {first} already: keep one"
            )
        seen[setting.name] = setting


def read_overrides(overrides: Sequence[str]) -> list[Setting]:
    """Settings of `a.b=value` arguments; the value is read as YAML, the last of one key counts.

    A leading `+` (Hydra's "add this key") is accepted, since released commands have it.
    """
    settings: dict[str, Setting] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip().lstrip("+")
        if not equals or not name:
            raise UserError(f"override {override!r}: expected key=value, such as optim.lr=2e-5")
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: not YAML: {_one_line(error)}") from None
        if isinstance(value, dict):
            raise UserError(
                f"override {override!r}: set one key at a time, such as {name}.KEY=value"
            )
        settings[name] = Setting(name, value, "override", override=True)
    return list(settings.values())
