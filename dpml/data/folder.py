"""The user's own images, in a folder for each class."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from accounting.errors import UserError
from accounting.events import shown
from dpml.data.formats import Bytes, scale_bytes
from dpml.data.labeled import LabeledData

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# What file managers leave behind without being asked and, on their own system, hide.
_HIDDEN_ELSEWHERE = ("Thumbs.db", "desktop.ini")

Labeled = list[tuple[Path, int]]


def load_image_folder(
    folder: Path,
    *,
    name: str,
    classes: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> LabeledData:
    """Load images from `train/CLASS/*.png` and `test/CLASS/*.png`, in [0, 1].

    PNG, JPEG, BMP and WebP are read. Labels number the names of the folders in `train`, sorted as
    text (so 10 comes before 2); `test` may lack some of them. Images are `[n, 1, height, width]`
    if all of them, in both splits, are greyscale, and `[n, 3, height, width]` otherwise;
    transparency is dropped. Hidden files are ignored. Any other file that is no image is an error:
    a data set that silently misses records is worse than one that does not load.

    Args:
        folder: The folder with `train` and `test`.
        name: What messages and summaries will call the data.
        classes: Must equal the number of folders in `train`, if given.
        image_size: `(height, width)` in pixels, to which every image is resized, whatever its
            proportions. By default all images must be of equal size.

    Raises:
        UserError: A folder is missing or empty, a file is no readable 8-bit image, or the images'
            sizes differ. The message names the folder or file.
    """
    if image_size is not None and not _is_size(image_size):
        raise UserError(f"image_size must be two positive integers, got {shown(image_size)}.")
    names = _class_names(folder / "train")
    if classes not in (None, len(names)):
        raise UserError(
            f"{str(folder / 'train')!r} has {len(names)} class folders, but classes is {classes}: "
            "leave classes out."
        )
    if unknown := sorted(set(_class_names(folder / "test")) - set(names)):
        raise UserError(
            f"The class {unknown[0]!r} is in {str(folder / 'test')!r} but not in 'train': make the "
            "folders' names equal."
        )
    train, test = _files(folder / "train", names), _files(folder / "test", names)
    size, channels = _common_form(train + test, image_size)
    return LabeledData(
        name=name,
        x_train=scale_bytes(_pixels(train, size, channels)),
        y_train=torch.tensor([label for _, label in train]),
        x_test=scale_bytes(_pixels(test, size, channels)),
        y_test=torch.tensor([label for _, label in test]),
        classes=len(names),
    )


def _is_size(size: tuple[int, int]) -> bool:
    return (
        isinstance(size, tuple | list)
        and len(size) == 2
        and all(type(side) is int and side > 0 for side in size)
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in _HIDDEN_ELSEWHERE
    )


def _class_names(split: Path) -> list[str]:
    if not split.is_dir():
        raise UserError(
            f"There is no folder {str(split)!r}: an image folder holds train/CLASS/*.png and "
            "test/CLASS/*.png."
        )
    paths = _visible(split)
    if strays := [path for path in paths if not path.is_dir()]:
        raise UserError(f"{str(strays[0])!r} is in no class: put it into a class's folder, or remove it.")
    if not paths:
        raise UserError(f"{str(split)!r} is empty: make a folder for each class in it.")
    return [path.name for path in paths]


def _files(split: Path, names: list[str]) -> Labeled:
    """The images of a split with their labels, sorted by class and then by name."""
    found: Labeled = []
    for label, name in enumerate(names):
        folder = split / name
        if not folder.is_dir():  # only of test: train's folders gave the names
            continue
        paths = _visible(folder)
        if not paths:
            raise UserError(f"{str(folder)!r} is empty: add images, or remove the folder.")
        for path in paths:
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                raise UserError(f"{str(path)!r} is not an image ({', '.join(SUFFIXES)}): remove or hide it.")
            found.append((path, label))
    return found


def _common_form(files: Labeled, image_size: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """The `(height, width)` and the number of channels of all images, from their headers."""
    size, channels = image_size, 1
    for path, _ in files:
        image = _open(path)
        height, width = image.height, image.width
        if image.mode.startswith(("I", "F")):
            raise UserError(
                f"{str(path)!r} has more than 8 bits per channel: scale it by a constant and save it with 8."
            )
        if image.mode not in ("1", "L"):
            channels = 3
        size = size or (height, width)
        if image_size is None and size != (height, width):
            raise UserError(
                f"{str(path)!r} is {height}×{width} pixels, {str(files[0][0])!r} is "
                f"{size[0]}×{size[1]}: make them equal, or set image_size."
            )
    assert size is not None  # noqa: S101 (every class has an image)
    return size, channels


def _open(path: Path, mode: str | None = None) -> Image.Image:
    """The image's header or, with a mode, its pixels in that mode."""
    try:
        with Image.open(path) as image:
            if mode is None:
                return image
            # A palette with transparency warns, unless it goes by way of RGBA.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return opaque.convert(mode)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise UserError(f"{str(path)!r} is not a readable image: replace or remove it.") from error


def _pixels(files: Labeled, size: tuple[int, int], channels: int) -> Bytes:
    """Decode and resize to `[n, channels, height, width]`."""
    height, width = size
    pixels = np.empty((len(files), channels, height, width), np.uint8)
    for index, (path, _) in enumerate(files):
        image = _open(path, "L" if channels == 1 else "RGB")
        if (image.height, image.width) != size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels[index] = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    return pixels
