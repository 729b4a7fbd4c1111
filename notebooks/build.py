"""Make the notebooks from their sources, the Python files beside this one: `python notebooks/build.py`.

No output is kept: it would be different each time, since noise is secret.
"""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def read(source: Path) -> NotebookNode:
    """The notebook that a source says, without outputs: the same each time."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=python, language_info={"name": "python"})
    return notebook


def execute(notebook: NotebookNode, folder: Path, *, small: bool) -> None:
    """Run all cells in `folder`, by the Python that runs this, and fill in their outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    kernels = KernelSpecManager(kernel_dirs=[])  # no installed one, which might be another Python's
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels),
        timeout=3600,
        resources={"metadata": {"path": str(folder)}},
    )
    client.owns_km = True  # it is shut down after the last cell
    client.execute(env={**os.environ, "DPML_NOTEBOOKS": "small" if small else "full"})


def main() -> None:
    """Write every notebook beside its source."""
    for source in SOURCES:
        nbformat.write(read(source), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
