"""Programs composed at random, each checked. The suite draws the same sixty; `make fuzz` draws others for minutes."""

from __future__ import annotations

import time

import pytest
from checks import NotAProgram, check, outcomes
from hypothesis import HealthCheck, given, reject, seed, settings
from programs import Program
from writer import programs

import topk_fx

IN_SUITE = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
ROUND = settings(IN_SUITE, max_examples=60, derandomize=False, print_blob=False)
"""Draws after which a new seed is taken: Hypothesis would come back to what it has seen."""


def check_program(program: Program) -> None:
    try:
        check(program)
    except NotAProgram:
        reject()
    finally:
        topk_fx.clear_reports()


@given(programs())
@IN_SUITE
def test_program_is_rewritten_exactly_or_left_dense_with_a_reason(program: Program) -> None:
    check_program(program)


def test_programs_drawn_for_minutes(request: pytest.FixtureRequest) -> None:
    """Prints the seed of each round, so that a failure can be drawn again with --fuzz-seed."""
    minutes = request.config.getoption("--fuzz-minutes")
    if not minutes:
        pytest.skip("drawing goes on for --fuzz-minutes, which are 0")
    first = request.config.getoption("--fuzz-seed")
    number = time.time_ns() % 10**9 if first is None else first
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        print(f"--fuzz-seed {number}", flush=True)

        @seed(number)
        @given(programs())
        @ROUND
        def draw(program: Program) -> None:
            check_program(program)

        draw()
        number += 1
    print(", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
