"""Trains a small causal language model of bytes on real text, with vanilla and with top-k attention, in some minutes.

    python examples/train_bytes.py                                   # the topics of Python's help(), three seeds
    python examples/train_bytes.py --text library --seeds 3 4 5      # the sources of Python's own library
    python examples/train_bytes.py --text notes.txt docs/ --k 16     # your own files and folders
    python examples/train_bytes.py --full --device cuda --dtype bfloat16     # 12 layers of 768, 4,096 bytes, k=64

The first nine tenths of the text are learnt from, and the model is tested on the rest. Both models are compiled,
begin with the same weights and see the same batches. The default sizes are for a processor. Figures go to
examples/results/train_bytes.md, .json and .png.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import training
from byte_model import ByteModel

DEFAULTS = {"steps": 600, "batch": 8, "k": [32], "lr": 2e-3, "size": 128, "heads": 4, "layers": 3}
QUICK = {
    "length": 24, "windows": 4, "seeds": [0, 1], "steps": 4, "batch": 2, "k": [3], "size": 16, "heads": 2, "layers": 1,
    "evaluations": 2, "inner": "aot_eager",
}  # fmt: skip
FULL = {
    "text": ["library"], "length": 4096, "windows": 64, "steps": 20000, "batch": 8, "k": [64], "lr": 3e-4, "size": 768,
    "heads": 12, "layers": 12, "evaluations": 20,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "train_bytes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", nargs="+", default=["topics"], help="topics, library, or files and folders of which all text is read"
    )
    parser.add_argument("--length", type=int, default=256, help="bytes that the model sees")
    parser.add_argument("--windows", type=int, default=64, help="windows of the rest of the text to be tested on")
    options = training.parse_options(parser, arguments, {"quick": QUICK, "full": FULL}, DEFAULTS)
    text = torch.frombuffer(bytearray(load_text(options.text)), dtype=torch.uint8)
    if len(text) < 20 * (options.length + 1):
        parser.error(f"--text has {len(text):,} bytes: too few for windows of --length {options.length:,}")
    setting = (
        f"bytes of {' '.join(options.text)} ({len(text):,}), windows of {options.length:,}, {options.steps:,} steps of "
        f"{options.batch}; {options.layers} layers of {options.size}, {options.heads} heads"
    )
    print(setting, flush=True)
    held_out = windows_of_the_rest(text, options)
    note = (
        f"On {len(held_out)} windows of the last tenth of the text, not trained on: bits by which the next byte "
        f"surprises, and how often it was the likeliest. Means ± standard deviations over {len(options.seeds)} seeds."
    )
    training.write(training.train(task(text, held_out, options), options), setting, note, options)


def load_text(names: Sequence[str]) -> bytes:
    """The text of each name, one after the other.

    Args:
        names: "topics", the topics of Python's `help()`; "library", the sources of its library's single modules; or
            paths of files, and of folders whose files are read in alphabetical order but for those that are not UTF-8.

    Raises:
        SystemExit: a path does not exist.
    """
    return b"\n\n".join(text for name in names for text in _texts(name))


def _texts(name: str) -> Iterator[bytes]:
    if name == "topics":
        topics = pydoc_data.topics.topics
        yield from (topics[topic].encode() for topic in sorted(topics))
        return
    path = Path(sysconfig.get_path("stdlib")) if name == "library" else Path(name)
    if not path.exists():
        raise SystemExit(f"--text {name}: neither topics nor library, and there is no such file or folder")
    pattern = "*.py" if name == "library" else "**/*"
    for file in [path] if path.is_file() else sorted(x for x in path.glob(pattern) if x.is_file()):
        content = file.read_bytes()
        if path.is_file() or _is_text(content):
            yield content


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def windows_of_the_rest(text: Tensor, options: argparse.Namespace) -> Tensor:
    """Of the last tenth, evenly spread; int64 [windows, length + 1], as many as fill whole batches."""
    rest, width = text[len(text) * 9 // 10 :], options.length + 1
    starts = torch.linspace(0, len(rest) - width, -(-options.windows // options.batch) * options.batch).long()
    return torch.stack([rest[start : start + width] for start in starts.tolist()]).long()


def task(text: Tensor, held_out: Tensor, options: argparse.Namespace) -> training.Task:
    """text uint8 [bytes]; held_out int64 [windows, length + 1]."""
    cut, width = len(text) * 9 // 10, options.length + 1

    def make_model() -> ByteModel:
        model = ByteModel(options.size, options.heads, options.layers, options.length)
        # It is also the output layer: with weights as large as nn.Embedding's, the first losses would be of 20 bits.
        nn.init.normal_(model.embedding.weight, std=options.size**-0.5)
        return model

    def batches(seed: int) -> Iterator[training.Batch]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            firsts = torch.randint(cut - width, (options.batch,), generator=draw).tolist()
            window = torch.stack([text[first : first + width] for first in firsts]).long()
            yield window[:, :-1], window[:, 1:]

    def evaluate(run: Callable[..., Tensor]) -> training.Scores:
        losses, hits = [], []
        for window in held_out.to(options.device).split(options.batch):
            logits = run(window[:, :-1]).float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).item() / math.log(2))
            hits.append((logits.argmax(-1) == window[:, 1:]).float().mean().item())
        return {"bits per byte": sum(losses) / len(losses), "accuracy": sum(hits) / len(hits)}

    return training.Task(
        make_model,
        batches,
        lambda logits, batch: F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()),
        evaluate,
    )


if __name__ == "__main__":
    main()
