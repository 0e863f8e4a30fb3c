"""Times the top-k FFN of few tokens on the processor against dense ones, in about a minute.

    python examples/benchmark_ffn.py                                # SwiGLU 2048 -> 8192, a tenth kept, one thread
    python examples/benchmark_ffn.py --form plain --dtypes float32 --tokens 1 2 --rounds 25

All are called in turns in one process, so that a slow spell of the machine meets them all. A ratio is the median of
the rounds' ratios, and is given with their quartiles. "every unit kept" tells what the kernel buys by reading memory
faster, without selecting anything. The figures go to examples/results/cpu_ffn.json, and a plot beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import figures
import topk_fx  # noqa: F401  (registers the ops)
from measure import measure_in_process
from topk_fx.config import kept_count

DENSE, TOPK = "torch, dense", "top-k, C++"
QUICK = {"model": 32, "hidden": 256, "dtypes": ["float32"], "tokens": [1, 2], "rounds": 2}
FORMS = {"gated": "silu", "plain": "gelu"}

Calls = Mapping[str, Callable[[], Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmark_ffn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, default="gated", help="SwiGLU, or up, GELU, down")
    parser.add_argument("--model", type=int, default=2048, help="size of input and output")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--keep", type=float, default=0.1, help="share of the hidden units that is kept")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8])
    options = figures.parse_options(parser, arguments, "cpu_ffn.json", QUICK, rounds=15)
    kept = kept_count(options.keep, options.hidden)
    print(f"{FORMS[options.form]} FFN, {options.form}, {options.model} -> {options.hidden}, {kept} units kept")
    print(figures.heading(options), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for dtype in options.dtypes:
        weights = draw_weights(options, getattr(torch, dtype))
        for tokens in options.tokens:
            calls = rivals(weights, torch.randn(tokens, options.model).to(getattr(torch, dtype)), options)
            check(calls)
            with torch.no_grad():
                measurements = measure_in_process(calls, options.rounds, options.threads)
            label = f"{dtype}, {tokens} token(s)"
            found = figures.summarise(measurements, DENSE, TOPK)
            rows[label] = {"dtype": dtype, "tokens": tokens, "rivals": found}
            print(figures.table(label, found, DENSE, TOPK), flush=True)
    figures.write(options, DENSE, rows)


def draw_weights(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Weights by the names of `topk_fx.ffn`, as nn.Linear holds them."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

    return {
        "up_weight": draw(options.hidden, options.model),
        "gate_weight": draw(options.hidden, options.model) if options.form == "gated" else None,
        "down_weight": draw(options.model, options.hidden),
    }


def rivals(weights: dict[str, Tensor | None], input: Tensor, options: argparse.Namespace) -> Calls:
    """What competes, each ready to be called."""
    up, gate, down = (weights[name] for name in ("up_weight", "gate_weight", "down_weight"))
    assert up is not None
    assert down is not None
    by_columns = down.T.contiguous().T
    kept = kept_count(options.keep, options.hidden)

    def dense(x: Tensor) -> Tensor:
        if gate is None:
            return F.linear(F.gelu(F.linear(x, up)), down)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def topk(down_weight: Tensor, lowering: str, k: int = kept) -> Tensor:
        rest = (gate, None, down_weight, None, FORMS[options.form], k)
        return torch.ops.topk_fx.ffn(input, up, None, *rest, lowering=lowering)

    compiled = torch.compile(dense)
    return {
        DENSE: lambda: dense(input),
        "Inductor, dense": lambda: compiled(input),
        "top-k, ATen": lambda: topk(down, "aten"),
        "every unit kept, C++": lambda: topk(down, "cpu", options.hidden),
        TOPK: lambda: topk(down, "cpu"),
        "top-k, C++, down weight by columns": lambda: topk(by_columns, "cpu"),
    }


def check(calls: Calls) -> None:
    """The lowerings agree; this warms all rivals up, too."""
    found = {name: call() for name, call in calls.items()}
    expected = found["top-k, ATen"]
    for name, output in found.items():
        if name.startswith("top-k"):
            torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


if __name__ == "__main__":
    main()
