"""Checkpoints: one private file from which a killed run goes on as if nothing had happened.

Steps that were done after the last checkpoint are lost in a crash, though their noise had been drawn. Two
things make sure that to do them once more is no second release:

- **Nothing of them was shown.** A step is committed, its noise drawn, the result persisted, and only then is
  a figure shown that depends on it. What a crash takes away was in the memory of the process alone.
- **They are done identically.** The checkpoint holds the keys of sampling, noise and masks, so the same
  noise meets the same sum of the same records at the same weights. Other data, settings, versions or another
  processor are refused, for there the sum might differ, and noise that two sums share is none.

Nor do the keys open what was shown before: every step's streams get new ones (`Randomness.renew`). After the
last step a checkpoint without keys takes the place of that with keys, before the results are written, and
when these are there, nothing is left of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import TensorDataset

from accounting import UserError
from accounting.budget import Receipt
from dpml.gradients import native
from dpml.outputs import RunFolder, write_private
from dpml.paths import require_plain
from dpml.resuming import CHECKPOINT_FOLDER, EVENTS_FILE, CannotResume, recorded_checkpoint, write_run
from dpml.training_state import TrainingState

CHECKPOINT_FILE = "checkpoint.safetensors"
_VERSION = "1"
_UNSEALED = "SHA-256 of this file, with these words where it stands.".ljust(64, ".")
_PAUSE, _SHARE = 60.0, 0.01
_SOME_RECORDS = 64
_MOST_THREADS = 4096


class Checkpoint:
    """The checkpoint of a run in its output folder; of a run without one, nothing.

    It is written before the first release, before any figure is shown that depends on releases, and besides
    once a minute, or as often as costs a hundredth of the time, whichever is less. Its file has mode 600, in
    a folder of mode 700, and is replaced as a whole.

    Args:
        folder: The run's.
        state: What is kept.
        about: What must be the same for the run to go on: settings and plan, as JSON.
        records: The training set, of which a keyed digest is kept.
        device: Where it computes.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        state: TrainingState,
        about: Mapping[str, Any],
        records: Any,
        device: torch.device,
    ) -> None:
        self._run_folder = folder
        self._folder = None if folder is None else folder.path / CHECKPOINT_FOLDER
        self._state, self._records = state, records
        self._about = {**json.loads(json.dumps(about)), "environment": environment(device)}
        self._next = 0.0

    @contextmanager
    def opened(self, *, resume: bool, receipt: Receipt | None = None) -> Iterator[None]:
        """Around the run: take up its state, or keep that of the beginning, and where a ledger has it.

        The block runs with as many threads as the run began with.

        Raises:
            CannotResume: if there is nothing to go on with, or it is damaged, or of another run.
            UserError: if another process goes on with the run, or a part of the state cannot be kept.
        """
        if self._folder is None:
            yield
            return
        path, threads = self._folder / CHECKPOINT_FILE, torch.get_num_threads()
        if resume and not path.exists() and (self._folder.parent / EVENTS_FILE).exists():
            raise CannotResume(f"The run {str(self._folder.parent)!r} has lost its checkpoint; start anew.")
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with _alone(self._folder):
            try:
                if path.exists():
                    self._take_up(path)
                else:
                    self._begin(receipt)
                yield
            finally:
                torch.set_num_threads(threads)

    def keep(self, *, needed: bool, over: bool = False) -> None:
        """Write the state if it is needed or was not kept for long; without keys if the run is over."""
        if self._folder is not None and (needed or over or time.monotonic() > self._next):
            self._write(with_keys=not over)

    def keep_interrupted(self) -> bool:
        """Keep the state of a run that is stopped. False if it was caught in the middle of a step."""
        if self._folder is not None and self._state.whole:
            self._write(with_keys=True)
        return self._folder is None or self._state.whole

    def delete(self) -> None:
        """The results are there: keep nothing."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def _begin(self, receipt: Receipt | None) -> None:
        assert self._run_folder is not None  # noqa: S101 - callers have looked
        self._data_key = os.urandom(32)
        write_run(self._run_folder, "dpsgd", self._about["settings"], receipt, self._name)
        self._about |= {"threads": torch.get_num_threads()}
        self._about["data"] = fingerprint(self._records, self._data_key)
        self._write(with_keys=True)

    @property
    def _name(self) -> str:
        """What tells a run's checkpoints from those of other runs, for its record, which others may read."""
        return hashlib.sha256(self._data_key).hexdigest()

    def _write(self, *, with_keys: bool) -> None:
        assert self._folder is not None  # noqa: S101 - callers have looked
        began = time.monotonic()
        kept = self._state.kept(with_keys=with_keys)
        content = {"about": self._about, "data_key": self._data_key.hex(), "state": kept}
        write(self._folder / CHECKPOINT_FILE, content)
        now = time.monotonic()
        self._next = now + max(_PAUSE, (now - began) / _SHARE)

    def _take_up(self, path: Path) -> None:
        found = read(path)
        try:
            about, self._data_key = found["about"], bytes.fromhex(found["data_key"])
            if recorded_checkpoint(path.parent.parent) != self._name:
                raise CannotResume(f"{str(path)!r} is not of the run in this folder; bring back its own.")
            self._about |= {"threads": about["threads"]}
            if type(about["threads"]) is not int or not 1 <= about["threads"] <= _MOST_THREADS:
                raise ValueError(f"{about['threads']!r:.60} threads")
            _require_same(path, about, self._about)
            self._about["data"] = fingerprint(self._records, self._data_key)
            if about["data"] != self._about["data"]:
                raise CannotResume(f"{str(path)!r} is of a run on other records; bring the same.")
            self._state.restore(found["state"])
        except CannotResume:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CannotResume(
                f"{str(path)!r} is of another model or optimizer ({error!s:.100}); bring the same."
            ) from error
        torch.set_num_threads(about["threads"])


def _require_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CannotResume with what differs first."""
    for part, advice in (
        ("environment", "go on where it began, or start a new run"),
        ("settings", "keep its settings"),
        ("plan", "keep its settings"),
    ):
        if then[part] == now[part]:
            continue
        if part == "plan":
            raise CannotResume(f"{str(path)!r} is of a run with another plan; {advice}.")
        names = [name for name in {**then[part], **now[part]} if then[part].get(name) != now[part].get(name)]
        what = ", ".join(f"{n} {then[part].get(n)!r:.60}, now {now[part].get(n)!r:.60}" for n in names[:3])
        raise CannotResume(f"{str(path)!r} is of a run with {what}: {advice}.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"The run {str(folder.parent)!r} is going on in another process.") from None
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------- what must be the same


def environment(device: torch.device) -> dict[str, Any]:
    """What else than settings and data the last bit of a sum may depend on."""
    processor = hashlib.sha256(native.processor().encode()).hexdigest()[:12]
    library = native.kernel() if device.type == "cpu" else None
    return {
        **{package: version(package) for package in ("dpml", "torch", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{torch.backends.cpu.get_cpu_capability()} {processor}",
        "kernel": None if library is None else Path(library._name).stem,
    }


def fingerprint(records: Any, key: bytes) -> str:
    """A digest of a training set, by which nobody without the key can tell what is in it.

    Of tensors it is one of all records; else of how many there are and some of them, which the key chooses.
    """
    digest = hashlib.blake2b(key=key)
    if isinstance(records, TensorDataset):
        _digest_into(digest, list(records.tensors))
        return digest.hexdigest()
    chosen = np.random.default_rng(list(key)).integers(len(records), size=_SOME_RECORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # records may be augmented
        _digest_into(digest, [len(records), *(records[i] for i in sorted({0, *chosen.tolist()}))])
    return digest.hexdigest()


def _digest_into(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, list | tuple):
        digest.update(f"{len(value)} parts".encode())
        for part in value:
            _digest_into(digest, part)
    elif isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu().contiguous() if isinstance(value, Tensor) else value
        digest.update(f"{array.dtype} {tuple(array.shape)}".encode())
        flat = array.view(-1).view(torch.uint8).numpy() if isinstance(array, Tensor) else array.tobytes()
        digest.update(flat)
    else:
        digest.update(repr(value).encode())


# ---------------------------------------------------------------- the file


def write(path: Path, content: Any) -> None:
    """Write dictionaries, lists, tuples, numbers, words and tensors to one private file, whole or not at all.

    It is a safetensors file: the tensors, and the rest as JSON in its metadata, with a SHA-256 over all.

    Raises:
        UserError: if something else is among them.
    """
    tensors: dict[str, Tensor] = {}
    words = json.dumps(_encoded(content, tensors))
    metadata = {"version": _VERSION, "sha256": _UNSEALED, "content": words}
    unsealed = safetensors.torch.save(tensors, metadata)
    seal = hashlib.sha256(unsealed).hexdigest()
    write_private(path, unsealed.replace(_UNSEALED.encode(), seal.encode(), 1))


def read(path: Path) -> Any:
    """What was written.

    Raises:
        CannotResume: if the file cannot be read, is no checkpoint of this version, or is damaged.
    """
    try:
        require_plain(path)
        found = path.read_bytes()
        header = json.loads(found[8 : 8 + int.from_bytes(found[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["version"] != _VERSION:
            raise CannotResume(
                f"{str(path)!r} is a checkpoint of version {metadata['version']!r:.20}; this is {_VERSION}."
            )
        seal = metadata["sha256"].encode()
        if hashlib.sha256(found.replace(seal, _UNSEALED.encode(), 1)).hexdigest().encode() != seal:
            raise ValueError("its SHA-256 differs")
        return _decoded(json.loads(metadata["content"]), safetensors.torch.load(found))
    except CannotResume:
        raise
    except OSError as error:
        raise CannotResume(f"The checkpoint {str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise CannotResume(f"The checkpoint {str(path)!r} is damaged ({error!s:.100}).") from error


def require_keepable(value: Any) -> None:
    """Raise UserError if something is among `value` that no checkpoint can keep."""
    _encoded(value, {})


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON. Tensors go into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, list):
        return [_encoded(part, tensors) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(part, tensors) for part in value]}
    if isinstance(value, dict):
        return {"pairs": [[_encoded(part, tensors) for part in pair] for pair in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"A checkpoint keeps tensors, numbers and words. Got {type(value).__name__} in the state of the "
        "optimizer; choose another one, or train without output."
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    parts = [_decoded(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else dict(parts)
