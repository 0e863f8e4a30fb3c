"""The pass: finds, judges and rewrites every candidate of a graph and of its child graphs, and reports on each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from topk_fx.config import Keep, TopKConfig, kept_count
from topk_fx.errors import LoweringUnavailableError
from topk_fx.report import RewriteReport
from topk_fx.report import Site as SiteReport

from .attention import find_attention, find_sdpa
from .dialect import Kind, read
from .emit import EmitError
from .ffn import find_ffn
from .judge import ffn_keep, judge_attention, judge_ffn
from .rewrite import rewrite_attention, rewrite_ffn
from .sites import AttentionSite, FFNSite, Refusal
from .softmax import read_softmax
from .values import dtype_of, shape_of, value_of
from .where import module_path

_INDEX_BYTES = _WEIGHT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class TopKPass:
    """Rewrites attention and FFN sites of a GraphModule, in place, to top-k ops.

    `lowering` is the name of what will compute them where it can, `pays` tells whether it would beat the dense form on
    a device, and `lowering_of` names what will compute an attention with given arguments, and why it is no better one.
    """

    config: TopKConfig
    lowering: str
    pays: Callable[[str, tuple[Any, ...] | None, Keep, str | None], bool]
    lowering_of: Callable[[str, Sequence[Any]], tuple[str, str]] | None = None
    name: str = "topk"

    def __call__(self, module: fx.GraphModule, graph_name: str = "graph") -> RewriteReport:
        """Rewrites `module` and its child graphs; a graph without a rewritten site is not touched."""
        sites: list[SiteReport] = []
        for child in _graph_modules(module):
            reports = list(self._rewrite_graph(child.graph))
            if any(report.rewritten for report in reports):
                child.graph.lint()
                child.recompile()
            sites += reports
        return RewriteReport(tuple(sites), graph_name)

    def _rewrite_graph(self, graph: fx.Graph) -> Iterator[SiteReport]:
        order = _positions(graph)
        for node in list(graph.nodes):
            # A site's inputs may be the output of one before, so each is found when those before are rewritten.
            site = find_site(node, order) if node in order else None
            if site is None:
                continue
            if isinstance(site, Refusal):
                yield _refused(site)
                continue
            report = self._rewrite_attention(site) if isinstance(site, AttentionSite) else self._rewrite_ffn(site)
            if report.rewritten:
                order = _positions(graph)
            yield report

    def _rewrite_attention(self, site: AttentionSite) -> SiteReport:
        where = module_path(site.anchor)
        config = self.config.at(where)
        facts = _attention_facts(site, config.k)
        refusal = judge_attention(
            site, config, self.pays("attention", site.scores_shape, config.k, _device(site.output))
        )
        if refusal is not None:
            return _refused(refusal, "attention", where, **facts)
        try:
            op = rewrite_attention(site, config.k, self.config.lowering or "")
        except EmitError as error:
            return _refused(Refusal("not_expressible", str(error), site.anchor), "attention", where, **facts)
        facts["mask_bytes"] = _mask_bytes(op)
        name, detail = self._lowering_of(op)
        return SiteReport("attention", True, "", detail, where, op.name, k=str(config.k), lowering=name, **facts)

    def _lowering_of(self, op: fx.Node) -> tuple[str, str]:
        """What will compute an op, as far as tracing recorded its tensors; and why it is no better one."""
        arguments = fx.node.map_arg(op.args, value_of)
        if self.lowering_of is None or any(x is None for x in (*arguments[:3], *arguments[3])):
            return self.lowering, ""
        name, detail = self.lowering_of(self.lowering, arguments)
        if self.config.lowering not in (None, name):
            raise LoweringUnavailableError(f"lowering={self.config.lowering!r} cannot run: {detail}")
        return name, detail

    def _rewrite_ffn(self, site: FFNSite) -> SiteReport:
        where = module_path(site.anchor)
        config = self.config.at(where)
        facts = _ffn_facts(site, ffn_keep(config))
        refusal = judge_ffn(site, config, self.pays("ffn", site.tokens_shape, ffn_keep(config), _device(site.output)))
        if refusal is not None:
            return _refused(refusal, "ffn", where, **facts)
        try:
            op = rewrite_ffn(site, ffn_keep(config))
        except EmitError as error:
            return _refused(Refusal("not_expressible", str(error), site.anchor), "ffn", where, **facts)
        return SiteReport("ffn", True, "", "", where, op.name, k=str(ffn_keep(config)), lowering="aten", **facts)


def find_site(node: fx.Node, order: dict[fx.Node, int]) -> AttentionSite | FFNSite | Refusal | None:
    """The candidate that a node anchors: a softmax, an SDPA call, a down projection, or a call that hides one."""
    call = read(node)
    if call is None:
        return None
    match call.kind:
        case Kind.ATTENTION:
            return find_sdpa(call, order)
        case Kind.LINEAR:
            return find_ffn(call, order)
        case Kind.OPAQUE:
            return Refusal("opaque_call", f"{node.name} is one call: what happens inside is not in the graph", node)
    softmax = read_softmax(call)
    return None if softmax is None else find_attention(softmax, order)


def _device(node: fx.Node) -> str | None:
    """The type of the device on which a node's value is; None if tracing recorded none."""
    value = value_of(node)
    return value.device.type if isinstance(value, torch.Tensor) else None


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}


def _graph_modules(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The module and every GraphModule inside it, each once: bodies of checkpoints, of grad modes, of loops."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield child


def _refused(refusal: Refusal, kind: str | None = None, where: str | None = None, **facts: Any) -> SiteReport:
    call = read(refusal.node)
    kind = kind or ("ffn" if call is not None and call.kind == Kind.LINEAR else "attention")
    where = module_path(refusal.node) if where is None else where
    return SiteReport(kind, False, refusal.reason, refusal.detail, where, refusal.node.name, **facts)


def _attention_facts(site: AttentionSite, keep: Keep) -> dict[str, Any]:
    shape = site.scores_shape
    if shape is None:
        return {}
    shapes = {"scores": _text(shape), "D": str(site.head_size)}
    if site.value_size not in (None, site.head_size):
        shapes["Dv"] = str(site.value_size)
    dtype = dtype_of(site.output)
    itemsize = dtype.itemsize if dtype is not None else _WEIGHT_BYTES
    return {"shapes": shapes, **_sizes(shape[:-1], shape[-1], keep, itemsize)}


def _ffn_facts(site: FFNSite, keep: Keep) -> dict[str, Any]:
    if site.tokens_shape is None or site.up.shape is None:
        return {}
    dtype = dtype_of(site.output)
    itemsize = dtype.itemsize if dtype is not None else _WEIGHT_BYTES
    shapes = {"tokens": _text(site.tokens_shape), "hidden": str(site.up.shape[0])}
    return {"shapes": shapes, **_sizes(site.tokens_shape, site.up.shape[0], keep, itemsize)}


def _sizes(rows: tuple[Any, ...], total: Any, keep: Keep, itemsize: int) -> dict[str, int]:
    """Bytes of the dense matrix [rows, total], and of an index and a weight for each kept entry."""
    if not all(isinstance(size, int) for size in (*rows, total)):
        return {}
    kept = min(kept_count(keep, total), total)
    count = math.prod(rows)
    return {"dense_bytes": count * total * itemsize, "topk_bytes": count * kept * (_INDEX_BYTES + _WEIGHT_BYTES)}


def _mask_bytes(op: fx.Node) -> int | None:
    """Bytes of the operands that have both a query and a key axis."""
    total = 0
    operands: Any = op.args[3]
    for operand in operands:
        shape = shape_of(operand)
        if shape is None or not all(isinstance(size, int) for size in shape):
            return None
        if len(shape) >= 2 and shape[-1] > 1 and shape[-2] > 1:
            total += math.prod(shape) * value_of(operand).element_size()
    return total


def _text(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
