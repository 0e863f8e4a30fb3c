"""A score program as a Triton function, generated for one program and one kind of operands.

    score(s, i, j, batch, head, queries, keys, operands, strides)

gives what the scores `s` at the positions i and j become; i and j are int32 and broadcast to s, so that the same
function serves a tile of scores, a row of candidates, and a row of kept keys. `operands` is a tuple of pointers,
`strides` one of four strides for each.

The dtype of every value is asked of the ATen operation itself, on meta tensors. A 16-bit float is held in float32 and
rounded after each operation, as ATen does; positions are int32 where their limit is known to allow it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import linecache
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from topk_fx.score import Call, Expression, Name, Operand, Program
from topk_fx.score.language import KEY_POSITION, QUERY_POSITION, SCORES
from topk_fx.score.operations import OPERATIONS


class NoCodeError(Exception):
    """There is no Triton for a program; the message says for what of it."""


@dataclasses.dataclass(frozen=True)
class OperandKind:
    """What code depends on of an operand: its dtype, and which of its axes have more than one element."""

    dtype: torch.dtype
    has_queries: bool
    has_keys: bool
    is_table: bool = False


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NARROW = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
_POSITION_LIMIT = 2**30
"""Queries and keys are fewer."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the generated code. `meta` stands for it where ATen is asked for a dtype; a number is its own."""

    code: str
    meta: Any
    limit: int = 2**62  # integers: an upper bound of the magnitude

    @property
    def dtype(self) -> torch.dtype:
        if isinstance(self.meta, torch.Tensor):
            return self.meta.dtype
        return (
            torch.bool if isinstance(self.meta, bool) else torch.int64 if isinstance(self.meta, int) else torch.float32
        )


@functools.lru_cache(maxsize=4096)
def why_no_code(program: Program, kinds: tuple[OperandKind, ...]) -> str:
    """Why there is no Triton for a program, or ""."""
    try:
        source_of(program, kinds)
    except NoCodeError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=4096)
def function_of(program: Program, kinds: tuple[OperandKind, ...]) -> Any:
    """The program as a function for `triton.jit` kernels to call; NoCodeError if an operation or dtype has none."""
    import triton
    import triton.language as tl

    from .kernels.scores import tanh

    source = source_of(program, kinds)
    # Triton tells functions by their names: two that a kernel calls must not share one.
    name = f"score_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    source = source.replace("def score(", f"def {name}(", 1)
    file = f"<topk_fx {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # Triton reads a kernel's text
    module = types.ModuleType("topk_fx_score")
    module.__dict__.update(tl=tl, tanh=tanh)
    exec(compile(source, file, "exec"), module.__dict__)
    return triton.jit(module.__dict__[name])


def source_of(program: Program, kinds: Sequence[OperandKind]) -> str:
    """The text of the function; NoCodeError if an operation or a dtype has no Triton."""
    lines = _Lines(program, kinds)
    body = "".join(f"    {line}\n" for line in lines.text)
    return f"def score(s, i, j, batch, head, queries, keys, operands, strides):\n{body}    return {lines.result}\n"


def without_causal_mask(program: Program) -> Program:
    """The program where every key is at or before its query: `le(j, i)` holds."""
    true = {
        Name(f"%{number}")
        for number, call in enumerate(program.operations)
        if (call.name, call.arguments)
        in (("le", (KEY_POSITION, QUERY_POSITION)), ("ge", (QUERY_POSITION, KEY_POSITION)))
    }
    same: dict[Expression, Expression] = {}
    for number, call in enumerate(program.operations):
        name, arguments = Name(f"%{number}"), [same.get(x, x) if isinstance(x, Name) else x for x in call.arguments]
        if call.name in ("and", "logical_and") and len(rest := [x for x in arguments if x not in true]) < 2:
            if rest:
                same[name] = rest[0]
            else:
                true.add(name)
        elif call.name == "keep" and arguments[1] in true:
            same[name] = arguments[0]

    def rename(x: Expression) -> Expression:
        return True if x in true else same.get(x, x) if isinstance(x, Name) else x

    operations = tuple(
        call if Name(f"%{n}") in true else Call(call.name, tuple(map(rename, call.arguments)))
        for n, call in enumerate(program.operations)
    )
    return Program(operations, same.get(program.result, program.result), program.score_dependent)


class _Lines:
    """The statements that compute a program's result."""

    def __init__(self, program: Program, kinds: Sequence[OperandKind]) -> None:
        self.program, self.kinds = program, kinds
        self.text: list[str] = []
        self.operands: dict[int, _Value] = {}
        position = torch.empty((1, 1, 1, 1), dtype=torch.int64, device="meta")
        self.values: dict[Expression, _Value] = {
            SCORES: _Value("s", torch.empty((1, 1, 1, 1), device="meta")),
            QUERY_POSITION: _Value("i", position, _POSITION_LIMIT),
            KEY_POSITION: _Value("j", position, _POSITION_LIMIT),
        }
        for number in sorted(_needed(program)):
            name = Name(f"%{number}")
            value = self._compute(program.operations[number], name in program.score_dependent)
            self.text.append(f"v{number} = {value.code}")
            self.values[name] = dataclasses.replace(value, code=f"v{number}")
        self.result = _cast(self.values[program.result], torch.float32).code

    def _compute(self, call: Call, is_score: bool) -> _Value:
        if call.name == "lookup":
            return self._lookup(call)
        arguments = [self._read(x) for x in call.arguments]
        if call.name == "mask":
            is_bool = arguments[1].dtype == torch.bool
            call = Call("keep", (*call.arguments, -math.inf)) if is_bool else Call("add", call.arguments)
            arguments += [_number(-math.inf)] if is_bool else []
        if is_score:
            arguments = [x if x.dtype == torch.bool else _cast(x, torch.float32) for x in arguments]
        rule = _RULES.get(call.name)
        if rule is None:
            raise NoCodeError(f"the operation {call.name}")
        try:
            meta = OPERATIONS[call.name].function(*(x.meta for x in arguments))
        except (TypeError, RuntimeError) as error:
            raise NoCodeError(f"the operation {call.name} on {[x.dtype for x in arguments]}") from error
        if not isinstance(meta, torch.Tensor):
            raise NoCodeError(f"the operation {call.name} on numbers alone")
        return rule(meta, *arguments)

    def _read(self, x: Expression) -> _Value:
        if isinstance(x, Name):
            return self.values[x]
        return self._operand(x.index) if isinstance(x, Operand) else _number(x)

    def _operand(self, index: int) -> _Value:
        if index not in self.operands:
            kind = self.kinds[index]
            terms, conditions = [f"operands[{index}]", *self._head_terms(index)], []
            for has_axis, position, axis, limit in (
                (kind.has_queries, "i", 2, "queries"),
                (kind.has_keys, "j", 3, "keys"),
            ):
                if has_axis:
                    terms.append(f"{position}.to(tl.int64) * strides[{index}][{axis}]")
                    conditions.append(f"({position} < {limit})")
            # The interpreter of triton 3.9 makes integers of a scalar & a block, of which only a comparison is a mask.
            where = f"({' & '.join(conditions)}) != 0" if len(conditions) > 1 else "".join(conditions)
            mask = f", mask={where}, other=0" if where else ""
            self.operands[index] = self._load(index, f"tl.load({' + '.join(terms)}{mask})", f"x{index}")
        return self.operands[index]

    def _lookup(self, call: Call) -> _Value:
        index, at = call.arguments[0].index, self._read(call.arguments[1])
        if at.dtype not in _INTEGERS:
            raise NoCodeError("a table read at an index that is no integer")
        size = f"strides[{index}][2]"  # of a table: its length, as it has no axis of queries
        position = f"tl.where({at.code} < 0, {at.code} + {size}, {at.code}).to(tl.int64) * strides[{index}][3]"
        terms = " + ".join((f"operands[{index}]", *self._head_terms(index), position))
        return self._load(
            index, f"tl.load({terms}, mask=((i < queries) & (j < keys)) != 0, other=0)", f"t{len(self.text)}"
        )

    def _head_terms(self, index: int) -> tuple[str, str]:
        return f"batch.to(tl.int64) * strides[{index}][0]", f"head.to(tl.int64) * strides[{index}][1]"

    def _load(self, index: int, code: str, name: str) -> _Value:
        dtype = self.kinds[index].dtype
        meta = torch.empty((1, 1, 1, 1), dtype=dtype, device="meta")
        if dtype == torch.bool:
            code = f"({code} != 0)"
        elif dtype in _FLOATS:
            code = f"{code}.to(tl.float32)"
        elif dtype not in _INTEGERS:
            raise NoCodeError(f"operand ${index} has dtype {dtype}")
        elif dtype != torch.int64:
            code = f"{code}.to(tl.int32)"
        self.text.append(f"{name} = {code}")
        return _Value(name, meta, 2**62 if dtype == torch.int64 else 2 ** (8 * dtype.itemsize))


def _needed(program: Program) -> set[int]:
    found: set[int] = set()
    pending = [program.result]
    while pending:
        name = pending.pop()
        if name.text.startswith("%") and int(name.text[1:]) not in found:
            found.add(int(name.text[1:]))
            pending += [x for x in program.operations[int(name.text[1:])].arguments if isinstance(x, Name)]
    return found


# --- operations


def _number(x: bool | int | float) -> _Value:
    if isinstance(x, bool):
        return _Value("(i == i)" if x else "(i != i)", x)
    if isinstance(x, int):
        if abs(x) >= 2**62:
            raise NoCodeError(f"the number {x}")
        return _Value(repr(x), x, abs(x) + 1)
    return _Value(repr(x) if math.isfinite(x) else f'float("{x}")', x)


def _cast(x: _Value, dtype: torch.dtype) -> _Value:
    """x in another dtype; numbers stay numbers, in the code too."""
    if not isinstance(x.meta, torch.Tensor):
        if x.dtype == dtype or isinstance(x.meta, bool):
            return x
        number = float(x.meta) if dtype in _FLOATS else x.meta
        return _number(number)
    if x.dtype == dtype:
        return x
    meta = x.meta.to(dtype)
    if dtype == torch.bool:
        return _Value(f"({x.code} != 0)", meta)
    if dtype in _FLOATS:
        code = x.code if x.dtype in _FLOATS else f"{x.code}.to(tl.float32)"
        return _rounded(_Value(code, meta))
    if dtype not in (torch.int32, torch.int64):
        raise NoCodeError(f"a cast to {dtype}")
    if x.dtype in _FLOATS:
        return _Value(f"{x.code}.to({'tl.int64' if dtype == torch.int64 else 'tl.int32'})", meta)
    return _Value(f"{x.code}.to(tl.int32)", meta, 2) if x.dtype == torch.bool else _Value(x.code, meta, x.limit)


def _rounded(x: _Value) -> _Value:
    """A value computed in float32, rounded to its dtype if that has 16 bits."""
    if x.dtype not in _NARROW:
        return x
    return dataclasses.replace(x, code=f"({x.code}).to({_NARROW[x.dtype]}).to(tl.float32)")


def _computed(template: str, meta: torch.Tensor, arguments: Sequence[_Value], limit: int = 2**62) -> _Value:
    """An operation that ATen computes in the dtype of its result."""
    if meta.dtype in _FLOATS:
        return _rounded(_Value(template.format(*(_cast(x, torch.float32).code for x in arguments)), meta))
    if meta.dtype not in _INTEGERS or any(x.dtype in _FLOATS for x in arguments):
        raise NoCodeError(f"an operation whose result has dtype {meta.dtype}")
    if limit < 2**31:
        return _Value(template.format(*(x.code for x in arguments)), meta, limit)
    wide = (f"{x.code}.to(tl.int64)" if isinstance(x.meta, torch.Tensor) else x.code for x in arguments)
    return _Value(template.format(*wide), meta, limit)


def _arithmetic(template: str, limit: Callable[[int, int], int]) -> Callable[..., _Value]:
    return lambda meta, a, b: _computed(template, meta, (a, b), min(limit(a.limit, b.limit), 2**62))


def _function(template: str) -> Callable[..., _Value]:
    """A function of floats."""

    def rule(meta: torch.Tensor, *arguments: _Value) -> _Value:
        if meta.dtype not in _FLOATS:
            raise NoCodeError(f"a function of {meta.dtype}")
        return _computed(template, meta, arguments)

    return rule


def _sign_change(template: str) -> Callable[..., _Value]:
    return lambda meta, x: _computed(template, meta, (x,), x.limit)


def _integer_division(template: str) -> Callable[..., _Value]:
    def rule(meta: torch.Tensor, a: _Value, b: _Value) -> _Value:
        if meta.dtype not in _INTEGERS or not isinstance(b.meta, int) or b.meta <= 0:
            raise NoCodeError("a division that is not of integers by a positive number")
        return _computed(template, meta, (a, b), max(a.limit, b.limit))

    return rule


def _comparison(operator: str) -> Callable[..., _Value]:
    def rule(meta: torch.Tensor, a: _Value, b: _Value) -> _Value:
        dtype = torch.result_type(a.meta, b.meta)
        if dtype in _FLOATS:
            a, b = _cast(a, dtype), _cast(b, dtype)
        return _Value(f"({a.code} {operator} {b.code})", meta)

    return rule


def _bits(operator: str, as_bool: bool = False) -> Callable[..., _Value]:
    def rule(meta: torch.Tensor, a: _Value, b: _Value) -> _Value:
        if as_bool:
            a, b = _cast(a, torch.bool), _cast(b, torch.bool)
        if not a.dtype == b.dtype == torch.bool:
            raise NoCodeError("bits of integers")
        return _Value(f"({a.code} {operator} {b.code})", meta)

    return rule


def _not(meta: torch.Tensor, a: _Value) -> _Value:
    if a.dtype != torch.bool:
        raise NoCodeError("bits of integers")
    return _Value(f"({a.code} == 0)", meta)


def _where(meta: torch.Tensor, condition: _Value, a: _Value, b: _Value) -> _Value:
    if condition.dtype != torch.bool:
        raise NoCodeError("a condition that is no boolean")
    if meta.dtype == torch.bool:
        return _Value(f"({condition.code} & {a.code}) | (({condition.code} == 0) & {b.code})", meta)
    x, y = (_cast(v, torch.float32 if meta.dtype in _FLOATS else meta.dtype) for v in (a, b))
    return _rounded(_Value(f"tl.where({condition.code}, {x.code}, {y.code})", meta, max(x.limit, y.limit)))


def _power(meta: torch.Tensor, a: _Value, b: _Value) -> _Value:
    if b.meta not in (2, 2.0) or meta.dtype not in _FLOATS:
        raise NoCodeError("a power other than a square")
    return _computed("({0} * {0})", meta, (a,))


def _clamp(meta: torch.Tensor, x: _Value, low: _Value, high: _Value) -> _Value:
    return _computed(_MINIMUM.format(_MAXIMUM, "{2}"), meta, (x, low, high), max(x.limit, low.limit, high.limit))


def _to(dtype: torch.dtype) -> Callable[..., _Value]:
    return lambda meta, x: dataclasses.replace(_cast(x, dtype), meta=meta)


_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_SIGMOID = "(1.0 / (1.0 + tl.exp(-({0}))))"

_RULES: Mapping[str, Callable[..., _Value]] = {
    "add": _arithmetic("({0} + {1})", lambda a, b: a + b),
    "sub": _arithmetic("({0} - {1})", lambda a, b: a + b),
    "mul": _arithmetic("({0} * {1})", lambda a, b: a * b),
    "maximum": _arithmetic(_MAXIMUM, max),
    "minimum": _arithmetic(_MINIMUM, max),
    "clamp": _clamp,
    "div": _function("({0} / {1})"),
    "neg": _sign_change("(-{0})"),
    "abs": _sign_change("tl.abs({0})"),
    "floor_div": _integer_division("(({0} - (({0} % {1} + {1}) % {1})) // {1})"),
    "trunc_div": _integer_division("({0} // {1})"),
    "remainder": _integer_division("(({0} % {1} + {1}) % {1})"),
    "pow": _power,
    **{
        name: _function(template)
        for name, template in {
            "square": "({0} * {0})",
            "reciprocal": "(1.0 / {0})",
            "sqrt": "tl.sqrt_rn({0})",
            "rsqrt": "(1.0 / tl.sqrt_rn({0}))",
            "floor": "tl.floor({0})",
            "ceil": "tl.ceil({0})",
            "exp": "tl.exp({0})",
            "exp2": "tl.exp2({0})",
            "log": "tl.log({0})",
            "log2": "tl.log2({0})",
            "tanh": "tanh({0})",
            "sin": "tl.sin({0})",
            "cos": "tl.cos({0})",
            "erf": "tl.erf({0})",
            "sigmoid": _SIGMOID,
            "silu": f"({{0}} * {_SIGMOID})",
            "relu": "tl.where({0} < 0.0, 0.0, {0})",
            "softsign": "({0} / (1.0 + tl.abs({0})))",
            "leaky_relu": "tl.where({0} > 0.0, {0}, {0} * {1})",
        }.items()
    },
    **{
        name: _comparison(operator)
        for name, operator in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    },
    **{name: _bits(operator) for name, operator in {"and": "&", "or": "|", "xor": "!="}.items()},
    **{f"logical_{name}": _bits(sign, as_bool=True) for name, sign in {"and": "&", "or": "|", "xor": "!="}.items()},
    "not": _not,
    "logical_not": lambda meta, a: _not(meta, _cast(a, torch.bool)),
    "where": _where,
    "keep": lambda meta, x, condition, value: _where(meta, condition, x, value),
    "fill": lambda meta, x, condition, value: _where(meta, condition, value, x),
    **{str(d).removeprefix("torch."): _to(d) for d in (torch.bool, torch.int32, torch.int64, *_FLOATS)},
}
