"""Times top-k attention under masks and biases against its plain causal form, and SDPA, in a few minutes.

    python examples/benchmark_masks.py                                  # 4,096 tokens, D 64, k 64, on a processor
    python examples/benchmark_masks.py --lengths 2048 16384 --forms causal window "ALiBi, computed"

The C++ kernel's forward under each form, and SDPA's with the same as a tensor, all in turns in one process. "Computed"
is what the score function makes of the positions, which is how the passes hand over a mask or bias that a model builds
of them; "read" is a tensor [1, 1 or H, L, L]. Figures go to examples/results/cpu_masks.json, and a plot beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
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

CAUSAL = "causal"
LOWEST = torch.finfo(torch.float32).min
QUICK = {"lengths": [256], "depth": 16, "heads": 2, "dtypes": ["float32"], "k": 16, "rounds": 2}


@dataclasses.dataclass(frozen=True)
class Form:
    """A mask or bias: as a score function with its operands, and as the tensor that SDPA adds, or None."""

    score: str
    operands: Sequence[Tensor]
    dense: Tensor | None


def forms(heads: int, length: int, dtype: torch.dtype) -> dict[str, Form]:
    """The forms by their names, the plain causal one first."""
    keys = torch.arange(length)
    distance = keys - keys.view(-1, 1)
    past = (distance <= 0).view(1, 1, length, length)
    window = past & (distance > -512)
    padding = (keys < length * 7 // 8).view(1, 1, 1, length)
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)]).view(1, heads, 1, 1)
    buckets = torch.randn(1, heads, 1, 32)
    bias = buckets[0, :, 0][:, t5_bucket(-distance)].unsqueeze(0)

    def masked(allowed: Tensor, x: Tensor | float = 0.0) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32).masked_fill(~allowed, -math.inf).to(dtype)

    causal_bias, alibi = masked(past, bias), masked(past, slopes * distance)
    return {
        CAUSAL: Form("causal", [], None),
        "causal and padding": Form("causal mask($0)", [padding], masked(past & padding)),
        "window of 512": Form("keep(and(le(j, i), gt(j, sub(i, 512))), -inf)", [], masked(window)),
        "boolean causal mask, read": Form("mask($0)", [past], masked(past)),
        "boolean window, read": Form("mask($0)", [window], masked(window)),
        "additive causal mask, computed": Form(f"add(where(le(j, i), 0.0, {LOWEST}))", [], masked(past)),
        "additive causal mask, read": Form("add($0)", [masked(past)], masked(past)),
        "ALiBi, computed": Form("add(mul($0, float32(sub(j, i)))) causal", [slopes], alibi),
        "ALiBi, read": Form("add($0)", [alibi], alibi),
        "T5's bias, computed": Form(T5_SCORE, [buckets], causal_bias),
        "T5's bias, read": Form("add($0) causal", [bias.to(dtype)], causal_bias),
    }


def t5_bucket(distance: Tensor) -> Tensor:
    """T5's bucket of how far back a key is, of 32 for 128 tokens."""
    far = 16 + (torch.log(distance.clamp(min=1) / 16) / math.log(8) * 16).long()
    return torch.where(distance < 16, distance.clamp(min=0), far.clamp(max=31))


T5_SCORE = (
    "%0 = neg(minimum(sub(j, i), 0)) add(lookup($0, where(lt(%0, 16), %0, minimum(add(16, "
    "int64(mul(div(log(div(float32(%0), 16)), 2.0794415416798357), 16))), 31)))) causal"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmark_masks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(forms(1, 1, torch.float32))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096])
    parser.add_argument("--depth", type=int, default=64, help="size of a head")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--forms", nargs="+", choices=known, default=known, metavar="FORM", help="; ".join(known))
    options = figures.parse_options(parser, arguments, "cpu_masks.json", QUICK)
    print(figures.heading(options), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for dtype, length in itertools.product(options.dtypes, options.lengths):
        label = f"forward, {dtype}, D {options.depth}, L {length:,}, k {options.k}"
        rows[label] = {"dtype": dtype, "length": length, "rivals": measure(dtype, length, options)}
        print(figures.table(label, rows[label]["rivals"], CAUSAL, CAUSAL), flush=True)
    figures.write(options, CAUSAL, rows)


def measure(dtype_name: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    query, key, value = (torch.randn(1, options.heads, length, options.depth).to(dtype) for _ in range(3))
    chosen = {name: x for name, x in forms(options.heads, length, dtype).items() if name in (CAUSAL, *options.forms)}

    def topk(form: Form, k: int = options.k) -> Tensor:
        scale = options.depth**-0.5
        return torch.ops.topk_fx.attention(query, key, value, form.operands, form.score, scale, k, lowering="cpu")

    def sdpa(form: Form) -> Tensor:
        is_causal = form.dense is None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=form.dense, is_causal=is_causal)

    calls: dict[str, Callable[[], object]] = {}
    for name, form in chosen.items():
        check(topk(form, length), sdpa(form), name)
        calls[name] = lambda form=form: topk(form)
        calls[f"{name}: SDPA"] = lambda form=form: sdpa(form)
    for call in calls.values():
        call()
    return figures.summarise(measure_in_process(calls, options.rounds, options.threads), CAUSAL, CAUSAL)


def check(actual: Tensor, expected: Tensor, name: str) -> None:
    """The score function and the tensor say the same: with every key kept, top-k attention is SDPA."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * largest, msg=name)


if __name__ == "__main__":
    main()
