"""ε against steps: every point is a bound, whichever way it was come by."""

from __future__ import annotations

import pytest

from accounting import (
    ZCDP,
    Composed,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    UserError,
    ZeroCost,
    epsilon_curve,
)

STEP = PoissonSampled(Gaussian(1.1), 256 / 60_000)


def single(step: Event, count: int, delta: float, tolerance: float = 0.001) -> tuple[float, float]:
    accountant = PrivacyAccountant(tolerance=tolerance)
    accountant.record(Repeated(step, count))
    return accountant.epsilon_bounds(delta)


@pytest.mark.parametrize(
    ("step", "delta"),
    [
        (STEP, 1e-5),
        (PoissonSampled(Gaussian(0.7), 0.02), 1e-6),
        (PoissonSampled(Laplace(1.5), 0.01), 1e-5),
        (Composed([PoissonSampled(Gaussian(2.0), 0.05), PoissonSampled(Laplace(4.0), 0.01)]), 1e-7),
        (Laplace(30.0), 1e-5),
        (Gaussian(80.0), 1e-5),
    ],
    ids=lambda value: str(value)[:50],
)
def test_every_point_of_a_long_curve_brackets_a_finer_bracket(step: Event, delta: float) -> None:
    points = epsilon_curve(step, range(1, 2_001), delta)
    for count in (1, 2, 3, 10, 64, 65, 333, 1_234, 2_000):
        lower, upper = points[count - 1]
        fine_lower, fine_upper = single(step, count, delta)
        assert lower <= fine_upper * (1 + 1e-9), count
        assert upper >= fine_lower * (1 - 1e-9), count
        assert upper <= 1.06 * fine_upper + 1e-9, count
        if step is STEP:
            assert lower >= 0.93 * fine_lower, count


def test_a_curve_never_falls() -> None:
    points = epsilon_curve(STEP, range(0, 3_000), 1e-5)
    assert points[0] == (0.0, 0.0)
    for low, high in ((points, points[1:]),):
        assert all(a[0] <= b[0] + 1e-12 and a[1] <= b[1] + 1e-12 for a, b in zip(low, high, strict=False))


def test_few_points_are_as_narrow_as_single_ones() -> None:
    for count, (lower, upper) in zip(
        (100, 5_000, 700), epsilon_curve(STEP, (100, 5_000, 700), 1e-5), strict=True
    ):
        fine_lower, fine_upper = single(STEP, count, 1e-5)
        assert lower <= fine_upper
        assert upper >= fine_lower
        assert upper - lower <= 0.011 * upper


def test_by_renyi_divergences_the_upper_bounds_are_the_accountants_but_for_the_orders() -> None:
    points = epsilon_curve(STEP, (10, 1_000), 1e-5, method="rdp")
    for count, (_, upper) in zip((10, 1_000), points, strict=True):
        accountant = PrivacyAccountant("rdp")
        accountant.record(Repeated(STEP, count))
        assert accountant.epsilon(1e-5) == pytest.approx(upper, rel=2e-2)
    assert all(low == 0 for low, _ in epsilon_curve(ZCDP(0.01), (1, 5), 1e-5, method="rdp"))


def test_simple_cases() -> None:
    assert epsilon_curve(STEP, [], 1e-5) == []
    assert epsilon_curve(ZeroCost("public"), [0, 5], 1e-5) == [(0.0, 0.0)] * 2
    assert epsilon_curve(NonPrivate(), [0, 5], 1e-5) == [(0.0, 0.0), (float("inf"), float("inf"))]


def test_mistakes() -> None:
    for steps, delta, method, words in (
        ([-1], 1e-5, "pld", "'steps' parameter"),
        ([1], 1.5, "pld", "'delta' parameter"),
        ([1], 1e-5, "prv", "method must be pld or rdp"),
    ):
        with pytest.raises(UserError, match=words):
            epsilon_curve(STEP, steps, delta, method=method)
