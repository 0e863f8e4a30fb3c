"""What finding gives to rewriting: a site that holds every fact needed, or a refusal that says why there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from topk_fx.score.language import Call, Expression

from .layout import Layout


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A candidate that stays dense: a snake_case reason, a sentence for the model's owner, and the node.

    `products` are the nodes whose common module owns it; the node alone if there are none.
    """

    reason: str
    detail: str
    node: fx.Node
    kind: str = "attention"
    products: tuple[fx.Node, ...] = ()


class Refuse(Exception):
    """Raised while a candidate is read; caught where the candidate was taken up, and turned into a Refusal."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of a product: a node, its axes put in `order` (None: a new axis of size 1), the last two swapped."""

    node: fx.Node
    order: tuple[int | None, ...] | None = None
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Term:
    """A tensor, or a number known only at run time, that a score step reads.

    `stage`: how many moves of the scores precede the step. `order`: which axis of the tensor stands in the place of
    each axis of the scores (None: a new axis of size 1); by default it broadcasts as it is. `shape`: what it is
    reshaped to first.
    """

    node: fx.Node
    stage: int
    negated: bool = False
    multiplier: Any = 1
    order: tuple[int | None, ...] | None = None
    shape: tuple[Any, ...] | None = None


def terms_of(argument: Any) -> Iterator[Term]:
    """The terms in an argument of a step, however deep in an expression."""
    if isinstance(argument, Term):
        yield argument
    elif isinstance(argument, Call):
        for inner in argument.arguments:
            yield from terms_of(inner)


@dataclasses.dataclass(frozen=True)
class ScoreStep:
    """A step of the score language whose expressions have terms for operands."""

    name: str
    arguments: tuple[Expression, ...] = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for argument in self.arguments for term in terms_of(argument))


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """softmax(score(scale * Q K^T)) V, whatever its spelling.

    The scores move along `score_layout` from the product to the softmax and along `weight_layout` from there to the
    product with V. The factors stand in the axes of their product: the query has D in the place of the key axis, the
    key D in that of the query axis, the value Dv in that of the query axis. `sizes` are nodes that read a symbolic size
    off the scores and are needed elsewhere. scores_shape is [*others, Lq, Lk]; it and the sizes after it are None where
    tracing recorded none. A scale of None is SDPA's default. `steps` and `sink` are on the way to the softmax and the
    stage of their terms counts the moves of `score_layout`; `weight_steps` come after it, on `weight_layout`. The op
    does the work of the nodes `replayed` again, which build masks and biases that others may share; `looked_through`
    are these and the repeats of K and V that it does not need.
    """

    anchor: fx.Node
    output: fx.Node
    query: Factor
    key: Factor
    value: Factor
    start_axes: tuple[int, int]
    score_layout: Layout
    weight_layout: Layout
    output_order: tuple[int, ...] | None
    scale: float | fx.Node | None
    scale_divides: bool
    steps: tuple[ScoreStep, ...]
    sink: Term | None
    weight_steps: tuple[ScoreStep, ...]
    dropout_p: float | fx.Node
    dropout_module: fx.Node | None
    zero_empty_rows: bool
    interior: tuple[fx.Node, ...]
    replayed: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    looked_through: tuple[fx.Node, ...]
    scores_shape: tuple[Any, ...] | None
    head_size: Any
    value_size: Any
    kind: str = "attention"


Units = range
"""Which of a layer's outputs, in which order."""


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A linear layer: its weight and bias as nodes, or the call of the module that owns them.

    The weight is [out, in], or [in, out] if `transposed`; `shape` is (out, in) of the whole weight. `units` are the
    rows that the site uses; None: all.
    """

    weight: fx.Node | None
    bias: fx.Node | None
    module_call: fx.Node | None
    shape: tuple[Any, ...] | None
    has_bias: bool
    transposed: bool = False
    units: Units | None = None

    @property
    def size(self) -> Any:
        """The number of outputs, None if it is not known."""
        if self.units is not None:
            return len(self.units)
        return None if self.shape is None else self.shape[0]


@dataclasses.dataclass(frozen=True)
class FFNSite:
    """down(dropout(act(up(x)))), or with a gate down(dropout(act(gate(x)) * up(x))).

    `products` are the nodes that multiply by the weights. `up` is None where the layer before the activation is the
    down projection of another FFN, whose op gives x: down(dropout(act(x))).
    """

    anchor: fx.Node
    output: fx.Node
    input: fx.Node
    up: LinearLayer | None
    gate: LinearLayer | None
    down: LinearLayer
    activation: str
    dropout_p: float | fx.Node
    dropout_module: fx.Node | None
    interior: tuple[fx.Node, ...]
    products: tuple[fx.Node, ...]
    tokens_shape: tuple[Any, ...] | None
    kind: str = "ffn"

    @property
    def hidden_size(self) -> Any:
        """F, None if it was not traced."""
        if self.up is not None:
            return self.up.size
        return None if self.down.shape is None else self.down.shape[1]


Site = AttentionSite | FFNSite
