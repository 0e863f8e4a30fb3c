"""topk_fx.calibrate on SmolLM2-135M: a k for each layer by the loss of perplexity, checked on text it never saw.

    python examples/calibrate.py                          some ten minutes on two quiet cores
    python examples/calibrate.py --budget 0.01 --ffn      less loss, hidden units too

Saves the configuration, prints the table of sites, and compares on other windows of the text: the dense model, the
configuration, and the smallest k at every layer that loses no more than the budget there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import smollm2
import topk_fx
from quality import Interval, Predictions, perplexity_ratio, predict
from rivals import compile_with_topk


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    model = smollm2.load_model("sdpa")
    tokens = smollm2.documentation_tokens(smollm2.load_tokenizer())
    windows, held_out = smollm2.text_split(tokens, options.windows, options.held_out, options.tokens)
    batches = [{"input_ids": window[None], "use_cache": False} for window in windows]
    config = topk_fx.calibrate(model, batches, budget=options.budget, metric="perplexity", ffn=options.ffn)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    config.to_json(options.output)
    print(f"saved: {options.output}")

    print(f"\n{len(held_out)} windows of {options.tokens:,} tokens that calibration did not see")
    dense = predict(model, held_out)
    by_site = Result.of("by site", model, held_out, dense, {"config": str(options.output)})
    uniform = None if options.ffn else smallest_k(model, held_out, dense, options.budget)
    print(f"  {'':<14} {'perplexity':>10} {'of dense (95 % interval)':>28} {'keys kept':>12}")
    print(f"  {'dense':<14} {dense.perplexity:>10.3f}")
    for result in filter(None, (uniform, by_site)):
        print(result)
    if uniform is not None:
        print(f"  by site keeps {by_site.kept_keys / uniform.kept_keys:.1%} of the keys that one k needs")
    return 0 if by_site.ratio.value <= 1 + options.budget else 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=0.02, help="the most relative increase of perplexity")
    parser.add_argument("--ffn", action="store_true", help="give up hidden units of the FFNs too")
    parser.add_argument("--windows", type=int, default=8, help="windows of text to calibrate on")
    parser.add_argument("--held-out", type=int, default=8, help="windows of text, between those, to check it on")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in each window")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "smollm2.json", help="the configuration"
    )
    return parser.parse_args(arguments)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a setting gives on the held-out windows, and the keys that it keeps there."""

    name: str
    perplexity: float
    ratio: Interval
    kept_keys: int

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, windows: Tensor, dense: Predictions, options: dict) -> Result:
        topk_fx.clear_reports()
        torch.compiler.reset()
        predictions = predict(compile_with_topk(model, inner="eager", **options), windows)
        (report,) = topk_fx.reports()
        return cls(
            name, predictions.perplexity, perplexity_ratio(predictions, dense), kept_keys(report, windows.size(1))
        )

    def __str__(self) -> str:
        return f"  {self.name:<14} {self.perplexity:>10.3f} {self.ratio!s:>28} {self.kept_keys:>12,}"


def kept_keys(report: topk_fx.RewriteReport, length: int) -> int:
    """Keys that all queries of one head of every layer keep in a causal window."""
    attention = [site for site in report if site.kind == "attention"]
    kept = [int(site.k) if site.rewritten else length for site in attention]
    return sum(min(k, query + 1) for k in kept for query in range(length))


def smallest_k(model: PreTrainedModel, windows: Tensor, dense: Predictions, budget: float) -> Result:
    """The smallest k at every layer, within 3 %, that loses no more than the budget."""
    low, high, best = 0, windows.size(1), None
    while high - low > max(1, 0.03 * high):
        k = (low + high) // 2 if not low else round((low * high) ** 0.5)
        k = min(max(k, low + 1), high - 1)
        result = Result.of(f"k={k}", model, windows, dense, {"k": k})
        if result.ratio.value <= 1 + budget:
            high, best = k, result
        else:
            low = k
    if best is None:
        raise SystemExit("No k below the window's length is within the budget.")
    return best


if __name__ == "__main__":
    raise SystemExit(main())
