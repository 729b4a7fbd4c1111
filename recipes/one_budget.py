"""DP-SGD and PATE from one budget: part of it trains features, the rest pays for answers.

`python -m recipes.one_budget` runs it on digits in seconds. Both releases go through one accountant, whose
budget is a Rényi filter: the second plan may depend on what the first gave.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpml
from accounting import GNMax
from dpml.data import LabeledData

_PUBLIC = 270  # of the 360 test digits


@dataclass(frozen=True)
class SharedBudget:
    """What one budget bought.

    Attributes:
        epsilon: ε of everything together, an upper bound.
        features_accuracy: Of the model that DP-SGD trained, on the test digits that are not public.
        student_accuracy: Of the student, on the same.
        queries: Answers that the rest of the budget paid for.
    """

    epsilon: float
    features_accuracy: float
    student_accuracy: float
    queries: int


def train_both(
    data: LabeledData, *, epsilon: float = 8.0, delta: float = 1e-5, seed: int = 0
) -> SharedBudget:
    """Train features by DP-SGD, then teachers on these features, within one budget."""
    train_set = TensorDataset(data.x_train, data.y_train)
    public, held_out = data.x_test[:_PUBLIC], TensorDataset(data.x_test[_PUBLIC:], data.y_test[_PUBLIC:])
    accountant = dpml.PrivacyAccountant(budget=dpml.PrivacyBudget(epsilon, delta))

    # A third of the budget for features: the released model's own first layers.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh())
        model = nn.Sequential(body, nn.Linear(64, data.classes))
    first = dpml.DPSGDConfig(
        epsilon=epsilon / 3,
        delta=delta,
        epochs=40,
        batch_size=512,
        clip_norm=0.5,
        learning_rate=0.5,
        seed=seed,
    )
    trained = dpml.train_dpsgd(model, train_set, first, test_set=held_out, accountant=accountant)

    # What is left, in answers. The accountant knows both.
    noise = 4.0
    queries = min(accountant.remaining(GNMax(noise)), _PUBLIC)
    second = dpml.PATEConfig(
        noise_multiplier=noise, queries=queries, delta=delta, teachers=30, student_epochs=100, seed=seed
    )
    answered = dpml.train_pate(
        train_set,
        public,
        second,
        classes=data.classes,
        test_set=held_out,
        features=lambda inputs: body(inputs).detach(),
        accountant=accountant,
    )
    return SharedBudget(
        epsilon=accountant.epsilon(delta),
        features_accuracy=trained.summary["test_accuracy"],
        student_accuracy=answered.summary["test_accuracy"],
        queries=queries,
    )


@click.command()
@click.option("--epsilon", type=float, default=8.0, help="The budget for both.")
def main(epsilon: float) -> None:
    """Train on digits by DP-SGD and by PATE within one budget."""
    both = train_both(dpml.load("digits"), epsilon=epsilon)
    click.echo(f"ε = {both.epsilon:.3f} of {epsilon:g} for both, {both.queries} answers")
    click.echo(f"DP-SGD {both.features_accuracy:.1%}, PATE on its features {both.student_accuracy:.1%}")


if __name__ == "__main__":
    main()
