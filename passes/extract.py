"""Takes a site out of its graph: a small graph of the dense form alone, with the same site in it."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import fx

from .sites import AttentionSite, FFNSite
from .values import attribute_of, value_of

Site = TypeVar("Site", AttentionSite, FFNSite)


@dataclasses.dataclass(frozen=True)
class Extract:
    """
    Attributes:
        graph: from the inputs of a site to its output, and then the symbolic sizes that are read off its scores.
        site: the site as a site of `graph`.
        inputs: the placeholders of `graph`, and for each the node of the model's graph that it stands for.
    """

    graph: fx.Graph
    site: Any
    inputs: dict[fx.Node, fx.Node]


def extract(site: AttentionSite | FFNSite) -> Extract:
    """A copy of every node between what a site's op would read and the site's output.

    To these belong the nodes that finding looked through or read by meaning, so that what was read is proven too, and
    constants. Every other input of theirs becomes a placeholder.
    """
    own = _nodes_of_site(site)
    reads = inputs_of(site) - own
    downstream, constant = _flow(site.output.graph, reads)
    inside = set(own)
    pending = list(own)
    outside: set[fx.Node] = set(reads)
    while pending:
        for x in pending.pop().all_input_nodes:
            if x in inside or x in outside:
                continue
            is_computed = x not in reads and (x in downstream or x in constant)
            (inside if is_computed else outside).add(x)
            if is_computed:
                pending.append(x)
    if any(_is_symbolic(value_of(node)) for node in inside | outside):
        outside |= _size_sources(site.output.graph, downstream | inside)
    return _copy(site, inside, outside)


def inputs_of(site: AttentionSite | FFNSite) -> set[fx.Node]:
    """The nodes that a site's op would read."""
    found: list[Any]
    if isinstance(site, FFNSite):
        layers = [layer for layer in (site.up, site.gate, site.down) if layer is not None]
        found = [site.input, *(x for layer in layers for x in (layer.weight, layer.bias))]
    else:
        steps = (*site.steps, *site.weight_steps)
        found = [site.query.node, site.key.node, site.value.node, site.scale]
        found += [term.node for step in steps for term in step.terms]
        found += [] if site.sink is None else [site.sink.node]
    return {x for x in found if isinstance(x, fx.Node)}


def _nodes_of_site(site: AttentionSite | FFNSite) -> set[fx.Node]:
    own = {*site.interior, site.output}
    return own if isinstance(site, FFNSite) else own | {*site.sizes, *site.looked_through}


def _flow(graph: fx.Graph, reads: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes computed from some of `reads`, and those that are computed from numbers alone."""
    downstream: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        inputs = node.all_input_nodes
        if any(x in downstream or x in reads for x in inputs):
            downstream.add(node)
        elif all(x in constant or isinstance(value_of(x), torch.SymInt) for x in inputs):
            constant.add(node)
    return downstream, constant


def _size_sources(graph: fx.Graph, excluded: set[fx.Node]) -> set[fx.Node]:
    """The nodes that a symbolic size may be read from: symbolic numbers, and inputs of the model."""
    return {
        node
        for node in graph.nodes
        if node not in excluded
        and (isinstance(value_of(node), torch.SymInt) or (node.op == "placeholder" and _is_symbolic(value_of(node))))
    }


def _is_symbolic(value: Any) -> bool:
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _copy(site: Any, inside: set[fx.Node], outside: set[fx.Node]) -> Extract:
    graph = fx.Graph()
    graph.owning_module = site.output.graph.owning_module
    copies: dict[fx.Node, fx.Node] = {}
    inputs: dict[fx.Node, fx.Node] = {}
    order = {node: position for position, node in enumerate(site.output.graph.nodes)}
    for node in _by_first_use(inside, outside, order):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
        if node.op == "get_attr" and value_of(copies[node]) is None:
            copies[node].meta["example_value"] = attribute_of(node)
        inputs[copies[node]] = node
    for node in sorted(inside, key=order.__getitem__):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    mapped = _mapped(site, copies)
    graph.output((mapped.output, *getattr(mapped, "sizes", ())))
    return Extract(graph, mapped, inputs)


def _by_first_use(inside: set[fx.Node], outside: set[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    """The inputs in the order in which a site reads them, so that equal sites become equal graphs."""
    used = [x for node in sorted(inside, key=order.__getitem__) for x in node.all_input_nodes if x in outside]
    return list(dict.fromkeys([*used, *sorted(outside, key=order.__getitem__)]))


def _mapped(x: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    """A site, or a part of one, with copies in the place of nodes."""
    if isinstance(x, fx.Node):
        return copies.get(x, x)
    if isinstance(x, tuple):
        return tuple(_mapped(item, copies) for item in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x) if field.init}
        return dataclasses.replace(x, **{name: _mapped(value, copies) for name, value in fields.items()})
    return x
