from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpml.data import load


def draw(path: Path, value=0, *, size=(4, 6), mode="L", **options) -> Path:
    """Save an image of one colour, `size` being (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; the value of a pixel tells the file."""
    root = tmp_path / "pets"
    for split, first in (("train", 10), ("test", 50)):
        for i, name in enumerate(("dog", "cat")):
            draw(root / split / name / "b.png", first + 2 * i)
            draw(root / split / name / "a.png", first + 2 * i + 1)
    return root


def test_order_values_and_labels(folder: Path):
    data = load(folder)
    assert data.name == str(folder)
    assert not data.is_public_benchmark
    assert data.classes == 2
    assert data.x_train.shape == (4, 1, 4, 6)
    # cat before dog, a before b
    assert (data.x_train[:, 0, 0, 0] * 255).round().tolist() == [13, 12, 11, 10]
    assert data.y_train.tolist() == [0, 0, 1, 1]
    assert (data.x_test[:, 0, 3, 5] * 255).round().tolist() == [53, 52, 51, 50]


def test_pixels_are_exact_and_channel_first(folder: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "train" / "cat" / "0.bmp")
    data = load(folder)
    assert data.example_shape == (3, 4, 6)
    expected = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)
    assert torch.equal(data.x_train[0], expected)
    assert torch.equal(data.x_train[1], torch.full((3, 4, 6), 13 / 255))  # grey, as RGB


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "webp"])
def test_formats(folder: Path, suffix: str):
    draw(folder / "train" / "cat" / f"0.{suffix}", (200, 100, 50), mode="RGB")
    colour = load(folder).x_train[0].mean((1, 2))
    torch.testing.assert_close(colour, torch.tensor([200, 100, 50]) / 255, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("mode", "value", "channels", "red"),
    [
        ("1", 1, 1, 1.0),
        ("L", 51, 1, 0.2),
        ("LA", (51, 0), 3, 0.2),
        ("P", 0, 3, 0.0),
        ("RGBA", (51, 2, 3, 0), 3, 0.2),
    ],
)
def test_modes(folder: Path, mode, value, channels, red):
    draw(folder / "train" / "cat" / "0.png", value, mode=mode)
    data = load(folder)
    assert data.example_shape == (channels, 4, 6)
    assert data.x_train[0, 0, 0, 0].item() == pytest.approx(red)


def test_a_palette_with_transparency(folder: Path):
    draw(folder / "train" / "cat" / "0.png", 0, mode="P", transparency=bytes((0, 128)))
    assert load(folder).example_shape == (3, 4, 6)


def test_resizing(folder: Path):
    draw(folder / "train" / "cat" / "0.png", 255, size=(20, 3))
    data = load(folder, image_size=(8, 5))
    assert data.example_shape == (1, 8, 5)
    assert torch.equal(data.x_train[0], torch.ones(1, 8, 5))


def test_test_may_lack_a_class_and_hidden_files_are_ignored(folder: Path):
    for path in (folder / "test" / "cat").iterdir():
        path.unlink()
    (folder / "test" / "cat").rmdir()
    for name in (".DS_Store", "train/.DS_Store", "train/cat/.DS_Store", "train/cat/Thumbs.db"):
        (folder / name).write_bytes(b"")
    data = load(folder, classes=2)
    assert data.y_test.tolist() == [1, 1]
    assert data.classes == 2


def test_sizes_must_be_equal(refused, folder: Path):
    odd = draw(folder / "train" / "cat" / "b.png", size=(4, 7))
    refused(lambda: load(folder), str(odd), "4×7", "4×6", "image_size")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_image(refused, folder: Path, content: bytes):
    bad = folder / "test" / "cat" / "b.png"
    bad.write_bytes(content)
    refused(lambda: load(folder), str(bad), "not a readable image")


def test_truncated_image(refused, folder: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    bad = folder / "train" / "dog" / "b.png"
    Image.fromarray(pixels).save(bad)
    bad.write_bytes(bad.read_bytes()[:50])
    refused(lambda: load(folder), str(bad), "not a readable image")


def test_more_than_eight_bits(refused, folder: Path):
    deep = draw(folder / "train" / "dog" / "b.png", 1000, mode="I;16")
    refused(lambda: load(folder), str(deep), "8 bits")


@pytest.mark.parametrize("name", ["train/cat/labels.csv", "train/cat/more/0.png", "train/0.png"])
def test_strays(refused, folder: Path, name: str):
    stray = draw(folder / "0.png").rename(folder / "0")
    (folder / name).parent.mkdir(exist_ok=True)
    stray.rename(folder / name)
    refused(lambda: load(folder), "train", "remove")


def test_empty_class_or_split(refused, folder: Path):
    (folder / "train" / "emu").mkdir()
    refused(lambda: load(folder), str(folder / "train" / "emu"), "empty")
    empty = folder.parent / "empty"
    (empty / "train").mkdir(parents=True)
    refused(lambda: load(empty), str(empty / "train"), "empty")


def test_missing_split(refused, folder: Path):
    (folder / "test").rename(folder / "valid")
    refused(lambda: load(folder), str(folder / "test"), "test/CLASS/*.png")


def test_class_only_in_test(refused, folder: Path):
    draw(folder / "test" / "emu" / "0.png")
    refused(lambda: load(folder), "'emu'", "test", "train")


def test_one_class_is_none(refused, folder: Path):
    for split in ("train", "test"):
        (folder / split / "dog").rename(folder / f"{split}-dog")
    refused(lambda: load(folder), "classes", "at least 2")


@pytest.mark.parametrize("size", [(0, 4), (4,), (4.0, 4.0), (-1, 2)])
def test_image_size_is_checked(refused, folder: Path, size):
    refused(lambda: load(folder, image_size=size), "image_size", repr(size))


def test_classes_must_agree(refused, folder: Path):
    refused(lambda: load(folder, classes=3), "train", "2 class", "3")
