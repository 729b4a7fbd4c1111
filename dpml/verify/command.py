"""The command `dpml verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

_CONTEXT = {"max_content_width": 100}


@click.command(context_settings=_CONTEXT)
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    default=60.0,
    help="Processor time for each ε; 60 by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(runs: tuple[Path, ...], seconds: float, as_json: bool) -> int:
    """Check the figures of finished runs, as somebody who did not make them would.

    ε is recomputed from the events by an accountant that shares nothing with the one of the run. Exit status
    0 if all of it can be believed, 1 if not, 2 for a folder that is no run.
    """
    from dpml.verify.run import verify_run

    found = []
    for folder in runs:
        verification = verify_run(folder, seconds=seconds)
        found.append(verification)
        if not as_json:
            click.echo("\n".join([str(folder), *verification.lines(), ""]))
    if as_json:
        click.echo(
            json.dumps([verification.to_dict() for verification in found], indent=2, ensure_ascii=False)
        )
    return 0 if all(verification.believable for verification in found) else 1
