"""What a group of keys of a run is: a frozen dataclass, legal once it exists."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar, get_type_hints

from megatron_deft.config.values import checked


class Section:
    """A group of keys; `path` is what stands before them (`optim.`)."""

    path: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every key's type and range. Errors: UserError naming the first that is wrong."""
        hints = get_type_hints(type(self))
        for declaration in fields(self):  # type: ignore[arg-type]
            name = declaration.name
            hint, value = hints[name], getattr(self, name)
            if isinstance(hint, type) and issubclass(hint, Section):
                assert isinstance(value, hint), f"{name} must be a {hint.__name__}"
            else:
                value = checked(self.path + name, declaration, hint, value)
                object.__setattr__(self, name, value)
