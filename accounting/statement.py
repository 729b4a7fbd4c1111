"""The privacy statement: what is protected, from what, by how much, in words for a reviewer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from accounting.budget import Receipt
from accounting.errors import UserError
from accounting.events import Event, NeighboringRelation, check_number
from accounting.gdp import equivalent_mu
from accounting.tradeoff import tradeoff_curve


@dataclass(frozen=True, kw_only=True)
class Risk:
    """What an attacker can do at best, by the whole plan: upper bounds (`accounting.tradeoff`).

    Attributes:
        mu: The Gaussian mechanism of σ = 1/μ has this ε at this δ; see `accounting.gdp.equivalent_mu`.
        tpr_at_fpr_1: True positive rate at a false positive rate of 1 %.
        tpr_at_fpr_01: The same at 0.1 %.
    """

    mu: float
    tpr_at_fpr_1: float
    tpr_at_fpr_01: float

    @classmethod
    def of(cls, plan: Event, delta: float, relation: NeighboringRelation) -> Risk:
        """The risk of a plan whose parameters were fixed in advance."""
        delta = check_number(delta, "delta", "Risk", low=0, high=1)
        lower, _ = tradeoff_curve(plan, [0.01, 0.001], neighboring_relation=relation)
        try:
            mu = equivalent_mu(plan, delta, neighboring_relation=relation)
        except UserError:  # above 1000, which is as good as no protection
            mu = math.inf
        return cls(mu=mu, tpr_at_fpr_1=1 - float(lower[0]), tpr_at_fpr_01=1 - float(lower[1]))


@dataclass(frozen=True, kw_only=True)
class GuaranteeFacts:
    """What every statement is made of. All of it is public.

    Attributes:
        dataset: What the private data is called.
        method: The training method, in words.
        status: "completed", "stopped" or "diverged".
        relation: The neighbouring relation.
        n_is_public: Whether the number of records is taken to be public.
        epsilon: The guarantee: ε of the whole plan, an upper bound.
        epsilon_lower: A lower bound on the same for the dominating pair.
        epsilon_spent: ε of what was executed: an odometer reading.
        delta: δ.
        accountant: "pld" or "rdp".
        noise_multiplier: Standard deviation of the noise: over the clip norm, or in votes.
        noise_is_secret: Whether noise and sampling are unpredictable.
        risk: What an attacker can do at best; None where only Rényi divergences are known.
        test_set_is_public: Whether the test set is that of a public benchmark.
        not_private_logs: Whether private figures were logged beside the results.
        ledger: Where the run is recorded beside all others of the same data; None if no ledger was on.
    """

    dataset: str
    method: str
    status: str
    relation: NeighboringRelation
    n_is_public: bool
    epsilon: float
    epsilon_lower: float
    epsilon_spent: float
    delta: float
    accountant: str
    noise_multiplier: float
    noise_is_secret: bool
    risk: Risk | None
    test_set_is_public: bool
    not_private_logs: bool
    ledger: Receipt | None = None


@dataclass(frozen=True, kw_only=True)
class SelectionFacts:
    """How the released model was chosen among several trials.

    Attributes:
        candidates: What was tried, in words.
        trials: How many trials there were, in words: their distribution if the number is secret.
        score: What decided, in words.
        charged: Whether ε covers the choice.
        epsilon_of_one: ε of the released trial's training alone.
    """

    candidates: str
    trials: str
    score: str
    charged: bool
    epsilon_of_one: float


@dataclass(frozen=True, kw_only=True)
class PrivacyFacts(GuaranteeFacts):
    """What the statement of a DP-SGD run is made of.

    Attributes:
        clip_norm: The clip norm.
        sensitivity_slack: How much the arithmetic may exceed the clip norm, relatively.
        sampling_probability: Of each record in each step.
        expected_batch_size: The divisor of the noisy sums.
        planned_steps: Steps that were reserved.
        steps: Steps that were released.
        clip_quantile: The quantile that the clip norm followed by noisy counts; None if it was fixed.
        mean_noise: Noise multiplier of the release of the inputs' mean; None if there was none.
        selection: How the model was chosen, if it is the best of several.
    """

    clip_norm: float
    sensitivity_slack: float
    sampling_probability: float
    expected_batch_size: float
    planned_steps: int
    steps: int
    clip_quantile: float | None = None
    mean_noise: float | None = None
    selection: SelectionFacts | None = None


@dataclass(frozen=True, kw_only=True)
class PATEFacts(GuaranteeFacts):
    """What the statement of a PATE run is made of.

    Attributes:
        aggregator: Its name.
        teachers: Number of teachers.
        threshold: Of the check, in votes; None without a check.
        threshold_noise: Standard deviation of the check's noise, in votes.
        planned_queries: Queries that were reserved.
        planned_answers: Answers that were reserved.
        queries: Queries that were asked.
        answers: Queries that were answered.
        published: The sanitised data-dependent ε, if there is one.
    """

    aggregator: str
    teachers: int
    threshold: float | None
    threshold_noise: float | None
    planned_queries: int
    planned_answers: int
    queries: int
    answers: int
    published: float | None = None


_RELATIONS: dict[NeighboringRelation, str] = {
    "zero-out": "two data sets are neighbours if one has a record where the other has one that contributes "
    "nothing (zero-out)",
    "add-or-remove-one": "two data sets are neighbours if one has a record more than the other "
    "(add-or-remove-one)",
    "replace-one": "two data sets are neighbours if they differ in one record (replace-one)",
}


def statement(facts: PrivacyFacts | PATEFacts) -> str:
    """Return the statement in Markdown."""
    words = _dpsgd(facts) if isinstance(facts, PrivacyFacts) else _pate(facts)
    return _assembled(facts, words)


@dataclass(frozen=True, kw_only=True)
class _Words:
    """What a method says in its statement."""

    subject: str
    seen: str
    covered: str
    not_covered: str
    logs: str
    progress: str
    rows: list[tuple[str, str]]
    warning: str = ""
    choices: str = "choices made by looking at the private data, such as hyperparameters tuned on it; timing and memory use"


def _dpsgd(f: PrivacyFacts) -> _Words:
    rounding = (
        " The rounding of other records' float32 gradients when they change places in a batch is covered by "
        "the slack below for ordinary networks, but not proven for inputs of extreme scale."
        if f.relation == "add-or-remove-one"
        else ""
    )
    if f.clip_quantile is None:
        releases, adapts, norms = "the sum of clipped gradients", "", ""
    else:
        releases = "the sum of clipped gradients, and on the number of those below the clip norm,"
        adapts = f" (the first clip norm; it then follows the quantile {f.clip_quantile:g})"
        norms = " and the clip norm"
        rounding += (
            " Nor is such rounding covered where it takes a gradient's norm across the clip norm, and so moves "
            "the count."
            if f.relation == "add-or-remove-one"
            else ""
        )
    mean, mean_too = [], ""
    if f.mean_noise is not None:
        mean_too = ", and the mean of the inputs"
        mean.append(
            (
                "before the first step",
                "Gaussian noise on the sum of all inputs, each scaled to norm 1: noise multiplier "
                f"{f.mean_noise:g}",
            )
        )
    words = _Words(
        subject=f"The model trained on `{f.dataset}` by {f.method}",
        seen="the model, and every model on the way to it,",
        covered=f"the weights{norms} after every step{mean_too}",
        not_covered=rounding,
        logs="loss, gradient norms and the share of clipped gradients. They are computed from private records",
        progress=f"{f.steps:,} of {f.planned_steps:,} steps",
        rows=[
            ("mechanism", f"Gaussian noise on {releases} of a Poisson sample"),
            ("clip norm, noise multiplier", f"{f.clip_norm:g}, {f.noise_multiplier:.6g}{adapts}"),
            (
                "sampling probability",
                f"{f.sampling_probability:.6g} (expected batch size {f.expected_batch_size:g})",
            ),
            ("steps planned, released", f"{f.planned_steps:,}, {f.steps:,}"),
            ("slack of the clipping, charged", f"{f.sensitivity_slack:g}"),
            *mean,
        ],
    )
    return words if f.selection is None else _selected(words, f.selection, f.epsilon)


def _selected(words: _Words, s: SelectionFacts, epsilon: float) -> _Words:
    """The words of the released trial, and how it was chosen."""
    rows = [
        *words.rows,
        ("chosen among", s.candidates),
        ("trials", s.trials),
        ("what decided", s.score),
        ("ε of this training alone, without the choice", _up(s.epsilon_of_one)),
    ]
    if not s.charged:
        warning = (
            "> **The selection is not charged.** This model is the best of several that were trained on these "
            "records. ε is that of its own training alone, because the data set is a public benchmark, and holds "
            "for one that was trained with these hyperparameters without looking. The same on private data costs "
            "more.\n\n"
        )
        return replace(words, warning=warning, rows=rows)
    rows.append(("what the choice added to ε", _up(max(0.0, epsilon - s.epsilon_of_one))))
    return replace(
        words,
        subject=f"{words.subject}, and chosen as the best of a random number of trials,",
        covered=f"{words.covered}, and the choice of hyperparameters among those named below. No other trial "
        "was released, nor how many there were",
        choices="other choices made by looking at the private data; memory use and timing: the time that all "
        "trials took together tells whoever watched something of their number",
        rows=rows,
    )


def _pate(f: PATEFacts) -> _Words:
    kind = "Laplace" if f.aggregator == "lnmax" else "Gaussian"
    rows = [
        ("mechanism", f"{f.aggregator}: {kind} noise on the votes of {f.teachers:,} teachers for each class"),
        ("noise on a count", f"{f.noise_multiplier:.6g} votes"),
    ]
    if f.threshold is not None and f.threshold_noise is not None:
        rows.append(
            ("check before an answer", f"{f.threshold:g} votes, with noise of {f.threshold_noise:.6g} votes")
        )
    rows += [
        ("queries planned, asked", f"{f.planned_queries:,}, {f.queries:,}"),
        ("answers planned, given", f"{f.planned_answers:,}, {f.answers:,}"),
    ]
    if f.published is not None:
        rows.append(
            (
                "data-dependent ε, sanitised and released",
                f"{_up(f.published)} at δ = {f.delta:g}: it holds at the votes that there were, this release included",
            )
        )
    return _Words(
        subject=f"The student trained by {f.method} with teachers of `{f.dataset}`",
        seen="the student and every answer that it learned from",
        covered="which queries were answered, the answers, and all that is made of them. The public inputs, the "
        "teachers' partition and settings are public. **The teachers themselves and their votes are private** and "
        "must not be published",
        not_covered="",
        logs="the data-dependent ε and accuracies. They are computed from private votes",
        progress=f"{f.queries:,} of {f.planned_queries:,} queries",
        rows=rows,
    )


def _assembled(f: GuaranteeFacts, words: _Words) -> str:
    warning = (
        ""
        if f.noise_is_secret
        else "> **Not for release.** Noise and sampling came from a known seed: whoever has it can remove the "
        "noise. The figures below hold for the same run with secret randomness.\n\n"
    )
    stopped = (
        ""
        if f.status == "completed"
        else f"The run {_ENDS.get(f.status, 'ended')} after {words.progress}. If the moment was chosen by "
        "someone who saw results, what was spent until then is an odometer reading and no guarantee. The "
        f"guarantee is that of the whole plan, above. The reading: ε = {_up(f.epsilon_spent)}.\n\n"
    )
    size = "the number of training records, " if f.n_is_public else ""
    hidden = "" if f.n_is_public else " The number of training records is not."
    test = (
        "The test set is that of a public benchmark."
        if f.test_set_is_public
        else "The test set you gave is taken to be public: accuracy on it is released exactly."
    )
    logs = (
        f"\n- **Logged beside this run** under `not_private/`: {words.logs} without noise. Do not publish them."
        if f.not_private_logs
        else ""
    )
    others = "other releases of the same records, since no ledger was on; " if f.ledger is None else ""
    ledger = "" if f.ledger is None else _recorded(f.ledger)
    rows = [
        *words.rows,
        ("accountant", _ACCOUNTANTS[f.accountant]),
        ("ε, upper bound (the guarantee)", _up(f.epsilon)),
        ("ε, lower bound for the dominating pair", _down(f.epsilon_lower)),
    ]
    if f.risk is not None:
        rates = f"TPR {_percent(f.risk.tpr_at_fpr_1)} at FPR 1 %; TPR {_percent(f.risk.tpr_at_fpr_01)} at FPR 0.1 %"
        figure = f"μ = {_up(f.risk.mu)} (a figure of speech: it says nothing about other δ)"
        rows += [("membership inference, at most", rates), ("Gaussian noise with this ε at this δ", figure)]
    secret = "secret, keyed by the operating system" if f.noise_is_secret else "SEEDED, not secret"
    rows.append(("noise and sampling", secret))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# Privacy statement

{warning}{words.warning}{words.subject} satisfies **(ε, δ)-differential privacy with ε = \
{_up(f.epsilon)} and δ = {f.delta:g}**.

{stopped}- **What is protected**: each single record of the training set: {_RELATIONS[f.relation]}.
- **What that means**: whoever sees {words.seen} and knows all other records, \
can hardly tell whether or how one record took part. Any event is at most e^ε ≈ {_power(f.epsilon)} times as \
likely with the record as without it, up to δ.
- **What is public**: {size}the form of a record (shape, number of classes), and every setting in \
`summary.json`.{hidden}
- **What is covered**: {words.covered}. {test}
- **What is not covered**: records that appear several times or belong to the same person (protection weakens \
with the number of such records); {others}{words.choices}.{words.not_covered}{ledger}{logs}

| | |
| --- | --- |
{table}

The events behind these figures are in `privacy_events.json`; \
`dpml account --events privacy_events.json --delta {f.delta:g}` recomputes ε.
"""


def _recorded(receipt: Receipt) -> str:
    """What a ledger says: the budget of all runs together, and where the chain of its entries stood."""
    caveat = f" {receipt.caveat}" if receipt.caveat else ""
    return (
        f"\n- **Other releases of the same data**: a ledger was on. All runs of the data set `{receipt.name}` "
        f"together satisfy its budget of {receipt.budget} (by the rule: {receipt.rule}), of which ε = "
        f"{_up(receipt.spent)} is spent or reserved.{caveat} This is the run {receipt.run_id}; entry "
        f"{receipt.rows:,} of the ledger has the hash `{receipt.head}`, and `dpml ledger verify --head` looks "
        "for it."
    )


_ENDS = {
    "stopped": "was stopped",
    "diverged": "ended, because its weights were not finite any more,",
}
_ACCOUNTANTS = {
    "pld": "privacy-loss distributions, certified from both sides",
    "rdp": "Rényi differential privacy",
}


def _up(value: float) -> str:
    """Four decimals, rounded up: a statement never says less than the bound."""
    rounded = round(value, 4)
    return f"{rounded if rounded >= value else rounded + 1e-4:.4f}"


def _down(value: float) -> str:
    """Four decimals, rounded down: a lower bound stays one."""
    rounded = round(value, 4)
    return f"{rounded if rounded <= value else rounded - 1e-4:.4f}"


def _percent(share: float) -> str:
    """Two decimals of a percentage, rounded up."""
    return f"{math.ceil(min(share, 1.0) * 1e4) / 100:.2f} %"


def _power(epsilon: float) -> str:
    return f"{2.718281828459045**epsilon:,.3g}" if epsilon < 500 else "∞"
