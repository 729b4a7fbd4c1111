"""The command `dpml chart`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder; by default `charts` in the first PATH, or beside it if that is a file.",
)
@click.option(
    "--scale",
    type=click.Choice(["auto", "accuracy", "error"]),
    default="auto",
    help="accuracy, error (log scale), or auto: the error where all accuracies are above 90 %.",
)
def chart(paths: tuple[Path, ...], output: Path | None, scale: str) -> None:
    """Draw privacy against accuracy and speed: pictures (PNG) and a page to explore (chart.html).

    PATH is a folder of `dpml sweep`, a folder with runs in it, a table of runs (.parquet), or a results file
    (.json).
    """
    # Imported here: these take a second that `dpml --help` need not wait for.
    from recipes.charts import draw_all, load_runs, studies

    if output is None:
        output = (paths[0] if paths[0].is_dir() else paths[0].parent) / "charts"
    for path in draw_all(studies(load_runs(paths)), paths, output, scale=scale):  # type: ignore[arg-type]
        click.echo(path)
