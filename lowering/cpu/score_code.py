"""A score program as C++: what `sources/score.h` declares, generated for one program and one kind of operands.

    apply        changes a block of scores in place: for each row a loop over the keys that the compiler vectorises
    apply_terms  of an affine program, what `apply` makes of scores of 0, which it does not read
    apply_listed as `apply`, for keys that stand anywhere
    apply_kept   the same for the probabilities of kept keys
    bound        interval arithmetic on the same operations, for a whole block: an upper bound of its scores, so that
                 blocks beyond a causal diagonal, outside a window, or under a mask are skipped; whether its masks
                 mask nothing, so that `apply` can leave them out; and of an affine program the size of its terms

A value has the dtype that ATen would give it. Where that is a 16-bit float it is held in float32 and rounded after each
operation, as ATen does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from topk_fx.score import Call, Expression, Name, Operand, Program
from topk_fx.score.language import KEY_POSITION, QUERY_POSITION, SCORES

from .affine import Affine, affine_of, terms_of


class NoCodeError(Exception):
    """There is no C++ for a program; the message says for what of it."""


@dataclasses.dataclass(frozen=True)
class OperandKind:
    """What code depends on of an operand: its dtype, and how its elements lie along the keys."""

    dtype: torch.dtype
    keys: str  # "one": a single element for all keys, "dense": neighbours, "strided"


ELEMENT_TYPES = {
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float32: "float",
}

BOOL, INT, FLOAT, BFLOAT16, HALF = "bool", "int", "float", "BFloat16", "Half"
"""The types of values. Integers have 32 bits where their size is known to allow it, else 64."""

_FLOATS = (FLOAT, BFLOAT16, HALF)
_POSITION_LIMIT = 2**30
"""Queries and keys are fewer."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the generated code: an expression for one element, and one for the interval of a block's elements."""

    type: str
    code: str
    interval: str
    varies: bool = False  # along the keys
    limit: int = 2**62  # integers: an upper bound of the magnitude
    weight: int = 2  # in type promotion: 0 a number, 1 a tensor without axes, 2 a tensor with some

    @property
    def is_wide(self) -> bool:
        return self.type == INT and self.limit >= 2**31

    @property
    def cpp_type(self) -> str:
        return {BOOL: "bool", INT: "int64_t" if self.is_wide else "int32_t"}.get(self.type, "float")


def supports(program: Program, kinds: Sequence[OperandKind]) -> str:
    """Why there is no code for a program, or ""."""
    try:
        _Lines(program, kinds)
    except NoCodeError as error:
        return str(error)
    return ""


def source_of(before: Program, after: Program, kinds: Sequence[OperandKind]) -> str:
    """A translation unit that defines the functions of `before` and `after`, for `sources/score.h`.

    Raises:
        NoCodeError: an operation or a dtype has no C++.
    """
    parts = ['#include "score.h"', "", "using namespace topk;"]
    if before:
        lines = _Lines(before, kinds)
        reduced, facts = _without_masks(before, kinds)
        simple = _Lines(reduced, kinds)
        change = "NONE" if reduced.result == SCORES else "WITHOUT_MASKS"
        affine = affine_of(before, kinds)
        parts += [
            *_apply("apply", lines, simple, "scores[n]"),
            lines.apply_listed("apply_listed"),
            lines.bound(facts, change, affine),
        ]
        if affine and affine.cap:
            terms = _Lines(terms_of(before, affine), kinds)
            parts += _apply("apply_terms", terms, terms, "0.0f")
        elif affine:
            parts += _apply("apply_terms", lines, simple, "0.0f")
    if after:
        parts.append(_Lines(after, kinds).apply_listed("apply_kept"))
    return "\n".join([*parts, ""])


def _apply(name: str, lines: _Lines, simple: _Lines, score: str) -> Iterator[str]:
    """A function that applies one or the other program to scores, and its parts."""
    yield lines.apply(f"{name}_all", score)
    yield simple.apply(f"{name}_without_masks", score)
    yield (
        f'extern "C" void {name}(const Block& block, float* scores, int64_t stride, Change change) {{\n'
        f"  (change == Change::ANY ? {name}_all : {name}_without_masks)(block, scores, stride);\n"
        "}"
    )


def _without_masks(program: Program, kinds: Sequence[OperandKind]) -> tuple[Program, list[tuple[Expression, int]]]:
    """The program without the operations that only mask, and the facts under which that is the same.

    A fact is an expression and the number that all its elements must be.
    """
    renamed: dict[Expression, Expression] = {}
    facts: list[tuple[Expression, int]] = []

    def does_not_read_scores(x: Expression) -> bool:
        return isinstance(x, (Name, Operand)) and x not in program.score_dependent

    for number, call in enumerate(program.operations):
        arguments = call.arguments
        match call.name, arguments:
            case ("keep", (scores, condition, _)) | ("where", (condition, scores, _)):
                fact = 1
            case ("fill", (scores, condition, _)):
                fact = 0
            case ("mask", (scores, condition)):
                fact = int(kinds[condition.index].dtype == torch.bool)
            case (("add" | "sub"), (scores, condition)):
                fact = 0
                if call.name == "add" and scores not in program.score_dependent:
                    scores, condition = condition, scores
            case _:
                continue
        if scores in program.score_dependent and does_not_read_scores(condition):
            renamed[Name(f"%{number}")] = renamed.get(scores, scores)
            facts.append((condition, fact))
    operations = tuple(
        Call(call.name, tuple(renamed.get(x, x) if isinstance(x, Name) else x for x in call.arguments))
        for call in program.operations
    )
    result = renamed.get(program.result, program.result)
    assert isinstance(result, Name)
    return Program(operations, result, program.score_dependent), facts


class _Lines:
    """The operations of a program that its result needs, as values, and the functions that compute them."""

    def __init__(self, program: Program, kinds: Sequence[OperandKind]) -> None:
        self.program, self.kinds = program, kinds
        self.operands: dict[int, str] = {}  # those read element by element, and their C++ types
        self.tables: dict[int, str] = {}
        self.integer_bytes: dict[Name, int] = {}  # of results that are integers of fewer than 64 bits
        self.values: dict[Expression, _Value] = {
            SCORES: _Value(FLOAT, "s", "s", varies=True),
            QUERY_POSITION: _Value(INT, "i", "i", limit=_POSITION_LIMIT - 1),
            KEY_POSITION: _Value(INT, "j", "j", varies=True, limit=_POSITION_LIMIT - 1),
        }
        self.lines: list[tuple[Name, _Value]] = []
        for number in sorted(self._needed()):
            name = Name(f"%{number}")
            value = self._compute(program.operations[number], name in program.score_dependent)
            self._check_range(name, program.operations[number], value)
            self.lines.append((name, value))
            self.values[name] = dataclasses.replace(value, code=f"v{number}", interval=f"v{number}")

    def _needed(self) -> set[int]:
        found: set[int] = set()
        pending = [self.program.result]
        while pending:
            name = pending.pop()
            if name.text.startswith("%") and int(name.text[1:]) not in found:
                found.add(int(name.text[1:]))
                pending += [x for x in self.program.operations[int(name.text[1:])].arguments if isinstance(x, Name)]
        return found

    # --- values

    def _read(self, x: Expression) -> _Value:
        if isinstance(x, Name):
            return self.values[x]
        if isinstance(x, Operand):
            return self._operand(x.index)
        return _number(x)

    def _operand(self, index: int) -> _Value:
        kind = self.kinds[index]
        if kind.dtype not in ELEMENT_TYPES:
            raise NoCodeError(f"operand ${index} has dtype {kind.dtype}")
        element = self.operands[index] = ELEMENT_TYPES[kind.dtype]
        code = {"one": f"x{index}_only", "dense": f"x{index}[at]", "strided": f"x{index}[at * x{index}_stride]"}[
            kind.keys
        ]
        interval = f"interval_of<{element}>(block, {index})"
        varies = kind.keys != "one"
        if kind.dtype == torch.bool:
            return _Value(BOOL, code, interval, varies)
        if kind.dtype.is_floating_point:
            type_ = {"float": FLOAT}.get(element, element)
            return _Value(type_, f"to_float({code})", interval, varies)
        limit = 2 ** (8 * kind.dtype.itemsize - 1) if kind.dtype != torch.int64 else 2**62
        limit = 256 if kind.dtype == torch.uint8 else limit
        return _Value(INT, f"int64_t({code})" if limit >= 2**31 else f"int32_t({code})", interval, varies, limit)

    def _compute(self, call: Call, is_score: bool) -> _Value:
        if call.name == "lookup":
            return self._lookup(call)
        if call.name == "mask":
            scores, mask = call.arguments
            is_bool = self._read(mask).type == BOOL
            call = Call("keep", (scores, mask, -math.inf)) if is_bool else Call("add", (scores, mask))
        arguments = [self._read(x) for x in call.arguments]
        if is_score:
            arguments = [x if x.type == BOOL and x.weight else _cast(x, FLOAT) for x in arguments]
        rule = _RULES.get(call.name)
        if rule is None:
            raise NoCodeError(f"the operation {call.name}")
        value = rule(*arguments)
        varies, weight = any(x.varies for x in arguments), max(x.weight for x in arguments)
        return dataclasses.replace(value, varies=varies, weight=max(weight, value.weight if call.name in CASTS else 0))

    def _check_range(self, name: Name, call: Call, value: _Value) -> None:
        """NoCodeError where integers of few bits might wrap around, which those of C++ here do not."""
        if value.type != INT:
            return
        sizes = [size for x in call.arguments if (size := self._bytes_of(x, call.name))]
        if not sizes:
            return
        size = self.integer_bytes[name] = max(sizes)
        if call.name in _MAY_WRAP and (size < 4 or (size == 4 and value.limit >= 2**31)):
            raise NoCodeError(f"{call.name} of integers of {8 * size} bits, which may wrap around")

    def _bytes_of(self, x: Expression, operation: str) -> int:
        """The size of an integer tensor that takes part in an operation, or is cast to; 0 for what is none."""
        if operation in CASTS:
            return {"int32": 4, "int64": 8}.get(operation, 0)
        if isinstance(x, Operand):
            dtype = self.kinds[x.index].dtype
            return 0 if dtype.is_floating_point or dtype == torch.bool else dtype.itemsize
        if isinstance(x, Name) and self.values[x].type == INT:
            return self.integer_bytes.get(x, 8)
        return 0

    def _lookup(self, call: Call) -> _Value:
        table, index = call.arguments[0].index, self._read(call.arguments[1])
        kind = self.kinds[table]
        if kind.dtype not in (torch.float32, torch.bfloat16, torch.float16) or index.type != INT:
            raise NoCodeError(f"a table of dtype {kind.dtype}, or an index that is no integer")
        self.tables[table] = ELEMENT_TYPES[kind.dtype]
        type_ = {"float": FLOAT}.get(self.tables[table], self.tables[table])
        position = f"({index.code} < 0 ? {index.code} + t{table}_size : {index.code})"
        code = f"to_float(t{table}[{position} * t{table}_stride])"
        return _Value(type_, code, f"interval_of_table<{self.tables[table]}>(block, {table})", index.varies)

    # --- functions

    def apply(self, name: str, score: str) -> str:
        if self.program.result == SCORES and score == "scores[n]":
            return f"static void {name}(const Block&, float*, int64_t) {{}}"
        return (
            f"static void {name}(const Block& block, float* all_scores, int64_t stride) {{\n"
            "  for (int64_t r = 0; r < block.row_count; r++) {\n"
            "    float* __restrict scores = all_scores + r * stride;\n"
            f"{self._row('block.first_key')}"
            "#pragma GCC ivdep\n"
            "    for (int32_t n = 0; n < count; n++) {\n"
            "      [[maybe_unused]] const int64_t at = n;\n"
            "      [[maybe_unused]] const int32_t j = int32_t(block.first_key) + n;\n"
            f"{self._elements(score)}"
            "    }\n"
            "  }\n"
            "}"
        )

    def apply_listed(self, name: str) -> str:
        return (
            f'extern "C" void {name}(const Block& block, const int32_t* __restrict keys, float* __restrict scores) {{\n'
            "  const int64_t r = 0;\n"
            f"{self._row('0')}"
            "    for (int32_t n = 0; n < count; n++) {\n"
            "      [[maybe_unused]] const int64_t at = keys[n];\n"
            "      [[maybe_unused]] const int32_t j = keys[n];\n"
            f"{self._elements('scores[n]')}"
            "    }\n"
            "}"
        )

    def _row(self, first_key: str) -> str:
        """What is the same for all keys of a row: pointers and values that do not vary along the keys."""
        lines = ["[[maybe_unused]] const int32_t i = int32_t(block.rows[r].query);"]
        lines += ["const int32_t count = int32_t(block.key_count);"]
        for index, element in sorted(self.operands.items()):
            x = f"block.operands[{index}]"
            lines += [
                f"const {element}* __restrict x{index} = static_cast<const {element}*>({x}.data) + "
                f"block.batch * {x}.batch_stride + block.rows[r].head * {x}.head_stride + "
                f"block.rows[r].query * {x}.query_stride + {first_key} * {x}.key_stride;",
                f"[[maybe_unused]] const int64_t x{index}_stride = {x}.key_stride;",
            ]
            if self.kinds[index].keys == "one":
                lines.append(f"const {element} x{index}_only = x{index}[0];")
        for index, element in sorted(self.tables.items()):
            x = f"block.operands[{index}]"
            lines += [
                f"const {element}* __restrict t{index} = static_cast<const {element}*>({x}.data) + "
                f"block.batch * {x}.batch_stride + block.rows[r].head * {x}.head_stride;",
                f"const int64_t t{index}_stride = {x}.key_stride, t{index}_size = {x}.size;",
            ]
        lines += [self._declaration(name, value) for name, value in self.lines if not value.varies]
        return "".join(f"    {line}\n" for line in lines)

    def _elements(self, score: str) -> str:
        lines = [f"[[maybe_unused]] const float s = {score};"]
        lines += [self._declaration(name, value) for name, value in self.lines if value.varies]
        lines += [f"scores[n] = {_cast(self.values[self.program.result], FLOAT).code};"]
        return "".join(f"      {line}\n" for line in lines)

    def _declaration(self, name: Name, value: _Value) -> str:
        return f"const {value.cpp_type} {self.values[name].code} = {value.code};"

    def bound(self, facts: Sequence[tuple[Expression, int]], change: str, affine: Affine | None) -> str:
        lines = [
            "[[maybe_unused]] const double most = largest_product;",
            "[[maybe_unused]] const Interval s{-most, most, std::isinf(most)};",
            "[[maybe_unused]] const Interval j{double(block.first_key), "
            "double(block.first_key + block.key_count - 1)};",
            "int64_t first = block.rows[0].query, last = first;",
            "for (int64_t r = 1; r < block.row_count; r++) {",
            "  first = std::min(first, block.rows[r].query);",
            "  last = std::max(last, block.rows[r].query);",
            "}",
            "[[maybe_unused]] const Interval i{double(first), double(last)};",
        ]
        needed = {x.index for name in self._needed() for x in self.program.operations[name].operands}
        read = [(index, ELEMENT_TYPES[self.kinds[index].dtype]) for index in sorted(needed - set(self.tables))]
        for index, element in read:
            lines.append(f"const Interval x{index} = interval_of<{element}>(block, {index}, matrices);")
        for name, value in self.lines:
            interval = value.interval
            for index, element in read:
                interval = interval.replace(f"interval_of<{element}>(block, {index})", f"x{index}")
            lines.append(f"[[maybe_unused]] const Interval {self.values[name].code} = {interval};")

        def interval_name(x: Expression) -> str:
            if isinstance(x, Operand):
                return f"x{x.index}"
            return self.values[x].code if isinstance(x, Name) else _number(x).interval

        result = self.values[self.program.result].interval
        lines.append(f"facts.upper = {result}.has_nan ? double(INF) : {result}.high;")
        if facts:
            known = " && ".join(f"{interval_name(x)}.is({number})" for x, number in facts)
            lines.append(f"facts.change = {known} ? Change::{change} : Change::ANY;")
        else:
            lines.append("facts.change = Change::ANY;")
        ends = [
            f"std::fabs({interval_name(term.value)}.{'high' if term.sign > 0 else 'low'}) * {term.weight!r}"
            for term in (affine.terms if affine else ())
        ]
        lines.append(f"facts.terms = {' + '.join(ends) or '0'};")
        body = "".join(f"  {line}\n" for line in lines)
        parameters = "const Block& block, float largest_product, BlockFacts& facts"
        any_matrix = " || ".join(f"is_matrix(block.operands[{index}])" for index, _ in read) or "false"
        return (
            f"static void bound_with({parameters}, [[maybe_unused]] Matrices matrices) {{\n{body}}}\n"
            f'extern "C" void bound({parameters}) {{\n'
            f"  if ({any_matrix}) {{\n"
            "    bound_with(block, largest_product, facts, Matrices::UNREAD);\n"
            "    if (facts.upper == -INF) return;\n"
            "  }\n"
            "  bound_with(block, largest_product, facts, Matrices::READ);\n"
            "}"
        )


# --- operations


def _number(x: bool | int | float) -> _Value:
    if isinstance(x, bool):
        return _Value(BOOL, "true" if x else "false", f"number({int(x)})", weight=0)
    if isinstance(x, int):
        if abs(x) >= 2**62:
            raise NoCodeError(f"the number {x}")
        return _Value(INT, f"INT64_C({x})", f"number({x}.0)", limit=abs(x) + 1, weight=0)
    return _Value(FLOAT, _float_literal(x), f"number({_float_literal(x)})", weight=0)


def _float_literal(x: float) -> str:
    if math.isnan(x):
        return "std::numeric_limits<float>::quiet_NaN()"
    try:
        x = struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        x = math.copysign(math.inf, x)
    if math.isinf(x):
        return "INF" if x > 0 else "-INF"
    return f"{x.hex()}f"


def _cast(x: _Value, type_: str) -> _Value:
    if x.type == type_:
        return x
    if type_ == BOOL:
        return dataclasses.replace(
            x, type=BOOL, code=f"({x.code} != 0)", interval=f"interval_ne({x.interval}, number(0))"
        )
    if type_ == INT:
        if x.type in _FLOATS:
            return dataclasses.replace(x, type=INT, code=f"int64_t({x.code})", interval="anything()", limit=2**62)
        return dataclasses.replace(x, type=INT, code=f"int32_t({x.code})", limit=2)
    code = x.code if x.type in _FLOATS else f"float({x.code})"
    return _rounded(dataclasses.replace(x, type=FLOAT, code=code, interval=f"as_float({x.interval})"), type_)


def _rounded(x: _Value, type_: str) -> _Value:
    """A float32 value rounded to a type of 16 bits."""
    if type_ == FLOAT:
        return x
    return dataclasses.replace(
        x, type=type_, code=f"rounded_to<{type_}>({x.code})", interval=f"interval_as<{type_}>({x.interval})"
    )


def _promoted(*values: _Value) -> str:
    """The dtype in which ATen computes: numbers count for their kind only."""

    def rank(x: _Value) -> int:
        return 0 if x.type == BOOL else 1 if x.type == INT else 2

    highest = max(map(rank, values))
    if highest < 2:
        return BOOL if highest == 0 else INT
    floats = [x for x in values if x.type in _FLOATS and x.weight]
    heaviest = max((x.weight for x in floats), default=0)
    types = {x.type for x in floats if x.weight == heaviest}
    return types.pop() if len(types) == 1 else FLOAT


def _arithmetic(code: str, interval: str, limit: Callable[[int, int], int]) -> Callable[[_Value, _Value], _Value]:
    def rule(a: _Value, b: _Value) -> _Value:
        type_ = _promoted(a, b)
        if type_ == BOOL:
            raise NoCodeError("arithmetic of booleans")
        if type_ == INT:
            size = limit(a.limit, b.limit) if a.type == b.type == INT else 2**62
            kind = "int64_t" if size >= 2**31 else "int32_t"
            text = code.format(f"{kind}({a.code})", f"{kind}({b.code})")
            return _Value(INT, text, interval.format(a.interval, b.interval), limit=min(size, 2**62))
        x, y = (_cast(v, FLOAT) for v in (a, b))
        value = _Value(FLOAT, code.format(x.code, y.code), f"as_float({interval.format(x.interval, y.interval)})")
        return _rounded(value, type_)

    return rule


def _integer_division(code: str, limit: Callable[[int, int], int]) -> Callable[[_Value, _Value], _Value]:
    def rule(a: _Value, b: _Value) -> _Value:
        if a.type != INT or b.type != INT or b.weight or b.code in ("INT64_C(0)", "INT64_C(-1)"):
            raise NoCodeError("a division that is not of integers by a number")
        size = limit(a.limit, b.limit)
        kind = "int64_t" if a.is_wide or b.is_wide else "int32_t"
        return _Value(INT, code.format(f"{kind}({a.code})", f"{kind}({b.code})"), "anything()", limit=size)

    return rule


def _division(a: _Value, b: _Value) -> _Value:
    type_ = _promoted(a, b)
    x, y = (_cast(v, FLOAT) for v in (a, b))
    value = _Value(FLOAT, f"({x.code} / {y.code})", f"as_float(interval_div({x.interval}, {y.interval}))")
    return _rounded(value, type_ if type_ in _FLOATS else FLOAT)


def _comparison(operator: str, interval: str) -> Callable[[_Value, _Value], _Value]:
    def rule(a: _Value, b: _Value) -> _Value:
        type_ = _promoted(a, b)
        x, y = (_cast(v, type_) if type_ in _FLOATS else v for v in (a, b))
        return _Value(BOOL, f"({x.code} {operator} {y.code})", f"{interval}({x.interval}, {y.interval})")

    return rule


def _bits(operator: str, interval: str) -> Callable[[_Value, _Value], _Value]:
    def rule(a: _Value, b: _Value) -> _Value:
        if a.type != BOOL or b.type != BOOL:
            raise NoCodeError("bits of integers")
        return _Value(BOOL, f"bool({a.code} {operator} {b.code})", f"{interval}({a.interval}, {b.interval})")

    return rule


def _logical(operator: str, interval: str) -> Callable[[_Value, _Value], _Value]:
    rule = _bits(operator, interval)
    return lambda a, b: rule(_cast(a, BOOL), _cast(b, BOOL))


def _not(a: _Value) -> _Value:
    if a.type != BOOL:
        raise NoCodeError("bits of integers")
    return _Value(BOOL, f"!{a.code}", f"interval_not({a.interval})")


def _where(condition: _Value, a: _Value, b: _Value) -> _Value:
    if condition.type != BOOL:
        raise NoCodeError("a condition that is no boolean")
    type_ = _promoted(a, b)
    if type_ == BOOL:
        x, y = a, b
    elif type_ == INT:
        x, y = (_cast(v, INT) for v in (a, b))
    else:
        x, y = (_cast(v, type_) for v in (a, b))
    code = f"({condition.code} ? {x.code} : {y.code})"
    if type_ in _FLOATS:
        code = f"select({condition.code}, {x.code}, {y.code})"
    return _Value(
        type_,
        code,
        f"interval_where({condition.interval}, {x.interval}, {y.interval})",
        limit=max(x.limit, y.limit),
    )


def _function(code: str, interval: str = "anything()", integer: bool = False) -> Callable[..., _Value]:
    """A function of floats. {0}, {1} ... are its arguments."""

    def rule(*arguments: _Value) -> _Value:
        type_ = _promoted(*arguments)
        if type_ == INT and integer:
            (x,) = arguments
            return _Value(INT, code.format(x.code), interval.format(x.interval), limit=x.limit)
        if type_ == BOOL:
            raise NoCodeError("a function of booleans")
        floats = [_cast(x, FLOAT) for x in arguments]
        text = interval.format(*(x.interval for x in floats))
        value = _Value(FLOAT, code.format(*(x.code for x in floats)), f"as_float({text})")
        return _rounded(value, type_ if type_ in _FLOATS else FLOAT)

    return rule


def _power(a: _Value, b: _Value) -> _Value:
    if b.weight or a.type not in _FLOATS:
        raise NoCodeError("a power whose exponent is no number")
    if b.code in ("INT64_C(2)", _float_literal(2.0)):
        return _function("({0} * {0})")(a)
    return _function("std::pow({0}, {1})")(a, _cast(b, FLOAT))


_maximum = _arithmetic("maximum_of({0}, {1})", "interval_maximum({0}, {1})", max)
_minimum = _arithmetic("minimum_of({0}, {1})", "interval_minimum({0}, {1})", max)

CASTS = {"bool": BOOL, "int32": INT, "int64": INT, "float32": FLOAT, "bfloat16": BFLOAT16, "float16": HALF}


def _as_tensor(type_: str, x: _Value) -> _Value:
    """A cast makes a tensor of a number."""
    return dataclasses.replace(_cast(x, type_), weight=max(x.weight, 1))


_MAY_WRAP = ("add", "sub", "mul", "neg", "abs", "square", "pow")

_RULES: Mapping[str, Callable[..., _Value]] = {
    "add": _arithmetic("({0} + {1})", "interval_add({0}, {1})", lambda a, b: a + b),
    "sub": _arithmetic("({0} - {1})", "interval_sub({0}, {1})", lambda a, b: a + b),
    "mul": _arithmetic("({0} * {1})", "interval_mul({0}, {1})", lambda a, b: a * b),
    "div": _division,
    "floor_div": _integer_division("floor_div_of({0}, {1})", lambda a, b: a),
    "trunc_div": _integer_division("({0} / {1})", lambda a, b: a),
    "remainder": _integer_division("({0} - {1} * floor_div_of({0}, {1}))", lambda a, b: b),
    "maximum": _maximum,
    "minimum": _minimum,
    "clamp": lambda x, low, high: _minimum(_maximum(x, low), high),
    "neg": _function("-({0})", "interval_neg({0})", integer=True),
    "abs": _function("std::abs({0})", "interval_abs({0})", integer=True),
    "square": _function("({0} * {0})"),
    "reciprocal": _function("(1.0f / {0})"),
    "sqrt": _function("std::sqrt({0})"),
    "rsqrt": _function("(1.0f / std::sqrt({0}))"),
    "pow": _power,
    "floor": _function("std::floor({0})", integer=False),
    "ceil": _function("std::ceil({0})"),
    "round": _function("std::nearbyint({0})"),
    "trunc": _function("std::trunc({0})"),
    "exp": _function("exp_of({0})"),
    "exp2": _function("std::exp2({0})"),
    "expm1": _function("std::expm1({0})"),
    "log": _function("std::log({0})"),
    "log2": _function("std::log2({0})"),
    "log10": _function("std::log10({0})"),
    "log1p": _function("std::log1p({0})"),
    "sin": _function("std::sin({0})"),
    "cos": _function("std::cos({0})"),
    "tan": _function("std::tan({0})"),
    "atan": _function("std::atan({0})"),
    "sinh": _function("std::sinh({0})"),
    "cosh": _function("std::cosh({0})"),
    "asinh": _function("std::asinh({0})"),
    "tanh": _function("tanh_of({0})", "interval_tanh({0})"),
    "erf": _function("std::erf({0})"),
    "sigmoid": _function("sigmoid_of({0})"),
    "silu": _function("({0} * sigmoid_of({0}))"),
    "relu": _function("({0} < 0.0f ? 0.0f : {0})"),
    "softsign": _function("({0} / (1.0f + std::abs({0})))"),
    "leaky_relu": _function("({0} > 0.0f ? {0} : {0} * {1})"),
    "eq": _comparison("==", "interval_eq"),
    "ne": _comparison("!=", "interval_ne"),
    "lt": _comparison("<", "interval_lt"),
    "le": _comparison("<=", "interval_le"),
    "gt": _comparison(">", "interval_gt"),
    "ge": _comparison(">=", "interval_ge"),
    "and": _bits("&", "interval_and"),
    "or": _bits("|", "interval_or"),
    "xor": _bits("!=", "interval_xor"),
    "logical_and": _logical("&", "interval_and"),
    "logical_or": _logical("|", "interval_or"),
    "logical_xor": _logical("!=", "interval_xor"),
    "not": _not,
    "logical_not": lambda a: _not(_cast(a, BOOL)),
    "where": _where,
    "keep": lambda x, condition, value: _where(condition, x, value),
    "fill": lambda x, condition, value: _where(condition, value, x),
    **{name: functools.partial(_as_tensor, type_) for name, type_ in CASTS.items()},
}
