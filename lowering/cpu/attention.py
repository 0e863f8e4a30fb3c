"""Top-k attention by the C++ kernel in `sources/attention.cpp`: chooses and compiles it, and hands it the tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk_fx.errors import LoweringUnavailableError
from topk_fx.score import Name, Program, Score

from . import build, screening
from .affine import Affine, affine_of
from .differences import by_operands, evaluate_differences
from .key_copy import KeyCopy, KeyCopyArgument
from .score_code import ELEMENT_TYPES, NoCodeError, OperandKind, source_of
from .sparse import TensorArgument, prepare_products, with_dense_rows

_LONGEST = 2**30 - 1
"""Of queries and of keys: their positions are held in 32 bits, and so are the differences of two."""


class _Operand(ctypes.Structure):
    """`Operand` of score.h; whoever finds ranges of it says so there."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("size", ctypes.c_int64)),
        ("ranges", ctypes.c_void_p),
    )


class _Program(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("bound", "apply", "apply_terms", "apply_listed"))


class _Affine(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("only_masks", "operations")),
        *((name, ctypes.c_double) for name in ("factor", "cap", "highest_fill")),
    )

    @classmethod
    def of(cls, program: Affine) -> _Affine:
        return cls(*(getattr(program, name) for name, *_ in cls._fields_))


class _ForwardArguments(ctypes.Structure):
    """`ForwardArguments` of arguments.h."""

    _fields_ = (
        *((name, TensorArgument) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("output", "indices", "weights", "dropout_keep")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "value_heads", "queries", "keys")),
        *((name, ctypes.c_int64) for name in ("depth", "value_size", "kept")),
        *((name, ctypes.c_double) for name in ("scale", "dropout_factor")),
        *((name, ctypes.c_int64) for name in ("zero_empty_rows", "threads", "screens")),
        ("screening_counts", ctypes.c_void_p),
        ("affine", _Affine),
        ("copy", KeyCopyArgument),
        *((name, _Program) for name in ("before", "after")),
        ("operands", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("operand_count", "sink")),
    )


def why_not(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], score: str) -> str:
    """Why the C++ kernel cannot compute an attention of these tensors, or ""."""
    for name, x in (("query", query), ("value", value)):
        if x.device.type != "cpu":
            return f"{name} is on {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} has dtype {x.dtype}; there are kernels for float32, bfloat16 and float16"
    if any(isinstance(size, int) and size > _LONGEST for x in (query, key) for size in x.shape):
        return f"there are more than {_LONGEST} queries or keys"
    why = build.why_unavailable()
    return why or _why_no_code(score, _kinds(Score.parse(score), operands))


def prepare(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], score: str) -> None:
    """Begins to build what an attention of these tensors, which may be fake, will run; `why_not` has no objection."""
    function = Score.parse(score)
    build.start(*_kernel_source(ELEMENT_TYPES[query.dtype], ELEMENT_TYPES[value.dtype]))
    if function.before or function.after:
        before, names = _before(score, len(operands))
        # Of their dtypes alone: sizes may be symbolic, and must not be asked for.
        tables = [torch.empty(1, 1, 1, 2, dtype=x.dtype, device="meta") for x in operands]
        rows = torch.empty(1, 1, 2, 1, device="meta")
        differences = evaluate_differences(function.before, names, tables, rows, rows)
        build.start(source_of(before, function.after, _kinds(function, [*operands, *differences])))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        prepare_products(key.dtype, value.dtype)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    zero_empty_rows: bool,
    copy: KeyCopy | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, indices and weights as `aten.attention_forward`; the kept keys of a row ascend.

    Few queries are screened by a copy of the keys in int8, if one is given and the program only masks.

    Raises:
        LoweringUnavailableError: there is no kernel for these tensors or this score, or no compiler.
    """
    batch, heads, queries, depth = query.shape
    keys, value_size = value.shape[-2:]
    kept = min(k, keys)
    output = value.new_empty(batch, heads, queries, value_size)
    indices = query.new_empty(batch, heads, queries, kept, dtype=torch.int32)
    weights = query.new_empty(batch, heads, queries, kept, dtype=torch.float32)
    if 0 in (output.numel(), weights.numel()):
        return output.zero_(), indices.zero_(), weights.zero_()
    if copy is not None:
        copy.check(key, keys)
    function = Score.parse(score)
    differences = evaluate_differences(function.before, _before(score, len(operands))[1], operands, query, key)
    kinds = _kinds(function, [*operands, *differences])
    before, after = _programs(score, len(operands), kinds)
    affine = _affine(score, len(operands), kinds)
    query, key, value = map(with_dense_rows, (query, key, value))
    sink = -1 if function.sink is None else function.sink.index
    operands = [x.float() if number == sink else x for number, x in enumerate(operands)]
    described = (_Operand * len(kinds))(*map(_operand, operands), *(_diagonals(x, queries) for x in differences))
    keep = None if dropout_keep is None else dropout_keep.contiguous()
    arguments = _ForwardArguments(
        *(TensorArgument.of(x) for x in (query, key, value)),
        *(x.data_ptr() for x in (output, indices, weights)),
        None if keep is None else keep.data_ptr(),
        *(batch, heads, key.size(1), value.size(1), queries, keys, depth, value_size, kept),
        *(scale, 1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
        *(zero_empty_rows, torch.get_num_threads()),
        screening.is_used(query, key, kept, affine),
        screening.counts_address(),
        _Affine.of(affine) if affine else _Affine(),
        KeyCopyArgument.of(copy) if copy and screening.copy_is_used(affine) else KeyCopyArgument(),
        *(before, after, ctypes.addressof(described), len(described), sink),
    )
    if _kernel(ELEMENT_TYPES[query.dtype], ELEMENT_TYPES[value.dtype])(ctypes.byref(arguments)):
        raise MemoryError("not enough memory for the candidates of top-k attention")
    return output, indices, weights


def _operand(x: Tensor) -> _Operand:
    strides = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
    return _Operand(x.data_ptr(), (ctypes.c_int64 * 4)(*strides), x.size(-1))


def _diagonals(x: Tensor, queries: int) -> _Operand:
    """x [B|1, H|1, 1, Lq + Lk - 1], of each difference of positions, for each query and key."""
    operand = _operand(x)
    operand.data += (queries - 1) * x.element_size()
    operand.strides[2] = -1 if queries > 1 else 0
    return operand


def _kinds(function: Score, operands: Sequence[Tensor]) -> tuple[OperandKind, ...]:
    """What code depends on of the operands. Symbolic sizes count as unknown."""

    def along_keys(x: Tensor) -> str:
        if x.dim() == 0 or _is_one(x.size(-1)):
            return "one"
        return "dense" if _is_one(x.stride(-1)) else "strided"

    return tuple(OperandKind(x.dtype, "" if n in function.tables else along_keys(x)) for n, x in enumerate(operands))


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _kernel(query_type: str, value_type: str) -> Any:
    return _kernel_for(query_type, value_type, build.current_instruction_set())


def _kernel_source(query_type: str, value_type: str) -> tuple[str, tuple[str, ...]]:
    return '#include "attention.cpp"\n', (f"QUERY={query_type}", f"VALUE={value_type}")


@functools.cache
def _kernel_for(query_type: str, value_type: str, instructions: str) -> Any:
    library = build.load(*_kernel_source(query_type, value_type))
    function = library.attention_forward
    function.restype = ctypes.c_int64
    return function


@functools.lru_cache(maxsize=4096)
def _why_no_code(score: str, kinds: tuple[OperandKind, ...]) -> str:
    function = Score.parse(score)
    try:
        source_of(function.before, function.after, kinds)
    except NoCodeError as error:
        return f"the score function {score!r} has no C++: {error}"
    return ""


@functools.lru_cache(maxsize=4096)
def _before(score: str, operands: int) -> tuple[Program, tuple[Name, ...]]:
    return by_operands(Score.parse(score).before, operands)


def _programs(score: str, operands: int, kinds: tuple[OperandKind, ...]) -> tuple[_Program, _Program]:
    return _programs_for(score, operands, kinds, build.current_instruction_set())


@functools.lru_cache(maxsize=4096)
def _programs_for(
    score: str, operands: int, kinds: tuple[OperandKind, ...], instructions: str
) -> tuple[_Program, _Program]:
    function = Score.parse(score)
    if not function.before and not function.after:
        return _Program(), _Program()
    try:
        library = build.load(source_of(_before(score, operands)[0], function.after, kinds))
    except NoCodeError as error:
        raise LoweringUnavailableError(f"the score function {score!r} has no C++: {error}") from error

    def address(name: str) -> int | None:
        if name == "apply_terms" and not _affine(score, operands, kinds):
            return None
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value

    return (
        _Program(*map(address, ("bound", "apply", "apply_terms", "apply_listed"))) if function.before else _Program(),
        _Program(apply_listed=address("apply_kept")) if function.after else _Program(),
    )


@functools.lru_cache(maxsize=4096)
def _affine(score: str, operands: int, kinds: tuple[OperandKind, ...]) -> Affine | None:
    return affine_of(_before(score, operands)[0], kinds)
