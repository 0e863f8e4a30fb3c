"""The score language: what happens between Q K^T and the softmax, as a line of text.

A top-k op takes its score function as a string of steps, applied from left to right to `scale * q_i.k_j`:

    "add($0)"                           an additive mask or bias, the op's operand 0
    "div(50.0) tanh mul(50.0) add($0)"  Gemma-2: soft cap, then mask
    "mask($0) causal"                   a mask as SDPA takes it, and the causal one

Text, because it is visible in a printed graph, is part of every compile cache's key, survives `torch.export.save`, and
reads the same to each lowering. An argument is a number or an operand, `$i`, that broadcasts against the scores
[B, H, Lq, Lk].

| step           | s becomes                             |
|----------------|---------------------------------------|
| `add(x)`       | s + x                                 |
| `mul(x)`       | s * x                                 |
| `div(x)`       | s / x                                 |
| `tanh`         | tanh(s)                               |
| `clamp(a, b)`  | min(max(s, a), b)                     |
| `mask(x)`      | as `keep(x, -inf)` if x is boolean, else as `add(x)`: what SDPA's attn_mask means |
| `keep(x, c)`   | s where x (boolean) is True, else c   |
| `fill(x, c)`   | c where x (boolean) is True, else s   |
| `causal`       | s where j <= i, else -inf             |
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, DTypeError


@dataclasses.dataclass(frozen=True)
class Operand:
    """The op's operand number `index`, written `$index`."""

    index: int

    def __str__(self) -> str:
        return f"${self.index}"


Argument = float | Operand
_ARITY = {"add": 1, "mul": 1, "div": 1, "tanh": 0, "clamp": 2, "mask": 1, "keep": 2, "fill": 2, "causal": 0}
_CONDITIONAL = ("keep", "fill")
_STEP = re.compile(r"(\w+)(?:\(([^()]*)\))?\s*")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a score function."""

    name: str
    arguments: tuple[Argument, ...] = ()

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        return f"{self.name}({', '.join(str(a) if isinstance(a, Operand) else repr(a) for a in self.arguments)})"

    @property
    def operands(self) -> tuple[int, ...]:
        return tuple(a.index for a in self.arguments if isinstance(a, Operand))


@dataclasses.dataclass(frozen=True)
class Score:
    """A score function: the steps in the order in which they are applied."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    @property
    def needs_scores_in_backward(self) -> bool:
        """Whether a derivative depends on the scores, and not only on the constants and operands."""
        return any(s.name in ("tanh", "clamp") or (s.name in ("mul", "div") and s.operands) for s in self.steps)

    @property
    def ends_causal(self) -> bool:
        """Whether query i sees no key beyond i, whatever comes before."""
        return bool(self.steps) and self.steps[-1].name == "causal"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Score:
        """The Score that `text` describes; ConfigError if it is not one."""
        steps = []
        position = 0
        while position < len(text):
            match = _STEP.match(text, position)
            if match is None:
                raise ConfigError(f"score={text!r} is not accepted: cannot read it from {text[position:]!r}")
            name, inside = match.groups()
            arguments = tuple(_parse_argument(a.strip(), text) for a in inside.split(",")) if inside else ()
            if _ARITY.get(name) != len(arguments):
                raise ConfigError(f"score={text!r} is not accepted: no step {name} with {len(arguments)} arguments")
            if name in (*_CONDITIONAL, "mask") and not isinstance(arguments[0], Operand):
                raise ConfigError(f"score={text!r} is not accepted: {name} takes an operand $i as its condition")
            steps.append(Step(name, arguments))
            position = match.end()
        return Score(tuple(steps))


def _parse_argument(text: str, whole: str) -> Argument:
    if re.fullmatch(r"\$\d+", text):
        return Operand(int(text[1:]))
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"score={whole!r} is not accepted: {text!r} is neither a number nor an operand $i") from None


Read = Callable[[Operand], Tensor]
"""Reads an operand at the positions of the scores, broadcastable to them."""


def _values(step: Step, read: Read, scores: Tensor) -> tuple[str, list[Any]]:
    """The step's name, `mask` resolved by the dtype of its operand, and its arguments in the dtype of the scores."""
    name, arguments = step.name, list(step.arguments)
    values: list[Any] = [read(a) if isinstance(a, Operand) else a for a in arguments]
    if name == "mask":
        name, values = ("keep", [*values, -torch.inf]) if values[0].dtype == torch.bool else ("add", values)
    start = 1 if name in _CONDITIONAL else 0
    values[start:] = [x.to(scores.dtype) if isinstance(x, Tensor) else x for x in values[start:]]
    return name, values


def apply_step(step: Step, scores: Tensor, read: Read, is_future: Callable[[], Tensor]) -> Tensor:
    """`scores` after `step`. `is_future()` gives the boolean tensor j > i at the positions of the scores."""
    name, x = _values(step, read, scores)
    match name:
        case "add":
            return scores + x[0]
        case "mul":
            return scores * x[0]
        case "div":
            return scores / x[0]
        case "tanh":
            return scores.tanh()
        case "clamp":
            return torch.minimum(torch.maximum(scores, _tensor(x[0], scores)), _tensor(x[1], scores))
        case "keep":
            return torch.where(x[0], scores, x[1])
        case "fill":
            return torch.where(x[0], x[1], scores)
        case "causal":
            return torch.where(is_future(), -torch.inf, scores)
    raise AssertionError(f"no such step: {step}")


def apply(score: Score, scores: Tensor, read: Read, is_future: Callable[[], Tensor]) -> Tensor:
    """`scores` after all steps."""
    for step in score.steps:
        scores = apply_step(step, scores, read, is_future)
    return scores


def differentiate_step(step: Step, before: Tensor | None, grad: Tensor, read: Read) -> tuple[Tensor, dict[int, Tensor]]:
    """The gradient before `step`, and those of its operands, from the one after it.

    Args:
        before: the scores before the step; needed where `Score.needs_scores_in_backward`.
        grad: the gradient of the scores after the step, at the same positions.
    """
    name, x = _values(step, read, grad)
    operands = step.operands
    match name:
        case "add":
            return grad, dict.fromkeys(operands, grad)
        case "mul":
            return grad * x[0], {index: grad * _given(before) for index in operands}
        case "div":
            return grad / x[0], {index: -grad * _given(before) / (x[0] * x[0]) for index in operands}
        case "tanh":
            return grad * (1 - _given(before).tanh().square()), {}
        case "clamp":
            scores, (low, high) = _given(before), step.arguments
            is_high = torch.maximum(scores, _tensor(x[0], scores)) > x[1]
            is_low = (scores < x[0]) & ~is_high
            found: dict[int, Tensor] = {}
            for bound, is_bound in ((low, is_low), (high, is_high)):
                if isinstance(bound, Operand):
                    found[bound.index] = found.get(bound.index, 0) + grad * is_bound
            return grad * ~(is_low | is_high), found
        case "causal":  # what it masks is never kept
            return grad, {}
        case "keep" | "fill":
            is_filled = x[0] if name == "fill" else ~x[0]
            value = step.arguments[-1]
            filled = {}
            if len(step.arguments) == 2 and isinstance(value, Operand):
                filled = {value.index: grad.masked_fill(~is_filled, 0)}
            return grad.masked_fill(is_filled, 0), filled
    raise AssertionError(f"no such step: {step}")


def _tensor(x: float | Tensor, like: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else like.new_tensor(x)


def _given(scores: Tensor | None) -> Tensor:
    assert scores is not None, "Score.needs_scores_in_backward must cover every step that reads them"
    return scores


def check_operands(score: Score, operands: Sequence[Tensor]) -> None:
    """ConfigError or DTypeError unless the operands are those which the steps read."""
    named = {index for step in score.steps for index in step.operands}
    if named != set(range(len(operands))):
        raise ConfigError(f"score={str(score)!r} names operands {sorted(named)}, but {len(operands)} were given")
    for step in score.steps:
        for position, argument in enumerate(step.arguments):
            if not isinstance(argument, Operand):
                continue
            dtype = operands[argument.index].dtype
            if step.name in _CONDITIONAL and position == 0 and dtype != torch.bool:
                raise DTypeError(f"operand {argument} of {step} has dtype {dtype}; accepted: torch.bool")
            if dtype.is_complex:
                raise DTypeError(f"operand {argument} of {step} has dtype {dtype}; accepted: a real dtype")
