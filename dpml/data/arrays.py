"""The user's own data as NumPy arrays, in memory or in an `.npz` file."""

import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from accounting.errors import UserError
from dpml.data.formats import scale_bytes
from dpml.data.labeled import LabeledData
from dpml.paths import check_path

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_ALL = ", ".join(ARRAYS)

# More classes than ImageNet's are rather a mistake: record numbers or prices passed as labels.
_MOST_INFERRED_CLASSES = 1000

# What reading a file of any content may raise; MemoryError, where a header claims what no memory holds.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, RuntimeError, LookupError, SyntaxError, MemoryError),
    *(OverflowError, TokenError, zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError),
)


def load_npz(path: Path, *, name: str, classes: int | None = None) -> LabeledData:
    """Load an `.npz` file with the arrays `x_train, y_train, x_test, y_test`.

    What the arrays may be, `from_arrays` says. Other arrays in the file are ignored. Object arrays,
    which are pickles and could run code, are refused.

    Raises:
        UserError: The file is no `.npz` file, or damaged; an array is missing or of a wrong form.
    """
    return from_arrays(name, **_arrays(path, name, ARRAYS), classes=classes)


def load_inputs(path: str | Path, array: str) -> Tensor:
    """Load unlabelled examples, one array of an `.npz` file, as float32 `[n, …]`; see `from_arrays`.

    Raises:
        UserError: The file is no `.npz` file, or damaged; the array is missing, empty, of a wrong form, or
            not finite.
    """
    examples = _examples(str(path), array, _arrays(check_path(path, "file"), str(path), (array,))[array])
    if examples.ndim < 2 or examples.numel() == 0:
        raise UserError(
            f"{array} of {str(path)!r} must have shape [n, features] or [n, channels, height, width], got "
            f"{list(examples.shape)}."
        )
    if not bool(examples.isfinite().all()):
        raise UserError(f"{array} of {str(path)!r} holds NaN or infinite values: replace or remove them.")
    return examples


def load_labelled(path: str | Path, *, classes: int) -> LabeledData:
    """Load the arrays `x` and `y` of an `.npz` file, labelled examples; see `from_arrays`.

    Returns:
        The examples as test split, and as training split too.

    Raises:
        UserError: The file is no `.npz` file, or damaged; an array is missing or of a wrong form.
    """
    found = _arrays(check_path(path, "file"), str(path), ("x", "y"))
    x, y = found["x"], found["y"]
    return from_arrays(str(path), x_train=x, y_train=y, x_test=x, y_test=y, classes=classes)


def _arrays(path: Path, name: str, wanted: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file by name."""
    words = ", ".join(wanted)
    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        raise UserError(f"{name!r} is no plain file: save {words} by np.savez.")
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{name!r} holds a single array: save {words} by np.savez.")
            if missing := [array for array in wanted if array not in file.files]:
                raise UserError(f"{name!r} has no array {', '.join(missing)}: it must hold {words}.")
            return {array: _member(file, array, name) for array in wanted}
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(f"{name!r} is not a readable .npz file: save it by np.savez.") from error


def _member(file: np.lib.npyio.NpzFile, array: str, name: str) -> NDArray[Any]:
    try:
        values = file[array]
    except _DAMAGED as error:
        why = "holds Python objects" if "Object arrays" in str(error) else "is damaged"
        raise UserError(f"{array} of {name!r} {why}: save it as an array of numbers.") from error
    # NpzFile hands out the raw bytes of a member that is no .npy file.
    return np.asarray(values)


def from_arrays(
    name: str,
    *,
    x_train: ArrayLike,
    y_train: ArrayLike,
    x_test: ArrayLike,
    y_test: ArrayLike,
    classes: int | None = None,
) -> LabeledData:
    """Turn arrays of any real number type into validated data.

    The rules look at types and shapes alone, never at the values, so they cost no privacy:

    ==============================  ====================================================
    examples                        become
    ==============================  ====================================================
    `[n, features]`                 float32 `[n, features]`, same values
    `[n, height, width]`            float32 `[n, 1, height, width]`
    `[n, height, width, c]`         float32 `[n, c, height, width]`, if c is 1, 3 or 4 and
                                    `height` is not (else it is taken as channel-first)
    any other `[n, …]`              float32 `[n, …]`
    uint8 with three axes or more   as above, and divided by 255
    ==============================  ====================================================

    Args:
        name: What messages and summaries will call the data.
        x_train: Training examples, as in the table; bool, integer or float.
        y_train: Their labels, `[n]` or `[n, 1]`; integer or bool, numbered from 0.
        x_test: Test examples, of the same shape but for their number.
        y_test: Their labels.
        classes: The number of classes, which is public. By default one more than the largest label
            in `y_train`, up to 1,000.

    Raises:
        UserError: An array has a wrong type, shape or length, is empty, or holds values that are
            NaN, infinite, beyond float32, or no labels. The message names the array.
    """
    labels = _labels(name, "y_train", y_train)
    if classes is None:
        # Empty and negative labels are LabeledData's to refuse, in words that fit them better.
        classes = int(labels.max(initial=-1)) + 1
        if classes > _MOST_INFERRED_CLASSES:
            raise UserError(
                f"y_train of {name!r} holds the label {classes - 1}, which would make {classes} "
                "classes: number the classes from 0, or set classes if so many are meant."
            )
    return LabeledData(
        name=name,
        x_train=_examples(name, "x_train", x_train),
        y_train=torch.from_numpy(labels),
        x_test=_examples(name, "x_test", x_test),
        y_test=torch.from_numpy(_labels(name, "y_test", y_test)),
        classes=classes,
    )


def _labels(name: str, array: str, values: ArrayLike) -> NDArray[np.int64]:
    """Labels as int64 `[n]`; a shape that is wrong is left for LabeledData to refuse."""
    y = _array(values)
    if y.dtype.kind not in "biu":
        raise UserError(
            f"{array} of {name!r} must hold integer labels, got {y.dtype}: number the classes "
            "from 0 and save them as int64."
        )
    if y.dtype == np.uint64 and (largest := y.max(initial=0)) > np.iinfo(np.int64).max:
        raise UserError(f"{array} of {name!r} holds the label {largest}: number classes from 0.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    # A copy, for torch shares memory with an array and the caller may go on to change theirs.
    return y.astype(np.int64, order="C")


def _array(values: ArrayLike) -> NDArray[Any]:
    """An array, of objects where it is of nothing else."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError):  # rows of different lengths
        return np.empty(0, dtype=object)


def _examples(name: str, array: str, values: ArrayLike) -> Tensor:
    """Examples as contiguous float32, images channel-first, as the table of `from_arrays` says."""
    x = _array(values)
    if x.dtype.kind not in "biuf":
        raise UserError(f"{array} of {name!r} must hold real numbers, got {x.dtype}: convert it to float32.")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = np.moveaxis(x, 3, 1)
    if x.dtype == np.uint8 and x.ndim >= 4:
        return scale_bytes(np.ascontiguousarray(x))
    with np.errstate(over="ignore"):
        converted = x.astype(np.float32, order="C")
    if x.dtype.itemsize > 4 and (lost := np.isinf(converted) & np.isfinite(x)).any():
        raise UserError(
            f"{array} of {name!r} holds {x[lost][0]:g}, which is beyond float32's range: rescale "
            "it by a constant."
        )
    return torch.from_numpy(converted)
