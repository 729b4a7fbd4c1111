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


def options_from(
    config: type, *, only: tuple[str, ...] | None = None, required: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """Decorate a click command with an option for each field of a dataclass.

    An option that is not typed is None, so that a recipe or the field's default can supply it.

    Args:
        config: The dataclass.
        only: The fields to offer; all by default.
        required: The fields that must be typed.
    """
    hints = get_type_hints(config)
    helps = _field_docs(config)

    def decorate(command: Command) -> Command:
        for item in reversed(fields(config)):
            if only is None or item.name in only:
                command = _option(item, hints[item.name], helps.get(item.name, ""), required)(command)
        return command

    return decorate


def lists_from(
    *configs: type, only: tuple[str, ...] | None = None, without: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """Decorate a click command with an option for each field of some dataclasses, for values between commas.

    Args:
        configs: The dataclasses. A field that several of them have is one option.
        only: The fields to offer; all by default.
        without: Fields not to offer.
    """
    found: dict[str, tuple[Any, str]] = {}
    for config in configs:
        hints, helps = get_type_hints(config), _field_docs(config)
        for item in fields(config):
            if item.name not in without and (only is None or item.name in only):
                found.setdefault(item.name, (hints[item.name], helps.get(item.name, "")))

    def decorate(command: Command) -> Command:
        for name, (hint, text) in reversed(found.items()):
            flag = f"--{name.replace('_', '-')}"
            command = click.option(flag, name, callback=_split_as(hint), metavar="A,B,…", help=text)(command)
        return command

    return decorate


def _split_as(hint: Any) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """From "1,none" to (1, None); "none" is None where the field may be that."""
    kind = _without_none(hint)
    optional = kind is not hint
    convert = click.types.convert_type(click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind)

    def split(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        words = [word.strip() for word in value.split(",")]
        return tuple(None if optional and word == "none" else convert(word, param, ctx) for word in words)

    return split


def typed(values: dict[str, Any]) -> dict[str, Any]:
    """Only what was typed."""
    return {name: value for name, value in values.items() if value is not None}


def _option(
    item: Field[Any], hint: Any, text: str, required: tuple[str, ...]
) -> Callable[[Command], Command]:
    flag = f"--{item.name.replace('_', '-')}"
    kind = _without_none(hint)
    if kind is bool:
        return click.option(flag, item.name, is_flag=True, default=None, help=text)
    choice: Any = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
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
