"""From what each site would lose at each k to the order in which keys are given up.

A site's points are (entries kept, loss). Of the many ways to spend an amount, the best takes each site to the point
where one entry less costs the same loss everywhere: the points of the lower convex hulls, in the order of their slopes.
That is the greedy path from every key kept to one key a query, and each point on it is the least loss for what it keeps
(Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Point:
    """A k of a site (None: dense), the cost of what it keeps and the loss that it is expected to bring."""

    k: int | None
    cost: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Allocation(Generic[Key]):
    """A k for each site, None where it stays dense, with the sums over all sites."""

    ks: Mapping[Key, int | None]
    cost: float
    loss: float


def allocations(curves: Mapping[Key, Sequence[Point]]) -> list[Allocation[Key]]:
    """From all dense to the fewest keys: each with the least expected loss for what it keeps.

    Args:
        curves: the points of each site; one of them is dense, with loss 0.
    """
    hulls = {key: lower_hull(points) for key, points in curves.items()}
    steps = [
        (_slope(before, after), position, number, key, before, after)
        for position, (key, hull) in enumerate(hulls.items())
        for number, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    ks: dict[Key, int | None] = {key: hull[0].k for key, hull in hulls.items()}
    path = [Allocation(dict(ks), sum(hull[0].cost for hull in hulls.values()), 0.0)]
    for _, _, _, key, before, after in sorted(steps, key=lambda step: step[:3]):
        ks[key] = after.k
        last = path[-1]
        path.append(Allocation(dict(ks), last.cost - before.cost + after.cost, last.loss - before.loss + after.loss))
    return path


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points with less loss than any mixture of others at the same cost, by falling cost and rising loss."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda x: (-x.cost, x.loss)):
        if hull and point.cost == hull[-1].cost:
            continue
        while hull and point.loss <= hull[-1].loss and hull[-1].k is not None:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(before: Point, after: Point) -> float:
    """Loss for each entry that is given up."""
    return (after.loss - before.loss) / (before.cost - after.cost)
