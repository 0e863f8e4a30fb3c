"""Times top-k attention of one query, as in decoding, on the processor against dense attention, in about two minutes.

    python examples/benchmark_decode.py                             # 16,384 and 65,536 keys, groups of 1 and 4 queries
    python examples/benchmark_decode.py --lengths 131072 --groups 8 --k 32 64 256

All are called in turns in one process, with cold caches: before each call more memory than they hold is written to.
"matmul, softmax" multiplies all queries of a group with their key head at once, so that K and V are neither copied nor
read twice. The figures go to examples/results/cpu_decode.json, and a plot beside it.
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

import figures
import topk_fx  # noqa: F401  (registers the ops)
from measure import measure_in_process

EAGER, INDUCTOR, SDPA = "matmul, softmax", "matmul, softmax, Inductor", "SDPA"
TOPK, ATEN = "top-k, C++", "top-k, chunked ATen"
QUICK = {"lengths": [512], "depth": 16, "heads": 1, "dtypes": ["float32"], "rounds": 2, "evict": 2**20}

Calls = dict[str, Callable[[], Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmark_decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384, 65536], help="numbers of keys")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], help="query heads of each key head")
    parser.add_argument("--heads", type=int, default=4, help="key heads")
    parser.add_argument("--depth", type=int, default=128, help="size of a head")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--k", nargs="+", type=int, default=[64])
    parser.add_argument("--evict", type=int, default=2**27, help="bytes written before each call")
    options = figures.parse_options(parser, arguments, "cpu_decode.json", QUICK, rounds=15)
    print(figures.heading(options), flush=True)
    other_memory = torch.zeros(options.evict, dtype=torch.uint8)
    rows: dict[str, dict[str, Any]] = {}
    for dtype, group, length, k in itertools.product(options.dtypes, options.groups, options.lengths, options.k):
        torch.compiler.reset()
        calls = rivals(*draw_inputs(options, getattr(torch, dtype), group, length), k)
        with torch.no_grad():
            check(calls)
            measurements = measure_in_process(calls, options.rounds, options.threads, lambda: other_memory.add_(1))
        label = f"{dtype}, group of {group}, {length:,} keys, k {k}"
        found = figures.summarise(measurements, EAGER, TOPK)
        rows[label] = {"dtype": dtype, "group": group, "length": length, "k": k, "rivals": found}
        print(figures.table(label, found, EAGER, TOPK), flush=True)
    figures.write(options, EAGER, rows)


def draw_inputs(options: argparse.Namespace, dtype: torch.dtype, group: int, length: int) -> list[Tensor]:
    """query [1, heads * group, 1, D], key and value [1, heads, length, D]."""
    shapes = ((1, options.heads * group, 1, options.depth), *[(1, options.heads, length, options.depth)] * 2)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def rivals(query: Tensor, key: Tensor, value: Tensor, k: int) -> Calls:
    """What competes, each ready to be called."""
    heads, depth = key.size(1), query.size(-1)

    def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.view(1, heads, -1, depth)
        return ((grouped @ key.mT / math.sqrt(depth)).softmax(-1) @ value).view(query.shape)

    def topk(lowering: str) -> Tensor:
        return torch.ops.topk_fx.attention(query, key, value, [], "", depth**-0.5, k, lowering=lowering)

    compiled = torch.compile(written_out, backend="inductor", dynamic=False, fullgraph=True)
    is_grouped = query.size(1) != heads
    return {
        EAGER: lambda: written_out(query, key, value),
        INDUCTOR: lambda: compiled(query, key, value),
        SDPA: lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=is_grouped),
        TOPK: lambda: topk("cpu"),
        ATEN: lambda: topk("aten"),
    }


def check(calls: Calls) -> None:
    """The dense ones agree with each other, and the lowerings of top-k do."""
    found = {name: call().double() for name, call in calls.items()}
    for name, output in found.items():
        expected = found[TOPK if name == ATEN else EAGER]
        if name != TOPK:
            torch.testing.assert_close(output, expected, rtol=0, atol=0.03 * expected.abs().max().item(), msg=name)


if __name__ == "__main__":
    main()
