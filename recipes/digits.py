"""scikit-learn's handwritten digits: 1,437 training images of 8×8 pixels. Nothing to download."""

from dpml.config import DPSGDRun
from dpml.pate.config import PATERun
from dpml.registry import card


@card(
    reaches="89.8 % at ε = 0.85, 93.3 % at ε = 2.4 (ours)",
    cost="3 s on 2 cores",
    source="docs/results/digits-demo.json",
)
def dpsgd(private: bool = True) -> DPSGDRun:
    """Softmax regression on the 64 pixels of scikit-learn's digits, in seconds.

    Chosen on a validation split of the training set at ε = 1 and 3, not on the test set: larger batches
    with a small learning rate win, and with 1,437 records a CNN or an MLP gives no more than a linear model.
    """
    if not private:
        return DPSGDRun(
            dataset="digits", non_private=True, model="linear", epochs=60, batch_size=64, learning_rate=0.1
        )
    return DPSGDRun(
        dataset="digits",
        epsilon=3.0,
        delta=1e-5,
        model="linear",
        epochs=60,
        batch_size=512,
        clip_norm=0.5,
        learning_rate=0.3,
        momentum=0.9,
        micro_batch_size=512,
    )


@card(reaches="87.0 % at ε = 8 (ours)", cost="6 s on 2 cores", source="docs/results/digits-demo.json")
def pate(private: bool = True) -> PATERun:
    """Papernot et al. 2017 in small: 30 ridge regressions on scikit-learn's digits, in seconds."""
    if not private:
        return PATERun(dataset="digits", non_private=True, teachers=30, queries=100, student_epochs=100)
    return PATERun(dataset="digits", epsilon=8.0, delta=1e-5, teachers=30, student_epochs=100)
