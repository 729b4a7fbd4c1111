"""The configuration of a run. The command line is generated from it.

A field's docstring is its help text. `DPSGDConfig` is what `dpml.train_dpsgd` needs beside a model and data;
`DPSGDRun` adds what names them, and is a complete run: what recipes return and `summary.json` keeps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from accounting import Method, NeighboringRelation, PrivacyBudget, UserError
from accounting.accountant import METHODS
from accounting.events import check_count, check_number, check_relation, shown
from accounting.ledger import check_name

Device = Literal["auto", "cpu", "cuda"]
ClippingMode = Literal["flat", "per-layer", "automatic"]
Augmentation = Literal["none", "flip-crop"]
FeatureMap = Literal["none", "scattering", "patches", "scattering-patches"]
Schedule = Literal["constant", "linear", "trapezoidal"]
CLIPPING_MODES: tuple[ClippingMode, ...] = get_args(ClippingMode)
_AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)
FEATURE_MAPS: tuple[FeatureMap, ...] = get_args(FeatureMap)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True, kw_only=True)
class PrivateConfig:
    """What the trainers share. Give a budget (epsilon) or a noise multiplier, not both."""

    epsilon: float | None = None
    """Privacy budget ε: the noise is chosen such that the whole run costs at most this."""
    delta: float | None = None
    """Privacy parameter δ, well below one over the number of records; 1e-5 is customary for 60,000."""
    noise_multiplier: float | None = None
    """Noise instead of a budget. ε follows from it."""
    non_private: bool = False
    """Train without noise: the ceiling that privacy is measured against."""
    device: Device = "auto"
    """Where to compute: cpu, cuda, or auto (cuda if there is one)."""
    seed: int = 0
    """Fixes what privacy does not depend on."""
    insecure_noise_seed: int | None = None
    """Fixes the noise too. For tests and experiments: such a run is not for release."""
    accountant: Method = "pld"
    """How ε is computed: pld (tight) or rdp."""
    log_not_private: bool = False
    """Also log figures that are NOT covered by ε, to files readable by their owner alone."""
    ledger: str | None = None
    """Name of the data set in the ledger (see `dpml ledger`), whose budget for all runs then has to pay for
    this one too. By default no ledger knows of the run."""

    def __post_init__(self) -> None:
        self._check_privacy()
        count_field(self, "seed")
        count_field(self, "insecure_noise_seed")
        switch_field(self, "log_not_private")
        choice_field(self, "device", ("auto", "cpu", "cuda"))
        choice_field(self, "accountant", METHODS)

        if self.ledger is not None:
            object.__setattr__(self, "ledger", check_name(self.ledger))
            if self.non_private:
                raise UserError("No budget pays for a run without noise: leave out ledger or non_private.")

    def _check_privacy(self) -> None:
        switch_field(self, "non_private")
        wishes = [name for name in ("epsilon", "noise_multiplier") if getattr(self, name) is not None]
        wishes += ["non_private"] if self.non_private else []
        self._check_wishes(wishes)
        number_field(self, "epsilon", high=1e9)
        number_field(self, "noise_multiplier", high=1e7)
        number_field(self, "delta", high=1)
        if self.delta is None and not self.non_private:
            raise UserError(
                "Give delta, well below one over the number of records; 1e-5 is customary for 60,000. "
                "Got none."
            )

    def _check_wishes(self, wishes: list[str]) -> None:
        if len(wishes) != 1:
            got = " and ".join(wishes) or "none of them"
            raise UserError(
                f"Give exactly one of epsilon (a budget), noise_multiplier or non_private. Got {got}."
            )

    @property
    def budget(self) -> PrivacyBudget | None:
        """The budget, if ε was given."""
        if self.epsilon is None or self.delta is None:
            return None
        return PrivacyBudget(self.epsilon, self.delta)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Which data a complete run is about."""

    dataset: str
    """A name (digits, mnist, fashion-mnist, cifar10) or a path: an .npz file with x_train, y_train, x_test,
    y_test, or an image folder train/CLASS/*.png, test/CLASS/*.png."""
    classes: int | None = None
    """Number of classes of your own .npz data; by default one more than the largest label."""
    image_size: int | None = None
    """Side in pixels to which the images of a folder are resized; by default they must be equal."""

    def check_source(self) -> None:
        """Raise UserError for a data set that cannot be one."""
        dataset: object = self.dataset
        if isinstance(dataset, os.PathLike):
            object.__setattr__(self, "dataset", os.fspath(dataset))
        if not isinstance(self.dataset, str) or not self.dataset:
            raise UserError(f"The dataset must be a name or a path. Got {shown(self.dataset)}.")
        count_field(self, "classes", low=2)
        count_field(self, "image_size", low=1)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of resized images."""
        return None if self.image_size is None else (self.image_size, self.image_size)


@dataclass(frozen=True, kw_only=True)
class DPSGDConfig(PrivateConfig):
    """How to train with DP-SGD. Give a budget (epsilon) or a noise multiplier, not both."""

    noise_multiplier: float | None = None
    """Noise instead of a budget: its standard deviation over the clip norm. ε follows from it."""
    non_private: bool = False
    """Train without clipping and noise: the ceiling that privacy is measured against."""
    epochs: float = 20
    """Passes over the data, in expectation: steps = epochs × records / batch size, rounded down."""
    batch_size: int = 256
    """Expected batch size B. The noisy sum is divided by it, whatever the size of a sample."""
    sampling_probability: float | None = None
    """Probability of each record to be in a batch, as a number chosen without looking at the number of
    records. Needed for the relation add-or-remove-one; by default B / records."""
    neighboring_relation: NeighboringRelation | None = None
    """Which data sets must be hard to tell apart: zero-out (the number of records is public) or
    add-or-remove-one. By default zero-out, or add-or-remove-one if a sampling probability is given."""
    clip_norm: float = 1.0
    """Clip norm C: the L2 norm to which each example's gradient is cut."""
    clipping: ClippingMode = "flat"
    """How it is cut: flat (the gradient as a whole), per-layer (each of L layers to C/√L), or automatic
    (scaled to just below C, large or small). Its norm is then at most C in each case."""
    clip_quantile: float | None = None
    """Let the clip norm adapt: it starts at C and moves towards this quantile of the gradient norms, by a
    noisy count in every step. Its noise is a twentieth of the batch size, or 2.5 noise multipliers if that
    is more; ε covers it. For flat clipping."""
    learning_rate: float = 0.5
    """Learning rate of stochastic gradient descent."""
    schedule: Schedule = "constant"
    """Learning rate over the run: constant, linear (down to zero), or trapezoidal (constant for 60 % of the
    run, then down to zero: as much progress as constant, and late noise is averaged away)."""
    momentum: float = 0.9
    """Momentum of stochastic gradient descent; 0 for none."""
    average: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9999: its model is then the result.
    It costs no privacy. 0 for none."""
    views: int = 1
    """Augmented views of each record in a step: its gradient is that of their mean loss, and is clipped once.
    Costs time, but no privacy. Needs an augmentation."""
    augment: Augmentation = "none"
    """How each view is changed at random: none, or flip-crop (mirrored or not, and shifted by up to 4 pixels;
    for images)."""
    micro_batch_size: int = 128
    """Rows (examples, or views of them) that are processed at once. Changes memory and speed, never the
    result."""
    mean_noise: float | None = None
    """Centre the inputs: each is scaled to norm 1, and the mean of all, released once with this noise
    multiplier, is subtracted. ε covers it. For vectors of features; 30 costs next to nothing. By default
    inputs stay as they are."""
    workers: int = 0
    """Processes that load data; 0 loads in the main process. For data sets that are not in memory."""
    seed: int = 0
    """Fixes the initial weights. Noise, sampling, augmentation and dropout stay secret."""
    insecure_noise_seed: int | None = None
    """Fixes noise, sampling, augmentation and dropout too. For tests and experiments: such a run is not for
    release."""
    log_not_private: bool = False
    """Also log loss, gradient norms and clipping to TensorBoard. They are NOT covered by ε; their file is
    readable by its owner alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number_field(self, "epochs", high=1e9)
        count_field(self, "batch_size", low=1)
        number_field(self, "sampling_probability", high=1, closed="right")
        if self.neighboring_relation is not None:
            check_relation(self.neighboring_relation)
        number_field(self, "clip_norm", high=1e12)
        number_field(self, "clip_quantile", high=1)
        number_field(self, "mean_noise", high=1e7)
        number_field(self, "learning_rate", high=1e12)
        number_field(self, "momentum", high=1, closed="left")
        number_field(self, "average", high=1, closed="left")
        count_field(self, "views", low=1)
        if not isinstance(self.augment, str) or self.augment not in _AUGMENTATIONS:
            names = ", ".join(_AUGMENTATIONS)
            raise UserError(
                f"The augment must be one of {names}; a function of your own goes to train_dpsgd as its "
                f"argument. Got {shown(self.augment)}."
            )
        count_field(self, "micro_batch_size", low=1)
        count_field(self, "workers")
        choice_field(self, "clipping", CLIPPING_MODES)
        if self.clip_quantile is not None and self.clipping != "flat":
            raise UserError(
                f"A clip_quantile needs flat clipping: there is no one norm to adapt in {self.clipping} "
                "clipping. Leave out one of the two."
            )
        choice_field(self, "schedule", SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class DPSGDRun(DPSGDConfig, DataSource):
    """A complete run: data, model, training."""

    model: str = "auto"
    """The model: cnn, mlp, linear, linear-without-bias (for centred features and classes of about equal size)
    or wrn-16-4; auto is cnn for images, mlp for other data, and linear on features of images."""
    features: FeatureMap = "none"
    """What the model sees of an image instead of its pixels: features that are fitted to no data, and so cost
    no privacy. scattering (wavelets), patches (random filters), or both (scattering-patches)."""
    no_cache: bool = False
    """Keep no features for the next run. They are as private as the data; their files are readable by their
    owner alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_source()
        if not isinstance(self.model, str):
            raise UserError(f"The model must be a name. Got {shown(self.model)}.")
        choice_field(self, "features", FEATURE_MAPS)
        switch_field(self, "no_cache")
        if self.features != "none" and self.augment != "none":
            raise UserError(
                "Features are computed once, of images as they are: augment must be none. Got "
                f"{self.augment!r}."
            )


# Checks of fields. A checked number is kept as Python's own: NumPy's, which callers pass, go into no JSON.


def number_field(config: object, name: str, *, high: float, low: float = 0, closed: str = "neither") -> None:
    """Check that a field is a number in the interval, or None where that is its default."""
    value = getattr(config, name)
    if value is None and _is_optional(config, name):
        return
    object.__setattr__(config, name, check_number(value, name, "a run", low=low, high=high, closed=closed))


def count_field(config: object, name: str, *, low: int = 0) -> None:
    """Check that a field is a whole number of at least `low`, or None where that is its default."""
    value = getattr(config, name)
    if value is None and _is_optional(config, name):
        return
    object.__setattr__(config, name, check_count(value, name, "a run", low=low))


def switch_field(config: object, name: str) -> None:
    """Check that a field is True or False."""
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise UserError(f"The '{name}' parameter of a run must be True or False. Got {shown(value)}.")


def choice_field(config: object, name: str, choices: tuple[str, ...]) -> None:
    """Check that a field is one of `choices`."""
    value = getattr(config, name)
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(choices)
        raise UserError(f"The {name.replace('_', ' ')} must be one of {names}. Got {shown(value)}.")


def _is_optional(config: Any, name: str) -> bool:
    return config.__dataclass_fields__[name].default is None
