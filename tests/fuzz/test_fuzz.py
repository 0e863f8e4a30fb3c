"""Programs composed at random, each checked. `make fuzz` draws for minutes; the suite draws a fixed hundred."""

from __future__ import annotations

import time

import pytest
from checks import NotAProgram, check, outcomes
from hypothesis import HealthCheck, given, reject, seed, settings
from programs import Program, programs

import topk_fx

SETTINGS = settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def check_program(program: Program) -> None:
    try:
        check(program)
    except NotAProgram:
        reject()
    finally:
        topk_fx.clear_reports()


def test_program_is_rewritten_exactly_or_left_dense_with_a_reason(request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--fuzz-minutes", default=0)
    if not minutes:
        given(programs())(settings(SETTINGS, max_examples=100, derandomize=True)(check_program))()
        return
    end = time.monotonic() + 60 * minutes
    start = time.time_ns()
    while time.monotonic() < end:
        start += 1
        given(programs())(seed(start)(settings(SETTINGS, max_examples=200)(check_program)))()
    print(dict(outcomes))
