"""What one record changes among teachers: one of them, to the last bit. And what they learn."""

import json
import math
import stat

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from accounting import UserError
from dpml.data import load
from dpml.gradients.native import switched
from dpml.pate import native
from dpml.pate.features import features_by_name
from dpml.pate.partition import Partition, default_places
from dpml.pate.teachers import (
    draw_batches,
    load_ensemble,
    new_networks,
    train_convolutional,
    train_linear,
)

CLASSES, TEACHERS, N = 10, 6, 60
RIDGE = 0.1
STEPS = {"steps": 4, "batch_size": 16, "learning_rate": 0.05, "shift": 2, "seed": 3}
IMAGES = (2, 12, 13)
SHAPES = {"values": (1, 8, 8), "scattering": (1, 16, 16), "convolutional": IMAGES, "portable": IMAGES}
HOSTILE = {
    "huge": 1e30,
    "largest": 3e38,
    "smallest": -3e38,
    "subnormal": 1e-45,
    "infinite": math.inf,
    "not a number": math.nan,
}


def records(kind, n=N):
    """Real digits for the features "values", random images for the others."""
    if kind == "values":
        digits = load("digits")
        return digits.x_train[:n].clone(), digits.y_train[:n].clone()
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, *SHAPES[kind], generator=generator), torch.randint(
        CLASSES, (n,), generator=generator
    )


def train(kind, inputs, labels, *, teachers=TEACHERS, places=40, function=None):
    """An ensemble, and each record's teacher."""
    partition = Partition.of(inputs, labels, teachers, places=places)
    if kind in ("convolutional", "portable"):
        with switched(kind == "convolutional"):
            return train_convolutional(inputs, labels, CLASSES, partition, **STEPS), partition
    function = function or features_by_name(kind, tuple(inputs.shape[1:]))[1]
    made = train_linear(inputs, labels, CLASSES, partition, features=kind, function=function, ridge=RIDGE)
    return made, partition


def changed(a, b):
    """The teachers of whose weights any bit differs."""
    ours, theirs = a.weights(), b.weights()
    same = [
        all(ours[name][teacher].numpy().tobytes() == theirs[name][teacher].numpy().tobytes() for name in ours)
        for teacher in range(a.teachers)
    ]
    return [teacher for teacher, equal in enumerate(same) if not equal]


def home(partition, row):
    return [int(teacher) for teacher in (partition.members == row).any(dim=1).nonzero()[:, 0]]


def without(inputs, labels, row):
    return torch.cat([inputs[:row], inputs[row + 1 :]]), torch.cat([labels[:row], labels[row + 1 :]])


def check_teachers(kind, rows=(0, 17, N - 1), hostile=(), **settings):
    """Assert that without a record its teacher alone is another one, bit for bit, and votes move by one."""
    inputs, labels = records(kind)
    for row, value in [
        *((row, None) for row in rows),
        *((row, value) for row in rows[:2] for value in hostile),
    ]:
        some = inputs.clone()
        if value is not None:
            some[row] = value
        full, partition = train(kind, some, labels, **settings)
        less, _ = train(kind, *without(some, labels, row), **settings)
        own = home(partition, row)
        moved = changed(full, less)
        harmless = [] if value is not None else own  # a teacher may make nothing of a hostile record
        assert moved in (own, harmless), f"teachers: a record of {own} changes {moved}"
        votes, fewer = full.votes(inputs), less.votes(inputs)
        assert (votes - fewer).abs().max() <= 1, "votes: one record moves a count by more than one"
        assert (votes - fewer).abs().sum(dim=1).max() <= 2, "votes: one record moves more than one vote"


KINDS = pytest.mark.parametrize("kind", SHAPES)


# ---------------------------------------------------------------- one record


@KINDS
def test_without_a_record_its_teacher_alone_changes_bit_for_bit(kind):
    check_teachers(kind)


@pytest.mark.parametrize("row", range(2, N, 7))
def test_that_holds_for_each_record(row):
    check_teachers("values", rows=(row,))


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@KINDS
def test_that_holds_for_hostile_records_in_the_first_row_and_elsewhere(kind, value):
    check_teachers(kind, rows=(0, 31), hostile=[value])


def test_that_holds_in_several_groups(monkeypatch):
    monkeypatch.setattr("dpml.pate.teachers._GROUP_BYTES", 2 * 4 * 64 * 40)  # two teachers in a group
    check_teachers("values", rows=(0, 40))
    monkeypatch.setattr("dpml.pate.teachers._NETWORKS", 4)
    check_teachers("convolutional", rows=(0, 40))
    check_teachers("portable", rows=(0, 40))


def test_that_holds_for_signed_numbers_that_are_mostly_zero(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(N, 30, generator=generator) * (torch.rand(N, 30, generator=generator) < 0.1)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    monkeypatch.setattr("test_teachers.records", lambda _: (inputs, labels))
    check_teachers("values", rows=range(0, N, 6))


@KINDS
def test_that_holds_when_shards_overflow(kind):
    _, partition = train(kind, *records(kind), places=6)
    kept = partition.members[partition.members >= 0].tolist()
    assert len(kept) < N
    check_teachers(kind, rows=(kept[0], kept[-1]), places=6)


@KINDS
def test_a_record_beyond_its_shard_s_places_changes_nothing(kind):
    inputs, labels = records(kind)
    full, partition = train(kind, inputs, labels, places=6)
    lost = next(row for row in range(N) if not home(partition, row))
    less, _ = train(kind, *without(inputs, labels, lost), places=6)
    assert changed(full, less) == []


@pytest.mark.parametrize("value", [None, 1e38, math.inf], ids=["plain", "largest", "infinite"])
@KINDS
def test_that_holds_when_shards_are_or_become_empty(kind, value):
    inputs, labels = records(kind, 7)
    if value is not None:
        inputs[0] = value
    full, partition = train(kind, inputs, labels, teachers=12)
    sizes = (partition.members >= 0).sum(dim=1)
    assert (sizes == 0).sum() >= 3
    for row in range(7):
        less, _ = train(kind, *without(inputs, labels, row), teachers=12)
        own = home(partition, row)
        assert changed(full, less) in (own, [] if value is not None else own)  # see check_teachers
    assert any(sizes[home(partition, row)] == 1 for row in range(7))


@KINDS
def test_a_changed_record_changes_its_old_and_its_new_teacher_at_most(kind):
    inputs, labels = records(kind)
    full, partition = train(kind, inputs, labels)
    for row, value in ((0, 0.25), (30, 1e30)):
        other = inputs.clone()
        other[row, 0, 2, 2] = value
        after, moved = train(kind, other, labels)
        assert changed(full, after) == sorted({*home(partition, row), *home(moved, row)})


def test_a_changed_label_changes_its_old_and_its_new_teacher_at_most():
    inputs, labels = records("values")
    full, partition = train("values", inputs, labels)
    other = labels.clone()
    other[0] = (labels[0] + 1) % CLASSES
    after, moved = train("values", inputs, other)
    assert changed(full, after) == sorted({*home(partition, 0), *home(moved, 0)})


@KINDS
def test_the_order_of_rows_does_not_matter(kind):
    inputs, labels = records(kind)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert changed(train(kind, inputs, labels)[0], train(kind, inputs[order], labels[order])[0]) == []


def test_features_that_fail_on_one_record_concern_its_teacher_alone():
    inputs, labels = records("values")
    for row in (0, 31):
        special = inputs[row]

        def failing(some, special=special):
            rows = some.flatten(1).clone()
            rows[(some == special).flatten(1).all(dim=1)] = torch.nan
            return rows

        full, partition = train("own", inputs, labels, function=failing)
        less, _ = train("own", *without(inputs, labels, row), function=failing)
        assert changed(full, less) in (home(partition, row), [])


# ---------------------------------------------------------------- what they learn


@pytest.mark.parametrize(("n", "teachers"), [(60, 6), (900, 3)])
def test_linear_teachers_are_ridge_regressions(n, teachers):
    inputs, labels = records("values", n)
    ensemble, partition = train("values", inputs, labels, teachers=teachers, places=n)
    x = ensemble.function(inputs).double().numpy()
    y = np.eye(CLASSES)[labels.numpy()]
    for teacher, members in enumerate(partition.members):
        rows = members[members >= 0].numpy()
        spread = ((x[rows] - x[rows].mean(axis=0)) ** 2).sum(axis=1).mean()
        exact = Ridge(alpha=RIDGE * spread, solver="cholesky").fit(x[rows], y[rows])
        weight, bias = ensemble.weight[teacher].double().numpy(), ensemble.bias[teacher].double().numpy()
        np.testing.assert_allclose(weight, exact.coef_.T, atol=2e-4 * np.abs(exact.coef_).max())
        np.testing.assert_allclose(x @ weight + bias, exact.predict(x), atol=2e-4)


def test_linear_teachers_in_several_groups_are_those_of_one_group(monkeypatch):
    inputs, labels = records("values")
    one, _ = train("values", inputs, labels)
    monkeypatch.setattr("dpml.pate.teachers._GROUP_BYTES", 2 * 4 * 64 * 40)  # two teachers in a group
    several, _ = train("values", inputs, labels)
    for name, weights in one.weights().items():
        torch.testing.assert_close(several.weights()[name], weights, atol=1e-6, rtol=1e-5)


def test_teachers_without_records_vote_for_some_class():
    inputs, labels = records("values", 3)
    ensemble, _ = train("values", inputs, labels, teachers=40)
    assert (ensemble.votes(inputs).sum(dim=1) == 40).all()


def alone(weights, teacher):
    """The network of one teacher from plain modules."""
    shape = {name: tuple(weight.shape[1:]) for name, weight in weights.items()}
    network = nn.Sequential(
        nn.Conv2d(shape["weight1"][1], shape["weight1"][0], 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(shape["weight2"][1], shape["weight2"][0], 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(*shape["weight3"]),
    )
    with torch.no_grad():
        for number, module in enumerate((network[0], network[2], network[5]), start=1):
            weight = weights[f"weight{number}"][teacher]
            module.weight.copy_(weight.T if number == 3 else weight)
            module.bias.copy_(weights[f"bias{number}"][teacher])
    return network


def shifted(image, move):
    """What was at (y + dy, x + dx) comes to (y, x), number by number."""
    dy, dx = move.tolist()
    _, height, width = image.shape
    found = torch.zeros_like(image)
    for y in range(max(0, -dy), min(height, height - dy)):
        for x in range(max(0, -dx), min(width, width - dx)):
            found[:, y, x] = image[:, y + dy, x + dx]
    return found


def trained_alone(inputs, labels, members, weights, teacher, settings):
    """The network of one teacher, trained by modules, an optimizer, a scheduler and a loop."""
    keys = torch.randint(2**62, (teacher + 1,), generator=torch.Generator().manual_seed(settings["seed"] + 1))
    rows, moves = draw_batches(
        members, settings["steps"], settings["batch_size"], settings["shift"], int(keys[teacher])
    )
    network = alone(weights, teacher)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings["learning_rate"], momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["steps"])
    for batch, move in zip(rows, moves, strict=True):
        x = torch.stack([shifted(image, by) for image, by in zip(inputs[batch], move, strict=True)])
        optimizer.zero_grad()
        if len(members[members >= 0]):
            nn.functional.cross_entropy(network(x), labels[batch]).backward()
        else:  # no records, no loss
            (network(torch.zeros_like(x)) * 0).sum().backward()
        optimizer.step()
        schedule.step()
    return network


@pytest.mark.parametrize("kind", ["convolutional", "portable"])
@pytest.mark.parametrize(("n", "teachers", "looked_at"), [(60, 3, (0, 1, 2)), (60, 27, (0, 9, 10, 26))])
def test_convolutional_teachers_are_the_networks_trained_alone(kind, n, teachers, looked_at):
    inputs, labels = records(kind, n)
    together, partition = train(kind, inputs, labels, teachers=teachers)
    initial = new_networks(teachers, IMAGES, CLASSES, STEPS["seed"])
    for teacher in looked_at:
        network = trained_alone(inputs, labels, partition.members[teacher], initial, teacher, STEPS)
        expected = alone(together.weights(), teacher).state_dict()
        for name, weight in network.state_dict().items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            logits = network(inputs)
        clear = logits.topk(2).values.diff().abs()[:, 0] > 1e-4
        with switched(kind == "convolutional"):
            assert torch.equal(together.predict(inputs)[clear, teacher], logits.argmax(dim=1)[clear])


needs_kernel = pytest.mark.skipif(native.kernel() is None, reason="needs a C++ compiler")


@needs_kernel
@pytest.mark.parametrize(
    ("shape", "classes", "steps"),
    [
        ((1, 9, 9), 2, 3),
        ((3, 32, 32), 10, 3),
        ((1, 28, 28), 17, 3),
        ((2, 10, 31), 33, 3),
        ((1, 12, 12), 1, 2),
    ],
    ids=str,
)
def test_the_kernel_takes_the_portable_steps(shape, classes, steps):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, *shape, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    partition = Partition.of(inputs, labels, 4, places=30)
    settings = {**STEPS, "steps": steps, "shift": 12}  # images may leave the frame altogether
    both = []
    for on in (True, False):
        with switched(on):
            both.append(train_convolutional(inputs, labels, classes, partition, **settings))
    for name, weight in both[0].weights().items():
        torch.testing.assert_close(weight, both[1].weights()[name], atol=1e-5, rtol=1e-4)
    found = both[1].predict(inputs)
    with switched(False):
        assert (found == both[1].predict(inputs)).float().mean() > 0.99
        assert not torch.equal(both[0].parameters["weight1"], new_networks(4, shape, classes, 3)["weight1"])


@needs_kernel
def test_kernel_and_portable_teachers_vote_alike_after_training():
    digits = load("digits")
    train_set, test_set = (nn.functional.interpolate(x, 16) for x in (digits.x_train, digits.x_test))
    labels, settings = digits.y_train, {**STEPS, "steps": 150, "shift": 1}
    partition = Partition.of(train_set, labels, 6, places=default_places(len(train_set), 6))
    votes = []
    for on in (True, False):
        with switched(on):
            made = train_convolutional(train_set, labels, CLASSES, partition, **settings)
            votes.append(made.votes(test_set))
    assert (votes[0] != votes[1]).any(dim=1).float().mean() < 0.02
    assert (votes[0].argmax(dim=1) == digits.y_test).float().mean() > 0.9


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    inputs, labels = records("convolutional")
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made.append(train("convolutional", inputs, labels)[0])
    torch.set_num_threads(before)
    assert changed(made[0], made[1]) == changed(made[0], made[2]) == []
    assert torch.equal(made[0].votes(inputs), made[2].votes(inputs))


@pytest.mark.parametrize("kind", ["convolutional", "portable"])
def test_what_is_not_a_number_votes_for_one_class(kind):
    inputs, labels = records(kind)
    with switched(kind == "convolutional"):
        ensemble, _ = train(kind, torch.full_like(inputs, torch.nan), labels)
        assert ensemble.parameters["bias3"].isnan().all()
        assert (ensemble.predict(inputs) == 0).all()


def test_teachers_learn():
    digits = load("digits")
    inputs, labels = digits.x_train, digits.y_train
    ensemble, _ = train("values", inputs, labels, teachers=5, places=default_places(len(inputs), 5))
    hits = ensemble.votes(digits.x_test).argmax(dim=1) == digits.y_test
    assert hits.float().mean() > 0.85


def test_the_seed_alone_fixes_convolutional_teachers():
    inputs, labels = records("convolutional")
    torch.manual_seed(0)
    a, partition = train("convolutional", inputs, labels)
    torch.manual_seed(1)
    b, _ = train("convolutional", inputs, labels)
    assert changed(a, b) == []
    other = train_convolutional(inputs, labels, CLASSES, partition, **{**STEPS, "seed": 4})
    assert changed(a, other) == list(range(TEACHERS))


@pytest.mark.parametrize("kind", ["values", "convolutional"])
def test_progress_ends_with_all_teachers(kind):
    inputs, labels = records(kind)
    partition, seen = Partition.of(inputs, labels, 27, places=40), []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    if kind == "values":
        function = features_by_name("values", tuple(inputs.shape[1:]))[1]
        more = {"features": "values", "function": function, "ridge": RIDGE}
        train_linear(inputs, labels, CLASSES, partition, **more, progress=report)
    else:
        train_convolutional(inputs, labels, CLASSES, partition, **STEPS, progress=report)
    assert seen[-1] == (27, 27)
    assert seen == sorted(seen)


# ---------------------------------------------------------------- votes


@KINDS
def test_every_teacher_votes_once(kind):
    inputs, labels = records(kind)
    ensemble, _ = train(kind, inputs, labels)
    votes = ensemble.votes(inputs)
    assert votes.shape == (N, CLASSES)
    assert votes.dtype == torch.int64
    assert (votes >= 0).all()
    assert (votes.sum(dim=1) == TEACHERS).all()
    assert ensemble.votes(inputs[:0]).shape == (0, CLASSES)


@KINDS
def test_votes_do_not_depend_on_the_batch_that_a_query_is_in(kind, monkeypatch):
    inputs, labels = records(kind)
    ensemble, _ = train(kind, inputs, labels)
    whole = ensemble.votes(inputs)
    one_by_one = torch.cat([ensemble.votes(row[None]) for row in inputs])
    backwards = ensemble.votes(inputs.flip(0)).flip(0)
    monkeypatch.setattr("dpml.pate.teachers._ROWS", 7)
    for other in (one_by_one, backwards, ensemble.votes(inputs)):
        assert (
            whole != other
        ).sum() <= 2  # one vote of 360, between two classes that rounding cannot tell apart


def test_inputs_of_another_shape_are_refused():
    ensemble, _ = train("values", *records("values"))
    with pytest.raises(
        UserError, match=r"trained on inputs of shape \(1, 8, 8\), these have shape \(1, 9, 8\)"
    ):
        ensemble.votes(torch.zeros(2, 1, 9, 8))


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 30), (1, 30, 8)], ids=str)
def test_images_too_small_for_a_network_are_refused(shape):
    with pytest.raises(UserError, match="Convolutional teachers need images of shape"):
        new_networks(2, shape, CLASSES, 0)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 12, 19), (1, 28, 28)], ids=str)
def test_networks_fit_the_images_they_are_made_for(shape):
    inputs = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    partition = Partition.of(inputs, torch.arange(6), 2, places=6)
    ensemble = train_convolutional(inputs, torch.arange(6), 6, partition, **STEPS)
    assert (ensemble.votes(inputs).sum(dim=1) == 2).all()


# ---------------------------------------------------------------- files


@KINDS
def test_a_saved_ensemble_votes_the_same(kind, tmp_path):
    inputs, labels = records(kind)
    ensemble, _ = train(kind, inputs, labels)
    folder = tmp_path / "made" / "teachers"
    ensemble.save(folder, note="so")
    loaded, description = load_ensemble(folder)
    assert type(loaded) is type(ensemble)
    assert changed(loaded, ensemble) == []
    assert torch.equal(loaded.votes(inputs), ensemble.votes(inputs))
    assert description["note"] == "so"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 2
    ensemble.save(folder)  # over the old ones
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


@pytest.fixture(scope="module")
def files():
    """The two files of a linear and of a convolutional ensemble."""
    import tempfile
    from pathlib import Path

    made = {}
    for kind in ("values", "convolutional"):
        ensemble, _ = train(kind, *records(kind))
        with tempfile.TemporaryDirectory() as folder:
            ensemble.save(Path(folder))
            made[kind] = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return made


JSON, WEIGHTS = "ensemble.json", "ensemble.safetensors"


def described(**changes):
    def damage(files):
        text = json.loads(files["values"][JSON])
        text = {key: value for key, value in {**text, **changes}.items() if value != "left out"}
        return {JSON: json.dumps(text).encode(), WEIGHTS: files["values"][WEIGHTS]}

    return damage


def with_json(content):
    return lambda files: {JSON: content, WEIGHTS: files["values"][WEIGHTS]}


DAMAGES = {
    "no files": lambda files: {},  # noqa: ARG005
    "no weights": lambda files: {JSON: files["values"][JSON]},
    "no description": lambda files: {WEIGHTS: files["values"][WEIGHTS]},
    "empty description": with_json(b""),
    "half a description": with_json(b'{"schema_version": 1, "kind": '),
    "a list": with_json(b"[1, 2]"),
    "a number": with_json(b"1"),
    "deep lists": with_json(b"[" * 100_000),
    "no text": with_json(b"\xff\xfe\x00"),
    "another version": described(schema_version=2),
    "no kind": described(kind="left out"),
    "an unknown kind": described(kind="forest"),
    "no shape": described(example_shape="left out"),
    "a shape that is none": described(example_shape=5),
    "no classes": described(classes="left out"),
    "classes that are none": described(classes="x"),
    "other classes": described(classes=7),
    "no features": described(features="left out"),
    "unknown features": described(features="pixels"),
    "features of other images": described(features="scattering"),
    "a function's features": described(features="function"),
    "weights cut short": lambda files: {
        JSON: files["values"][JSON],
        WEIGHTS: files["values"][WEIGHTS][: len(files["values"][WEIGHTS]) // 2],
    },
    "weights that are text": lambda files: {JSON: files["values"][JSON], WEIGHTS: b"hello " * 100},
    "linear teachers with networks' weights": lambda files: {
        JSON: files["values"][JSON],
        WEIGHTS: files["convolutional"][WEIGHTS],
    },
    "networks with linear weights": lambda files: {
        JSON: files["convolutional"][JSON],
        WEIGHTS: files["values"][WEIGHTS],
    },
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_ensemble_is_refused_in_one_line(damage, files, tmp_path):
    folder = tmp_path / "teachers"
    folder.mkdir()
    for name, content in damage(files).items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_ensemble(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value) or "Scattering is for images" in str(refused.value)


def test_networks_of_another_form_are_refused(files, tmp_path):
    description = json.loads(files["convolutional"][JSON])
    for network in ("of other layers", None):
        (tmp_path / JSON).write_text(json.dumps({**description, "network": network}))
        (tmp_path / WEIGHTS).write_bytes(files["convolutional"][WEIGHTS])
        with pytest.raises(UserError, match=r"networks of another form.*train the teachers again"):
            load_ensemble(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_ensemble(tmp_path / "none")


def test_features_that_are_a_function_cannot_be_loaded_again(tmp_path):
    inputs, labels = records("values")
    ensemble, _ = train("function", inputs, labels, function=lambda some: some.flatten(1))
    ensemble.save(tmp_path)
    with pytest.raises(UserError, match="a function of your own"):
        load_ensemble(tmp_path)
