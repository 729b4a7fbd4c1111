"""How official files are found, downloaded and verified, shown on tiny ones."""

import dataclasses
import functools
import gc
import gzip
import hashlib
import http.server
import io
import lzma
import shutil
import socket
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dpml.data import load, official

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (5, 28, 28), np.uint8)
TEST = RNG.integers(0, 256, (3, 28, 28), np.uint8)


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


FILES = {
    "train-images-idx3-ubyte": idx(TRAIN),
    "train-labels-idx1-ubyte": idx(np.array([5, 0, 4, 1, 9], np.uint8)),
    "t10k-images-idx3-ubyte": idx(TEST),
    "t10k-labels-idx1-ubyte": idx(np.array([7, 2, 1], np.uint8)),
}
PACKED = {name: gzip.compress(data, mtime=0) for name, data in FILES.items()}


def tiny_mnist(url: str, *, checked: bool = True) -> official.Benchmark:
    checksums = {
        "-".join(name.split("-")[:2]): (
            hashlib.md5(PACKED[name], usedforsecurity=False).hexdigest(),
            hashlib.sha256(data).hexdigest() if checked else None,
        )
        for name, data in FILES.items()
    }
    return official._mnist_like("mnist", url, checksums, n=(5, 3))


@pytest.fixture
def mnist(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tiny MNIST in $DPML_DATA, whose content has known checksums."""
    monkeypatch.setitem(official.BENCHMARKS, "mnist", tiny_mnist("http://127.0.0.1:9"))
    folder = data_folder / "mnist"
    folder.mkdir()
    for name, data in PACKED.items():
        (folder / f"{name}.gz").write_bytes(data)
    return folder


@pytest.fixture
def unchecked(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as for Fashion-MNIST: the content has no known checksum."""
    monkeypatch.setitem(official.BENCHMARKS, "mnist", tiny_mnist("http://127.0.0.1:9", checked=False))
    return mnist


@pytest.mark.usefixtures("mnist")
def test_bytes_become_images_in_the_unit_interval():
    data = load("mnist")
    assert data.y_train.tolist() == [5, 0, 4, 1, 9]
    assert data.y_test.tolist() == [7, 2, 1]
    torch.testing.assert_close(
        data.x_train, torch.from_numpy(TRAIN[:, None] / np.float32(255)), atol=0, rtol=0
    )


def test_uncompressed_and_recompressed_files_are_accepted(mnist: Path):
    (mnist / "train-images-idx3-ubyte.gz").unlink()
    (mnist / "train-images-idx3-ubyte").write_bytes(FILES["train-images-idx3-ubyte"])
    (mnist / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(FILES["t10k-images-idx3-ubyte"], compresslevel=1, mtime=1)
    )
    assert torch.equal(load("mnist").x_test, torch.from_numpy(TEST[:, None] / np.float32(255)))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (f"{IMAGES}.gz", PACKED[IMAGES][:1000], "gzip"),
        (f"{IMAGES}.gz", PACKED[IMAGES][:-4], "gzip"),
        (f"{IMAGES}.gz", PACKED[IMAGES][:2000] + b"\0" * 40 + PACKED[IMAGES][2040:], "gzip"),
        (f"{IMAGES}.gz", b"<html>404</html>", "gzip"),
        (f"{IMAGES}.gz", b"", "0 bytes"),
        (f"{IMAGES}.gz", gzip.compress(FILES[IMAGES][:-1]), "3935 bytes where 3936"),
        (f"{IMAGES}.gz", gzip.compress(FILES[IMAGES] + bytes(10**6)), "more where 3936"),
        (f"{IMAGES}.gz", gzip.compress(flipped(FILES[IMAGES])), "SHA-256"),
        (IMAGES, FILES[IMAGES][:-1], "3935 bytes where 3936"),
        (IMAGES, FILES[IMAGES] + b"\0", "3937 bytes where 3936"),
        (IMAGES, flipped(FILES[IMAGES]), "SHA-256"),
    ],
)
def test_damaged_and_foreign_files_are_named(refused, mnist: Path, name: str, content: bytes, why: str):
    (mnist / name).write_bytes(content)
    refused(lambda: load("mnist"), repr(str(mnist / name)), why, "delete it and run again")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (IMAGES, b"\0\0\x0d\x03" + FILES[IMAGES][4:], "not an IDX file of 3-dim"),
        (IMAGES, b"\0\0\x08\x01" + FILES[IMAGES][4:], "not an IDX file of 3-dim"),
        (IMAGES, idx(TRAIN)[:4] + struct.pack(">3I", 6, 28, 28) + TRAIN.tobytes(), "(6, 28, 28)"),
        (
            IMAGES,
            idx(TRAIN)[:4] + struct.pack(">3I", *[2**32 - 1] * 3) + TRAIN.tobytes(),
            "4294967295",
        ),
        (LABELS, idx(np.array([5, 0, 4, 1, 10], np.uint8)), "label 10"),
        (LABELS, idx(np.array([5, 0, 4, 1], np.uint8)) + b"\0", "5 bytes of data"),
    ],
)
def test_structure_is_checked_without_a_checksum(refused, unchecked: Path, name, content, why):
    (unchecked / name).write_bytes(content)
    refused(lambda: load("mnist"), repr(str(unchecked / name)), why, "delete it and run again")


def test_images_and_labels_must_be_equally_many(refused, unchecked: Path):
    images = np.zeros((4, 28, 35), np.uint8)  # as many bytes as five images
    (unchecked / IMAGES).write_bytes(idx(images))
    refused(lambda: load("mnist"), LABELS, "5 labels for 4 images")


def test_an_unreadable_file_is_named(refused, mnist: Path):
    (mnist / IMAGES).mkdir()
    refused(lambda: load("mnist"), IMAGES)


def test_data_folder_must_exist(refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPML_DATA", "/no/such/folder")
    refused(lambda: load("mnist"), "DPML_DATA", "/no/such/folder")


# Downloads


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local server's address, and the folder that it serves: a tiny MNIST's `.gz` files."""
    root = tmp_path / "site"
    root.mkdir()
    for name, data in PACKED.items():
        (root / f"{name}.gz").write_bytes(data)
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()
        thread.join()


@pytest.fixture
def online(site: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    url, root = site
    monkeypatch.setitem(official.BENCHMARKS, "mnist", tiny_mnist(url))
    return root


def test_download_goes_to_the_cache_and_is_used_again(online: Path, cache: Path):
    first = load("mnist")
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(f"{name}.gz" for name in FILES)
    shutil.rmtree(online)
    assert torch.equal(load("mnist").x_train, first.x_train)


def test_only_what_is_missing_is_downloaded(mnist: Path, cache: Path, site, monkeypatch):
    monkeypatch.setitem(official.BENCHMARKS, "mnist", tiny_mnist(site[0]))
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    assert load("mnist").y_test.tolist() == [7, 2, 1]
    assert [path.name for path in (cache / "mnist").iterdir()] == ["t10k-labels-idx1-ubyte.gz"]


@pytest.mark.usefixtures("online")
def test_a_corrupt_cache_is_mended_by_doing_what_the_message_says(refused, cache: Path):
    load("mnist")
    bad = cache / "mnist" / "train-images-idx3-ubyte.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    refused(lambda: load("mnist"), str(bad), "delete it and run again")
    bad.unlink()
    assert load("mnist").train_examples == 5


def test_wrong_checksum_leaves_nothing_behind(refused, online: Path, cache: Path):
    (online / f"{IMAGES}.gz").write_bytes(b"<html>please log in</html>")
    target = cache / "mnist" / f"{IMAGES}.gz"
    refused(lambda: load("mnist"), f"{IMAGES}.gz", "checksum", "http://127.0.0.1", str(target))
    assert list((cache / "mnist").iterdir()) == []


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_missing_on_the_server(refused, online: Path):
    (online / f"{IMAGES}.gz").unlink()
    refused(lambda: load("mnist"), "HTTPError", "http://127.0.0.1")
    gc.collect()  # pooch leaves the connection to the collector; let it warn here, not elsewhere


def test_no_network(refused, cache: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setitem(official.BENCHMARKS, "mnist", tiny_mnist(url))
    target = cache / "mnist" / f"{IMAGES}.gz"
    refused(lambda: load("mnist"), f"{url}/{IMAGES}.gz", "network", repr(str(target)), "$DPML_DATA")


@pytest.mark.usefixtures("online")
def test_cache_that_cannot_be_written(refused, cache: Path):
    cache.write_text("a file where the folder should be")
    refused(lambda: load("mnist"), IMAGES, str(cache))


# CIFAR-10's archive

RECORD = 3073
BATCHES = {
    path: b"".join(bytes((i % 10,)) + RNG.bytes(RECORD - 1) for i in range(2 * k, 2 * k + 2))
    for k, path in enumerate((*official._CIFAR_TRAIN, *official._CIFAR_TEST))
}
FIRST = official._CIFAR_TRAIN[0]
META = "cifar-10-batches-bin/batches.meta.txt"


def tar(members: list[tuple[str, bytes]], *links: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        for info in (folder, *links):
            archive.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GOOD = [*BATCHES.items(), (META, b"airplane\n")]


@pytest.fixture
def cifar(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$DPML_DATA, still empty, for a CIFAR-10 of two records in each file."""
    real = official.BENCHMARKS["cifar10"]
    files = tuple(official.File(path=path, size=2 * RECORD) for path in BATCHES)
    download = dataclasses.replace(real.downloads[0], holds=files, url="http://127.0.0.1:9/")
    monkeypatch.setitem(official.BENCHMARKS, "cifar10", dataclasses.replace(real, downloads=(download,)))
    return data_folder


def check_cifar():
    data = load("cifar10")
    assert data.y_train.tolist() == list(range(10))
    assert data.y_test.tolist() == [0, 1]
    pixels = np.frombuffer(BATCHES[FIRST], np.uint8)[1:RECORD].reshape(3, 32, 32)
    assert torch.equal(data.x_train[0], torch.from_numpy(pixels / np.float32(255)))


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_archive(cifar: Path, cache: Path, monkeypatch, suffix, compress):
    (cifar / f"cifar-10-binary.tar.{suffix}").write_bytes(compress(tar(GOOD)))
    check_cifar()
    assert sorted(path.name for path in cache.rglob("*.bin")) == sorted(Path(path).name for path in BATCHES)
    monkeypatch.setattr(official, "read_tar", None)  # the second time, it is not opened
    check_cifar()


def test_an_incomplete_cache_is_made_anew(cifar: Path, cache: Path):
    (cifar / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(tar(GOOD)))
    check_cifar()
    one, two, *_ = cache.rglob("*.bin")
    one.unlink()
    two.write_bytes(b"short")
    check_cifar()
    assert two.stat().st_size == 2 * RECORD
    assert len(list(cache.rglob("*"))) == 3 + len(BATCHES)  # and no temporary file


def test_another_archive_never_gets_the_cache_of_the_first(cifar: Path):
    archive = cifar / "cifar-10-binary.tar.gz"
    archive.write_bytes(gzip.compress(tar(GOOD)))
    check_cifar()
    reordered = zip(BATCHES, reversed(BATCHES.values()), strict=True)
    archive.write_bytes(gzip.compress(tar([*reordered])))
    assert load("cifar10").y_test.tolist() == [0, 1][::1]
    assert load("cifar10").y_train.tolist() == [0, 1, 8, 9, 6, 7, 4, 5, 2, 3]


def test_archive_without_a_cache(cifar: Path, cache: Path):
    cache.write_text("a file where the folder should be")
    (cifar / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(tar(GOOD)))
    check_cifar()


def test_plain_records(cifar: Path, refused):
    (cifar / "cifar-10-batches-bin").mkdir()
    for path, data in BATCHES.items():
        (cifar / path).write_bytes(data)
    check_cifar()
    (cifar / FIRST).write_bytes(BATCHES[FIRST][:-1])
    refused(lambda: load("cifar10"), repr(str(cifar / FIRST)), "6145 bytes where 6146")
    (cifar / FIRST).write_bytes(b"\x0a" + BATCHES[FIRST][1:])
    refused(lambda: load("cifar10"), repr(str(cifar / FIRST)), "label 10")
    (cifar / FIRST).unlink()
    refused(lambda: load("cifar10"), repr(str(cifar / FIRST)), "missing")


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


_XZ = lzma.compress(tar(GOOD))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lzma.compress(tar([*GOOD, ("../../evil.bin", b"x")])), "'../../evil.bin'"),
        (lzma.compress(tar([*GOOD, (FIRST, BATCHES[FIRST])])), f"unexpected member '{FIRST}'"),
        (lzma.compress(tar(GOOD[1:], link(FIRST, "/etc/passwd"))), f"unexpected member '{FIRST}'"),
        (lzma.compress(tar([(FIRST, b"short"), *GOOD[1:]])), f"5 bytes as '{FIRST}'"),
        (lzma.compress(tar([*GOOD[:-1], (META, bytes(2 << 20))])), f"unexpected member '{META}'"),
        (lzma.compress(tar(GOOD[1:])), f"lacks '{FIRST}'"),
        (lzma.compress(tar(GOOD) + bytes(2 << 20)), "goes on"),
        (lzma.compress(b""), "not a complete tar"),
        (lzma.compress(b"no tar" * 1000), "not a complete tar"),
        (_XZ[: len(_XZ) // 2], "not a complete tar"),
        (_XZ[:-1], "not a complete tar"),
        (_XZ[:5000] + flipped(_XZ[5000:5001]) + _XZ[5001:], "not a complete tar"),
        (gzip.compress(tar(GOOD)), "not a complete tar"),
        (b"", "not a complete tar"),
    ],
)
def test_damaged_and_foreign_archives_are_named(refused, cifar: Path, cache: Path, content, why):
    archive = cifar / "cifar-10-binary.tar.xz"
    archive.write_bytes(content)
    refused(lambda: load("cifar10"), repr(str(archive)), why, "delete it and run again")
    assert not list(cache.rglob("*.bin"))
