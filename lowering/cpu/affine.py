"""Score programs that make an affine function of each product, which is what screening can bound.

    score = factor * product + terms      factor > 0, and terms of anything but the products
    score = a number                      where it is filled
    score = -inf                          where it is masked

But for rounding, such a program is what it makes of 0, and the product times the factor. Beside them stand soft caps,
which leave the order of the products: score = cap * tanh(factor * product), filled, masked, and without terms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from topk_fx.score import Call, Expression, Name, Operand, Program
from topk_fx.score.language import SCORES

if TYPE_CHECKING:
    from .score_code import OperandKind

_MOST_OPERATIONS = 16


@dataclasses.dataclass(frozen=True)
class Term:
    """What is added to the scores, or with sign -1 subtracted; weight: what later steps multiply it by."""

    value: Expression
    sign: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Affine:
    """An affine program, or with a cap that is not 0 a soft cap, `capped` being its tanh.

    operations: its steps that may round a score. highest_fill: the largest number that scores are filled with, times
    the weight of what follows and without its terms; -inf if there is none.
    """

    factor: float = 1.0
    cap: float = 0.0
    operations: int = 0
    highest_fill: float = -math.inf
    terms: tuple[Term, ...] = ()
    capped: Name = SCORES

    @property
    def only_masks(self) -> bool:
        """Whether each score stays as it is or becomes -inf."""
        return self.operations == 0 and self.highest_fill == -math.inf


def affine_of(program: Program, kinds: Sequence[OperandKind]) -> Affine | None:
    """A program as an affine one, if it is: its steps are followed from the last to the first."""
    found, name = Affine(), program.result
    while name != SCORES:
        call = program.operations[int(name.text[1:])]
        scores = [x for x in call.arguments if isinstance(x, Name) and x in program.score_dependent]
        if len(scores) != 1 or found.operations > _MOST_OPERATIONS:
            return None
        before = _capped(found, program, name) if call.name == "tanh" else _before(call, scores[0], found, kinds)
        if before is None:
            return None
        found, name = before, scores[0]
    return found


def terms_of(program: Program, affine: Affine) -> Program:
    """What makes of 0 what the program makes of it: without what comes before a soft cap, and with it."""
    operations = tuple(
        Call(call.name, tuple(SCORES if x == affine.capped else x for x in call.arguments))
        for call in program.operations
    )
    result = SCORES if program.result == affine.capped else program.result
    return Program(operations, result, program.score_dependent)


def _before(call: Call, scores: Name, later: Affine, kinds: Sequence[OperandKind]) -> Affine | None:
    """An affine program with a step before its own."""
    name, arguments = call.name, call.arguments
    if name == "mask" and isinstance(arguments[1], Operand):
        is_boolean = kinds[arguments[1].index].dtype == torch.bool
        name, arguments = ("keep", (scores, arguments[1], -math.inf)) if is_boolean else ("add", arguments)
    if name in ("add", "mul") and arguments[1] == scores:
        arguments = (scores, arguments[0])
    match name, arguments:
        case (("keep" | "fill"), (first, _, value)) | ("where", (_, first, value)) if first == scores and not later.cap:
            return _with_fill(later, value)
        case "where", (_, value, second) if second == scores and not later.cap:
            return _with_fill(later, value)
        case (("add" | "sub"), (first, value)) if first == scores and not later.cap:
            return _with_term(later, Term(value, 1 if name == "add" else -1, later.factor))
        case (("mul" | "div"), (first, value)) if first == scores and _is_number(value) and 1e-6 < value < 1e6:
            factor = later.factor * value if name == "mul" else later.factor / value
            return dataclasses.replace(later, operations=later.operations + 1, factor=factor)
    return None


def _capped(later: Affine, program: Program, name: Name) -> Affine | None:
    """A tanh before an affine program, whose terms only fill: where a condition holds they are 0, else a number."""
    if later.cap:
        return None
    highest = later.highest_fill
    for term in later.terms:
        if not isinstance(term.value, Name) or term.sign < 0:
            return None
        call = program.operations[int(term.value.text[1:])] if term.value.text.startswith("%") else None
        numbers = call.arguments[1:] if call and call.name == "where" else ()
        if 0.0 not in numbers or not all(_is_number(x) and x <= 0 for x in numbers):
            return None
        highest = max(highest, min(numbers) * term.weight)
    return Affine(1.0, later.factor, later.operations + 1, highest, capped=name)


def _with_fill(later: Affine, value: Expression) -> Affine | None:
    if not _is_number(value) or not value < math.inf:
        return None
    return dataclasses.replace(later, highest_fill=max(later.highest_fill, value * later.factor))


def _with_term(later: Affine, term: Term) -> Affine:
    return dataclasses.replace(later, operations=later.operations + 1, terms=(*later.terms, term))


def _is_number(x: Expression) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
