"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import click


def print_table(rows: Mapping[str, str]) -> None:
    """Print in two columns. Nothing is wrapped, so that paths can be copied and lines be searched."""
    width = max(map(len, rows))
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {value}")
