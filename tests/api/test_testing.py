"""graph_text: one line a node, with what a person designs and nothing that varies by machine."""

from __future__ import annotations

import re

import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from topk_fx.testing import graph_text


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("table", torch.zeros(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.linear(x).softmax(-1)
        picked = hidden[:, None, 1:, :2, ..., ::2, 1:5:3]
        return torch.cat([picked, y], dim=-1) * 2.5 + self.table, torch.add(x, y, alpha=3)


def test_traced_module_is_one_line_a_node():
    assert_expected_inline(
        graph_text(fx.symbolic_trace(Model())),
        """\
x = input
y = input
linear = self.linear(x)
softmax = linear.softmax(-1)
getitem = getitem(softmax, (:, None, 1:, :2, Ellipsis, ::2, 1:5:3))
cat = cat([getitem, y], dim=-1)
mul = mul(cat, 2.5)
table = self.table
add = add(mul, table)
add_1 = add(x, y, alpha=3)
return (add, add_1)""",
    )


def test_exported_program_shows_dtypes_and_shapes():
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x @ y).sum(-1, dtype=torch.float64) * x.size(0) > 1.0

    example = (torch.zeros(5, 3, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16))
    program = torch.export.export(Scale(), example, dynamic_shapes=({0: torch.export.Dim("rows")}, None))
    text = re.sub(r"\bs\d+\b", "rows", graph_text(program))  # torch chooses the symbol
    assert_expected_inline(
        text,
        """\
x: bf16[rows, 3] = input
y: bf16[3, 4] = input
sym_size_int_1: rows = aten.sym_size.int(x, 0)
matmul: bf16[rows, 4] = aten.matmul(x, y)
sum_1: f64[rows] = aten.sum.dim_IntList(matmul, [-1], dtype=torch.float64)
mul: f64[rows] = aten.mul.Tensor(sum_1, sym_size_int_1)
gt: bool[rows] = aten.gt.Scalar(mul, 1.0)
return (gt)""",
    )


def test_ops_are_named_with_their_overload_and_namespace():
    graph = fx.Graph()
    q, k, v, mask = (graph.placeholder(name) for name in ("q", "k", "v", "mask"))
    output = graph.call_function(
        torch.ops.topk_fx.attention.default, (q, k, v, [mask], "mask($0) causal", 0.125, 64), {"dropout_p": 0.1}
    )
    total = graph.call_function(torch.ops.aten.sum.dim_IntList, (output, [-1]), {"dtype": torch.float32})
    graph.output((total, None))
    assert_expected_inline(
        graph_text(graph),
        """\
q = input
k = input
v = input
mask = input
attention_default = topk_fx.attention(q, k, v, [mask], 'mask($0) causal', 0.125, 64, dropout_p=0.1)
sum_dim_int_list = aten.sum.dim_IntList(attention_default, [-1], dtype=torch.float32)
return (sum_dim_int_list, None)""",
    )


def calling(child: nn.Module | None) -> fx.GraphModule:
    """A graph that calls its child graph, or, without one, relu."""
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    if child is None:
        graph.output(graph.call_method("relu", (x,)))
    else:
        root.body = child
        graph.output(graph.call_module("body", (x,)))
    return fx.GraphModule(root, graph)


def test_child_graphs_follow_indented():
    assert_expected_inline(
        graph_text(calling(calling(calling(None)))),
        """\
x = input
body = self.body(x)
return body
body:
  x = input
  body = self.body(x)
  return body
  body:
    x = input
    relu = x.relu()
    return relu""",
    )


def test_child_that_is_no_graph_is_not_opened():
    text = graph_text(calling(nn.Linear(2, 2)))
    assert text.splitlines() == ["x = input", "body = self.body(x)", "return body"]


def test_graph_and_module_read_the_same():
    module = fx.symbolic_trace(Model())
    assert graph_text(module.graph) == graph_text(module)
