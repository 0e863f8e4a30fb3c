"""Products with the sparse matrix of the kept keys, by the C++ in `sources/sparse.cpp`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import build
from .score_code import ELEMENT_TYPES


class TensorArgument(ctypes.Structure):
    """`Tensor` of rows.h: [B, H, L, columns] whose last axis is contiguous."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3))

    @classmethod
    def of(cls, x: Tensor) -> TensorArgument:
        return cls(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


class _SparseArguments(ctypes.Structure):
    """`SparseArguments` of sparse.cpp."""

    _fields_ = (
        *((name, TensorArgument) for name in ("rows", "table")),
        *((name, ctypes.c_void_p) for name in ("indices", "weights", "result")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "table_heads", "queries", "keys", "columns")),
        *((name, ctypes.c_int64) for name in ("kept", "threads")),
    )


def with_dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose last axis is contiguous."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


class CppProducts:
    """`aten.bags.SparseProducts` in C++; results have the dtype of the keys, dot products float32."""

    def __init__(self, indices: Tensor, keys: Tensor, dtype: torch.dtype) -> None:
        self.indices, self.keys = indices.contiguous(), with_dense_rows(keys)

    def dot_products(self, rows: Tensor) -> Tensor:
        products = self.indices.new_empty(self.indices.shape, dtype=torch.float32)
        self._run("dot_products", rows, products, None)
        return products

    def weighted_sum(self, weights: Tensor) -> Tensor:
        result = self.keys.new_empty(*self.indices.shape[:-1], self.keys.size(-1))
        self._run("weighted_sum", None, weights, result)
        return result

    def scatter_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        result = torch.empty(self.keys.shape, dtype=self.keys.dtype)
        self._run("scatter_rows", rows, weights, result)
        return result

    def _run(self, name: str, rows: Tensor | None, weights: Tensor, result: Tensor | None) -> None:
        batch, heads, queries, kept = self.indices.shape
        if 0 in (self.indices.numel(), self.keys.numel()):
            (weights if result is None else result).zero_()
            return
        rows = None if rows is None else with_dense_rows(rows.to(self.keys.dtype))
        weights = weights.contiguous()
        arguments = _SparseArguments(
            TensorArgument() if rows is None else TensorArgument.of(rows),
            TensorArgument.of(self.keys),
            *(self.indices.data_ptr(), weights.data_ptr(), None if result is None else result.data_ptr()),
            *(batch, heads, self.keys.size(1), queries, self.keys.size(2), self.keys.size(3), kept),
            torch.get_num_threads(),
        )
        run(name, self.keys.dtype, arguments)


def run(name: str, dtype: torch.dtype, arguments: ctypes.Structure) -> None:
    """Calls a function of sparse.cpp."""
    library = _library(ELEMENT_TYPES[dtype], build.current_instruction_set())
    if getattr(library, name)(ctypes.byref(arguments)):
        raise MemoryError("not enough memory for the sums of a gradient")


def prepare_products(*dtypes: torch.dtype) -> None:
    """Begins to build what products with keys and values of these dtypes will run."""
    for dtype in dtypes:
        build.start(*_source(ELEMENT_TYPES[dtype]))


def _source(element: str) -> tuple[str, tuple[str, ...]]:
    return '#include "sparse.cpp"\n', (f"ELEMENT={element}",)


@functools.cache
def _library(element: str, instructions: str) -> Any:
    library = build.load(*_source(element))
    for name in ("dot_products", "weighted_sum", "scatter_rows", "row_gradients"):
        getattr(library, name).restype = ctypes.c_int64
    return library
