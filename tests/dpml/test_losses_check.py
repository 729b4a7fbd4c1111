"""Losses that mix examples, layers that get replaced, and what else is settled before the first step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpml
from accounting import UserError
from dpml.cli import main
from dpml.gradients import cross_entropy
from dpml.gradients.models import make_trainable, require_example_losses, require_trainable

INPUTS, TARGETS = torch.rand(1, 4), torch.tensor([2])


def data(n: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 4, generator=generator), torch.arange(n) % 3)


def mixing(outputs: Tensor, targets: Tensor) -> Tensor:
    """A neighbour's loss decides about the sign; the gradient of one row shows no sign of it."""
    losses = cross_entropy(outputs, targets)
    return losses * torch.sign(losses.detach().mean() - 3)


def ranking(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets) / outputs.detach().std(dim=0).sum()


@pytest.mark.parametrize("loss", [mixing, ranking])
def test_a_loss_that_mixes_examples_is_refused(loss: object) -> None:
    with pytest.raises(UserError, match="The loss mixes the examples of a batch") as caught:
        require_example_losses(nn.Linear(4, 3), loss, INPUTS, TARGETS)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_loss_that_averages_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = dpml.DPSGDConfig(noise_multiplier=1.0, delta=1e-3, epochs=1, batch_size=20)
    with pytest.raises(UserError, match="reduction='none'"):
        dpml.train_dpsgd(nn.Linear(4, 3), data(), config, loss=nn.CrossEntropyLoss(), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_fails_gets_one_line() -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError(f"first\nsecond {outputs.shape} {targets.shape}")

    with pytest.raises(UserError, match="The loss refuses the model's outputs") as caught:
        require_example_losses(nn.Linear(4, 3), broken, INPUTS, TARGETS)
    assert "\n" not in str(caught.value)


def test_an_honest_loss_and_an_untouched_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    require_example_losses(model, cross_entropy, INPUTS, TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6).requires_grad_(False),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ],
    ids=["trainable", "without parameters", "frozen", "instance", "instance, affine"],
)
def test_what_is_refused_can_be_fixed_on_request(layer: nn.Module) -> None:
    example = torch.rand(1, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), layer, nn.Flatten(), nn.Linear(6 * 36, 3))
    with pytest.raises(UserError):
        require_trainable(model, example)
    fixed = make_trainable(model)
    require_trainable(fixed, example)
    assert model[1] is layer, "the caller's model is left as it was"


def test_dropout_masks_are_not_those_of_the_published_seed() -> None:
    """With the weights' seed alone, two runs with secret randomness draw different masks."""

    def masks(seed: int | None) -> list[Tensor]:
        seen: list[Tensor] = []

        class Watched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                seen.append(torch.rand(1))
                return self.layer(x)

        config = dpml.DPSGDConfig(
            noise_multiplier=1.0, delta=1e-3, epochs=2, batch_size=60, insecure_noise_seed=seed
        )
        dpml.train_dpsgd(Watched(), data(), config)
        return seen[-2:]

    assert torch.equal(masks(1)[0], masks(1)[0])
    assert not torch.equal(masks(None)[0], masks(None)[0])
    first, second = masks(1)
    assert not torch.equal(first, second), "fresh in every step"


def test_features_get_an_mlp_and_images_a_cnn(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.random((80, 5)), "y_train": np.arange(80) % 3}
    arrays |= {"x_test": rng.random((9, 5)), "y_test": np.arange(9) % 3}
    np.savez(tmp_path / "own.npz", **arrays)
    run = dpml.DPSGDRun(
        dataset=str(tmp_path / "own.npz"), noise_multiplier=1.0, delta=1e-3, epochs=1, batch_size=40
    )
    result = dpml.run_dpsgd(run)
    assert [type(layer).__name__ for layer in result.model.children()].count("Tanh") == 2


def test_a_delta_that_publishes_whole_records_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "train dpsgd --dataset digits --noise-multiplier 8 --epochs 1 --output"
    assert main([*words.split(), str(tmp_path / "a"), "--delta", "0.001"]) == 0
    assert "not below one over the number of records" in capsys.readouterr().err
    assert main([*words.split(), str(tmp_path / "b"), "--delta", "0.0001"]) == 0
    assert "not below one over" not in capsys.readouterr().err


def test_more_steps_than_anybody_could_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = "account dpsgd --batch-size 8 --epochs 1 --noise-multiplier 1 --delta 1e-5 --sampling-probability"
    for probability in ("1e-320", "1e-30"):
        assert main([*words.split(), probability]) == 2
        assert "more than 10^15 steps" in capsys.readouterr().err
