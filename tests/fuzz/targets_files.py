"""Fuzz targets: files of all kinds, with bytes, values or types changed."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import shutil
import sqlite3
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fuzzing import Draw, kept_folder, target
from PIL import Image
from targets_accounting import valid
from targets_command import call, data_folder, own_file

import dpml
from accounting import Event, PrivacyAccountant, UserError
from dpml.data.formats import Blob, decode_cifar, decode_idx, read_gzip, read_tar
from dpml.features import cache
from dpml.pate.ensembles import _cached
from dpml.verify import verify_run
from recipes.charts.reading import load_runs
from recipes.table import read_runs


def write_mutated(draw: Draw, path: Path) -> None:
    """Change a file: its JSON, its bytes, or what it is."""
    kind = draw.random()
    if kind < 0.5 and path.suffix == ".json":
        with contextlib.suppress(ValueError):  # it was damaged before
            path.write_text(json.dumps(draw.mutated_json(json.loads(path.read_text()))))
    elif kind < 0.95:
        path.write_bytes(draw.mutated_bytes(path.read_bytes()))
    else:
        path.unlink()
        match draw.randrange(4):
            case 0:
                path.mkdir()
            case 1:
                path.symlink_to("/dev/zero")
            case 2:
                path.symlink_to(path)
            case _:
                os.mkfifo(path)


# ---------------------------------------------------------------- data


def _valid_data(data: Any) -> None:
    assert torch.isfinite(data.x_train).all()
    assert data.x_train.dtype == torch.float32
    assert len(data.x_train) == len(data.y_train) > 0


@target("file: npz, bytes", 2)
def _npz(draw: Draw) -> None:
    path = draw.folder / "own.npz"
    shutil.copy(data_folder() / "own.npz", path)
    write_mutated(draw, path)
    if draw.random() < 0.7:
        _valid_data(dpml.load(path))
    else:
        words = "train dpsgd --noise-multiplier 1 --delta 1e-5 --output r --dataset"
        call([*words.split(), str(path)])


@target("file: npz, headers", 4)
def _npz_headers(draw: Draw) -> None:
    """Arrays whose header says something else than what follows: huge shapes, objects, odd types."""
    shape = draw.choice(
        [(10**12, 4), (2**40,), (2**62, 2**62), (-1, 4), (0, 4), (), (40, 4), (10**9, 4), (10**5000,)]
    )
    descr = draw.choice(
        ["<f4", "<f8", "|O", "<U3", "|V8", "<i8", "nonsense", [("a", "<f4")], "|b1", ">f4", "<M8[s]"]
    )
    with contextlib.suppress(ValueError):
        header = (
            repr({"descr": descr, "fortran_order": draw.choice([True, False, 1]), "shape": shape}).encode()
            + b"\n"
        )
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(header), 65535)) + header + bytes(640)
        packed = zipfile.ZipFile("own.npz", "w", zipfile.ZIP_DEFLATED)
        with packed as archive, zipfile.ZipFile(data_folder() / "own.npz") as good:
            wrong = draw.choice(good.namelist()[:4])
            for name in good.namelist():
                archive.writestr(name, member if name == wrong else good.read(name))
    _valid_data(dpml.load("own.npz"))


@functools.cache
def _image() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(content, "png")
    return content.getvalue()


@target("file: image folder", 1.5)
def _images(draw: Draw) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (draw.folder / split / name).mkdir(parents=True)
            for number in range(2):
                (draw.folder / split / name / f"{number}.png").write_bytes(_image())
    victim = draw.choice(sorted(draw.folder.rglob("*.png")))
    match draw.randrange(5):
        case 0:
            mode = draw.choice(["1", "L", "P", "RGBA", "LA", "I;16", "RGB"])
            Image.new(mode, (8, draw.choice([8, 8, 9]))).save(victim)
        case 1:
            victim.rename(victim.with_suffix(draw.choice([".txt", ".gif", ".PNG", "", ".jpg"])))
        case _:
            write_mutated(draw, victim)
    _valid_data(dpml.load(draw.folder, image_size=draw.choice([None, None, (4, 4), (-1, 4), "x"])))


@target("file: IDX, CIFAR, archives", 5)
def _official(draw: Draw) -> None:
    images = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 3, 3) + bytes(18)
    labels = bytes((0, 0, 8, 1)) + struct.pack(">I", 2) + bytes(2)
    path = Path("packed")
    match draw.randrange(4):
        case 0:
            x, y = decode_idx([Blob("x", draw.mutated_bytes(images)), Blob("y", draw.mutated_bytes(labels))])
            assert len(x) == len(y)
        case 1:
            x, y = decode_cifar([Blob("x", draw.mutated_bytes(bytes(3073 * 2)))])
            assert x.shape[1:] == (3, 32, 32)
            assert y.max(initial=0) < 10
        case 2:
            path.write_bytes(draw.mutated_bytes(gzip.compress(images)))
            assert len(read_gzip(path, len(images))) == len(images)
        case _:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                member = tarfile.TarInfo("a")
                member.size = len(images)
                archive.addfile(member, io.BytesIO(images))
            content = draw.mutated_bytes(buffer.getvalue())
            path.write_bytes(
                gzip.compress(content) if draw.random() < 0.7 else draw.mutated_bytes(gzip.compress(content))
            )
            assert len(read_tar(path, {"a": len(images)})["a"]) == len(images)


# ---------------------------------------------------------------- runs


@functools.cache
def run_folder(method: str) -> Path:
    """A finished run of each method, on digits or small data. Copied before it is changed."""
    folder = kept_folder() / method
    if method == "dpsgd":
        run: Any = dpml.DPSGDRun(
            dataset=own_file(),
            epsilon=3.0,
            delta=1e-3,
            epochs=2,
            batch_size=8,
            accountant="rdp",
        )
        dpml.run_dpsgd(run, output=folder)
    else:
        run = dpml.PATERun(
            dataset="digits",
            epsilon=3.0,
            delta=1e-3,
            teachers=5,
            queries=20,
            teacher="linear",
            student_epochs=1,
            student_width=2,
            no_cache=True,
            features="values",
            accountant="rdp",
        )
        dpml.run_pate(run, output=folder)
    return folder


def _copied(draw: Draw, method: str) -> Path:
    return Path(shutil.copytree(run_folder(method), draw.folder / "run"))


@target("file: privacy_events.json", 2)
def _events(draw: Draw) -> None:
    path = _copied(draw, draw.choice(["dpsgd", "pate"])) / "privacy_events.json"
    if draw.random() < 0.5:
        data = json.loads(path.read_text())
        data["accountant"] = "rdp"
        path.write_text(json.dumps(draw.mutated_json(data)))
    else:
        write_mutated(draw, path)
    _, out = call(["account", "--events", str(path), "--delta", "1e-3", "--json"])
    answer = json.loads(out)
    assert answer["epsilon"] is None or answer["epsilon"] >= 0
    data = json.loads(path.read_text())
    assert not isinstance(data["schema_version"], bool)
    for body in [*data["planned"], *data["committed"]]:
        valid(Event.from_dict(body))


@target("file: a run, verified", 3)
def _verified(draw: Draw) -> None:
    """Whatever is changed in a folder: a claim that is believed is not below what the events cost."""
    folder = _copied(draw, draw.choice(["dpsgd", "dpsgd", "pate"]))
    names = ["privacy_events.json", "summary.json", "statement.md", "model.safetensors", "answers.sqlite"]
    for _ in range(draw.choice([1, 1, 2])):
        path = folder / draw.choice(names)
        if path.is_file():
            write_mutated(draw, path)
    verification = verify_run(folder, seconds=1.0)
    json.dumps(verification.to_dict())
    assert all("\n" not in check.words for check in verification.checks)
    assert "\n" not in verification.conclusion
    if verification.believable:
        summary = json.loads((folder / "summary.json").read_text())
        accountant = PrivacyAccountant("pld", neighboring_relation=summary["neighboring_relation"])
        for body in json.loads((folder / "privacy_events.json").read_text())["planned"]:
            accountant.record(Event.from_dict(body))
        assert summary["epsilon"] >= accountant.epsilon_bounds(summary["delta"])[0] * 0.99


@target("file: run.json, resumed", 2)
def _resumed(draw: Draw) -> None:
    folder = _copied(draw, "pate")
    (folder / "summary.json").unlink()
    write_mutated(draw, folder / draw.choice(["run.json", "run.json", "run.json", "answers.sqlite"]))
    with mock.patch("dpml.data.official._fetch", side_effect=UserError("There is no network.")):
        call(["resume", str(folder)])


@functools.cache
def _served() -> Path:
    folder = Path(shutil.copytree(run_folder("pate") / "ensemble", run_folder("pate").parent / "served"))
    predictor = dpml.PrivatePredictor(folder, budget=dpml.PrivacyBudget(20.0, 1e-3), noise_multiplier=1.0)
    predictor.predict(dpml.load("digits").x_test[:3])
    predictor.book.close()
    np.savez(folder.parent / "inputs.npz", x=dpml.load("digits").x_test[3:5].numpy())
    return folder


@target("file: an ensemble, asked", 2)
def _asked(draw: Draw) -> None:
    folder = Path(shutil.copytree(_served(), draw.folder / "ensemble"))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = draw.choice(files)
    if path.suffix == ".sqlite" and draw.random() < 0.7:
        with contextlib.closing(sqlite3.connect(path)) as base, contextlib.suppress(sqlite3.Error):
            title = json.loads(base.execute("SELECT text FROM title").fetchone()[0])
            change = draw.choice(
                [
                    "DROP TABLE queries",
                    "DROP TABLE title",
                    "DELETE FROM title",
                    "UPDATE queries SET state = 'odd'",
                    "UPDATE queries SET class = 'x'",
                    "UPDATE queries SET class = -7",
                    "ALTER TABLE queries DROP COLUMN class",
                    "PRAGMA application_id = 1",
                    "UPDATE title SET text = x'ff'",
                ]
            )
            if draw.random() < 0.6:
                base.execute("UPDATE title SET text = ?", (json.dumps(draw.mutated_json(title)),))
            else:
                base.execute(change)
            base.commit()
    else:
        write_mutated(draw, path)
    inputs = str(_served().parent / "inputs.npz")
    budget = draw.choice([[], ["--epsilon", "20", "--delta", "1e-3"]])
    _, out = call(["predict", str(folder), "--inputs", inputs, *budget, "--json"])
    answer = json.loads(out)
    assert all(found is None or 0 <= found < 10 for found in answer["classes"])
    assert type(answer["queries_left"]) is int


@target("file: sweeps, tables, results", 2)
def _tables(draw: Draw) -> None:
    folder = draw.folder / "sweep"
    shutil.copytree(run_folder("dpsgd"), folder / "runs" / "seed-0")
    match draw.randrange(4):
        case 0:
            path = folder / "sweep.parquet"
            read_runs(run_folder("dpsgd")).write_parquet(path)
            write_mutated(draw, path)
            load_runs([folder])
        case 1:
            write_mutated(draw, folder / "runs" / "seed-0" / "summary.json")
            load_runs([folder])
        case 2:
            path = folder / "results.json"
            summary = json.loads((run_folder("dpsgd") / "summary.json").read_text())
            path.write_text(json.dumps({"each": [summary, summary]}))
            write_mutated(draw, path)
            load_runs([path])
        case _:
            words = ["sweep", "dpsgd-digits", "--output", "new", "--epochs", "1,2", "--epsilon", "1"]
            call(words)
            write_mutated(draw, Path("new/sweep.json"))
            call(words)


@target("file: a tuning state", 1)
def _state(draw: Draw) -> None:
    line = "tune dpsgd-digits --output out --epsilon 3 --delta 1e-3 --learning-rate 0.1,0.2 --epochs 1"
    words = [*f"{line} --model mlp --accountant rdp --batch-size 8 --dataset".split(), own_file()]
    call(words)
    state = next(iter(Path("out").rglob("state.json")), None)
    assert state is not None
    write_mutated(draw, state)
    call(words)


@target("file: caches", 3)
def _caches(draw: Draw) -> None:
    """A cache that is damaged is none."""
    if draw.random() < 0.5:
        path, array = draw.folder / "block.npy", np.arange(24, dtype="f2").reshape(6, 4)
        cache._write(path, iter([array[:3], array[3:]]), 6)
        write_mutated(draw, path)
        found = cache._read(path)
        assert found is None or torch.equal(found, torch.from_numpy(array))
        return
    folder = Path(shutil.copytree(run_folder("pate") / "ensemble", draw.folder / "ensemble"))
    votes = np.zeros((7, 10), dtype="i8")
    votes[:, 3] = 5
    np.save(folder / "votes.npy", votes)
    write_mutated(draw, draw.choice(sorted(path for path in folder.iterdir() if path.is_file())))
    voters = _cached(folder, 7, 10, 5)
    assert voters is None or (voters.votes.sum(dim=1) == 5).all()
