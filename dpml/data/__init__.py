"""Data sets: public benchmarks by name, and the user's own by path.

>>> from dpml.data import load
>>> load("digits")
LabeledData('digits', 1437 + 360 examples of shape (1, 8, 8), 10 classes)
"""

import difflib
from os import PathLike
from pathlib import Path

from accounting.errors import UserError
from accounting.events import check_count, shown
from dpml.data.arrays import from_arrays, load_npz
from dpml.data.folder import load_image_folder
from dpml.data.labeled import LabeledData
from dpml.data.official import BENCHMARKS, load_benchmark, load_digits

__all__ = ["NAMES", "LabeledData", "from_arrays", "load"]

NAMES: tuple[str, ...] = ("digits", *BENCHMARKS)
"""The data sets that `load` knows by name."""


def load(
    dataset: str | PathLike[str],
    *,
    classes: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> LabeledData:
    """Load a data set: training examples, test examples and their labels.

    Nothing here is fitted to the records. Bytes are divided by 255, a constant; subtracting the
    data's mean and dividing by its standard deviation would release two statistics of private
    records, for which the accountant would have to see an event. What is taken to be public is the
    *form* of the data: the shape of an example, the number of records and of classes.

    Args:
        dataset: One of `NAMES`, or the path of an `.npz` file (see `dpml.data.arrays.load_npz`) or
            of an image folder (see `dpml.data.folder.load_image_folder`). A known name wins over a
            folder of that name: write `./mnist` for the folder.
        classes: The number of classes. By default a benchmark and an image folder know it, and
            an `.npz` file has one more than the largest label in `y_train`.
        image_size: `(height, width)` in pixels to which the images of an image folder are
            resized. By default they must be of equal size.

    Returns:
        The data, in memory, validated.

    Raises:
        UserError: The data set is unknown, missing, corrupt or not of the documented form, or it
            cannot be downloaded. The message names the culprit.
    """
    if not isinstance(dataset, str | PathLike):
        raise UserError(f"The data set must be a name or a path. Got {shown(dataset)}.")
    if classes is not None:
        classes = check_count(classes, "classes", "load")
    name = str(dataset)
    path = _path(name)
    if image_size is not None and (name in NAMES or not path.is_dir()):
        raise UserError(f"image_size is for image folders, which {shown(name)} is not: leave it out.")
    if name in NAMES:
        data = load_digits() if name == "digits" else load_benchmark(name)
        if classes not in (None, data.classes):
            raise UserError(f"{name!r} has {data.classes} classes, not {classes}: leave it out.")
        return data
    if path.is_dir():
        return load_image_folder(path, name=name, classes=classes, image_size=image_size)
    if path.is_file():
        return load_npz(path, name=name, classes=classes)
    raise UserError(_not_found(name))


def _path(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # an unknown user, a name too long, a null byte
        raise UserError(f"The data set {shown(name)} is no path that can be read ({error!s:.80}).") from error
    return path


def _not_found(name: str) -> str:
    known = ", ".join(NAMES)
    if close := difflib.get_close_matches(name.lower(), NAMES, n=1):
        return f"There is no data set {shown(name)}; did you mean {close[0]!r}? Known names: {known}."
    return (
        f"There is no data set or path {shown(name)}: give one of {known}, or the path of "
        "an .npz file or of an image folder."
    )
