"""Trains a small transformer on ListOps, with vanilla and with top-k attention, in some minutes on two cores.

    python examples/train_listops.py                                     # short expressions, three seeds
    python examples/train_listops.py --seeds 3 4 5 --k 4 --steps 2000
    python examples/train_listops.py --full --device cuda --dtype bfloat16    # LRA's lengths and model, k=128

The data is drawn anew by examples/listops.py, all expressions of training and test different. By default they are much
shorter than Long Range Arena's, so that the model learns them on a processor; `--full` has LRA's lengths, depth and
numbers of samples, and the size of LRA's base model. Both models are compiled, begin with the same weights and see the
same batches. Figures go to examples/results/train_listops.md, .json and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import training
from byte_model import Layer
from listops import CLASSES, PAD, VOCABULARY, Bounds, draw_dataset

DEFAULTS = {"steps": 2000, "batch": 32, "k": [4, 8], "lr": 2e-3, "size": 64, "heads": 4, "layers": 2}
QUICK = {
    "shortest": 5, "length": 15, "depth": 2, "samples": 64, "test_samples": 16, "seeds": [0, 1], "steps": 4,
    "batch": 8, "k": [2], "size": 16, "heads": 2, "layers": 1, "evaluations": 2, "inner": "aot_eager",
}  # fmt: skip
FULL = {
    "shortest": Bounds.shortest, "length": Bounds.longest, "depth": Bounds.depth, "samples": 96000,
    "test_samples": 2000, "steps": 5000, "batch": 32, "k": [128], "lr": 3e-4, "size": 512, "heads": 8, "layers": 6,
    "evaluations": 20,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "train_listops.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest expression")
    parser.add_argument("--shortest", type=int, default=33, help="tokens of the shortest expression")
    parser.add_argument("--depth", type=int, default=3, help="levels of a tree, that of its digits included")
    parser.add_argument("--arguments", type=int, default=10, help="of an operator, at most")
    parser.add_argument("--samples", type=int, default=40000, help="expressions to learn from")
    parser.add_argument("--test-samples", type=int, default=2000, help="expressions to be tested on")
    parser.add_argument("--data-seed", type=int, default=0, help="of the expressions, which all seeds share")
    options = training.parse_options(parser, arguments, {"quick": QUICK, "full": FULL}, DEFAULTS)
    bounds = Bounds(options.shortest, options.length, options.depth, options.arguments)
    setting = (
        f"ListOps, {bounds.shortest} to {bounds.longest} tokens, depth {bounds.depth}, {options.samples:,} samples, "
        f"{options.steps:,} steps of {options.batch}; {options.layers} layers of {options.size}, {options.heads} heads"
    )
    print(setting, flush=True)
    with tqdm(total=options.samples + options.test_samples, desc="drawing", leave=False) as bar:
        ids, values = draw_dataset(bar.total, bounds, options.data_seed, bar.update)
    held_out = values[options.samples :]
    chance = held_out.bincount().max().item() / len(held_out)
    note = (
        f"Accuracy on {options.test_samples:,} expressions that were not trained on; always saying the most frequent "
        f"of the ten values would give {chance:.4f}. Means ± standard deviations over {len(options.seeds)} seeds."
    )
    training.write(training.train(task(ids, values, options), options), setting, note, options)


def task(ids: Tensor, values: Tensor, options: argparse.Namespace) -> training.Task:
    """ids [samples + test_samples, L] of `listops.draw_dataset`, and the values [samples + test_samples]."""

    def batches(seed: int) -> Iterator[training.Batch]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(options.samples, generator=draw).split(options.batch):
                if len(rows) == options.batch:
                    yield ids[rows].long(), values[rows]

    def evaluate(run: Callable[..., Tensor]) -> training.Scores:
        hits = [
            (run(_filled(x.long(), options.batch).to(options.device))[: len(x)].argmax(-1).cpu() == y).float()
            for x, y in zip(
                ids[options.samples :].split(options.batch), values[options.samples :].split(options.batch), strict=True
            )
        ]
        return {"accuracy": torch.cat(hits).mean().item()}

    return training.Task(
        lambda: Classifier(ids.size(1), options.size, options.heads, options.layers),
        batches,
        lambda logits, batch: F.cross_entropy(logits.float(), batch[1]),
        evaluate,
    )


def _filled(x: Tensor, rows: int) -> Tensor:
    """The rows, the first of them repeated until there are so many: a compiled model is compiled for one size."""
    return torch.cat([x, x[:1].expand(rows - len(x), -1)])


class Classifier(nn.Module):
    """Token numbers [B, L], L at most `context`, to logits [B, 10], read off at the first token; padding is masked."""

    def __init__(self, context: int, size: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(len(VOCABULARY), size), nn.Embedding(context, size)
        self.layers = nn.ModuleList(Layer(size, heads, is_causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != PAD)[:, None, None]
        x = self.embedding(ids) + self.positions.weight[: ids.size(1)]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x[:, 0]))


if __name__ == "__main__":
    main()
