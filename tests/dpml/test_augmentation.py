"""Views of records: their rows, their secret randomness, and that no row sees another."""

import math

import numpy as np
import pytest
import torch
from one_by_one import OneByOne
from privacy_checks import CLIP_NORM, NORMS, RECORDS, SIGNS, check_noise, observe, taking_part
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from accounting import UserError
from dpml.augmentation import flip_crop, require_independent_rows
from dpml.config import DPSGDConfig
from dpml.data.batches import Examples
from dpml.dpsgd import train_dpsgd
from dpml.gradients import BookKeepingEngine

SIDE = 6


def images(n=20, seed=0):
    x = torch.rand(n, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0, 0, 0] > 0.5).long())


def train(monkeypatch=None, *, augment=None, train_set=None, **changed):
    if monkeypatch is not None:
        monkeypatch.setattr("dpml.dpsgd.BookKeepingEngine", OneByOne)
    settings = {
        "noise_multiplier": 1.0,
        "delta": 1e-3,
        "epochs": 4,
        "batch_size": 5,
        "insecure_noise_seed": 1,
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, 2))
    if isinstance(augment, str):  # the name of one, which the configuration takes
        changed["augment"], augment = augment, None
    config = DPSGDConfig(**{**settings, **changed})
    return train_dpsgd(model, train_set or images(), config, augment=augment)


def flat(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


# ---------------------------------------------------------------- flip-crop


def variants(image):
    """All 2·81 images that flip-crop may make of one, by padding and cutting."""
    found, side = [], image.shape[-1]
    for mirrored in (image, image.flip(2)):
        padded = nn.functional.pad(mirrored[None], (4, 4, 4, 4), mode="reflect")[0]
        found += [padded[:, y : y + side, x : x + side] for y in range(9) for x in range(9)]
    return torch.stack(found).flatten(1)


def test_flip_crop_makes_each_variant_of_a_row_equally_often_and_nothing_else():
    n = 81 * 2 * 100
    image = torch.rand(1, 12, 12)
    torch.manual_seed(0)
    made = flip_crop(image.expand(n, *image.shape)).flatten(1)
    known = {tuple(row.tolist()): i for i, row in enumerate(variants(image))}
    assert len(known) == 162
    counts = np.bincount([known[tuple(row.tolist())] for row in made], minlength=162)
    assert stats.chisquare(counts).pvalue > 1e-9


def test_flip_crop_changes_each_row_by_itself():
    x = images(7).tensors[0]
    torch.manual_seed(3)
    together = flip_crop(x)
    torch.manual_seed(3)
    apart = torch.cat([flip_crop(x[:2]), flip_crop(x[2:3]), flip_crop(x[3:])])
    assert torch.equal(together, apart), "the same, however rows are cut into micro-batches"
    for row, made in zip(x, together, strict=True):
        assert (variants(row) == made.flatten()).all(dim=1).any()
    assert require_independent_rows(flip_crop, x[:1]).shape == (1, 2, SIDE, SIDE)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 4, 8), (1, 8, 4), (1, 1, 8, 8)])
def test_flip_crop_is_for_images(shape):
    with pytest.raises(UserError, match="flip-crop is for images") as raised:
        require_independent_rows(flip_crop, torch.zeros(1, *shape))
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- functions of one's own


def mixup(x):
    share = torch.rand(())
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def mixup_now_and_then(x):
    return mixup(x) if torch.rand(()) < 0.3 else x


def roll_in_order(x):
    return x.sort(dim=0).values


_own = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (mixup, "mixes the rows"),
        (mixup_now_and_then, "mixes the rows"),
        (roll_in_order, "mixes the rows"),
        (lambda x: x - x.mean(dim=0), "mixes the rows"),
        (lambda x: x / x.max(), "mixes the rows"),
        (lambda x: x.flip(0), "mixes the rows"),
        (lambda x: x + torch.rand(x.shape, generator=_own), "from elsewhere"),
        (lambda x: x + np.random.rand(), "from elsewhere"),  # noqa: NPY002 - the mistake
        (lambda x: x[:1], "as many rows"),
        (lambda x: torch.cat([x, x]), "as many rows"),
        (lambda x: x.sum(), "as many rows"),
        (lambda x: x.numpy(), "as many rows"),
        (lambda x: x @ torch.zeros(3, 3), "refuses records of shape"),
    ],
)
def test_mistakes_get_one_line(augment, words):
    with pytest.raises(UserError, match=words) as raised:
        train(augment=augment)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [torch.rand, lambda *s: torch.randint(0, 255, s, dtype=torch.uint8)])
def test_functions_that_change_each_row_are_accepted(make):
    for augment in (
        flip_crop,
        lambda x: x.flip(-1),
        lambda x: x[:, :, 1:],
        lambda x: x + torch.rand(len(x), 1, 1, 1),
        lambda x: x * torch.nan,
        lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, 0),
    ):
        require_independent_rows(augment, make(1, 3, 8, 8))


def test_records_that_are_no_tensor_are_refused():
    data = [({"pixels": torch.zeros(1, 8, 8)}, 0)] * 20
    with pytest.raises(UserError, match="one tensor a record"):
        train(augment=flip_crop, train_set=data)


def test_views_without_an_augmentation_are_refused():
    with pytest.raises(UserError, match="3 views of a record without an augmentation") as raised:
        train(views=3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [{"augment": "mixup"}, {"augment": None}, {"views": 0}, {"views": 1.5}])
def test_a_configuration_that_is_none_gets_one_line(change):
    with pytest.raises(UserError) as raised:
        DPSGDConfig(noise_multiplier=1.0, delta=1e-5, **change)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(("size", "places"), [(12, 4), (14, 4), (2, 1), (100, 10)])
def test_views_stand_one_after_the_other(size, places):
    data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    source = Examples(data, size, views=3, augment=lambda x: x + torch.rand(len(x), 1) / 2)
    batches = list(source.micro_batches(torch.tensor([1, 4, 5, 7, 9])))
    assert len(batches) == -(-5 // places)
    seen = []
    for batch in batches:
        assert batch.views == 3
        assert batch.mask.shape == (places,)
        assert batch.inputs.shape == (3 * places, 1)
        assert torch.equal(batch.inputs[:, 0].long(), batch.targets)
        assert len(batch.inputs.unique()) == 3 * places, "each view is drawn by itself"
        seen += batch.targets.view(places, 3)[batch.mask].tolist()
    assert seen == [[i] * 3 for i in (1, 4, 5, 7, 9)]
    assert source.probe()[0].tolist() == [[0.0]]


def test_one_view_is_augmented_once_and_none_leaves_rows_as_they_are():
    data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    [plain] = Examples(data).micro_batches(torch.tensor([3]))
    [changed] = Examples(data, augment=lambda x: x + 0.5).micro_batches(torch.tensor([3]))
    assert (plain.views, changed.views) == (1, 1)
    assert torch.equal(changed.inputs, plain.inputs + 0.5)


# ---------------------------------------------------------------- in a run


def test_k_views_that_are_the_same_are_one_view(monkeypatch):
    one = train(monkeypatch)
    many = train(monkeypatch, augment=lambda x: x, views=4)
    torch.testing.assert_close(flat(one), flat(many))
    assert one.planned == many.planned


@pytest.mark.parametrize("views", [1, 3])
def test_results_do_not_depend_on_the_micro_batch_size(monkeypatch, views):
    runs = [flat(train(monkeypatch, augment=flip_crop, views=views, micro_batch_size=m)) for m in (1, 7, 64)]
    assert (runs[0] - flat(train(monkeypatch))).abs().max() > 1e-3
    for other in runs[1:]:
        torch.testing.assert_close(runs[0], other)


def test_the_configured_augmentation_is_the_named_one_and_a_function_overrides_it():
    named, given = train(augment=None), train(augment=flip_crop)
    configured = train(augment="flip-crop")
    assert torch.equal(flat(configured), flat(given))
    assert not torch.equal(flat(configured), flat(named))
    assert configured.summary["config"]["augment"] == "flip-crop"
    assert given.summary["config"]["augment"] == "a function"
    assert named.summary["config"]["augment"] == "none"


def test_augmentations_are_secret():
    """They go by place in a batch, so known ones would show a record that moves the others."""

    def drawn(**settings):
        seen = []

        def augment(x):
            seen.append(torch.rand(len(x), 1, 1, 1))
            return x + seen[-1]

        train(augment=augment, epochs=1, **settings)
        # The last steps; the calls before them were for the check.
        return torch.cat([numbers.flatten() for numbers in seen[-3:]])

    assert not torch.equal(drawn(insecure_noise_seed=None)[:5], drawn(insecure_noise_seed=None)[:5])
    assert torch.equal(drawn(seed=1), drawn(seed=2))
    assert not torch.equal(drawn(), drawn(insecure_noise_seed=2))


def test_the_caller_s_random_state_is_theirs():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, 2))
    torch.random.set_rng_state(before)
    config = DPSGDConfig(noise_multiplier=1.0, delta=1e-3, epochs=1, batch_size=5, augment="flip-crop")
    train_dpsgd(model, images(), config)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_privacy_too():
    result = train(augment=flip_crop, views=2, non_private=True, noise_multiplier=None, delta=None)
    assert result.status == "completed"


# ---------------------------------------------------------------- one record's part, in each mode


@pytest.mark.parametrize("mode", ["flat", "per-layer", "automatic"])
@pytest.mark.parametrize("views", [1, 3])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(monkeypatch, mode, views):
    monkeypatch.setattr("dpml.dpsgd.BookKeepingEngine", OneByOne)
    settings = {"views": views, "clipping": mode, "epochs": 10, "insecure_noise_seed": 3}
    if views > 1:  # the same in all views, which keeps each record's gradient known
        monkeypatch.setattr("dpml.dpsgd.AUGMENTATIONS", {"flip-crop": lambda x: x})
        settings["augment"] = "flip-crop"
    seen = observe(**settings)
    part = NORMS * CLIP_NORM / (NORMS + 0.01) if mode == "automatic" else np.minimum(NORMS, CLIP_NORM)
    expected = taking_part(seen) * SIGNS * part / math.sqrt(2)
    np.testing.assert_allclose(seen.sums, np.hstack([expected, expected]), rtol=0, atol=1e-6)
    # C is the sensitivity of each mode, so noise and event are the same.
    check_noise((seen.updates * RECORDS / 4 - seen.sums) / CLIP_NORM)
    assert seen.result.planned.event.event.noise_multiplier == 1 / (1 + BookKeepingEngine.slack)
    assert seen.result.summary["config"]["clipping"] == mode


def test_the_adaptive_norm_is_the_same_with_another_engine(monkeypatch):
    settings = {"clip_quantile": 0.5, "epochs": 5, "insecure_noise_seed": 4}
    fast = observe(**settings)
    monkeypatch.setattr("dpml.dpsgd.BookKeepingEngine", OneByOne)
    slow = observe(**settings)
    np.testing.assert_allclose(fast.updates, slow.updates, rtol=0, atol=1e-6)


def test_all_at_once_from_the_command(call, tmp_path):
    line = (
        "train dpsgd --dataset digits --noise-multiplier 1 --delta 1e-5 --epochs 1 --batch-size 512 "
        "--average 0.99 --clip-quantile 0.5 --clipping flat --augment flip-crop --output"
    )
    assert call(line, tmp_path / "a").status == 0
    outcome = call(
        "train dpsgd --non-private --model linear --augment flip-crop --dataset", "digits", "--views", 0
    )
    assert outcome.status == 2
    assert "'views'" in outcome.error()
