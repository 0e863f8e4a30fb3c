"""How a call moves axes: permutations, views, and the labels of an einsum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .dialect import Call, Kind
from .layout import Layout, Permute
from .sites import Factor, Refuse
from .values import shape_of

Shapes = tuple[tuple[Any, ...], tuple[Any, ...]]


def read_move(call: Call) -> Permute | Shapes | None:
    """What a call does to the axes: a permutation, a view as (shape before, shape after), or None if nothing.

    Raises:
        Refuse: shapes that tracing did not record, or a call that is not a move (indexing, a real expansion).
    """
    source = call["input"]
    before, after = shape_of(source), shape_of(call.node)
    if call.kind == Kind.PERMUTE:
        dims = call["dims"]
        if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
            dims = dims[0]
        if not all(isinstance(d, int) for d in dims):
            raise Refuse("axes_not_followed", f"{call.node.name} permutes by numbers known only at run time")
        return Permute(tuple(d % len(dims) for d in dims))
    if before is None or after is None:
        raise Refuse("shape_unknown", f"the shape of {call.node.name} was not traced")
    if call.kind in (Kind.TRANSPOSE, Kind.MATRIX_TRANSPOSE):
        first, second = (-2, -1) if call.kind == Kind.MATRIX_TRANSPOSE else (call.get("dim0", 0), call.get("dim1", 1))
        if not isinstance(first, int) or not isinstance(second, int):
            raise Refuse("axes_not_followed", f"{call.node.name} transposes by numbers known only at run time")
        order = list(range(len(before)))
        order[first], order[second] = order[second], order[first]
        return Permute(tuple(order))
    if call.kind == Kind.GETITEM and not _only_inserts_axes(call.get("index")):
        raise Refuse("scores_sliced", f"{call.node.name} takes a part of the scores")
    if same_shape(before, after):
        return None
    if call.kind == Kind.EXPAND:
        raise Refuse("mask_broadcasts_scores", f"{call.node.name} expands the scores from {before} to {after}")
    return before, after


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are certainly the same."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _only_inserts_axes(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)


@dataclasses.dataclass(frozen=True)
class EinsumAxes:
    """An einsum of two factors, each axis with its letter."""

    name: str
    factors: tuple[tuple[fx.Node, str], tuple[fx.Node, str]]
    output: str

    @classmethod
    def of(cls, call: Call) -> EinsumAxes:
        """The axes of an einsum with two factors and explicit letters; Refuse if it has anything else."""
        equation, operands = call["equation"], call["operands"]
        if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(x, fx.Node) for x in operands):
            raise Refuse("einsum_not_a_product", f"{call.node.name} is not an einsum of two tensors")
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        terms = inputs.split(",")
        if not arrow:
            letters = [c for term in terms for c in term if c != "."]
            output = ("..." if "..." in inputs else "") + "".join(sorted(c for c in letters if letters.count(c) == 1))
        if "..." in equation:
            terms, output = _spell_out_ellipsis(call, terms, operands, output)
        if any(len(set(term)) != len(term) for term in (*terms, output)):
            raise Refuse("einsum_not_a_product", f"{call.node.name} takes a diagonal: {equation}")
        return cls(call.node.name, ((operands[0], terms[0]), (operands[1], terms[1])), output)

    def scores(self, key_axis: int, softmax: str) -> tuple[Factor, Factor, tuple[Permute, ...]]:
        """Query [*lead, i, d], key [*lead, d, j] of scores whose axis j is `key_axis`, and the move to the output."""
        j = self.output[key_axis]
        with_j = [factor for factor in self.factors if j in factor[1]]
        if len(with_j) != 1:
            raise Refuse("softmax_not_over_keys", f"{softmax} runs over an axis that both factors of {self.name} share")
        (key, key_letters), (query, query_letters) = (
            with_j[0],
            self.factors[1] if with_j[0] is self.factors[0] else self.factors[0],
        )
        summed = [c for c in key_letters if c in query_letters and c not in self.output]
        lost = [c for c in query_letters + key_letters if c not in self.output and c not in summed]
        if len(summed) != 1 or lost:
            raise Refuse("einsum_not_a_product", f"{self.name} does not sum over exactly one shared axis")
        queries = [c for c in self.output if c in query_letters and c not in key_letters]
        if not queries:
            raise Refuse("not_attention", f"{self.name} has no query axis")
        i = queries[-1]
        lead = [c for c in self.output if c not in (i, j)]
        standard = [*lead, i, j]
        moves = () if standard == list(self.output) else (Permute(tuple(standard.index(c) for c in self.output)),)
        return (
            Factor(query, _order(query_letters, [*lead, i, summed[0]])),
            Factor(key, _order(key_letters, [*lead, summed[0], j])),
            moves,
        )

    def value(self, weights: fx.Node, layout: Layout, name: str) -> tuple[Factor, tuple[int, ...] | None]:
        """V in the axes of the weights with Dv in the place of i, and the order of the output's axes in those."""
        if self.factors[0][0] is weights and self.factors[1][0] is weights:
            raise Refuse("not_attention", f"{name} multiplies the probabilities with themselves")
        mine = 0 if self.factors[0][0] is weights else 1
        letters, (value, value_letters) = self.factors[mine][1], self.factors[1 - mine]
        rank = len(letters)
        i, j = (letters[axis % rank] for axis in layout.axes)
        if i in value_letters and i not in self.output:
            raise softmax_over_queries(name)
        if j in self.output or j not in value_letters:
            raise Refuse("product_not_over_keys", f"{name} does not sum over the axis of the softmax")
        own = [c for c in value_letters if c not in letters]
        if (
            len(own) != 1
            or i in value_letters
            or sorted(self.output) != sorted([*(c for c in letters if c != j), own[0]])
        ):
            raise Refuse("einsum_not_a_product", f"{name} is not a plain product of probabilities and values")
        order = _order(value_letters, [own[0] if c == i else c for c in letters])
        result = [own[0] if c == j else c for c in letters]
        output_order = tuple(result.index(c) for c in self.output)
        return Factor(value, order), output_order


def softmax_over_queries(product: str) -> Refuse:
    """Seen from the product with V, which sums over the keys."""
    return Refuse("softmax_not_over_keys", f"{product} sums over the keys, and the softmax runs over the queries")


def _order(letters: str, wanted: list[str]) -> tuple[int | None, ...]:
    return tuple(letters.index(c) if c in letters else None for c in wanted)


def _spell_out_ellipsis(call: Call, terms: list[str], operands: list[Any], output: str) -> tuple[list[str], str]:
    """Terms in which letters stand for the axes of '...'."""
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in "".join(terms)]
    widths = []
    for term, operand in zip(terms, operands, strict=True):
        shape = shape_of(operand)
        if "..." in term and shape is None:
            raise Refuse("shape_unknown", f"the rank of {operand.name} in {call.node.name} was not traced")
        widths.append(len(shape) - len(term.replace("...", "")) if "..." in term and shape is not None else 0)
    names = "".join(free[: max(widths)])
    spelled = [term.replace("...", names[len(names) - width :]) for term, width in zip(terms, widths, strict=True)]
    return spelled, output.replace("...", names)
