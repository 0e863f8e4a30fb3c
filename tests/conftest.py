"""Fixtures of every test: seeded, started from empty caches, and with memory that shows what nobody wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import topk_fx

# Triton reads it when a kernel is defined. On a GPU, `examples/gpu_check.py` runs the tests with 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors here are too small to share among threads, and threads that wait for each other on a busy machine make
# the tests four times slower.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-minutes", type=float, default=0.0, help="how long tests/fuzz draws programs")
    parser.addoption("--fuzz-seed", type=int, default=None, help="of the first round of programs")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Neither Dynamo's caches nor topk_fx's reports outlive a test."""
    yield
    torch._dynamo.reset()
    topk_fx.clear_reports()


@pytest.fixture(scope="module")
def nan_filled_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, integers with their maximum: no test passes on leftover zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch fills only while this is set"
    yield
    torch.use_deterministic_algorithms(before)
