"""Features of images: functions of one image, and their cache."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from accounting import UserError
from dpml.data.arrays import from_arrays
from dpml.data.labeled import LabeledData
from dpml.features import FeatureMap, blocks, cache, features_of
from dpml.features.patches import Patches
from dpml.features.synthetic import dead_leaves
from dpml.features.wavelets import ANGLES, PATHS, Wavelets, mirrored_paths

Call = Callable[..., Any]

NAMES = ("scattering", "patches", "scattering-patches")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(9, 3, 18, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def maps() -> dict[str, FeatureMap]:
    return {name: FeatureMap(name, (3, 18, 20)) for name in NAMES}


def labelled(n: int = 70, test: int = 20, side: int = 16, channels: int = 1) -> LabeledData:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (n + test, channels, side, side)).astype(np.float32)
    y = np.arange(n + test) % 2
    return from_arrays("own", x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])


# ---------------------------------------------------------------- wavelets


def test_a_mirrored_image_has_mirrored_scattering() -> None:
    wavelets, x = Wavelets(), dead_leaves(5, 2, 32, 24)
    turned = wavelets(x.flip(3))[:, :, mirrored_paths()].flip(4)
    torch.testing.assert_close(turned, wavelets(x), rtol=0, atol=2e-6)
    assert wavelets(x).shape == (5, 2, PATHS, 8, 6)
    assert (wavelets(x) - wavelets(x).flip(4)).abs().max() > 0.05


def test_a_constant_image_has_its_average_alone() -> None:
    found = Wavelets()(torch.full((1, 1, 16, 16), 0.7))[0, 0]
    torch.testing.assert_close(found[0], torch.full((4, 4), 0.7))
    assert found[1:].abs().max() < 1e-6


@pytest.mark.parametrize("angle", range(ANGLES))
def test_a_grating_answers_at_its_angle(angle: int) -> None:
    theta = torch.tensor(angle * torch.pi / ANGLES)
    place = torch.arange(32.0)
    for octave, frequency in ((0, 3 * torch.pi / 4), (1, 3 * torch.pi / 8)):
        wave = (frequency * (theta.cos() * place + theta.sin() * place[:, None])).cos()
        first = Wavelets()(wave[None, None])[0, 0, 1 : 1 + 2 * ANGLES, 3:5, 3:5].mean(dim=(1, 2))
        assert int(first.argmax()) == octave * ANGLES + angle


def test_scattering_is_near_that_by_fourier_transform() -> None:
    from dpml.data.scattering import scattering_features

    x = dead_leaves(200, 1, 32, 32)
    ours = Wavelets()(x)[:, 0].mean(dim=(2, 3))
    theirs = scattering_features(x).view(200, PATHS, 8, 8).mean(dim=(2, 3))
    for path in range(1 + 2 * ANGLES):  # the second order is laid out otherwise
        together = torch.corrcoef(torch.stack([ours[:, path], theirs[:, path]]))[0, 1]
        assert together > 0.97


# ---------------------------------------------------------------- patches and synthetic images


def test_patches_do_not_see_brightness_and_hardly_contrast() -> None:
    patches, x = Patches(3, 16), dead_leaves(4, 3, 20, 20) * 0.5
    base = patches(x, 4)
    torch.testing.assert_close(patches(x + 0.3, 4), base, rtol=0, atol=1e-4)
    assert base.shape == (4, 32, 5, 5)
    assert base.min() >= 0
    assert (patches(torch.full((1, 3, 20, 20), 0.5), 4) == 0).all()


def test_whitened_patches_of_synthetic_images_are_white() -> None:
    from torch.nn.functional import conv2d

    patches = Patches(1, 1)
    white = conv2d(dead_leaves(100, 1, 32, 32, seed=9), patches._whitening).transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(white))[1:]  # all but the mean, which was taken out
    assert values.max() / values.min() < 5
    raw = torch.nn.functional.unfold(dead_leaves(100, 1, 32, 32, seed=9), 5).transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(raw))[1:]
    assert values.max() / values.min() > 50


def test_synthetic_images_are_the_same_everywhere() -> None:
    x = dead_leaves(20, 3, 16, 16)
    assert torch.equal(x, dead_leaves(20, 3, 16, 16))
    assert not torch.equal(x, dead_leaves(20, 3, 16, 16, seed=1))
    assert x.min() >= 0
    assert x.max() <= 1
    assert 0.2 < float(x.std()) < 0.4
    # Neighbouring pixels are alike, distant ones less.
    near, far = (x[..., d:] - x[..., :-d] for d in (1, 8))
    assert near.square().mean() < 0.5 * far.square().mean()


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("name", NAMES)
def test_features_of_a_row_depend_on_that_row_alone(
    maps: dict[str, FeatureMap], images: Tensor, name: str
) -> None:
    together = maps[name](images)
    alone = torch.cat([maps[name](image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    changed = torch.cat([images[:4], torch.full_like(images[4:], torch.nan)])
    torch.testing.assert_close(maps[name](changed)[:4], together[:4], rtol=0, atol=1e-5)
    assert (together.flatten(1).norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_features_of_colour_images_do_not_change_when_mirrored(
    maps: dict[str, FeatureMap], images: Tensor, name: str
) -> None:
    torch.testing.assert_close(maps[name](images.flip(3)), maps[name](images), rtol=0, atol=1e-4)
    grey = FeatureMap(name, (1, 18, 20))
    assert (grey(images[:, :1].flip(3)) - grey(images[:, :1])).flatten(1).norm(dim=1).min() > 0.1


def test_features_of_one_block_are_maps_and_those_of_several_vectors(
    maps: dict[str, FeatureMap], images: Tensor
) -> None:
    assert maps["scattering"].shape == (3 * PATHS, 5, 3)  # the left half; the right one holds the same
    assert maps["scattering-patches"].shape == (3 * PATHS * (5 * 3 + 3 * 2) + 1024 * 3 * 3,)
    assert maps["patches"].shape == (1024 * (3 * 3 + 3 * 3),)
    for function in maps.values():
        assert function(images).shape == (len(images), *function.shape)
    # Map i of the features is map i of the block, whitened.
    block = maps["scattering"].block("scattering", images).view(-1, *maps["scattering"].shape)
    torch.testing.assert_close(maps["scattering"](images), block, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [19, 21, 22])
def test_any_width_can_be_mirrored(width: int) -> None:
    x = torch.rand(3, 3, 17, width, generator=torch.Generator().manual_seed(1))
    for name, block in blocks.blocks_of(("scattering", "coarse-scattering", "coarse-patches"), 3).items():
        torch.testing.assert_close(block(x.flip(3)), block(x), rtol=0, atol=1e-4, msg=name)


def test_features_do_not_depend_on_the_caller_s_randomness(
    maps: dict[str, FeatureMap], images: Tensor
) -> None:
    torch.manual_seed(1)
    assert torch.equal(maps["patches"](images[:2]), FeatureMap("patches", (3, 18, 20))(images[:2]))


@pytest.mark.parametrize("shape", [(4,), (2, 20, 20), (3, 8, 8), (3, 20, 15)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="choose the features 'none'"):
        FeatureMap("patches", shape)


def test_mistakes_are_one_line(maps: dict[str, FeatureMap], images: Tensor) -> None:
    with pytest.raises(UserError, match="must be one of scattering, patches"):
        FeatureMap("sift", (3, 20, 20))
    for wrong in (images.double(), images[:, :1], images[:0]):
        with pytest.raises(UserError, match="float32 images"):
            maps["patches"](wrong)


# ---------------------------------------------------------------- cache


def test_features_come_from_the_cache_the_second_time(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = labelled(), []
    first = features_of("scattering", data, progress=lambda *x: seen.append(x))
    assert seen[-1] == ("scattering", 20, 20)
    assert ("scattering", 70, 70) in seen
    assert all(x.dtype == torch.float16 for x in first)
    assert [x.shape for x in first] == [(70, PATHS, 4, 4), (20, PATHS, 4, 4)]
    files = sorted(own_cache.iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    function = FeatureMap("scattering", data.example_shape)
    torch.testing.assert_close(first[1].float(), function(data.x_test), rtol=0, atol=2e-3)
    seen.clear()
    again = features_of("scattering", data, progress=lambda *x: seen.append(x))
    assert seen == []
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(cache, "VERSION", blocks.VERSION + 1)
    features_of("scattering", data, progress=lambda *x: seen.append(x))
    assert seen
    other = labelled()
    other.x_train[0, 0, 0, 0] += 0.01
    before = len(list(own_cache.iterdir()))
    features_of("scattering", other)
    assert len(list(own_cache.iterdir())) == before + 1


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _other_array(file: Path) -> None:
    with file.open("wb") as stream:
        np.save(stream, np.zeros((3, 4)))


def _pickled(file: Path) -> None:
    with file.open("wb") as stream:
        np.save(stream, np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize("damage", [_cut, _flip_a_bit, _empty, _other_array, _pickled])
def test_what_is_damaged_is_computed_again(own_cache: Path, damage: Any) -> None:
    data, seen = labelled(20, 5), []
    first = [x.clone() for x in features_of("scattering", data)]  # of files that are about to be cut short
    for file in own_cache.iterdir():
        damage(file)
    again = features_of("scattering", data, progress=lambda *x: seen.append(x))
    assert seen[-1] == ("scattering", 5, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_a_cache_nothing_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(20, 5)
    kept = features_of("scattering", data, cached=False)
    assert not own_cache.exists()

    def full(_path: Path, chunks: Any, _rows: int) -> None:
        next(chunks)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    computed = features_of("scattering", data)
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_a_killed_writer_leaves_nothing_that_counts(own_cache: Path) -> None:
    data = labelled(20, 5)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features_of("scattering", data, progress=interrupt)
    assert not list(own_cache.glob("*.npy"))
    assert features_of("scattering", data)[0].shape[0] == 20


# ---------------------------------------------------------------- the command


def striped(folder: Path, channels: int) -> Path:
    """A file of 120 images and 40 more, of which every other has stripes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 160)
    x = rng.integers(0, 256, (160, 16, 16, channels), dtype=np.uint8)
    x[y == 1, ::2] //= 8
    np.savez(folder / "own.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:])
    return folder / "own.npz"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_command_trains_on_features(call: Call, tmp_path: Path, own_cache: Path, channels: int) -> None:
    path = striped(tmp_path, channels)
    line = (
        f"train dpsgd --dataset {path} --features scattering-patches --mean-noise 0.2 "
        "--noise-multiplier 0.1 --delta 1e-3 --epochs 12 --batch-size 60 --clip-norm 0.1 --learning-rate 50 "
        f"--output {tmp_path / 'run'}"
    )
    outcome = call(line)
    assert outcome.status == 0
    assert own_cache.is_dir()
    assert "own.npz features, patches: step 64/120\n" in outcome.err
    assert "own.npz features, coarse-scattering: step 40/40\n" in outcome.err

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"]["features"] == "scattering-patches"
    assert summary["config"]["model"] == "linear"
    assert summary["mean_noise_multiplier"] == 0.2
    assert summary["test_accuracy"] > 0.9
    # The saved weights alone, with features of new images, give the accuracy that was reported.
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    data = np.load(path)
    images = torch.from_numpy(data["x_test"]).permute(0, 3, 1, 2).contiguous().float() / 255
    from dpml.centring import Centred

    features = FeatureMap("scattering-patches", tuple(images.shape[1:]))(images)
    model = torch.nn.Sequential(
        Centred(features.shape[1]),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features.shape[1], 2)),
    )
    model.load_state_dict(weights)
    right = (model(features).argmax(dim=1).numpy() == data["y_test"]).mean()
    assert abs(right - summary["test_accuracy"]) <= 1 / 40


@pytest.mark.parametrize("centred", ["", "--mean-noise 0.5"])
def test_a_cnn_trains_on_maps_of_features(call: Call, tmp_path: Path, centred: str) -> None:
    line = (
        f"train dpsgd --dataset {striped(tmp_path, 3)} --features scattering --model cnn "
        f"--noise-multiplier 0.1 --delta 1e-3 --epochs 8 --batch-size 60 --clip-norm 0.1 "
        f"--learning-rate 20 {centred} --output {tmp_path / 'run'}"
    )
    outcome = call(line)
    assert outcome.status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"]["model"] == "cnn"
    assert summary["test_accuracy"] > 0.9


def test_the_command_says_what_is_wrong(call: Call, own_data: Path) -> None:
    line = f"train dpsgd --dataset {own_data} --epsilon 3 --delta 1e-3 --batch-size 10 --features"
    assert "choose the features 'none'" in call(f"{line} patches").error()
    assert "augment must be none" in call(f"{line} patches --augment flip-crop").error()
    assert "sift" in call(f"{line} sift").error()
