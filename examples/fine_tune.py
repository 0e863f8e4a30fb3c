"""Fine-tunes SmolLM2-135M dense, with top-k attention and with top-k FFNs: does training win back what top-k loses?

    python examples/fine_tune.py                             # three k and two shares of the hidden units; an hour
    python examples/fine_tune.py --k 8 64 --units 0.25 --steps 200    # others, for longer
    python examples/fine_tune.py --text notes.txt docs/               # your own files and folders

All rivals begin with the published weights, see the same batches in the same order and take the same steps, compiled.
Each is tested on windows that lie between those it learns from: as it is, with the weights of the model that was tuned
dense, and tuned itself. Figures go to examples/results/fine_tune.md and .json.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import figures
import smollm2
import topk_fx
from quality import Interval, bootstrap, predict
from tables import Cell, Table, save
from train_bytes import load_text

Weights = dict[str, Tensor]
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Rival:
    """How the model is compiled: `options` of backend="topk", or None for the dense model.

    `kind` is that of the sites of which every layer must have one rewritten.
    """

    kind: str
    options: dict[str, Any] | None


@dataclasses.dataclass
class Losses:
    """Of every token but the first of each window, [windows, length - 1], in nats."""

    before: Tensor
    tuned_dense: Tensor
    tuned: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    rivals = {DENSE: Rival("", None)}
    rivals |= {f"k={k}": Rival("attention", {"k": k}) for k in options.k}
    no_attention = {"*attn*": False}
    rivals |= {
        f"{share:.0%} of the units": Rival("ffn", {"k": 1, "ffn_k": share, "sites": no_attention})
        for share in options.units
    }
    tokens = load_tokens(options.text)
    learnt, held_out = smollm2.text_split(tokens, options.train_windows, options.windows, options.length)
    model = smollm2.load_model("sdpa")
    published = copied(model)
    found: dict[str, Losses] = {}
    tuned_dense: Weights | None = None
    total = len(rivals) * (options.steps + 3 * options.windows) - options.windows
    with tqdm(total=total, unit="step", leave=False) as bar:
        for name, rival in rivals.items():
            bar.set_description(name)
            run = compiled(model, rival, options.inner)
            before = test(run, model, published, held_out, rival, bar.update)
            with_dense = before if tuned_dense is None else test(run, model, tuned_dense, held_out, rival, bar.update)
            model.load_state_dict(published)
            tune(run, model, batches(learnt, options), options, bar.update)
            tuned = copied(model)
            after = test(run, model, tuned, held_out, rival, bar.update)
            if tuned_dense is None:
                tuned_dense, with_dense = tuned, after
            found[name] = Losses(before, with_dense, after)
            bar.write(f"{name}: perplexity {before.mean().exp():.3f} before, {after.mean().exp():.3f} tuned")
    setting = (
        f"SmolLM2-135M-Instruct tuned for {options.steps} steps of {options.batch} windows of {options.length:,} "
        f"tokens of {' '.join(options.text)}, AdamW at {options.lr:g}, seed {options.seed}"
    )
    note = (
        f"{len(held_out)} windows that lie between those learnt from. `of dense`: perplexity, of the dense model's "
        "that had the same training. Recovered: of the loss in nats that top-k adds before any training, the share "
        "that is gone when both are tuned. Intervals of 95 %: a bootstrap of blocks of 64 tokens."
    )
    heading = f"{setting}; float32, {figures.machine()}: {options.command}"
    table = Table("Fine-tuning with top-k", note, {name: row(losses, found[DENSE]) for name, losses in found.items()})
    print(f"\n{table.markdown()}")
    for path in save([table], heading, options.output.parent, options.output.name):
        print(f"\nWritten: {path}")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "fine_tune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, nargs="*", default=[4, 8, 16], help="keys kept; each is a rival")
    parser.add_argument("--units", type=float, nargs="*", default=[0.25, 0.1], help="shares of the hidden units")
    parser.add_argument("--text", nargs="+", default=["topics"], help="topics, library, or files and folders")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--train-windows", type=int, default=160, help="to draw the batches from")
    parser.add_argument("--windows", type=int, default=16, help="to be tested on")
    parser.add_argument("--lr", type=float, default=5e-5, help="the largest of a one-cycle schedule of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="compiler of all rivals")
    parser.add_argument("--output", type=Path, default=figures.RESULTS / "fine_tune", help="without suffix")
    options = parser.parse_args(arguments)
    if not all(0 < share <= 1 for share in options.units):
        parser.error(f"--units {options.units} must be shares: above 0 and at most 1")
    if options.steps < 2 or options.batch < 1:
        parser.error(f"--steps {options.steps} must be at least 2, and --batch {options.batch} at least 1")
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "examples/fine_tune.py", *given])
    torch.set_num_threads(options.threads)
    return options


def load_tokens(text: Sequence[str]) -> Tensor:
    tokenizer = smollm2.load_tokenizer()
    if list(text) == ["topics"]:
        return smollm2.documentation_tokens(tokenizer)
    return tokenizer(load_text(text).decode("utf-8", "replace"), return_tensors="pt")["input_ids"][0]


def copied(model: PreTrainedModel) -> Weights:
    return {name: x.clone() for name, x in model.state_dict().items()}


def compiled(model: PreTrainedModel, rival: Rival, inner: str) -> Callable[..., Any]:
    torch.compiler.reset()  # of the rival before, whose code is of no more use
    topk_fx.clear_reports()
    if rival.options is None:
        return torch.compile(model, backend=inner, dynamic=False)
    return torch.compile(model, backend="topk", dynamic=False, options={**rival.options, "inner": inner})


def test(
    run: Callable[..., Any],
    model: PreTrainedModel,
    weights: Weights,
    windows: Tensor,
    rival: Rival,
    progress: Callable[[], object],
) -> Tensor:
    """The losses of the model with `weights`."""
    model.load_state_dict(weights)
    losses = -predict(run, windows, progress).log_probability.double()
    for report in topk_fx.reports() if rival.options else ():
        sites = [site for site in report.sites if site.kind == rival.kind]
        if [site.rewritten for site in sites] != [True] * model.config.num_hidden_layers:
            raise RuntimeError(f"every layer should have one site of {rival.kind} rewritten, but:\n{report}")
    return losses


def batches(windows: Tensor, options: argparse.Namespace) -> Iterator[Tensor]:
    """Windows [batch, length] in an order of the seed; all of them before one comes again."""
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < options.batch:
            order += torch.randperm(len(windows), generator=generator).tolist()
        yield windows[order[: options.batch]]
        order = order[options.batch :]


def tune(
    run: Callable[..., Any],
    model: PreTrainedModel,
    batches: Iterator[Tensor],
    options: argparse.Namespace,
    progress: Callable[[], object],
) -> None:
    """Trains all weights, in the model's own evaluation mode: it has no dropout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    for batch in batches:
        logits = run(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress()
    optimizer.zero_grad()


def row(losses: Losses, dense: Losses) -> dict[str, Cell]:
    found: dict[str, Cell] = {
        "perplexity before": losses.before.mean().exp().item(),
        "tuned dense": losses.tuned_dense.mean().exp().item(),
        "tuned so": losses.tuned.mean().exp().item(),
    }
    if losses is not dense:
        found["of dense, before"] = bootstrap(losses.before - dense.before, torch.exp)
        found["of dense, tuned dense"] = bootstrap(losses.tuned_dense - dense.tuned, torch.exp)
        found["of dense, tuned so"] = bootstrap(losses.tuned - dense.tuned, torch.exp)
        found["recovered"] = recovered(losses, dense)
    return found


def recovered(losses: Losses, dense: Losses) -> Interval:
    added = torch.stack([losses.before - dense.before, losses.tuned - dense.tuned])
    return bootstrap(added, lambda means: 1 - means[1] / means[0])


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
