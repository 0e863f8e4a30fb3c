"""The pass: finds, judges and rewrites every candidate of a graph and of its child graphs, and reports on each."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.compat import is_distributed, is_mapped, is_wrapped
from topk_fx.config import Keep, TopKConfig, kept_count
from topk_fx.errors import InternalErrorWarning, LoweringUnavailableError, ValidationError
from topk_fx.report import RewriteReport
from topk_fx.report import Site as SiteReport

from .attention import find_attention, find_sdpa
from .dialect import Kind, read
from .emit import EmitError
from .experts import find_experts
from .ffn import find_ffn
from .judge import ffn_keep, judge_attention, judge_ffn
from .open_calls import Autocasts, OpenError, autocasts_of_bodies, can_open, open_call, why_closed
from .rewrite import rewrite_attention, rewrite_ffn
from .shared_scores import split_scores
from .sites import AttentionSite, FFNSite, Refusal
from .softmax import read_softmax
from .trace import Order
from .unread_softmax import refuse_unread_softmax
from .validate import Validator
from .values import attribute_of, dtype_of, shape_of, value_of
from .where import module_path, owner_path

_INDEX_BYTES = _WEIGHT_BYTES = 4

_USED_ELSEWHERE = {"probabilities_used_elsewhere", "scores_used_elsewhere"}
"""Reasons of an attention, which torch 2.11 gives those in a torch.autograd.Function: its graph returns all values."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one run of the pass over a graph and its child graphs remembers.

    `own_gradients` are the bodies of torch.autograd.Function, whose gradient the model's owner wrote.
    """

    validator: Validator | None
    own_gradients: frozenset[fx.Graph] = frozenset()
    sites_at: Counter[str] = dataclasses.field(default_factory=Counter)

    def number(self, where: str) -> tuple[str, int]:
        """A path, and the number of the next site there."""
        self.sites_at[where] += 1
        return where, self.sites_at[where] - 1


@dataclasses.dataclass(frozen=True)
class TopKPass:
    """Rewrites attention and FFN sites of a GraphModule, in place, to top-k ops.

    `lowering` is the name of what is to compute them, "" if their tensors decide; `pays` tells whether it would beat
    the dense form on a device, and `lowering_of` and `ffn_lowering_of` name what will compute an attention and an FFN
    with given arguments, and why it is no better one.
    """

    config: TopKConfig
    lowering: str
    pays: Callable[[str, tuple[Any, ...] | None, Keep, str | None], bool]
    lowering_of: Callable[[str, Sequence[Any]], tuple[str, str]] | None = None
    ffn_lowering_of: Callable[[str, Sequence[Any]], tuple[str, str]] | None = None
    name: str = "topk"

    def __call__(self, module: fx.GraphModule, graph_name: str = "graph") -> RewriteReport:
        """Rewrites `module` and its child graphs; a graph without a rewritten site is not touched."""
        sites: list[SiteReport] = []
        autocasts = autocasts_of_bodies(module)
        run = _Run(Validator() if self.config.validate else None, _bodies_with_own_gradient(module))
        for child in _graph_modules(module):
            reports = list(self._rewrite_graph(child.graph, autocasts.get(child, ()), run))
            if any(report.rewritten for report in reports):
                child.graph.lint()
                child.recompile()
            sites += reports
        return RewriteReport(
            tuple(sites), graph_name, self.config.unmatched((site.where, site.number) for site in sites)
        )

    def _rewrite_graph(self, graph: fx.Graph, autocasts: Autocasts, run: _Run) -> Iterator[SiteReport]:
        order = _positions(graph)
        for node in list(graph.nodes):
            # A site's inputs may be the output of one before, so each is found when those before are rewritten.
            if node not in order:
                continue
            if can_open(node):
                reports = list(self._rewrite_inside(node, autocasts, run))
            else:
                reports = list(self._rewrite_node(node, order, run))
            if any(report.rewritten for report in reports):
                order = _positions(graph)
            yield from reports

    def _rewrite_node(self, node: fx.Node, order: Order, run: _Run) -> Iterator[SiteReport]:
        """The report on the candidate that a node anchors, if it does."""
        site = _find_or_refuse(node, order)
        if isinstance(site, Refusal) and site.reason in _USED_ELSEWHERE and node.graph in run.own_gradients:
            yield _refused(_own_gradient(node))
        elif isinstance(site, Refusal):
            yield self._rewrite_sharing(site, node, order, run)
        elif isinstance(site, AttentionSite):
            yield self._rewrite_attention(site, run)
        elif site is not None:
            yield self._rewrite_ffn(site, run)

    def _rewrite_sharing(self, refusal: Refusal, node: fx.Node, order: Order, run: _Run) -> SiteReport:
        """The report on a refused candidate, which may be rewritten once it has scores of its own."""
        split = split_scores(node, order) if refusal.reason == "scores_used_elsewhere" else None
        if split is None:
            return _refused(refusal)
        site = _find_or_refuse(node, _positions(node.graph))
        report = self._rewrite_attention(site, run) if isinstance(site, AttentionSite) else _refused(refusal)
        if not report.rewritten:
            split.undo()
        return report

    def _rewrite_inside(self, call: fx.Node, autocasts: Autocasts, run: _Run) -> Iterator[SiteReport]:
        """Opens a call that hides candidates, and closes it again if none of them is rewritten."""
        try:
            opened = open_call(call, autocasts)
        except OpenError as error:
            yield _refused(Refusal("opaque_call", str(error), call))
            return
        reports: list[SiteReport] = []
        order = _positions(call.graph)
        for node in opened.nodes:
            if node in order:
                reports += self._rewrite_node(node, order, run)
                order = _positions(call.graph)
        if any(report.rewritten for report in reports):
            opened.commit()
            yield from reports
        else:
            opened.close()
            for report in reports:
                detail = f"inside {call.name}: {report.detail}"
                yield dataclasses.replace(report, node=call.name, detail=detail)

    def _rewrite_attention(self, site: AttentionSite, run: _Run) -> SiteReport:
        where, number = run.number(module_path(site.anchor))
        config = self.config.at(where, number)
        facts = {**_attention_facts(site, config.k), "number": number}
        pays = self.pays("attention", site.scores_shape, config.k, _device(site.output))
        refusal = _refuse_surroundings(site.output, run) or judge_attention(site, config, pays)
        detail = ""
        if refusal is None:
            refusal, detail = self._validate(site, where, run)
        if refusal is not None:
            return _refused(refusal, "attention", where, **facts)
        try:
            op = rewrite_attention(site, config.k, self.config.lowering or "")
        except EmitError as error:
            return _refused(Refusal("not_expressible", str(error), site.anchor), "attention", where, **facts)
        op.meta["topk_fx_site"] = (where, number)
        facts["mask_bytes"] = _mask_bytes(op)
        name, why = self._lowering_of(op)
        detail = "; ".join(filter(None, (detail, why)))
        return SiteReport("attention", True, "", detail, where, op.name, k=str(config.k), lowering=name, **facts)

    def _lowering_of(self, op: fx.Node) -> tuple[str, str]:
        """What will compute an op, as far as tracing recorded its tensors; and why it is no better one."""
        arguments: Any = fx.node.map_arg(op.args, value_of)
        if self.lowering_of is None or any(x is None for x in (*arguments[:3], *arguments[3])):
            return self.lowering or "by what its tensors are", ""
        name, detail = self.lowering_of(self.lowering, arguments)
        if self.config.lowering not in (None, name):
            raise LoweringUnavailableError(f"lowering={self.config.lowering!r} cannot run: {detail}")
        return name, detail

    def _ffn_lowering_of(self, op: fx.Node) -> tuple[str, str]:
        arguments: Any = fx.node.map_arg(op.args, value_of)
        if self.ffn_lowering_of is None or arguments[0] is None or (op.args[1] is not None and arguments[1] is None):
            return self.lowering or "by what its tensors are", ""
        name, detail = self.ffn_lowering_of(self.lowering, arguments)
        if self.config.lowering not in (None, name):
            raise LoweringUnavailableError(f"lowering={self.config.lowering!r} cannot run: {detail}")
        return name, detail

    def _rewrite_ffn(self, site: FFNSite, run: _Run) -> SiteReport:
        where, number = run.number(owner_path(site.products))
        config = self.config.at(where, number)
        facts = {**_ffn_facts(site, ffn_keep(config)), "number": number}
        hidden_shape = None if site.tokens_shape is None else (*site.tokens_shape, site.hidden_size)
        pays = self.pays("ffn", hidden_shape, ffn_keep(config), _device(site.output))
        refusal = _refuse_surroundings(site.output, run) or judge_ffn(site, config, pays, self.config.lowering)
        detail = ""
        if refusal is None:
            refusal, detail = self._validate(site, where, run)
        if refusal is not None:
            return _refused(refusal, "ffn", where, **facts)
        try:
            op = rewrite_ffn(site, ffn_keep(config), self.config.lowering or "")
        except EmitError as error:
            return _refused(Refusal("not_expressible", str(error), site.anchor), "ffn", where, **facts)
        op.meta["topk_fx_site"] = (where, number)
        name, why = self._ffn_lowering_of(op)
        detail = "; ".join(filter(None, (detail, why)))
        return SiteReport("ffn", True, "", detail, where, op.name, k=str(ffn_keep(config)), lowering=name, **facts)

    def _validate(self, site: AttentionSite | FFNSite, where: str, run: _Run) -> tuple[Refusal | None, str]:
        """Why a site is not to be rewritten, if its op was seen to differ; and what the report says of it otherwise."""
        if run.validator is None:
            return None, ""
        verdict = run.validator.check(site)
        if not verdict.failure:
            return None, f"validation_skipped: {verdict.skipped}" if verdict.skipped else ""
        if self.config.validate == "raise":
            raise ValidationError(f"{where or site.output.name}: {verdict.failure}")
        return Refusal("validation_failed", verdict.failure, site.output), ""


def _find_or_refuse(node: fx.Node, order: Order) -> AttentionSite | FFNSite | Refusal | None:
    """The candidate that a node anchors. A fault of ours in reading it must not keep a model from being compiled."""
    try:
        return find_site(node, order)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        message = f"{node.format_node()} stays dense, as topk_fx failed in reading it; please report it. {cause}"
        warnings.warn(message, InternalErrorWarning, stacklevel=2)
        return Refusal("internal_error", f"topk_fx failed in reading it: {cause}", node)


def find_site(node: fx.Node, order: Order) -> AttentionSite | FFNSite | Refusal | None:
    """The candidate that a node anchors: a softmax, an SDPA call, a down projection, or a call that hides one."""
    call = read(node)
    if call is None:
        return None
    match call.kind:
        case Kind.ATTENTION:
            return find_sdpa(call, order)
        case Kind.LINEAR | Kind.ADDMM | Kind.EINSUM:
            return find_ffn(call, order)
        case Kind.MATMUL | Kind.GROUPED_MATMUL | Kind.BADDBMM:
            return find_ffn(call, order) or find_experts(call)
        case Kind.OPAQUE:
            return Refusal("opaque_call", why_closed(node), node)
    softmax = read_softmax(call)
    return refuse_unread_softmax(call) if softmax is None else find_attention(softmax, order)


def _refuse_surroundings(node: fx.Node, run: _Run) -> Refusal | None:
    """Inside torch.vmap, tracing recorded values of one sample, which nothing can be computed from outside of it.

    Inside jvp, and inside a gradient of a gradient, the op would raise where the dense form has a derivative; no rule
    tells how to shard the op; and a gradient that is written beside a dense form is not that of top-k.
    """
    if node.graph in run.own_gradients:
        return _own_gradient(node)
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    if is_distributed(value):
        return Refusal("distributed_tensor", f"{node.name} is a DTensor, and the op has no sharding rule", node)
    if not is_wrapped(value):
        return None
    if is_mapped(value):
        return Refusal("inside_vmap", f"{node.name} is computed under torch.vmap: write the batch as an axis", node)
    if _levels_around(node, "jvp") > 0:
        return Refusal("inside_jvp", f"{node.name} has a forward-mode derivative taken, which the op has not", node)
    if _levels_around(node, "grad") > 1:
        detail = f"{node.name} has the gradient of a gradient taken, which the op has not"
        return Refusal("inside_second_derivative", detail, node)
    return None


def _own_gradient(node: fx.Node) -> Refusal:
    detail = f"{node.name} is computed in a torch.autograd.Function, whose own gradient would not be that of top-k"
    return Refusal("custom_gradient", detail, node)


def _levels_around(node: fx.Node, transform: str) -> int:
    """How often a node of a Dynamo graph stands between the begin and the end of a torch.func.jvp, or grad."""
    levels = 0
    for other in node.graph.nodes:
        if other is node:
            break
        name = getattr(other.target, "__name__", "")
        levels += (name == f"_{transform}_increment_nesting") - (name == f"_{transform}_decrement_nesting")
    return levels


def _bodies_with_own_gradient(module: fx.GraphModule) -> frozenset[fx.Graph]:
    """The forward and backward of every torch.autograd.Function, with the graphs inside them."""
    found: set[fx.Graph] = set()
    for child in _graph_modules(module):
        for call in child.graph.find_nodes(op="call_function", target=torch.ops.higher_order.autograd_function_apply):
            bodies = (attribute_of(x) for x in call.all_input_nodes if x.op == "get_attr")
            found.update(x.graph for body in bodies if isinstance(body, fx.GraphModule) for x in _graph_modules(body))
    return frozenset(found)


def _device(node: fx.Node) -> str | None:
    """The type of the device on which a node's value is; None if tracing recorded none."""
    value = value_of(node)
    return value.device.type if isinstance(value, torch.Tensor) else None


def _positions(graph: fx.Graph) -> Order:
    return {node: position for position, node in enumerate(graph.nodes)}


def _graph_modules(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The module and every GraphModule inside it, each once: bodies of checkpoints, of grad modes, of loops."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield child


def _refused(refusal: Refusal, kind: str | None = None, where: str | None = None, **facts: Any) -> SiteReport:
    kind = kind or refusal.kind
    where = owner_path(refusal.products or (refusal.node,)) if where is None else where
    return SiteReport(kind, False, refusal.reason, refusal.detail, where, refusal.node.name, **facts)


def _attention_facts(site: AttentionSite, keep: Keep) -> dict[str, Any]:
    shape = site.scores_shape
    if shape is None:
        return {}
    shapes = {"scores": _text(shape), "D": str(site.head_size)}
    if site.value_size is not None and not statically_known_true(site.value_size == site.head_size):
        shapes["Dv"] = str(site.value_size)
    dtype = dtype_of(site.output)
    itemsize = dtype.itemsize if dtype is not None else _WEIGHT_BYTES
    return {"shapes": shapes, **_sizes(shape[:-1], shape[-1], keep, itemsize)}


def _ffn_facts(site: FFNSite, keep: Keep) -> dict[str, Any]:
    if site.tokens_shape is None or site.hidden_size is None:
        return {}
    dtype = dtype_of(site.output)
    itemsize = dtype.itemsize if dtype is not None else _WEIGHT_BYTES
    shapes = {"tokens": _text(site.tokens_shape), "hidden": str(site.hidden_size)}
    return {"shapes": shapes, **_sizes(site.tokens_shape, site.hidden_size, keep, itemsize)}


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
