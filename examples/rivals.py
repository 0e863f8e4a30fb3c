"""Three ways to run the same model: eager attention, SDPA under Inductor, and top-k attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import smollm2

K = int | float | str | None
"""None: the default, which rewrites where that pays."""

EAGER = "eager attention"
SDPA = "SDPA, Inductor"
TOPK = 'backend="topk"'


def prepare_forward(rival: str, saved_model: Path, tokens: list[int], k: K) -> Callable[[], None]:
    """Loads and compiles the rival; the call reads the tokens and predicts the one after them, as prefill does."""
    run = compile_rival(rival, load_rival(rival, saved_model), k)

    @torch.no_grad()
    def forward(text: Tensor) -> None:
        run(input_ids=text, use_cache=False, logits_to_keep=1)

    return _warmed_up(rival, forward, tokens)


def prepare_training(rival: str, saved_model: Path, tokens: list[int], k: K) -> Callable[[], None]:
    """Loads and compiles the rival; the call computes the loss over the tokens and the gradients of all weights."""
    model = load_rival(rival, saved_model)
    model.train()
    run = compile_rival(rival, model, k)

    def training_step(text: Tensor) -> None:
        run(input_ids=text, labels=text, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return _warmed_up(rival, training_step, tokens)


def load_rival(rival: str, saved_model: Path) -> PreTrainedModel:
    return smollm2.load_saved_model(saved_model, "eager" if rival == EAGER else "sdpa")


def compile_rival(rival: str, model: PreTrainedModel, k: K) -> Callable[..., Any]:
    if rival == EAGER:
        return model
    if rival == SDPA:
        return torch.compile(model, backend="inductor", dynamic=False)
    return compile_with_topk(model) if k is None else compile_with_topk(model, k=k)


def compile_with_topk(model: PreTrainedModel, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="topk", dynamic=False, options=options)


def _warmed_up(rival: str, run: Callable[[Tensor], None], tokens: list[int]) -> Callable[[], None]:
    """What is compiled has to see the full length once; for the rest a few tokens will do."""
    text = torch.tensor([tokens])
    run(text[:, :16] if rival == EAGER else text)
    return lambda: run(text)
