"""The Python interface: a user's own model, data set, loss and optimizer."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accounting import PrivacyAccountant, UnreachableBudget, UserError
from dpml.config import DPSGDConfig, DPSGDRun
from dpml.dpsgd import run_dpsgd, train_dpsgd
from dpml.report import TrainingResult, accuracy


class Rows:
    """A data set that is no tensor: pairs of a NumPy array and a number."""

    def __init__(self, n: int = 60, fails_after: int | None = None) -> None:
        self.x = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
        self.reads, self.fails_after = 0, fails_after

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.reads += 1
        if self.fails_after is not None and self.reads > self.fails_after:
            raise ZeroDivisionError("a broken record")
        return self.x[index], int(self.x[index, 0] > 0)


class Net(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(torch.tanh(self.first(x)))
        return hidden


class Recorder:
    """A tracker that writes down its calls."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.interrupt_at = interrupt_at

    def start(self, planned_steps: int, config: Mapping[str, object]) -> None:
        self.calls.append(("start", (planned_steps, dict(config))))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("scalars", (step, dict(values))))
        if step == self.interrupt_at:
            raise KeyboardInterrupt

    def not_private(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("not_private", (step, dict(values))))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def config(**changed: Any) -> DPSGDConfig:
    base: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-3, "epochs": 2, "batch_size": 10}
    return DPSGDConfig(**{**base, **changed})


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- what may be brought


def test_own_model_and_data_set() -> None:
    model = Net()
    before = parameters_of(model)
    result = train_dpsgd(model, Rows(), config(), test_set=Rows(20), name="my rows")
    assert result.model is model
    assert (parameters_of(model) - before).abs().max() > 1e-3
    assert result.status == "completed"
    assert result.summary["dataset"] == "my rows"
    assert result.summary["steps"] == 12
    assert result.summary["test_accuracy"] == accuracy(model, Rows(20))
    assert result.planned == result.committed
    accountant = PrivacyAccountant()
    accountant.record(result.planned)
    assert result.epsilon == accountant.epsilon(1e-3) == result.summary["epsilon"]
    assert "`my rows`" in result.statement
    assert "The test set you gave is taken to be public" in result.statement
    assert all(p.grad is None for p in model.parameters())


def test_a_list_will_do() -> None:
    result = train_dpsgd(Net(), [(torch.zeros(4), 0)] * 30, config())
    assert result.summary["test_accuracy"] is None


def test_own_loss_and_optimizer() -> None:
    seen: list[Any] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).sum(dim=1)

    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        seen.extend(parameters)
        return torch.optim.Adam(seen, lr=0.05)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    model = nn.Linear(3, 1, bias=False)
    weights = torch.tensor([[1.0], [-2.0], [0.5]])
    train = TensorDataset(x, x @ weights)
    settings = config(epochs=30, batch_size=100, noise_multiplier=0.5, insecure_noise_seed=0)
    train_dpsgd(model, train, settings, loss=loss, make_optimizer=adam)
    assert [id(p) for p in seen] == [id(p) for p in model.parameters()]
    assert (model.weight.detach().T - weights).abs().max() < 0.3


def test_only_what_requires_a_gradient_is_trained() -> None:
    model = Net()
    model.first.requires_grad_(False)
    before = model.first.weight.clone()
    train_dpsgd(model, Rows(), config())
    assert torch.equal(model.first.weight, before)
    with pytest.raises(UserError, match="no trainable parameters"):
        train_dpsgd(Net().requires_grad_(False), Rows(), config())


def test_token_inputs() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    tokens = TensorDataset(torch.randint(0, 10, (30, 3)), torch.zeros(30, dtype=torch.int64))
    assert train_dpsgd(model, tokens, config()).status == "completed"


@pytest.mark.parametrize("as_tensors", [True, False])
def test_a_data_set_s_form_does_not_matter(as_tensors: bool) -> None:
    rows = Rows()
    labels = torch.from_numpy((rows.x[:, 0] > 0).astype(np.int64))
    train: Any = TensorDataset(torch.from_numpy(rows.x), labels) if as_tensors else rows
    torch.manual_seed(1)
    result = train_dpsgd(Net(), train, config(insecure_noise_seed=1))
    torch.manual_seed(1)
    other = train_dpsgd(Net(), Rows(), config(insecure_noise_seed=1))
    assert torch.allclose(parameters_of(result.model), parameters_of(other.model), atol=1e-6)


def test_worker_processes() -> None:
    torch.manual_seed(1)
    result = train_dpsgd(Net(), Rows(), config(insecure_noise_seed=1, workers=1))
    torch.manual_seed(1)
    other = train_dpsgd(Net(), Rows(), config(insecure_noise_seed=1))
    assert torch.allclose(parameters_of(result.model), parameters_of(other.model), atol=1e-6)


def test_batch_normalisation() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = parameters_of(model)
    with pytest.raises(UserError, match=r"'1' \(BatchNorm1d\) mixes the examples .* fix_model=True"):
        train_dpsgd(model, Rows(), config())
    result = train_dpsgd(model, Rows(), config(), fix_model=True)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in result.model.modules())
    assert isinstance(model[1], nn.BatchNorm1d)
    assert torch.equal(parameters_of(model), before)
    # Nothing is to be protected without privacy.
    assert (
        train_dpsgd(model, Rows(), DPSGDConfig(non_private=True, epochs=1, batch_size=10)).epsilon == np.inf
    )


def test_a_model_that_mixes_examples() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x - x.mean(dim=0))
            return out

    with pytest.raises(UserError, match="mixes the examples of a batch"):
        train_dpsgd(Mixer(), Rows(), config())


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (iter([1]), "a stream cannot be Poisson-sampled"),
        ([], "is empty"),
        ([torch.zeros(4)] * 30, "pair"),
        (TensorDataset(torch.zeros(30, 4), torch.zeros(30), torch.zeros(30)), "pair"),
        (TensorDataset(torch.zeros(30, 5), torch.zeros(30, dtype=torch.int64)), "refuses inputs of shape"),
        (TensorDataset(torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)), "larger than the 5"),
    ],
)
def test_data_sets_that_are_none(tmp_path: Path, train: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        train_dpsgd(Net(), train, config(), output=tmp_path / "a")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "a").exists()


def test_a_loss_that_averages() -> None:
    with pytest.raises(UserError, match="reduction='none'"):
        train_dpsgd(Net(), Rows(), config(), loss=nn.CrossEntropyLoss())


def test_examples_that_are_not_finite_are_left_out() -> None:
    rows = Rows()
    rows.x[5] = np.nan
    result = train_dpsgd(Net(), rows, config())
    assert result.status == "completed"
    assert torch.isfinite(parameters_of(result.model)).all()


# ---------------------------------------------------------------- what a run leaves, and leaves alone


def test_without_output_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train_dpsgd(Net(), Rows(), config(log_not_private=True))
    assert list(tmp_path.iterdir()) == []


def test_numpy_s_numbers_reach_the_files(tmp_path: Path) -> None:
    settings = config(batch_size=np.int64(10), clip_norm=np.float32(1), seed=np.uint8(3))
    train_dpsgd(Net(), Rows(), settings, output=tmp_path / "a")
    kept = json.loads((tmp_path / "a" / "summary.json").read_text("utf-8"))["config"]
    assert (kept["batch_size"], kept["clip_norm"], kept["seed"]) == (10, 1.0, 3)


def test_trackers_are_called_in_order() -> None:
    tracker, other = Recorder(), Recorder()
    result = train_dpsgd(
        Net(), Rows(), config(log_not_private=True), test_set=Rows(20), trackers=[tracker, other]
    )
    assert tracker.calls == other.calls
    names = [name for name, _ in tracker.calls]
    assert names[0] == "start"
    assert names[-1] == "finish"
    assert set(names[1:-1]) == {"scalars", "not_private"}
    planned, settings = tracker.calls[0][1]
    assert planned == 12
    assert settings["noise_multiplier"] == 1.0
    assert settings["sampling_probability"] == 10 / 60
    steps = [values[0] for name, values in tracker.calls if name == "scalars"]
    assert steps == sorted(steps)
    last = [values for name, values in tracker.calls if name == "scalars"][-1][1]
    assert last["test/accuracy"] == result.summary["test_accuracy"]
    assert last["privacy/epsilon"] == pytest.approx(result.epsilon, rel=1e-3)
    assert last["privacy/epsilon"] <= result.epsilon
    public = {tag for name, values in tracker.calls if name == "scalars" for tag in values[1]}
    assert public == {
        *("privacy/epsilon", "privacy/epsilon_lower", "test/accuracy", "speed/examples_per_second"),
    }


def test_trackers_hear_nothing_private_unless_asked() -> None:
    tracker = Recorder()
    train_dpsgd(Net(), Rows(), config(), trackers=[tracker])
    assert "not_private" not in [name for name, _ in tracker.calls]


@pytest.mark.parametrize("settings", [{}, {"workers": 1}, {"interrupt_at": 3}])
@pytest.mark.parametrize("test_set", [None, Rows(20)])
def test_the_caller_s_random_state_is_theirs(settings: dict[str, Any], test_set: Any) -> None:
    trackers = [Recorder(settings.get("interrupt_at"))]
    chosen = config(**{key: value for key, value in settings.items() if key != "interrupt_at"})
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - it is the global state that is looked at
    before = torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]  # noqa: NPY002
    train_dpsgd(model, Rows(), chosen, test_set=test_set, trackers=trackers)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # type: ignore[index]  # noqa: NPY002


def test_dropout_follows_the_noise_seed_alone() -> None:
    """Masks go by place in a batch, so known ones would show a record that moves the others."""

    def train(seed: int, global_seed: int, noise_seed: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        torch.manual_seed(global_seed)
        settings = config(seed=seed, insecure_noise_seed=noise_seed, epochs=3)
        return parameters_of(train_dpsgd(model, Rows(), settings).model)

    assert torch.equal(train(3, 1, 1), train(4, 2, 1))
    assert not torch.equal(train(3, 1, 1), train(3, 1, 2))


def _breaks(where: str) -> dict[str, Any]:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise ZeroDivisionError("a broken loss")
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    if where == "loss":
        return {"train_set": Rows(), "loss": loss}
    return {"train_set": Rows(fails_after=120)}


@pytest.mark.parametrize("where", ["loss", "data"])
def test_an_error_in_a_user_s_code_leaves_the_plan_on_disk(tmp_path: Path, where: str) -> None:
    arguments = _breaks(where)
    with pytest.raises(ZeroDivisionError):
        train_dpsgd(Net(), config=config(), output=tmp_path / "a", **arguments)
    record = json.loads((tmp_path / "a" / "privacy_events.json").read_text("utf-8"))
    assert record["status"] == "running"
    [plan] = record["planned"]
    assert (plan["type"], plan["count"]) == ("Repeated", 12)
    assert not (tmp_path / "a" / "summary.json").exists()


def test_a_refused_budget_leaves_no_file(tmp_path: Path) -> None:
    settings = DPSGDConfig(epsilon=1e-9, delta=1e-12, epochs=1, batch_size=10)
    with pytest.raises(UnreachableBudget):
        train_dpsgd(Net(), Rows(), settings, output=tmp_path / "a")
    assert not list(tmp_path.glob("a/*"))
    # So the same folder serves for the second try.
    train_dpsgd(Net(), Rows(), config(), output=tmp_path / "a")


def test_weights_that_diverge(tmp_path: Path) -> None:
    def wild(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=3e38)

    loud = config(noise_multiplier=100.0)
    result = train_dpsgd(Net(), Rows(), loud, make_optimizer=wild, output=tmp_path / "a")
    assert result.status == "diverged"
    assert result.summary["status"] == "diverged"
    assert result.summary["steps"] < result.summary["planned_steps"]
    assert result.summary["epsilon_spent"] < result.summary["epsilon"]
    assert "not finite any more" in result.statement


def test_run_dpsgd_of_a_configuration(own_data: Path) -> None:
    def train(seed: int) -> TrainingResult:
        run = DPSGDRun(
            dataset=str(own_data), model="mlp", epsilon=2.0, delta=1e-3, epochs=1, batch_size=10, seed=seed
        )
        return run_dpsgd(run)

    before = torch.random.get_rng_state()
    result = train(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert result.epsilon <= 2
    assert result.summary["config"]["model"] == "mlp"


def test_examples_are_placed_where_records_are_asked_for() -> None:
    """A Poisson sample reads only its own records, each once a step."""
    rows = Rows()
    probe: Callable[[], int] = lambda: rows.reads  # noqa: E731
    train_dpsgd(Net(), rows, config(epochs=1, batch_size=60, sampling_probability=1.0))
    assert 60 <= probe() <= 62
