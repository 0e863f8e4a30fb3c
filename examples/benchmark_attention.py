"""Times top-k attention over whole sequences on the processor against dense attention, in some minutes.

    python examples/benchmark_attention.py                          # causal, D 64, k 64, forward and training
    python examples/benchmark_attention.py --lengths 16384 --depths 128 --masks full --k 64 256

All are called in turns in one process. What stands against the top-k kernel in C++: SDPA; matmul and softmax, as they
are and under Inductor, which may take them for SDPA; a dense kernel made of the top-k kernel's own product of matrices
(examples/dense_attention.cpp), which tells what top-k buys from what a faster product buys; and the chunks of ATen
calls that run where there is no C++ compiler. Training is the forward and the gradients of query, key and value; the
dense kernel has none. Figures go to examples/results/cpu_attention.json, and a plot beside it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dense_control
import figures
import topk_fx  # noqa: F401  (registers the ops)
from measure import measure_in_process

SDPA, CONTROL, TOPK, ATEN = "SDPA", "dense, same micro-kernel", "top-k, C++", "top-k, chunked ATen"
EAGER, INDUCTOR = "matmul, softmax", "matmul, softmax, Inductor"
MOST_LENGTH_WITH_SCORES = 4096
"""Beyond it, what holds all scores and the chunks of ATen calls are left out: they take gigabytes or minutes."""

QUICK = {"lengths": [256], "depths": [16], "heads": 1, "dtypes": ["float32"], "k": [16], "rounds": 2}

Function = Callable[[], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmark_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--depths", nargs="+", type=int, default=[64], help="sizes of a head")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--masks", nargs="+", choices=["causal", "full"], default=["causal"])
    parser.add_argument("--k", nargs="+", type=int, default=[64])
    options = figures.parse_options(parser, arguments, "cpu_attention.json", QUICK)
    print(figures.heading(options), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    grid = (options.tasks, options.dtypes, options.depths, options.masks, options.lengths, options.k)
    for task, dtype, depth, mask, length, k in itertools.product(*grid):
        facts = {"task": task, "dtype": dtype, "depth": depth, "mask": mask, "length": length, "k": k}
        label = f"{task}, {dtype}, D {depth}, {mask}, L {length:,}, k {k}"
        rows[label] = {**facts, "rivals": measure(facts, options)}
        print(figures.table(label, rows[label]["rivals"], SDPA, TOPK), flush=True)
    figures.write(options, SDPA, rows)


def measure(facts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    shape, is_training = (1, options.heads, facts["length"], facts["depth"]), facts["task"] == "training"
    dtype = getattr(torch, facts["dtype"])
    inputs = [torch.randn(shape).to(dtype).requires_grad_(is_training) for _ in range(3)]
    functions = rivals(*inputs, facts["k"], facts["mask"] == "causal")
    if is_training:
        functions.pop(CONTROL)
    check(functions)
    grad = torch.randn(shape).to(dtype)

    def called(function: Function) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(function(), inputs, grad)) if is_training else function

    calls = {name: called(function) for name, function in functions.items()}
    for call in calls.values():
        call()
    measurements = measure_in_process(calls, options.rounds, options.threads)
    torch.compiler.reset()
    return figures.summarise(measurements, SDPA, TOPK)


def rivals(query: Tensor, key: Tensor, value: Tensor, k: int, is_causal: bool) -> dict[str, Function]:
    """What competes, each ready to be called."""
    length, depth = query.shape[-2:]

    def topk(lowering: str) -> Tensor:
        score = "causal" if is_causal else ""
        return torch.ops.topk_fx.attention(query, key, value, [], score, depth**-0.5, k, lowering=lowering)

    def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT / math.sqrt(depth)
        if is_causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ value

    found: dict[str, Function] = {
        SDPA: lambda: F.scaled_dot_product_attention(query, key, value, is_causal=is_causal),
        CONTROL: lambda: dense_control.attention(query, key, value, is_causal=is_causal),
        TOPK: lambda: topk("cpu"),
    }
    if length <= MOST_LENGTH_WITH_SCORES:
        compiled = torch.compile(written_out, backend="inductor", dynamic=False, fullgraph=True)
        found |= {
            EAGER: lambda: written_out(query, key, value),
            INDUCTOR: lambda: compiled(query, key, value),
            ATEN: lambda: topk("aten"),
        }
    return found


def check(functions: dict[str, Function]) -> None:
    """The dense ones agree with each other, and the lowerings of top-k do."""
    found = {name: function().detach().double() for name, function in functions.items()}
    for name, output in found.items():
        expected = found[TOPK if name == ATEN else SDPA]
        if name != TOPK:
            torch.testing.assert_close(output, expected, rtol=0, atol=0.02 * expected.abs().max().item(), msg=name)


if __name__ == "__main__":
    main()
