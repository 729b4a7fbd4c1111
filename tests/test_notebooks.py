"""The notebooks run from the top at small settings, and are what their sources say."""

import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from accounting import UserError
from dpml import load

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SHOWS = {
    "ten_minutes": [
        r"attack tpr at fpr 0\.01",
        r"The layer '1' \(BatchNorm1d\) mixes the examples",
        r"ε = 1\.99\d, test accuracy \d",
        r"# Privacy statement",
        r"summary\.json\n",
        r"ok +epsilon +confirmed",
        r"committed epsilon",
        r"learning rate 0\.2: \d+\.\d%; spent so far",
        r"does not fit the budget of ε = 3",
    ],
    "tradeoff_mnist": [
        r"epsilon-8_seed-0",
        r"non-private",
        r"# Privacy statement of a sweep",
        r"All 2 private runs on `mnist-small.npz` together",
    ],
    "pate_against_dpsgd": [
        r"overturned at 60 percent lead",
        r"by PATE",
        r"A third party may believe: the events of this run cost at most",
    ],
}
CHARTS = {"ten_minutes": 1, "tradeoff_mnist": 4, "pate_against_dpsgd": 1}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(NOTEBOOKS)
        return __import__("build")


def test_every_notebook_is_tested(build: ModuleType) -> None:
    assert {source.stem for source in build.SOURCES} == set(SHOWS) == set(CHARTS)
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_a_notebook_is_what_its_source_says(name: str, build: ModuleType) -> None:
    kept = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(kept)
    assert kept == build.read(NOTEBOOKS / f"{name}.py"), "run: python notebooks/build.py"
    assert all(not cell.outputs for cell in kept.cells if cell.cell_type == "code")


def test_links_lead_somewhere() -> None:
    for path in NOTEBOOKS.iterdir():
        if path.suffix in (".py", ".md"):
            for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
                assert target.startswith("https://") or (NOTEBOOKS / target).exists(), (path.name, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWS)
def test_a_notebook_runs_and_shows_what_it_promises(name: str, build: ModuleType, tmp_path: Path) -> None:
    if name == "tradeoff_mnist":
        try:
            load("mnist")
        except UserError as missing:
            pytest.skip(f"needs MNIST's files: {missing}")
    notebook = build.read(NOTEBOOKS / f"{name}.py")
    build.execute(notebook, tmp_path, small=True)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    text = "".join(
        output.get("text") or each.get("text/markdown") or each.get("text/plain", "")
        for output, each in zip(outputs, data, strict=True)
    )
    missing = [words for words in SHOWS[name] if not re.search(words, text)]
    assert not missing, text
    assert sum("image/png" in each for each in data) == CHARTS[name]
    assert "Traceback" not in text
