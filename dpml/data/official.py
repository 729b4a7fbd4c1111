"""The public benchmarks: where their files are, what they must contain, and how they are found.

A file is looked for in the folder `$DPML_DATA`, then in the user's cache, and then downloaded into
the cache. Each data set's facts are in one table, `BENCHMARKS`.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import torch

from accounting.errors import UserError
from dpml.data.formats import (
    Blob,
    Bytes,
    corrupt,
    decode_cifar,
    decode_idx,
    read_gzip,
    read_plain,
    read_tar,
    scale_bytes,
)
from dpml.data.labeled import LabeledData


@dataclass(frozen=True, kw_only=True)
class File:
    """One official file, uncompressed."""

    path: str
    """Below the data folder and, for a file from an archive, within the archive."""
    size: int
    """In bytes."""
    sha256: str | None = None
    """Of the content; None where genuine copies differ (in the order of their records)."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """One compressed file at its canonical address, and the official files that are in it."""

    url: str
    md5: str
    """Of the compressed file, as its publisher states it."""
    packed: tuple[str, ...]
    """Paths below the data folder at which it is accepted; a download goes to the first."""
    holds: tuple[File, ...]
    """What it unpacks to. These are accepted in its place, all together."""
    ignored: tuple[str, ...] = ()
    """What else it contains."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A public data set."""

    downloads: tuple[Download, ...]
    train: tuple[str, ...]
    """The `File.path`s that `decode` takes for the training set."""
    test: tuple[str, ...]
    """The same for the test set."""
    decode: Callable[[Sequence[Blob]], tuple[Bytes, Bytes]]
    """From those files to images `[n, channels, height, width]` and labels `[n]`."""
    classes: int = 10


def _mnist_like(
    folder: str, url: str, checksums: dict[str, tuple[str, str | None]], n: tuple[int, int]
) -> Benchmark:
    """A data set in MNIST's four files of 28 × 28 images.

    Args:
        folder: The folder below the data folder.
        url: The address of the folder with the `.gz` files.
        checksums: MD5 of the `.gz` file and SHA-256 of its content, by short file name.
        n: How many examples there are for training and for testing.
    """
    sizes = {"train": n[0], "t10k": n[1]}

    def download(file: str, md5: str, sha256: str | None) -> Download:
        split, kind = file.split("-")
        name = f"{split}-images-idx3-ubyte" if kind == "images" else f"{split}-labels-idx1-ubyte"
        size = 16 + 28 * 28 * sizes[split] if kind == "images" else 8 + sizes[split]
        return Download(
            url=f"{url}/{name}.gz",
            md5=md5,
            packed=(f"{folder}/{name}.gz",),
            holds=(File(path=f"{folder}/{name}", size=size, sha256=sha256),),
        )

    return Benchmark(
        downloads=tuple(download(file, *sums) for file, sums in checksums.items()),
        train=(f"{folder}/train-images-idx3-ubyte", f"{folder}/train-labels-idx1-ubyte"),
        test=(f"{folder}/t10k-images-idx3-ubyte", f"{folder}/t10k-labels-idx1-ubyte"),
        decode=decode_idx,
    )


_CIFAR = "cifar-10-batches-bin"
_CIFAR_TRAIN = tuple(f"{_CIFAR}/data_batch_{i}.bin" for i in range(1, 6))
_CIFAR_TEST = (f"{_CIFAR}/test_batch.bin",)

BENCHMARKS: dict[str, Benchmark] = {
    # LeCun, Cortes, Burges. The address is the mirror that PyTorch's maintainers keep.
    "mnist": _mnist_like(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        {
            "train-images": (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            "train-labels": (
                "d53e105ee54ea40749a09fcbcd1e9432",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            "t10k-images": (
                "9fb629c4189551a2d022fa330f9573f3",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            "t10k-labels": (
                "ec29112dd5afa0611ce80d1b7f02629c",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        },
        n=(60_000, 10_000),
    ),
    # Xiao, Rasul, Vollgraf 2017.
    "fashion-mnist": _mnist_like(
        "fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", None),
            "train-labels": ("25c81989df183df01b3e8a0aad5dffbe", None),
            "t10k-images": ("bef4ecab320f06d8554ea6380940ec79", None),
            "t10k-labels": ("bb300cfdad3c16e7a12a480ee83cd310", None),
        },
        n=(60_000, 10_000),
    ),
    # Krizhevsky 2009. Copies exist that hold the same records in another order.
    "cifar10": Benchmark(
        downloads=(
            Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                md5="c32a1d4ab5d03f1284b67883e8d87530",
                packed=("cifar-10-binary.tar.gz", "cifar-10-binary.tar.xz"),
                holds=tuple(File(path=p, size=30_730_000) for p in (*_CIFAR_TRAIN, *_CIFAR_TEST)),
                ignored=(f"{_CIFAR}/batches.meta.txt", f"{_CIFAR}/readme.html"),
            ),
        ),
        train=_CIFAR_TRAIN,
        test=_CIFAR_TEST,
        decode=decode_cifar,
    ),
}


def load_benchmark(name: str) -> LabeledData:
    """Load a data set of `BENCHMARKS`, images in [0, 1].

    Raises:
        UserError: A file is corrupt, unreadable, incomplete, or cannot be downloaded.
    """
    benchmark = BENCHMARKS[name]
    files: dict[str, Blob] = {}
    try:
        for download in benchmark.downloads:
            files |= _obtain(download)
    except OSError as error:
        raise UserError(f"{name!r} cannot be read ({error}): make the file readable.") from error
    (x_train, y_train), (x_test, y_test) = (
        benchmark.decode([files[path] for path in split]) for split in (benchmark.train, benchmark.test)
    )
    return LabeledData(
        name=name,
        x_train=scale_bytes(x_train),
        y_train=torch.from_numpy(y_train.astype(np.int64)),
        x_test=scale_bytes(x_test),
        y_test=torch.from_numpy(y_test.astype(np.int64)),
        classes=benchmark.classes,
        is_public_benchmark=True,
    )


def load_digits() -> LabeledData:
    """Load scikit-learn's 1,797 handwritten digits, `[n, 1, 8, 8]`, in [0, 1]; it needs no file.

    The data set has no official split. Ours is fixed, blind to the labels, and the same on every
    machine: 1,437 training and 360 test examples.
    """
    from sklearn.datasets import load_digits as load_from_sklearn  # slow to import

    x, y = load_from_sklearn(return_X_y=True)
    # RandomState's stream is frozen for ever (NumPy's NEP 19); a Generator's may change.
    order = np.random.RandomState(0).permutation(len(x))
    images = torch.from_numpy((x[order] / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(y[order].astype(np.int64))
    return LabeledData(
        name="digits",
        x_train=images[:1437],
        y_train=labels[:1437],
        x_test=images[1437:],
        y_test=labels[1437:],
        classes=10,
        is_public_benchmark=True,
    )


def cache_folder() -> Path:
    """The user's cache of dpml: on Linux `~/.cache/dpml`, or what `$XDG_CACHE_HOME` says."""
    return Path(pooch.os_cache("dpml"))


def _obtain(download: Download) -> dict[str, Blob]:
    """The verified files of a download, by `File.path`, from the first place that has them."""
    for folder in _search_folders():
        plain = {file.path: folder / file.path for file in download.holds}
        present = [path for path in plain.values() if path.exists()]
        if len(present) == len(plain):
            return _read_all(download, folder)
        for packed in download.packed:
            if (folder / packed).exists():
                return _unpack(download, folder / packed)
        if present:
            missing = next(path for path in plain.values() if path not in present)
            raise UserError(
                f"{str(missing)!r} is missing, though other files of its data set are there: add "
                f"it, or delete {str(missing.parent)!r} and run again to have all of it fetched."
            )
    return _unpack(download, _fetch(download))


def _search_folders() -> list[Path]:
    folders = [cache_folder()]
    if chosen := os.environ.get("DPML_DATA"):
        folder = Path(chosen).expanduser()
        if not folder.is_dir():
            raise UserError(f"DPML_DATA is {chosen!r}, which is not a folder: correct or unset it.")
        folders.insert(0, folder)
    return folders


def _fetch(download: Download) -> Path:
    """Download into the cache, atomically, and verify the checksum."""
    cache = cache_folder()
    target = cache / download.packed[0]
    by_hand = f"or put the file at {str(target)!r} or at {download.packed[0]!r} in $DPML_DATA"
    try:
        pooch.retrieve(
            download.url,
            known_hash=f"md5:{download.md5}",
            fname=download.packed[0],
            path=cache,
            downloader=pooch.HTTPDownloader(chunk_size=1 << 18, timeout=30),
        )
    except ValueError as error:
        raise UserError(
            f"What {download.url} sent does not have the known checksum: try again, {by_hand}."
        ) from error
    except OSError as error:  # of the network (requests' errors are OSErrors) or of the disk
        raise UserError(
            f"{download.url} cannot be downloaded ({type(error).__name__}): check the network, {by_hand}."
        ) from error
    return target


def _unpack(download: Download, packed: Path) -> dict[str, Blob]:
    """The verified files of a compressed file."""
    if ".tar" in packed.suffixes:
        return _unpack_archive(download, packed)
    (file,) = download.holds
    return {file.path: _verified(file, Blob(str(packed), read_gzip(packed, file.size)))}


def _unpack_archive(download: Download, archive: Path) -> dict[str, Blob]:
    """The verified files of an archive, which are kept in the cache: CIFAR-10's take 10 seconds.

    The copies are found by the archive's own checksum, so that another archive, perhaps with
    the records in another order, never gets them.
    """
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    cache = cache_folder() / "unpacked" / digest
    sizes = {file.path: file.size for file in download.holds}
    if all(_has_size(cache / path, size) for path, size in sizes.items()):
        return _read_all(download, cache)
    contents = read_tar(archive, sizes, ignored=download.ignored)
    # A cache that cannot be written (a read-only or full disk) costs time, not the run.
    with contextlib.suppress(OSError):
        for path, data in contents.items():
            _write_atomically(cache / path, data)
    return {
        file.path: _verified(file, Blob(f"{archive}/{file.path}", contents[file.path]))
        for file in download.holds
    }


def _read_all(download: Download, folder: Path) -> dict[str, Blob]:
    """The verified files of a download that lie uncompressed below a folder."""
    return {
        file.path: _verified(file, Blob(str(folder / file.path), read_plain(folder / file.path, file.size)))
        for file in download.holds
    }


def _verified(file: File, blob: Blob) -> Blob:
    if file.sha256 and hashlib.sha256(blob.data).hexdigest() != file.sha256:
        raise corrupt(blob.source, "does not hold the official content (its SHA-256 differs)")
    return blob


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file that no reader ever sees in part, even if we are killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(data)
            stream.close()  # some systems cannot rename an open file
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
