"""Adds nodes to a graph, each with the value that tracing would have recorded for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.compat import unwrapped

from .values import rank_of, shape_of, value_of

aten = torch.ops.aten


class EmitError(Exception):
    """A node cannot be written down; the message says why."""


class Emitter:
    """Emits ATen calls before one node of a graph, simplifying layout changes as it goes.

    The nodes carry fake values where the graph has any, and the module path and stack trace of the node they stand for.
    `undo` takes back everything emitted.
    """

    def __init__(self, before: fx.Node) -> None:
        self.graph = before.graph
        self.before = before
        self.emitted: list[fx.Node] = []
        self.told_ranks: dict[fx.Node, int] = {}
        self.value_key, self.fake_mode = _fake_mode(before.graph)

    def call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A call_function node; its fake value is computed from those of its arguments."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self._register(node)
        if self.value_key is not None:
            fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), self.fake_value)
            with _unguarded(self.fake_mode), torch.no_grad(), _no_autocast():
                node.meta[self.value_key] = target(*fake_args, **fake_kwargs)
        return node

    def copy(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A call of a graph of make_fx, on the copies of its arguments, with the value recorded for it."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        with self.graph.inserting_before(self.before):
            copy = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        self._register(copy)
        if self.value_key is not None and "val" in node.meta:
            copy.meta[self.value_key] = node.meta["val"]
        return copy

    def _register(self, node: fx.Node) -> None:
        self.emitted.append(node)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]

    def fake_value(self, node: fx.Node) -> Any:
        """What was recorded for a node, as a value of the graph's fake mode."""
        value = value_of(node)
        if self.fake_mode is None or not isinstance(value, torch.Tensor):
            return value
        value = unwrapped(value)
        if not isinstance(value, FakeTensor):
            return self.fake_mode.from_tensor(value, static_shapes=True)
        if value.fake_mode is not self.fake_mode:  # make_fx on real tensors has a mode for each value
            with self.fake_mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return value

    def undo(self) -> None:
        for node in reversed(self.emitted):
            self.graph.erase_node(node)
        self.emitted.clear()

    def shape(self, x: fx.Node) -> tuple[Any, ...]:
        shape = shape_of(x)
        if shape is None:
            raise EmitError(f"the shape of {x.name} is not known")
        return shape

    def tell_rank(self, x: fx.Node, rank: int) -> fx.Node:
        """Notes a rank that the way x is used tells, for graphs in which tracing recorded none."""
        self.told_ranks[x] = rank
        return x

    def pad(self, x: fx.Node, rank: int) -> fx.Node:
        """x with leading axes of size 1, up to `rank`."""
        own = rank_of(x)
        own = self.told_ranks.get(x) if own is None else own
        if own is None:
            raise EmitError(f"the rank of {x.name} is not known")
        for _ in range(rank - own):
            x = self.call(aten.unsqueeze.default, x, 0)
        return self.tell_rank(x, rank)

    def permute(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        dims = list(dims)
        if dims == sorted(dims):
            return x
        if x in self.emitted and x.target is aten.permute.default:
            source, inner = cast(tuple[fx.Node, list[int]], x.args)
            return self.permute(source, [inner[d] for d in dims])
        return self.call(aten.permute.default, x, dims)

    def transpose_last(self, x: fx.Node) -> fx.Node:
        if x in self.emitted and x.target is aten.transpose.int and x.args[1:] == (-2, -1):
            return x.args[0]  # type: ignore[return-value]
        return self.call(aten.transpose.int, x, -2, -1)

    def reshape(self, x: fx.Node, shape: Sequence[Any]) -> fx.Node:
        if self._is_known_shape(x, shape):
            return x
        return self.call(aten.reshape.default, x, self._sizes(x, shape, allow_inferred=True))

    def expand(self, x: fx.Node, shape: Sequence[Any]) -> fx.Node:
        if self._is_known_shape(x, shape):
            return x
        return self.call(aten.expand.default, x, self._sizes(x, shape, allow_inferred=False))

    def _is_known_shape(self, x: fx.Node, shape: Sequence[Any]) -> bool:
        own = self.shape(x)
        return len(own) == len(shape) and all(statically_known_true(a == b) for a, b in zip(own, shape, strict=True))

    def _sizes(self, x: fx.Node, shape: Sequence[Any], allow_inferred: bool) -> list[Any]:
        """`shape` as arguments: numbers, and nodes for symbolic sizes; one that has no node may be inferred."""
        sizes: list[Any] = []
        for size in shape:
            if isinstance(size, int):
                sizes.append(size)
                continue
            node = self.size_node(size, x)
            if node is None and allow_inferred and -1 not in sizes:
                sizes.append(-1)
            elif node is None:
                raise EmitError(f"no node holds the symbolic size {size}")
            else:
                sizes.append(node)
        return sizes

    def size_node(self, size: Any, near: fx.Node, avoid: Sequence[fx.Node] = ()) -> fx.Node | None:
        """A node whose value is the symbolic `size`: a size of `near`, or any number before here and not in `avoid`."""
        for axis, own in enumerate(self.shape(near)):
            if _is_symbol(own, size):
                return self.call(aten.sym_size.int, near, axis)
        for node in self.graph.nodes:
            if node is self.before:
                break
            if node in avoid or any(x in avoid for x in node.all_input_nodes):
                continue
            value = value_of(node)
            if _is_symbol(value, size):
                return node
            if isinstance(value, torch.Tensor) and node.op == "placeholder":
                for axis, own in enumerate(value.shape):
                    if _is_symbol(own, size):
                        return self.call(aten.sym_size.int, node, axis)
        return None


def _is_symbol(value: Any, size: Any) -> bool:
    """Whether a value is the same symbolic number as `size`."""
    return isinstance(value, torch.SymInt) and bool(value.node.expr == size.node.expr)


def _fake_mode(graph: fx.Graph) -> tuple[str | None, FakeTensorMode | None]:
    """Under which key the graph's nodes keep their values, and the fake mode of these."""
    for node in graph.nodes:
        for key in ("val", "example_value"):
            value = node.meta.get(key)
            if isinstance(value, FakeTensor):
                return key, value.fake_mode
    return None, None


@contextlib.contextmanager
def _unguarded(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """Enters a fake mode in which nothing is assumed of symbolic sizes for good.

    An op checks that sizes agree. What the dense form leaves to run time, the pass must not settle for a whole program;
    whoever traces the rewritten graph makes the guards that it needs.
    """
    shape_env = None if fake_mode is None else fake_mode.shape_env
    with fake_mode or contextlib.nullcontext(), shape_env.suppress_guards() if shape_env else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _no_autocast() -> Any:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
