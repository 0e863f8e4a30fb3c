"""The order in which keys are given up, and the search along it."""

from __future__ import annotations

import itertools
import random

import pytest

from topk_fx.calibration.allocation import Point, allocations, lower_hull
from topk_fx.calibration.search import CLOSE, MOST_RUNS, last_within


def drawn_curves(seed: int) -> dict[str, list[Point]]:
    """Three sites with four points each besides the dense one, their losses not convex in what they keep."""
    draw = random.Random(seed)
    curves = {}
    for site in "abc":
        losses = sorted(draw.random() ** 4 for _ in range(4))
        points = [Point(k, float(k), loss) for k, loss in zip((8, 4, 2, 1), losses, strict=True)]
        curves[site] = [Point(None, 16.0, 0.0), *points]
    return curves


@pytest.mark.parametrize("seed", range(5))
def test_each_allocation_is_the_best_for_what_it_keeps(seed: int) -> None:
    """Against every combination of points."""
    curves = drawn_curves(seed)
    every = [
        (sum(p.cost for p in points), sum(p.loss for p in points)) for points in itertools.product(*curves.values())
    ]
    path = allocations(curves)
    for allocation in path:
        cheapest = min(loss for cost, loss in every if cost <= allocation.cost)
        assert allocation.loss == pytest.approx(cheapest)
        points = [next(p for p in curves[site] if p.k == k) for site, k in allocation.ks.items()]
        assert allocation.cost == pytest.approx(sum(p.cost for p in points))
    assert path[0].ks == {"a": None, "b": None, "c": None}
    assert path[-1].ks == {"a": 1, "b": 1, "c": 1}


def test_points_that_a_mixture_beats_are_left_out() -> None:
    dense, poor, good, last = Point(None, 16, 0), Point(8, 8, 5), Point(4, 4, 5.5), Point(1, 1, 20)
    assert lower_hull([dense, poor, good, last]) == [dense, good, last]


def test_a_site_whose_loss_falls_again_keeps_fewer() -> None:
    dense, noise, better = Point(None, 16, 0), Point(8, 8, 2), Point(4, 4, 1)
    assert lower_hull([dense, noise, better]) == [dense, better]


def test_a_site_that_loses_nothing_is_given_up_first() -> None:
    curves = {"a": [Point(None, 16, 0), Point(1, 1, 0.0)], "b": [Point(None, 16, 0), Point(1, 1, 1.0)]}
    assert [x.ks for x in allocations(curves)[:2]] == [{"a": None, "b": None}, {"a": 1, "b": None}]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("budget", [1e-6, 3e-3, 0.2, 1e9])
def test_search_finds_the_last_place_within_the_budget(scale: float, power: float, budget: float) -> None:
    """Whatever the measured loss is of the expected one."""
    predicted = [0.0, *(1e-7 * 1.05**n for n in range(400))]
    costs = [1e4 * 0.99**n for n in range(401)]
    measured: list[int] = []

    def measure(place: int) -> float:
        measured.append(place)
        return scale * predicted[place] ** power

    place = last_within(predicted, costs, measure, budget)
    within = [n for n in range(1, 401) if scale * predicted[n] ** power <= budget]
    if not within:
        assert place == 0
        assert 1 in measured
        return
    assert place in measured
    assert place <= within[-1]
    assert len(set(measured)) == len(measured) <= MOST_RUNS
    assert costs[place] - costs[min(within[-1], 400)] <= 3 * CLOSE * costs[place]


def test_search_takes_losses_that_are_no_losses() -> None:
    """Perplexity may fall."""
    predicted, costs = [0.0, 1.0, 2.0, 3.0, 4.0], [9.0, 7.0, 5.0, 3.0, 1.0]
    assert last_within(predicted, costs, lambda n: [0, -1, -2, 0.5, 3][n], 1.0) == 3
