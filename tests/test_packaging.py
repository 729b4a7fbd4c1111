import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("accounting", "dpml", "recipes")


def python(code: str) -> str:
    """Run code in a fresh interpreter, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""


def test_accounting_needs_numpy_and_scipy_alone() -> None:
    blocked = {
        *("torch", "opacus", "sklearn", "matplotlib", "click", "rich", "tensorboard", "pooch"),
        *("cryptography", "dp_accounting", "mpmath", "docstring_parser", "safetensors", "PIL"),
        *("dpml", "recipes"),
    }
    code = BLOCKER.format(blocked=blocked) + (
        "import pkgutil, importlib, accounting\n"
        "for module in pkgutil.walk_packages(accounting.__path__, 'accounting.'):\n"
        "    importlib.import_module(module.name)\n"
        "accountant = accounting.PrivacyAccountant()\n"
        "accountant.record(accounting.Gaussian(2.0))\n"
        "print(accountant.epsilon(1e-5))\n"
    )
    assert 1.9 < float(python(code)) < 2.1


def test_importing_dpml_imports_no_torch() -> None:
    code = (
        "import sys, dpml\n"
        "assert not {'torch', 'opacus', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert {'train_dpsgd', 'DPSGDConfig'} <= set(dir(dpml))\n"
        "dpml.DPSGDConfig(epsilon=1, delta=1e-5)\n"
        "assert 'torch' not in sys.modules\n"
        "from dpml import train_dpsgd\n"
        "assert 'torch' in sys.modules"
    )
    python(code)


def test_dpml_s_names_are_what_they_say() -> None:
    import dpml

    for name in dpml.__all__:
        assert getattr(dpml, name).__doc__, name
    with pytest.raises(AttributeError, match="'nothing'"):
        dpml.nothing  # noqa: B018


def test_recipes_need_no_torch() -> None:
    python(
        "import sys\n"
        "from dpml.registry import default_run\n"
        "assert default_run('dpsgd', 'digits', private=True).dataset == 'digits'\n"
        "assert 'torch' not in sys.modules"
    )


def test_every_room_is_typed() -> None:
    for room in ROOMS:
        assert (ROOT / room / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    if done.returncode and "hatchling" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("the build backend can neither be found nor downloaded")
    assert done.returncode == 0, done.stderr
    [path] = folder.iterdir()
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_exactly_three_packages_ship(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == set(ROOMS)
    tracked = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(names) == tracked
    for room in ROOMS:
        assert f"{room}/py.typed" in names
    assert all(name.endswith((".py", "py.typed", "README.md", ".cpp")) for name in names)


@pytest.mark.slow
def test_the_wheel_registers_command_and_recipes(wheel: zipfile.ZipFile) -> None:
    [info] = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entries = ConfigParser()
    entries.optionxform = str  # type: ignore[assignment, method-assign]
    entries.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert entries["console_scripts"]["dpml"] == "dpml.cli:run"
    recipes = entries["dpml.recipes"]
    assert {"dpsgd-digits", "dpsgd-mnist", "dpsgd-fashion-mnist", "dpsgd-cifar10"} <= set(recipes)
    for target in recipes.values():
        module, _, function = target.partition(":")
        assert f"def {function}(" in wheel.read(f"{module.replace('.', '/')}.py").decode()
    metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "dpml"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
