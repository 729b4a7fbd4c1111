"""Command-line options, generated from the configuration dataclasses: a field is a flag.

The flag's name is the field's, its help the docstring under the field, its type the field's type.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
from docstring_parser import parse_from_object

Command = TypeVar("Command", bound=Callable[..., Any])


class CommaSeparated(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.3
    """Values of one type, separated by commas: `0.1,0.3,1` becomes a tuple."""

    def __init__(self, kind: Any) -> None:
        self.kind = click.types.convert_type(kind)
        choices = getattr(self.kind, "choices", None)
        self.name = self.kind.name if choices is None else "|".join(choices)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """What the help shows in place of the values."""
        return f"{self.name if '|' in self.name else self.name.upper()},…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The values, each as its type converts it."""
        if isinstance(value, tuple):
            return value
        return tuple(self.kind.convert(part.strip(), param, ctx) for part in value.split(","))


def options_from(
    config: type,
    *,
    only: tuple[str, ...] | None = None,
    required: tuple[str, ...] = (),
    lists: tuple[str, ...] = (),
) -> Callable[[Command], Command]:
    """Decorate a click command with an option for each field of a dataclass.

    An option that is not typed is None, so that a recipe or the field's default can supply it.

    Args:
        config: The dataclass.
        only: The fields to offer; all by default.
        required: The fields that must be typed.
        lists: The fields that take several values, separated by commas; what is typed is then a tuple.
    """
    hints = get_type_hints(config)
    helps = _field_docs(config)

    def decorate(command: Command) -> Command:
        for item in reversed(fields(config)):
            if only is None or item.name in only:
                text = helps.get(item.name, "")
                command = _option(item, hints[item.name], text, required, lists)(command)
        return command

    return decorate


def typed(values: dict[str, Any]) -> dict[str, Any]:
    """Only what was typed."""
    return {name: value for name, value in values.items() if value is not None}


def _option(
    item: Field[Any], hint: Any, text: str, required: tuple[str, ...], lists: tuple[str, ...]
) -> Callable[[Command], Command]:
    flag = f"--{item.name.replace('_', '-')}"
    kind = _without_none(hint)
    if kind is bool:
        return click.option(flag, item.name, is_flag=True, default=None, help=text)
    choice: Any = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
    choice = CommaSeparated(choice) if item.name in lists else choice
    # No default, not even None: to click, that would be a value for an option that must be typed.
    return click.option(flag, item.name, type=choice, required=item.name in required, help=text)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        [kind] = [part for part in get_args(hint) if part is not type(None)]
        return kind
    return hint


def _field_docs(config: type) -> dict[str, str]:
    """The docstrings under the fields, those of base classes too, on one line each."""
    docs: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        for param in parse_from_object(owner).params:
            docs[param.arg_name] = " ".join((param.description or "").split())
    return docs
