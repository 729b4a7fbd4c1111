"""From a few answers to guesses for all public inputs, and which inputs to ask about, without a network.

Everything here looks at public inputs and at answers that were paid for. A handful of answers to well-chosen
inputs says most: they spread over a graph of neighbours, and linear models then learn from the surest of
these guesses and correct the others, in rounds.

Sources: Zhou, Bousquet, Lal, Weston & Schölkopf, "Learning with local and global consistency" (NeurIPS 2003);
Hacohen, Dekel & Weinshall, "Active learning on a budget" (ICML 2022), for asking about typical inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from accounting.errors import UserError
from accounting.events import check_count
from dpml.data.scattering import scattering_features
from dpml.pate.features import features_by_name

_NEIGHBOURS, _SPREAD, _SPREADINGS, _CHUNK = 10, 0.99, 50, 500
_ROUNDS, _DIRECTIONS = 15, 100
_KEPT_BY_ROUND, _MOST_RIDGE, _RIDGE, _SHARPNESS = (0.8, 0.9, 0.9, 0.9), 4000, 0.03, 8.0


def choose_queries(public: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Choose which public inputs to ask: one for each cluster of them, near its centre.

    It looks at public inputs alone, so it costs no privacy. The clusters are those of k-means in the 100 main
    directions of the inputs, or of their scattering features if they are images.

    Args:
        public: As for `train_student`.
        count: How many to choose, at most all.
        seed: Fixes where the clusters start.

    Returns:
        Distinct rows of `public`, int64 [count], in the order in which the clusters were found.

    Raises:
        UserError: for inputs of another form, or a count out of range.
    """
    require_inputs(public)
    count = check_count(count, "count", "a choice of queries", low=1)
    if count > len(public):
        raise UserError(f"There are {len(public)} public inputs to ask. Got a count of {count}: ask fewer.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(check_count(seed, "seed", "a choice of queries"))
        points = _points(public.cpu())
        centres = _cluster(points, count)
    free = torch.ones(len(points), dtype=torch.bool)
    rows = []
    for distances in torch.cdist(centres, points):
        row = int(torch.where(free, distances, torch.inf).argmin())
        free[row] = False
        rows.append(row)
    return torch.tensor(rows)


def first_guesses(public: Tensor, asked: Tensor, targets: Tensor) -> Tensor:
    """Guess the classes of all public inputs from answers to a few: shares of the classes [n, classes].

    Random numbers come from torch's global generator. Classes with answers are taken for about equally
    frequent among the public inputs.

    Args:
        public: Float32 [n, ...].
        asked: Rows that have an answer, int64 [k].
        targets: Their classes as shares, [k, classes].
    """
    shares = _spread(_points(public), asked, targets)
    return _self_trained(_features(public), shares, targets.sum(dim=0) > 0)


def _points(public: Tensor) -> Tensor:
    """Where inputs lie [n, 100 or fewer]: features, scaled alike, in their main directions, at norm 1."""
    if public.dim() == 4:
        public = scattering_features(public, scales=2 if min(public.shape[2:]) >= 16 else 1)
    points = public.flatten(1)
    points = points - points.mean(dim=0)
    spread = points.std(dim=0, unbiased=False)
    # Features that hardly vary are not blown up all the way.
    points = points / (spread + 0.05 * points.std(unbiased=False)).clamp(min=1e-12)
    _, _, directions = torch.pca_lowrank(points, min(_DIRECTIONS, *points.shape), center=False)
    return functional.normalize(points @ directions)


def _cluster(points: Tensor, count: int) -> Tensor:
    """Centres [count, d] of k-means, started as in k-means++ (Arthur & Vassilvitskii 2007)."""
    start = points[torch.randint(len(points), (1,))]
    chosen, nearest = [start], torch.cdist(points, start)[:, 0] ** 2
    while len(chosen) < count:
        # Where all points are centres already, as duplicates are, any will do.
        chance = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        new = points[torch.multinomial(chance, 1)]
        chosen.append(new)
        nearest = torch.minimum(nearest, torch.cdist(points, new)[:, 0] ** 2)
    centres = torch.cat(chosen)
    for _ in range(_ROUNDS):
        cluster = torch.cdist(points, centres).argmin(dim=1)
        sizes = torch.bincount(cluster, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, cluster, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def _spread(points: Tensor, asked: Tensor, targets: Tensor) -> Tensor:
    """Spread answers over the graph of neighbours (Zhou et al. 2003): shares of the classes [n, classes]."""
    n = len(points)
    near = min(_NEIGHBOURS, n - 1)
    parts = (points[start : start + _CHUNK] for start in range(0, n, _CHUNK))
    found = [torch.cdist(part, points).topk(near + 1, largest=False) for part in parts]
    distances, neighbours = (torch.cat(parts) for parts in zip(*found, strict=True))
    scale = distances[:, -1:].clamp(min=1e-12)
    weights = torch.exp(-((distances / scale) ** 2)).flatten()
    owners = torch.arange(n, device=points.device).repeat_interleave(near + 1)
    ends = torch.stack([owners, neighbours.flatten()])
    both = torch.cat([ends, ends.flip(0)], dim=1)
    weights = torch.where(both[0] == both[1], 0.0, weights.repeat(2))
    degree = torch.zeros(n, device=points.device).index_add_(0, both[0], weights).clamp(min=1e-12).rsqrt()
    weights = weights * degree[both[0]] * degree[both[1]]
    given = torch.zeros(n, targets.shape[1], device=points.device).index_copy_(0, asked, targets)
    shares = given
    for _ in range(_SPREADINGS):
        inflow = torch.zeros_like(shares).index_add_(0, both[0], weights[:, None] * shares[both[1]])
        shares = _SPREAD * inflow + (1 - _SPREAD) * given
    # Chosen queries say little of how frequent a class is, so those with answers are taken for equally so.
    return _balanced(shares, targets.sum(dim=0) > 0)


def _features(public: Tensor) -> Tensor:
    """What a linear model sees of the inputs, centred: [n, d]."""
    _, features = features_by_name("auto", tuple(public.shape[1:]))
    rows = features(public)
    return rows - rows.mean(dim=0)


def _self_trained(features: Tensor, shares: Tensor, known: Tensor) -> Tensor:
    """Improve guesses by ridge regressions on the surest of them, in rounds: shares [n, classes].

    Args:
        features: [n, d].
        shares: First guesses, [n, classes].
        known: Which classes were ever answered, bool [classes].
    """
    for kept in _KEPT_BY_ROUND:
        sure, guessed = shares.max(dim=1)
        rows = (sure >= sure.quantile(1 - kept)).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows))[:_MOST_RIDGE]]
        x = features[rows]
        wanted = functional.one_hot(guessed[rows], shares.shape[1]).float()
        gram = x @ x.T
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
        scores = features @ (x.T @ torch.linalg.solve(gram, wanted - wanted.mean(dim=0)))
        shares = _balanced((_SHARPNESS * scores).softmax(dim=1), known)
    return shares


def _balanced(shares: Tensor, known: Tensor) -> Tensor:
    """Shares [n, classes] with the known classes taken for equally frequent, and no others."""
    shares = shares * (known.float() / shares.sum(dim=0).clamp(min=1e-30))
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-30)


def require_inputs(public: object) -> None:
    """Raise UserError unless these are public inputs that a student can learn from."""
    wanted = "Public inputs must be float32 [n, features] or [n, channels, height, width], finite"
    if not isinstance(public, Tensor) or public.dtype != torch.float32 or public.dim() not in (2, 4):
        raise UserError(f"{wanted}. Got {form(public)}.")
    if len(public) < 2 or public[0].numel() == 0 or (public.dim() == 4 and min(public.shape[2:]) < 4):
        raise UserError(f"{wanted}, two or more, of 4×4 pixels or more. Got shape {tuple(public.shape)}.")
    if not bool(public.isfinite().all()):
        raise UserError(f"{wanted}. Got {int((~public.isfinite()).sum())} numbers that are not.")


def form(value: object) -> str:
    """Type and shape, for a message."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
