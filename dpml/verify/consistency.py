"""Whether events, summary and configuration say the same."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dpml.verify.check import Check, Folder
from dpml.verify.parts import Malformed, together

_STATUSES = ("running", "completed", "stopped", "diverged")
_RELATIVE = 1e-9


def kinds(bodies: object) -> Counter[str]:
    """How often each event that is neither Repeated nor Composed occurs, by its JSON."""
    counts: Counter[str] = Counter()

    def walk(body: object, times: int, depth: int) -> None:
        if not isinstance(body, Mapping) or depth > 32:
            raise Malformed("an event is no JSON object, or nested too deeply")
        kind = body.get("type")
        if kind == "Repeated":
            walk(body.get("event"), times * int(body["count"]), depth + 1)
        elif kind == "Composed":
            for member in body["events"]:
                walk(member, times, depth + 1)
        else:
            bare = {key: value for key, value in body.items() if key != "schema_version"}
            counts[json.dumps(bare, sort_keys=True)] += times

    if not isinstance(bodies, list) or not bodies:
        raise Malformed("there is no list of at least one event")
    for body in bodies:
        if not isinstance(body, Mapping) or body.get("schema_version") != 1:
            raise Malformed("an event is not of version 1")
        walk(body, 1, 0)
    return +counts


def events(folder: Folder) -> list[Check]:
    """Both lists can be read, and no kind was committed more often than planned."""
    record = folder.events
    if record.get("status") not in _STATUSES:
        return [Check("events", "FAILED", f"the status is {record.get('status')!r:.40}")]
    planned, committed = kinds(record.get("planned")), kinds(record.get("committed"))
    for key in ("planned", "committed"):
        together(record[key], folder.relation)
    if over := committed - planned:
        [(kind, count), *_] = over.items()
        return [Check("events", "FAILED", f"{count:,} more were committed than planned of {kind:.80}")]
    words = f"{committed.total():,} of {planned.total():,} planned were committed"
    if record["status"] == "running":
        words = f"{planned.total():,} are planned; how many of them were committed is not known"
    return [Check("events", "ok", words)]


def summary(folder: Folder) -> list[Check]:
    """Every figure of the summary that the events or the configuration say too."""
    figures, config = folder.figures, folder.figures.get("config")
    if not isinstance(config, dict):
        return [Check("summary", "FAILED", "it has no config")]
    method = figures.get("method")
    if method not in ("dpsgd", "pate"):
        return [Check("summary", "not checked", f"the method {method!r:.40} is not known here")]
    odd = _Differences()
    odd.unless("status", figures["status"], folder.events["status"])
    if folder.is_private:
        _private(folder, config, odd)
        (_dpsgd if method == "dpsgd" else _pate)(folder, config, odd)
    else:
        odd.unless("non_private in config", config.get("non_private"), True)
        private = ("epsilon_lower", "epsilon_spent", "target_epsilon", "noise_multiplier", "noise_is_secret")
        for name in private:
            odd.unless(name, figures.get(name), None)
    if odd.found:
        return [Check("summary", "FAILED", "; ".join(odd.found[:3]))]
    return [Check("summary", "ok", "agrees with the events and with its configuration")]


class _Differences:
    """Collects what differs, in words."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def unless(self, name: str, said: object, expected: object) -> None:
        """Note that `said` is not what was expected, if so."""
        if not _same(said, expected):
            self.found.append(f"{name} is {_shown(said)}, not {_shown(expected)}")


def _same(a: object, b: object) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=_RELATIVE)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _shown(value: object) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 120 else text[:119] + "…"


def _private(folder: Folder, config: dict[str, Any], odd: _Differences) -> None:
    """What all methods say twice."""
    figures = folder.figures
    odd.unless("neighboring_relation", figures["neighboring_relation"], folder.relation)
    odd.unless("accountant", figures["accountant"], folder.events["accountant"])
    if figures["accountant"] not in ("pld", "rdp"):
        odd.found.append(f"the accountant is {_shown(figures['accountant'])}")
    for name, key in (("accountant", "accountant"), ("delta", "delta"), ("target_epsilon", "epsilon")):
        odd.unless(name, figures[name], config[key])
    odd.unless("privacy_unit", figures["privacy_unit"], "record")
    odd.unless("noise_is_secret", figures["noise_is_secret"], config["insecure_noise_seed"] is None)
    odd.unless("seed", figures["seed"], config["seed"])
    odd.unless("non_private in config", config["non_private"], False)
    if config["noise_multiplier"] is not None:
        odd.unless("noise_multiplier", figures["noise_multiplier"], config["noise_multiplier"])
    target = figures["target_epsilon"]
    if target is not None and folder.number("epsilon") > target * (1 + _RELATIVE):
        odd.found.append(f"ε is {folder.number('epsilon'):g}, more than the budget {target:g}")
    if not 0 <= folder.number("epsilon_lower") <= folder.number("epsilon"):
        odd.found.append("epsilon_lower is not between 0 and ε")
    selection = figures.get("selection")
    added = None
    if selection is not None:
        added = folder.number("epsilon") - selection["epsilon_of_one"] if selection["charged"] else 0.0
    odd.unless("selection_epsilon", figures["selection_epsilon"], added)


def _dpsgd(folder: Folder, config: dict[str, Any], odd: _Differences) -> None:
    """The plan that the figures amount to is the one in the events, and so is what was done of it."""
    figures, number = folder.figures, folder.number
    sigma, size, q = number("noise_multiplier"), number("expected_batch_size"), number("sampling_probability")
    release: dict[str, Any] = {
        "type": "Gaussian",
        "noise_multiplier": sigma / (1 + number("sensitivity_slack")),
    }
    if config["clip_quantile"] is not None:  # a noisy count of ±1/2 beside the gradients, of the same sample
        count = {"type": "Gaussian", "noise_multiplier": 2 * max(size / 20, 2.5 * sigma)}
        release = {"type": "Composed", "events": [release, count]}
    step = {"type": "PoissonSampled", "event": release, "sampling_probability": q}
    for list_name, count in (("planned", figures["planned_steps"]), ("committed", figures["steps"])):
        expected = Counter({_key(step): count})
        if config["mean_noise"] is not None and (count or list_name == "planned"):
            slack = number("sensitivity_slack")
            mean = {"type": "Gaussian", "noise_multiplier": config["mean_noise"] / (1 + slack)}
            expected[_key(mean)] = 1
        found = [kinds(bodies) for bodies in _trials(folder.events[list_name], figures, odd)]
        if +expected not in found:
            odd.unless(f"the {list_name} events", dict(found[0]), dict(+expected))
    if figures["status"] == "completed":
        odd.unless("steps", figures["steps"], figures["planned_steps"])
    odd.unless("clip_norm", figures["clip_norm"], config["clip_norm"])
    odd.unless("expected_batch_size", figures["expected_batch_size"], config["batch_size"])
    odd.unless("sampler", figures["sampler"], "poisson")
    given = config["sampling_probability"]
    if given is not None:
        odd.unless("sampling_probability", q, given)
    relation = config["neighboring_relation"] or ("zero-out" if given is None else "add-or-remove-one")
    odd.unless("neighboring_relation", folder.relation, relation)
    odd.unless("n_is_public", figures["n_is_public"], relation == "zero-out")


def _trials(bodies: list[Any], figures: dict[str, Any], odd: _Differences) -> list[list[Any]]:
    """The events of the run; of one that was chosen among several, those that it may be one of."""
    selection, [body, *others] = figures.get("selection"), bodies
    if selection is None or others:
        return [bodies]
    if selection["charged"]:
        odd.unless("the event of the selection", body.get("type"), "BestOfRuns")
        for name, key in (("mean_trials", "mean_runs"), ("shape", "shape")):
            odd.unless(f"the selection's {name}", selection[name], body.get(key))
        body = body["event"]
    members = body["events"] if body.get("type") == "OneOf" else [body]
    return [[{**member, "schema_version": 1}] for member in members]


def _pate(folder: Folder, config: dict[str, Any], odd: _Differences) -> None:
    """The same for PATE: answers, checks, and a sanitised release."""
    figures, number = folder.figures, folder.number
    noise = number("noise_multiplier")
    answer = (
        {"type": "LNMax", "scale": noise}
        if figures["aggregator"] == "lnmax"
        else {"type": "GNMax", "sigma": noise}
    )
    check = None
    if figures["threshold_noise"] is not None:
        check = {"type": "GNMaxThreshold", "sigma": number("threshold_noise")}
    has_check = figures["aggregator"] in ("confident-gnmax", "interactive-gnmax")
    odd.unless("a check before answers", check is not None, has_check)
    odd.unless("a threshold", figures["threshold"] is not None, has_check)
    for list_name, queries, answers in (
        ("planned", "queries_planned", "answers_planned"),
        ("committed", "queries_asked", "queries_answered"),
    ):
        expected = Counter({_key(answer): figures[answers]})
        if check is not None:
            expected[_key(check)] = figures[queries]
        found = kinds(folder.events[list_name])
        releases = {key: n for key, n in found.items() if '"type": "SmoothRelease"' in key}
        if releases and not config["publish_data_dependent"]:
            odd.found.append(f"{list_name}: a sanitised release that was not asked for")
        answers_found = {key: n for key, n in found.items() if key not in releases}
        odd.unless(f"the {list_name} events", answers_found, dict(+expected))
        if list_name == "planned":
            odd.unless("a planned release", sum(releases.values()), int(config["publish_data_dependent"]))
        elif figures["sanitised_epsilon"] is not None:
            odd.unless("a committed release", sum(releases.values()), 1)
    for name in ("aggregator", "teachers"):
        odd.unless(name, figures[name], config[name])
    public = config["places"] is None
    odd.unless("neighboring_relation", folder.relation, "zero-out" if public else "add-or-remove-one")
    odd.unless("n_is_public", figures["n_is_public"], public)


def _key(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True)
