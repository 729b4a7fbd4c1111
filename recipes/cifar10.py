"""CIFAR-10: the tanh CNN of Papernot et al. 2020, and PATE on scattering features."""

from dpml.config import DPSGDRun
from dpml.pate.config import PATERun


def dpsgd(private: bool = True) -> DPSGDRun:
    """Papernot, Thakurta, Song, Chien & Erlingsson 2020 (550,570 parameters). Hours on two CPU cores."""
    if not private:
        return DPSGDRun(
            dataset="cifar10", model="cnn", non_private=True, epochs=20, batch_size=256, learning_rate=0.05
        )
    return DPSGDRun(
        dataset="cifar10",
        model="cnn",
        epsilon=3.0,
        delta=1e-5,
        epochs=30,
        batch_size=1024,
        clip_norm=0.1,
        learning_rate=2.0,
        schedule="linear",
        momentum=0.9,
        micro_batch_size=64,
    )


def pate(private: bool = True) -> PATERun:
    """PATE with 100 ridge regressions on scattering features; 500 records each, which is few."""
    if not private:
        return PATERun(dataset="cifar10", non_private=True, teachers=100, queries=500, student_flip=True)
    return PATERun(dataset="cifar10", epsilon=8.0, delta=1e-5, teachers=100, student_flip=True)
