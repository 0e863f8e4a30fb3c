"""Values of a score program that read positions only as j - i and cost more than an addition: T5's buckets, for one.

Such a value is the same along each diagonal of the queries and keys. It is computed once for each difference, by ATen,
and handed to the kernel as an operand [B|1, H|1, Lq, Lk] in the memory of Lq + Lk - 1 elements: its rows overlap, each
begins one element before the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from topk_fx.score import Call, Expression, Name, Operand, Program, evaluate_name
from topk_fx.score.language import KEY_POSITION, QUERY_POSITION, SCORES

_COSTLY = {
    *("lookup", "div", "floor_div", "trunc_div", "remainder", "reciprocal", "sqrt", "rsqrt", "pow"),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "sigmoid", "silu", "softsign"),
    *("sin", "cos", "tan", "atan", "sinh", "cosh", "asinh", "tanh"),
}


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What is known of a value that is linear, query * i + key * j + an integer, or else reads j - i alone."""

    query: int = 0
    key: int = 0
    is_linear: bool = False
    reads_positions: bool = False
    is_costly: bool = False

    @property
    def of_difference(self) -> bool:
        return self.query + self.key == 0


def by_operands(program: Program, operands: int) -> tuple[Program, tuple[Name, ...]]:
    """The program with such values as operands after its `operands`, and the values' names in it."""
    facts: dict[Expression, _Facts | None] = {
        QUERY_POSITION: _Facts(query=1, is_linear=True, reads_positions=True),
        KEY_POSITION: _Facts(key=1, is_linear=True, reads_positions=True),
        SCORES: None,
    }
    for number, call in enumerate(program.operations):
        facts[Name(f"%{number}")] = _facts_of(call, facts)
    found = []
    for number, call in enumerate(program.operations):
        if not _is_found(facts[Name(f"%{number}")]):
            found += [x for x in call.arguments if isinstance(x, Name) and _is_found(facts[x]) and x not in found]
    renamed = {name: Operand(operands + n) for n, name in enumerate(found)}
    operations = tuple(
        Call(call.name, tuple(renamed.get(x, x) if isinstance(x, Name) else x for x in call.arguments))
        for call in program.operations
    )
    return Program(operations, program.result, program.score_dependent), tuple(found)


def _is_found(facts: _Facts | None) -> bool:
    return facts is not None and facts.of_difference and facts.reads_positions and facts.is_costly


def _facts_of(call: Call, known: dict[Expression, _Facts | None]) -> _Facts | None:
    arguments = [_facts_of_argument(call, n, known) for n in range(len(call.arguments))]
    facts = [x for x in arguments if x is not None]
    if len(facts) < len(arguments):
        return None
    found = _Facts(
        reads_positions=any(x.reads_positions for x in facts),
        is_costly=call.name in _COSTLY or any(x.is_costly for x in facts),
    )
    if all(x.is_linear for x in facts):
        match call.name:
            case "add" | "sub":
                sign = 1 if call.name == "add" else -1
                query, key = facts[0].query + sign * facts[1].query, facts[0].key + sign * facts[1].key
                return dataclasses.replace(found, query=query, key=key, is_linear=True)
            case "neg":
                return dataclasses.replace(found, query=-facts[0].query, key=-facts[0].key, is_linear=True)
            case "lt" | "le" | "gt" | "ge" | "eq" | "ne":
                query, key = facts[0].query - facts[1].query, facts[0].key - facts[1].key
                return found if query + key == 0 else None
    return found if all(x.of_difference for x in facts) else None


def _facts_of_argument(call: Call, position: int, known: dict[Expression, _Facts | None]) -> _Facts | None:
    x = call.arguments[position]
    if isinstance(x, Name):
        return known[x]
    if isinstance(x, Operand):  # a table has no positions
        return _Facts() if call.name == "lookup" and position == 0 else None
    return _Facts(is_linear=isinstance(x, int) and not isinstance(x, bool))


@dataclasses.dataclass(frozen=True)
class _Differences:
    """Query 0 against keys from 1 - queries on: each difference of positions once, on the device of `like`."""

    operands: Sequence[Tensor]
    queries: int
    keys: int
    like: Tensor

    def operand(self, index: int) -> Tensor:
        raise AssertionError(f"${index} is no table")

    def table(self, index: int) -> Tensor:
        return self.operands[index]

    def query_positions(self) -> Tensor:
        return self.like.new_zeros(1, 1, 1, 1, dtype=torch.int64)

    def key_positions(self) -> Tensor:
        count = self.queries + self.keys - 1
        return self.like.new_ones(1, 1, 1, count, dtype=torch.int64).cumsum(-1) - self.queries


def evaluate_differences(
    program: Program, names: Sequence[Name], operands: Sequence[Tensor], query: Tensor, key: Tensor
) -> list[Tensor]:
    """The named values [B|1, H|1, 1, Lq + Lk - 1], from j - i = 1 - Lq on. Operands that are tables are read."""
    positions = _Differences(operands, query.size(-2), key.size(-2), query)
    found = [evaluate_name(program, name, positions) for name in names]
    return [(x.float() if x.dtype == torch.float64 else x).contiguous() for x in found]
