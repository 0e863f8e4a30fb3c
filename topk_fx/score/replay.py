"""Evaluates a score function, and differentiates it, at the positions of the scores that a lowering works on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from .language import KEY_POSITION, QUERY_POSITION, SCORES, Call, Expression, Name, Operand, Program
from .operations import OPERATIONS


class Positions(Protocol):
    """Where the scores stand: everything that a score function reads besides them, broadcastable to them."""

    def operand(self, index: int) -> Tensor:
        """The operand `$index`."""

    def table(self, index: int) -> Tensor:
        """The operand `$index`, which is a table, as it is: [B|1, H|1, 1, N]."""

    def query_positions(self) -> Tensor:
        """i, int64."""

    def key_positions(self) -> Tensor:
        """j, int64."""


@dataclasses.dataclass(frozen=True)
class OperandGrad:
    """The gradient of operand `index` at the positions of the scores; of a table, at `entries` (int64) of it."""

    index: int
    grad: Tensor
    entries: Tensor | None = None


def evaluate(program: Program, scores: Tensor, positions: Positions) -> Tensor:
    """`scores` after all steps, in their dtype."""
    values: dict[Expression, Any] = {SCORES: scores}
    read = functools.partial(_read, values, positions)
    for number, (call, finished) in enumerate(zip(program.operations, program.last_uses, strict=True)):
        name = Name(f"%{number}")
        values[name] = _compute(call, read, scores.dtype if name in program.score_dependent else None, positions)
        for last in finished:
            values.pop(last, None)
    return values[program.result].to(scores.dtype).expand(scores.shape)


def evaluate_name(program: Program, name: Name, positions: Positions) -> Tensor:
    """What a name of the program stands for, which does not read the scores."""
    values: dict[Expression, Any] = {}

    def value(x: Expression) -> Any:
        if isinstance(x, Name) and x not in values and x.text.startswith("%"):
            values[x] = _compute(program.operations[int(x.text[1:])], value, None, positions)
        return _read(values, positions, x)

    found: Tensor = value(name)
    return found


def differentiate(
    program: Program, scores: Tensor | None, grad: Tensor, positions: Positions, wanted: Collection[int]
) -> tuple[Tensor, list[OperandGrad]]:
    """The gradient of the scores before all steps, and those of the operands, from the one after them.

    Args:
        scores: the scores before the steps; needed where `Program.needs_scores_in_backward`.
        grad: the gradient after the steps, at the same positions.
        wanted: the operands whose gradients are asked for.
    """
    differentiable = program.depends_on(wanted)
    values: dict[Expression, Any] = {} if scores is None else {SCORES: scores}

    def value(x: Expression) -> Any:
        """The value of an argument, computed when a derivative asks for it."""
        if isinstance(x, Name) and x not in values and x.text.startswith("%"):
            call = program.operations[int(x.text[1:])]
            dtype = grad.dtype if x in program.score_dependent else None
            values[x] = _compute(call, value, dtype, positions)
        assert x != SCORES or scores is not None, "Program.needs_scores_in_backward covers every derivative"
        return _read(values, positions, x)

    grads: dict[Name, Tensor] = {program.result: grad}
    found: list[OperandGrad] = []
    for number in reversed(range(len(program.operations))):
        name, call = Name(f"%{number}"), program.operations[number]
        grad_result = grads.pop(name, None)
        if grad_result is None or name not in differentiable:
            continue
        if call.name == "lookup":
            entries = value(call.arguments[1])
            size = positions.table(call.arguments[0].index).size(-1)
            entries = torch.where(entries < 0, entries + size, entries)
            found.append(OperandGrad(call.arguments[0].index, grad_result, entries))
            continue
        as_scores = grad.dtype if name in program.score_dependent else None
        thunks = [functools.partial(_converted, value, x, as_scores) for x in call.arguments]
        for argument, derivative in zip(call.arguments, OPERATIONS[call.name].derivatives, strict=True):
            is_wanted = (isinstance(argument, Operand) and argument.index in wanted) or (
                isinstance(argument, Name) and argument in differentiable
            )
            if derivative is None or not is_wanted:
                continue
            part = derivative(grad_result, *thunks)
            if isinstance(argument, Operand):
                found.append(OperandGrad(argument.index, part))
            else:
                grads[argument] = grads[argument] + part if argument in grads else part
    return grads.get(SCORES, torch.zeros_like(grad)), found


def _read(values: dict[Expression, Any], positions: Positions, x: Expression) -> Any:
    if isinstance(x, Operand):
        return positions.operand(x.index)
    if x == QUERY_POSITION:
        return positions.query_positions()
    if x == KEY_POSITION:
        return positions.key_positions()
    return values[x] if isinstance(x, Name) else x


def _compute(call: Call, read: Callable[[Expression], Any], dtype: torch.dtype | None, positions: Positions) -> Any:
    """The result of an operation; `dtype` is that of the scores if it depends on them."""
    if call.name == "lookup":
        return OPERATIONS["lookup"].function(positions.table(call.arguments[0].index), read(call.arguments[1]))
    return OPERATIONS[call.name].function(*(_converted(read, x, dtype) for x in call.arguments))


def _converted(read: Callable[[Expression], Any], x: Expression, dtype: torch.dtype | None) -> Any:
    """A value, in the dtype of the scores if it meets them and is a number and no condition."""
    found = read(x)
    if dtype is not None and isinstance(found, Tensor) and found.dtype != torch.bool:
        return found.to(dtype)
    return found
