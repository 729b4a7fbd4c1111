"""MNIST and Fashion-MNIST with the tanh CNN of Papernot et al. 2020."""

from dataclasses import replace

from dpml.config import DPSGDRun
from dpml.pate.config import PATERun


def dpsgd(private: bool = True) -> DPSGDRun:
    """Papernot, Thakurta, Song, Chien & Erlingsson 2020 (26,010 parameters), larger batches, PLD noise."""
    if not private:
        return DPSGDRun(
            dataset="mnist", model="cnn", non_private=True, epochs=10, batch_size=256, learning_rate=0.05
        )
    return DPSGDRun(
        dataset="mnist",
        model="cnn",
        epsilon=3.0,
        delta=1e-5,
        epochs=40,
        batch_size=2048,
        clip_norm=0.1,
        learning_rate=4.0,
        schedule="trapezoidal",
        momentum=0.9,
        micro_batch_size=128,
    )


def fashion_dpsgd(private: bool = True) -> DPSGDRun:
    """The MNIST recipe on Fashion-MNIST."""
    return replace(dpsgd(private), dataset="fashion-mnist")


def pate(private: bool = True) -> PATERun:
    """Papernot et al. 2018 with 250 ridge regressions on scattering features."""
    if not private:
        return PATERun(dataset="mnist", non_private=True, queries=200)
    return PATERun(dataset="mnist", epsilon=2.0, delta=1e-5)


def fashion_pate(private: bool = True) -> PATERun:
    """The MNIST recipe on Fashion-MNIST, where public images are mirrored too."""
    return replace(pate(private), dataset="fashion-mnist", student_flip=True)
