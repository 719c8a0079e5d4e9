"""From a YAML file and overrides to a RunConfig and back, and the help that lists every key."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml

from megatron_deft.config.aliases import released_help, released_names, translate
from megatron_deft.config.schema import ONE_OF, RunConfig, is_required
from megatron_deft.config.section import Section
from megatron_deft.config.source import Dumper, Setting, read_overrides, read_yaml
from megatron_deft.config.values import checked, type_words
from megatron_deft.errors import UserError


def _keys(
    section: type[Section] = RunConfig,
) -> Iterator[tuple[str, type[Section], Field[Any], Any]]:
    """Every key: dotted name, section, declaration, type."""
    hints = get_type_hints(section)
    for declaration in fields(section):  # type: ignore[arg-type]
        hint = hints[declaration.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            yield from _keys(hint)
        else:
            yield section.path + declaration.name, section, declaration, hint


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run: a YAML file, then `a.b=value` overrides on top of it.

    Keys of the released trainers are accepted under their own names (config/aliases.py). Relative
    paths stay relative to the working folder; a leading `~/` is expanded.

    Errors: UserError, one line, for a file that is no YAML, a key that is unknown, missing, given
    twice or of the wrong type, each naming the key and the file and line (or `override`).
    """
    chosen = {setting.name: setting for setting in read_yaml(path)}
    chosen |= {setting.name: setting for setting in read_overrides(overrides)}
    values = _resolve(translate(chosen.values()))
    known = {name: section for name, section, *_ in _keys()}
    missing = [
        name
        for name, _, declaration, _ in _keys()
        if is_required(declaration) and name not in values
    ]
    missing += [" or ".join(names) for names in ONE_OF if not any(map(values.get, names))]
    if missing:
        raise UserError(
            f"{path}: required keys are missing: {', '.join(missing)}; "
            "`megatron-deft train --help-config` explains every key"
        )
    grouped: dict[type[Section], dict[str, Any]] = {section: {} for section in known.values()}
    for name, value in values.items():
        grouped[known[name]][name.rpartition(".")[2]] = value
    parts = {
        section.path.rstrip("."): section(**grouped[section])
        for section in grouped
        if section is not RunConfig
    }
    return RunConfig(**grouped[RunConfig], **cast(Any, parts))


def _resolve(settings: Sequence[Setting]) -> dict[str, Any]:
    """One checked value per key: an override beats the file, and two names must agree."""
    declarations = {name: (declaration, hint) for name, _, declaration, hint in _keys()}
    chosen: dict[str, Setting] = {}
    values: dict[str, Any] = {}
    for setting in settings:
        if setting.value is None and setting.name in _sections(declarations):
            continue  # `optim:` with all its keys commented out
        if setting.name not in declarations:
            raise _unknown(setting, list(declarations))
        try:
            value = _path_expanded(
                checked(setting.name, *declarations[setting.name], setting.value)
            )
        except UserError as error:
            raise UserError(f"{setting.place}: {error}") from None
        previous = chosen.get(setting.name)
        if previous and previous.override == setting.override and values[setting.name] != value:
            raise UserError(
                f"{setting.name} is given two ways: {_spelled(previous)} and "
                f"{_spelled(setting)}: keep one"
            )
        if previous is None or setting.override >= previous.override:
            chosen[setting.name], values[setting.name] = setting, value
    return values


def _path_expanded(value: Any) -> Any:
    """Strings with a leading `~/` expanded. Errors: UserError for Hydra's `${...}`."""
    if isinstance(value, tuple):
        return tuple(_path_expanded(item) for item in value)
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{value}: references are not resolved, write the value out")
    is_path = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_path else value


def _sections(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names if "." in name})


def _spelled(setting: Setting) -> str:
    return f"{setting.written or setting.name}={setting.value} ({setting.where})"


def _unknown(setting: Setting, legal: list[str]) -> UserError:
    """The error for a key that is neither ours nor a released one: the nearest, then its likes."""
    sections = _sections(legal)
    section, _, last = setting.name.rpartition(".")
    # The same last word in another section (`train.lr`) is nearer than any similar spelling.
    close = [name for name in legal if name.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(setting.name, [*legal, *released_names()], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    if setting.name in sections:
        hint = f" It is a section: give its keys, such as {setting.name}.KEY."
    group = [name for name in legal if name.rpartition(".")[0] == section]
    if not group or not section:
        group = [name for name in legal if "." not in name] + [f"{name}.*" for name in sections]
    return UserError(
        f"{setting.place}: unknown key {setting.name}.{hint} Legal: {', '.join(group)}"
    )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The run as plain dicts, lists and scalars (for JSON, YAML and W&B)."""
    return cast(dict[str, Any], _plain(asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def dump_yaml(config: RunConfig) -> str:
    """The run as YAML that `load_config` reads back to an equal RunConfig."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True)


def config_help() -> str:
    """Every key as commented YAML: meaning, type, legal values, and the default as its value."""
    lines = ["# Every key of a run with its default. REQUIRED marks keys without one."]
    previous: type[Section] = RunConfig
    for name, section, declaration, hint in sorted(
        _keys(), key=lambda row: row[1] is not RunConfig
    ):
        if section is not previous:
            lines += ["", f"# {(section.__doc__ or '').splitlines()[0]}", f"{section.path[:-1]}:"]
            previous = section
        indent = "  " if section.path else ""
        legal = declaration.metadata["legal"]
        kind = type_words(hint) + (f", {legal.words}" if legal else "")
        comment = f"{declaration.metadata['meaning']} [{kind}]"
        mark = f"{indent}# "
        lines += textwrap.wrap(
            comment, 98, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
        )
        default = "REQUIRED" if is_required(declaration) else _plain(declaration.default)
        shown = yaml.dump(default, Dumper=Dumper, default_flow_style=True).partition("\n")[0]
        lines.append(f"{indent}{name.rpartition('.')[2]}: {shown}")
    lines += ["", "# Keys of the released trainers, accepted under their own names:"]
    lines += [f"#   {line}" for line in released_help()]
    return "\n".join(lines)
