"""The configuration of a PATE run. The command line is generated from it: see `dpml.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from accounting import NeighboringRelation, UserError
from dpml.config import DataSource, PrivateConfig, choice_field, count_field, number_field, switch_field
from dpml.paths import check_path

AggregatorName = Literal["gnmax", "confident-gnmax", "interactive-gnmax", "lnmax"]
TeacherKind = Literal["linear", "convolutional"]
FeatureName = Literal["auto", "values", "scattering"]
StudentMethod = Literal["spread", "fixmatch", "supervised"]
QueryChoice = Literal["typical", "first"]
AGGREGATORS: tuple[AggregatorName, ...] = get_args(AggregatorName)
TEACHER_KINDS: tuple[TeacherKind, ...] = get_args(TeacherKind)
FEATURES: tuple[FeatureName, ...] = get_args(FeatureName)
STUDENT_METHODS: tuple[StudentMethod, ...] = get_args(StudentMethod)
QUERY_CHOICES: tuple[QueryChoice, ...] = get_args(QueryChoice)


@dataclass(frozen=True, kw_only=True)
class PATEConfig(PrivateConfig):
    """How to train with PATE. Budget, noise multiplier and number of queries fix each other."""

    epsilon: float | None = None
    """Privacy budget ε, whatever the votes are. With a noise multiplier it decides how many queries are
    asked, with queries how much noise is added, with neither both."""
    noise_multiplier: float | None = None
    """Noise on each class's count, in votes: standard deviation σ, for lnmax the scale of Laplace noise."""
    non_private: bool = False
    """Answer without noise: the ceiling that privacy is measured against."""
    seed: int = 0
    """Fixes the partition, the teachers and the student. Noise stays secret."""
    insecure_noise_seed: int | None = None
    """Fixes the noise too. For tests and experiments: such a run is not for release."""
    log_not_private: bool = False
    """Also write the data-dependent ε and the accuracy of teachers and answers. They are computed from votes
    without noise and are NOT covered by ε; their file is readable by its owner alone."""
    teachers: int = 250
    """Number of teachers. Each is trained on a share of the records of its own."""
    teacher: TeacherKind = "linear"
    """linear (ridge regression on features) or convolutional (for images)."""
    features: FeatureName = "auto"
    """What linear teachers look at: values (the numbers of an input), scattering (of images), or auto
    (scattering for images of 16×16 and more)."""
    ridge: float = 0.02
    """Ridge of linear teachers, relative to the mean squared norm of the features."""
    teacher_steps: int = 500
    """Steps of convolutional teachers."""
    teacher_batch_size: int = 16
    """Records in a step of convolutional teachers."""
    teacher_learning_rate: float = 0.05
    """First learning rate of convolutional teachers."""
    teacher_shift: int = 2
    """How far convolutional teachers see an image moved at random, at most, in pixels to either side."""
    places: int | None = None
    """The most records of one teacher, as a number chosen without looking at the number of records: the
    relation is then add-or-remove-one. By default it follows from that number, and the relation is
    zero-out."""
    aggregator: AggregatorName = "gnmax"
    """gnmax and lnmax answer every query; confident-gnmax only those on which teachers seem to agree;
    interactive-gnmax those on which they seem to disagree with the student."""
    queries: int | None = None
    """How many public inputs are asked about, at most."""
    answers: int | None = None
    """How many of them are answered at most, with a check; by default all."""
    threshold: float | None = None
    """Votes from which the check lets a query pass; by default 80 % of the teachers, or 50 % for
    interactive-gnmax, where it is votes beyond the student's prediction."""
    threshold_noise: float | None = None
    """Standard deviation of the check's noise, in votes; by default 3.75 noise multipliers."""
    choice: QueryChoice = "typical"
    """Which inputs are asked about: typical (chosen from the public inputs alone, diverse and representative)
    or first (the first ones, as in the papers)."""
    rounds: int | None = None
    """Rounds of interactive-gnmax: a student is trained in each, and the next queries are those that it is
    least sure of. By default 3."""
    confidence: float = 0.95
    """interactive-gnmax: a refused query keeps the student's own class if its confidence is above this."""
    public_examples: int | None = None
    """How many of the test inputs, from the first, are the public ones; by default nine tenths. Accuracy is
    measured on the rest."""
    student: StudentMethod = "spread"
    """How the student learns: spread (from the answers, from what neighbours were answered, then from its own
    confident guesses), fixmatch (from answers and guesses), or supervised (from answers alone)."""
    student_epochs: int = 24
    """Passes over the public inputs."""
    student_learning_rate: float = 0.003
    """Highest learning rate of the student."""
    student_width: int = 24
    """Filters of the student's first convolution."""
    student_flip: bool = False
    """Also mirror the student's images: for photographs, not for digits."""
    publish_data_dependent: bool = False
    """Publish the data-dependent ε, with noise, as one more release that ε pays for. For gnmax and
    confident-gnmax, with the accountant rdp."""
    publish_order: float = 20.0
    """The Rényi order of that release."""
    publish_cost: float = 0.1
    """The cost of that release: its Rényi divergence at that order."""
    no_cache: bool = False
    """Train the teachers again, though their votes may be in the cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "teachers",
            "teacher_steps",
            "teacher_batch_size",
            "queries",
            "answers",
            "places",
            "rounds",
        ):
            count_field(self, name, low=1)
        count_field(self, "teacher_shift", low=0)
        if self.teacher_shift > 1000:
            raise UserError(f"The teacher_shift must be at most 1000 pixels. Got {self.teacher_shift}.")
        for name in ("public_examples", "student_epochs"):
            count_field(self, name, low=1)
        count_field(self, "student_width", low=2)
        for name, high in (("ridge", 1e6), ("teacher_learning_rate", 1e3), ("student_learning_rate", 10.0)):
            number_field(self, name, high=high)
        number_field(self, "threshold", low=-1e9, high=1e9, closed="both")
        number_field(self, "threshold_noise", high=1e7)
        number_field(self, "confidence", high=1, closed="both")
        number_field(self, "publish_order", low=1, high=1e6)
        number_field(self, "publish_cost", high=1e3)
        choice_field(self, "teacher", TEACHER_KINDS)
        choice_field(self, "features", FEATURES)
        choice_field(self, "aggregator", AGGREGATORS)
        choice_field(self, "choice", QUERY_CHOICES)
        choice_field(self, "student", STUDENT_METHODS)
        for name in ("student_flip", "publish_data_dependent", "no_cache"):
            switch_field(self, name)
        self._check_publishing()
        self._check_checks()

    @property
    def neighboring_relation(self) -> NeighboringRelation:
        """Which data sets are hard to tell apart."""
        return "zero-out" if self.places is None else "add-or-remove-one"

    def _check_wishes(self, wishes: list[str]) -> None:
        if not wishes or (self.non_private and len(wishes) > 1):
            got = " and ".join(wishes) or "none of them"
            raise UserError(
                "Give a budget (epsilon), a noise_multiplier with a number of queries, or non_private alone. "
                f"Got {got}."
            )
        if wishes == ["noise_multiplier"] and self.queries is None:
            raise UserError(
                f"Noise of {self.noise_multiplier} votes does not say how many queries there are; give "
                f"queries, "
                "or a budget (epsilon)."
            )

    def _check_publishing(self) -> None:
        if not self.publish_data_dependent:
            return
        if self.non_private or self.aggregator in ("lnmax", "interactive-gnmax"):
            what = "a run without noise" if self.non_private else self.aggregator
            raise UserError(
                f"The data-dependent ε of {what} cannot be published; use gnmax or confident-gnmax with "
                f"noise, or "
                "leave out publish_data_dependent."
            )
        if self.accountant != "rdp":
            raise UserError(
                "publish_data_dependent needs the accountant rdp, since its release has Rényi "
                "divergences only. "
                f"Got {self.accountant}."
            )

    def _check_checks(self) -> None:
        given = [n for n in ("answers", "threshold", "threshold_noise") if getattr(self, n) is not None]
        if self.aggregator in ("gnmax", "lnmax") and given:
            raise UserError(
                f"The aggregator {self.aggregator} answers every query: leave out {given[0]}, or choose "
                "confident-gnmax."
            )
        if self.rounds is not None and self.aggregator != "interactive-gnmax":
            raise UserError(f"Rounds are for interactive-gnmax: leave them out for {self.aggregator}.")


@dataclass(frozen=True, kw_only=True)
class PATERun(PATEConfig, DataSource):
    """A complete run: data, teachers, answers, student."""

    public: str | None = None
    """Your own public inputs: an .npz file with an array x_public, formed like x_train. Accuracy is then
    measured on the whole test set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_source()
        if self.public is not None:
            object.__setattr__(self, "public", str(check_path(self.public, "public")))
        if self.public is not None and self.public_examples is not None:
            raise UserError("Give public (a file) or public_examples (of the test set), not both.")
