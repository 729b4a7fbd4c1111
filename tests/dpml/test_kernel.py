"""The compiled kernel gives the portable sums, however it is built, and is done without where it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_example_at_a_time import KERNEL, PORTABLE, difference, length, micro_batch, targets_for, weighted
from torch import nn

from dpml.gradients import Clipping, native
from dpml.models.layers import StandardizedConv2d

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CLIPPING = Clipping(0.3)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, stride=2, padding=1),
        nn.GroupNorm(4, 20),
        nn.Tanh(),
        StandardizedConv2d(20, 9, 3),
        nn.Tanh(),
        nn.Conv2d(9, 5, (1, 3), dilation=(1, 2), bias=False),
        nn.Flatten(),
    ), (3, 15, 14)


def sequences():
    return nn.Sequential(nn.Linear(37, 21), nn.LayerNorm(21), nn.Tanh(), nn.Linear(21, 5, bias=False)), (
        70,
        37,
    )


def wide():
    return nn.Sequential(nn.Linear(1501, 33), nn.Tanh(), nn.Linear(33, 2)), (1501,)


networks = pytest.mark.parametrize("make", [convolutions, sequences, wide])


def problem(make, n=9):
    torch.manual_seed(0)
    model, shape = make()
    x = torch.randn(n, *shape)
    return model, micro_batch(x, targets_for(model, x))


def sums(engine, model, batch):
    return engine.clipped_sum(model, weighted, [batch], CLIPPING).gradients


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No kernel is loaded, and none is in the cache; afterwards all is as it was."""
    monkeypatch.delenv("DPML_NO_KERNEL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    yield tmp_path / "dpml" / "kernels"
    native._load.cache_clear()


def assert_gives_the_same_sums(make):
    model, batch = problem(make)
    a, b = sums(KERNEL, model, batch), sums(PORTABLE, model, batch)
    assert difference(a, b) <= 1e-6 * 9 * CLIPPING.norm
    assert length(b) > 0.1 * CLIPPING.norm


# ---------------------------------------------------------------- builds

BUILDS = {
    "native": ["-O3", "-march=native"],
    "AVX2": ["-O3", "-mavx2", "-mfma", "-mno-avx512f"],
    "any x86-64": ["-O2", "-march=x86-64"],
    "not optimised": ["-O0"],
}


def runs_here(flags):
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        known = []
    wanted = {"-mavx2": ["avx2", "fma"], "-march=x86-64": ["sse2"]}
    return all(name in known for flag in flags for name in wanted.get(flag, []))


@needs_compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("flags", BUILDS.values(), ids=BUILDS)
def test_every_build_gives_the_portable_sums(monkeypatch, flags):
    if not runs_here(flags):
        pytest.skip("for another processor")
    others = [flag for flag in native._FLAGS if not flag.startswith(("-O", "-march"))]
    monkeypatch.setattr(native, "_FLAGS", [*flags, *others])
    assert native.kernel() is not None
    for make in (convolutions, sequences, wide):
        assert_gives_the_same_sums(make)


@needs_compiler
def test_a_library_is_compiled_once(fresh, monkeypatch):
    assert native.kernel() is not None
    [library] = fresh.iterdir()
    made = library.stat().st_mtime_ns
    native._load.cache_clear()
    assert native.kernel() is not None
    assert [(f, f.stat().st_mtime_ns) for f in fresh.iterdir()] == [(library, made)]
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-DANOTHER"])
    native._load.cache_clear()
    assert native.kernel() is not None
    assert len(list(fresh.iterdir())) == 2


# ---------------------------------------------------------------- without the kernel


def script(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


def no_compiler(monkeypatch, _):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")


def no_such_compiler(monkeypatch, _):
    monkeypatch.setenv("CXX", "/nowhere/c++")


def broken_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", script(folder, "broken", "exit 1"))


def refusing_compiler(monkeypatch, folder):
    refuses = script(folder, "refuses", 'case "$*" in --version) echo 1;; *) echo error >&2; exit 1;; esac')
    monkeypatch.setenv("CXX", refuses)


def compiler_of_nothing(monkeypatch, folder):
    monkeypatch.setenv("CXX", script(folder, "nothing", "exit 0"))


def compiler_of_rubbish(monkeypatch, folder):
    rubbish = 'for last; do :; done; [ "$1" = --version ] || echo rubbish > "$last"'
    monkeypatch.setenv("CXX", script(folder, "rubbish", rubbish))


def folder_that_is_a_file(monkeypatch, folder):
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def switched_off(monkeypatch, _):
    monkeypatch.setenv("DPML_NO_KERNEL", "1")


@networks
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "fails",
    [
        no_compiler,
        no_such_compiler,
        broken_compiler,
        refusing_compiler,
        compiler_of_nothing,
        compiler_of_rubbish,
        folder_that_is_a_file,
        switched_off,
    ],
)
def test_without_a_kernel_the_sums_are_the_portable_ones(make, fails, monkeypatch, tmp_path):
    fails(monkeypatch, tmp_path)
    assert native.kernel() is None
    model, batch = problem(make)
    assert all(map(torch.equal, sums(KERNEL, model, batch), sums(PORTABLE, model, batch)))


@pytest.fixture(scope="module")
def library():
    """The compiled library, for all tests of the module."""
    return native._compiled().read_bytes()


def put_into_the_cache(monkeypatch, folder, contents):
    """A compiler that gives these bytes, so that a process finds them where it looks for the library."""
    (folder / "contents").write_bytes(contents)
    copies = f'for last; do :; done; [ "$1" = --version ] || cp "{folder}/contents" "$last"'
    monkeypatch.setenv("CXX", script(folder, "copies", copies))
    assert native._compiled().read_bytes() == contents


@needs_compiler
@pytest.mark.parametrize("spoilt", ["empty", "rubbish", "the beginning"])
def test_a_spoilt_library_in_the_cache_is_replaced_or_done_without(
    library, fresh, spoilt, monkeypatch, tmp_path
):
    del fresh
    contents = {"empty": b"", "rubbish": b"rubbish", "the beginning": library[:100]}[spoilt]
    put_into_the_cache(monkeypatch, tmp_path, contents)
    for make in (convolutions, sequences):
        assert_gives_the_same_sums(make)


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_another_library_in_the_cache_is_replaced_or_done_without(monkeypatch, tmp_path):
    subprocess.run([COMPILER, "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "other"], check=True)
    put_into_the_cache(monkeypatch, tmp_path, (tmp_path / "other").read_bytes())
    assert_gives_the_same_sums(sequences)


ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("native", {native.__file__!r})
native = sys.modules["native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print("kernel" if native.kernel() else "none")
"""  # loads the module from its file, since the whole package takes seconds to import


@needs_compiler
def test_a_library_that_was_cut_short_is_replaced(library, fresh, monkeypatch, tmp_path):
    # With its table of segments in place it would be loaded, and the process killed by SIGBUS.
    del fresh
    put_into_the_cache(monkeypatch, tmp_path, library)
    native._compiled().write_bytes(library[: len(library) // 2])
    alone = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert (alone.returncode, alone.stdout.strip()) == (0, "kernel")


# ---------------------------------------------------------------- threads and processes


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@networks
@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_number_of_threads_only_rounds_otherwise(make, n, threads):
    model, batch = problem(make, n)
    one = sums(KERNEL, model, batch)
    for count in (2, 3, 16):
        threads(count)
        first, again = sums(KERNEL, model, batch), sums(KERNEL, model, batch)
        assert difference(first, one) <= 1e-6 * n * CLIPPING.norm
        assert all(map(torch.equal, first, again))
    threads(1)
    assert all(map(torch.equal, sums(KERNEL, model, batch), one))


@needs_compiler
def test_processes_may_compile_at_the_same_time(fresh):
    command = [sys.executable, "-c", ALONE]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["kernel"] * 2
    assert len(list(fresh.iterdir())) == 1
