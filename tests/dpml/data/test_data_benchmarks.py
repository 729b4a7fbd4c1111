"""Facts of the real data sets."""

import hashlib
import lzma
from pathlib import Path

import pytest
import torch

from dpml.data import LabeledData, load, official


def test_digits():
    data = load("digits")
    assert data.is_public_benchmark
    assert data.example_shape == (1, 8, 8)
    assert (data.train_examples, data.test_examples, data.classes) == (1437, 360, 10)
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    # Class sizes of scikit-learn's data set, both splits together.
    counts = torch.cat((data.y_train, data.y_test)).bincount().tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_split_of_digits_never_changes():
    labels = bytes(torch.cat((load("digits").y_train, load("digits").y_test)).tolist())
    assert hashlib.sha256(labels).hexdigest()[:16] == "0f9ffd7948cafb39"


def test_mnist(real_data: Path, monkeypatch: pytest.MonkeyPatch):
    if not (real_data / "mnist").is_dir():
        pytest.skip(f"no MNIST in {real_data}")
    monkeypatch.setenv("DPML_DATA", str(real_data))
    data = load("mnist")
    assert data.is_public_benchmark
    assert data.x_train.shape == (60_000, 1, 28, 28)
    assert data.x_test.shape == (10_000, 1, 28, 28)
    assert data.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.y_train.bincount()[:3].tolist() == [5923, 6742, 5958]
    assert data.x_train.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert data.x_train.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert data.x_train.max() == 1


@pytest.fixture(scope="module")
def cifar10(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LabeledData]:
    """The data, and the cache that they are in now."""
    if not any((real_data / name).exists() for name in official.BENCHMARKS["cifar10"].downloads[0].packed):
        pytest.skip(f"no archive of CIFAR-10 in {real_data}")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "cache_folder", lambda: cache)
        patch.setenv("DPML_DATA", str(real_data))
        return cache, load("cifar10")


@pytest.mark.slow
def test_cifar10(cifar10: tuple[Path, LabeledData]):
    _, data = cifar10
    assert data.is_public_benchmark
    assert data.x_train.shape == (50_000, 3, 32, 32)
    assert data.y_train.bincount().tolist() == [5000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    std, mean = torch.std_mean(data.x_train, (0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.tensor([0.2470, 0.2435, 0.2616]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_cifar10_is_decompressed_once(
    cifar10: tuple[Path, LabeledData], real_data: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, data = cifar10
    monkeypatch.setattr(official, "cache_folder", lambda: cache)
    monkeypatch.setenv("DPML_DATA", str(real_data))
    monkeypatch.setattr(lzma, "open", None)
    again = load("cifar10")
    assert torch.equal(again.y_train, data.y_train)
    assert torch.equal(again.x_test, data.x_test)
