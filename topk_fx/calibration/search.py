"""How far a sequence of ever cheaper settings stays within a budget, in few measured runs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

MOST_RUNS = 9
CLOSE = 0.01
"""The search ends when what could still be saved is less than this share of the cost."""


def last_within(
    predicted: Sequence[float], costs: Sequence[float], measure: Callable[[int], float], budget: float
) -> int:
    """The last place whose measured loss is within the budget, as far as the search goes; 0 if there is none.

    Args:
        predicted: the expected loss of each place, in any unit that grows with the measured one; rising, 0 at place 0.
        costs: falling.
        measure: runs the model at a place; place 0, which changes nothing, is not run.
    """
    low, high = 0, len(predicted)
    measured: dict[int, float] = {}
    side, same_side = 0, 0
    while high - low > 1:
        is_close = high < len(costs) and costs[low] - costs[high] <= CLOSE * costs[low]
        if low > 0 and (is_close or len(measured) >= MOST_RUNS):
            break
        guess = _guess(predicted, measured, low, high, budget) if same_side < 2 else None
        place = _middle(predicted, low, high) if guess is None else bisect.bisect_right(predicted, guess) - 1
        place = min(max(place, low + 1), high - 1)
        measured[place] = measure(place)
        is_within = measured[place] <= budget
        same_side = same_side + 1 if is_within == (side > 0) and len(measured) > 1 else 0
        side = 1 if is_within else -1
        low, high = (place, high) if is_within else (low, place)
    return low


def _guess(predicted: Sequence[float], measured: dict[int, float], low: int, high: int, budget: float) -> float | None:
    """The expected loss at which the measured one should be the budget; None if nothing tells."""
    known = [(predicted[n], measured[n]) for n in (low, high) if measured.get(n, 0.0) > 0 and predicted[n] > 0]
    if not measured:
        return budget
    if len(known) == 2 and known[0][0] < known[1][0] and known[0][1] < known[1][1]:
        (x0, y0), (x1, y1) = known
        share = (math.log(budget) - math.log(y0)) / (math.log(y1) - math.log(y0))
        return x0 * (x1 / x0) ** share
    return known[0][0] * budget / known[0][1] if known else None


def _middle(predicted: Sequence[float], low: int, high: int) -> int:
    """A place half way in the logarithm of the expected loss, or half way if there is none between."""
    last = min(high, len(predicted) - 1)
    if predicted[low] > 0 and predicted[last] > predicted[low]:
        place = bisect.bisect_right(predicted, math.sqrt(predicted[low] * predicted[last])) - 1
        if low < place < high:
            return place
    return (low + high) // 2
