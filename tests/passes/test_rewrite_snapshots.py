"""Graphs and reports after the rewrite, as a person reads them. EXPECTTEST_ACCEPT=1 rewrites the snapshots."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from expecttest import TestCase
from models import DynamoTrace, ExportTrace, SymbolicTrace, drawn
from torch import Tensor, nn

HEADS, SIZE = 2, 8


class SelfAttention(nn.Module):
    """One layer's projections, and the heads of what they give: [B, H, L, D]."""

    def __init__(self, key_heads: int = HEADS, bias: bool = True) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(SIZE, SIZE, bias), nn.Linear(SIZE, SIZE, bias)
        self.k, self.v = (nn.Linear(SIZE, key_heads * SIZE // HEADS, bias) for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, SIZE // HEADS).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        return self.o(x.transpose(1, 2).reshape(*x.shape[::2], SIZE))


class Bert(SelfAttention):
    """Scaled by a quotient, a mask of padding added, dropout of the probabilities; an FFN of GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.up, self.down = nn.Linear(SIZE, 16), nn.Linear(16, SIZE)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)) + mask
        x = x + self.join(torch.matmul(self.dropout(F.softmax(scores, dim=-1)), v))
        return x + self.down(F.gelu(self.up(x)))


class Llama(SelfAttention):
    """Keys and values of fewer heads, repeated; a causal mask built from indices; softmax in float32; a gated FFN."""

    def __init__(self) -> None:
        super().__init__(key_heads=1, bias=False)
        self.gate, self.up = nn.Linear(SIZE, 16, False), nn.Linear(SIZE, 16, False)
        self.down = nn.Linear(16, SIZE, False)

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        x = x[:, :, None, :, :].expand(batch, heads, HEADS // heads, length, size)
        return x.reshape(batch, HEADS, length, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.repeat(self.split(self.k(x))), self.repeat(self.split(self.v(x)))
        past = torch.arange(x.size(1)) <= torch.arange(x.size(1))[:, None]
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + torch.where(past, 0.0, torch.finfo(x.dtype).min)
        weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0, training=self.training)
        x = x + self.join(torch.matmul(weights, v).contiguous())
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class GPT2(nn.Module):
    """One projection for query, key and value, parted by split; the causal mask a buffer, filled in with where."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(SIZE, 3 * SIZE)
        self.register_buffer("past", torch.ones(5, 5, dtype=torch.bool).tril().view(1, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(2, 5, HEADS, -1).permute(0, 2, 1, 3) for y in self.attn(x).split(SIZE, dim=2))
        weights = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], 2.0)
        weights = torch.where(self.past, weights, torch.full([], -1e4))
        weights = nn.functional.softmax(weights, dim=-1).type(v.dtype)
        return torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(2, 5, SIZE)


class T5(SelfAttention):
    """No scale; a learned bias of relative positions and the mask, added up in place; an FFN of ReLU without biases."""

    def __init__(self) -> None:
        super().__init__(bias=False)
        self.positions = nn.Embedding(9, HEADS)
        self.up, self.down = nn.Linear(SIZE, 16, bias=False), nn.Linear(16, SIZE, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q, k.transpose(3, 2))
        distance = torch.arange(5)[None, :] - torch.arange(5)[:, None] + 4
        scores += self.positions(distance).permute(2, 0, 1).unsqueeze(0) + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        x = x + self.join(torch.matmul(weights, v))
        return x + self.down(F.relu(self.up(x)))


class OneHead(nn.Module):
    """Modules for everything, in training: its dropout is asked at run time whether it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.ffn = nn.Sequential(nn.Linear(SIZE, 16), nn.ReLU(), nn.Linear(16, SIZE))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).transpose(-2, -1)) * SIZE**-0.5
        weights = self.dropout(self.softmax(scores.masked_fill(mask, -math.inf)))
        return self.ffn(x + weights @ self.v(x))


class SDPA(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, keep) + F.scaled_dot_product_attention(q, k, v, is_causal=True)


def readable(text: str) -> str:
    """Parameters by their names in the model, and without the lines that take them in."""
    name = r"\b(?:l_self_modules_(\w+?)_parameters|p_(\w+?))_(weight|bias)_?"
    text = re.sub(rf"^{name}: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(name, lambda match: f"{match[1] or match[2]}.{match[3]}", text)


X, MASK = drawn(2, 5, SIZE), torch.zeros(2, 1, 1, 5)


class TestSnapshots(TestCase):
    maxDiff = None

    def setUp(self) -> None:
        torch._dynamo.reset()

    def test_bert_compiled(self) -> None:
        self.assertExpectedInline(
            readable(DynamoTrace(Bert().eval(), (X, MASK)).rewrite(k=3)[2]),
            """\
l_x_: f32[2, 5, 8] = input
l_mask_: f32[2, 1, 1, 5] = input
linear: f32[2, 5, 8] = linear(l_x_, q.weight, q.bias)
view: f32[2, 5, 2, 4] = linear.view(2, 5, -1, 4)
q: f32[2, 2, 5, 4] = view.transpose(1, 2)
linear_1: f32[2, 5, 8] = linear(l_x_, k.weight, k.bias)
view_1: f32[2, 5, 2, 4] = linear_1.view(2, 5, -1, 4)
k: f32[2, 2, 5, 4] = view_1.transpose(1, 2)
linear_2: f32[2, 5, 8] = linear(l_x_, v.weight, v.bias)
view_2: f32[2, 5, 2, 4] = linear_2.view(2, 5, -1, 4)
v: f32[2, 2, 5, 4] = view_2.transpose(1, 2)
attention: f32[2, 2, 5, 4] = topk_fx.attention(q, k, v, [l_mask_], 'add($0)', 0.5, 3)
transpose_4: f32[2, 5, 2, 4] = attention.transpose(1, 2)
reshape: f32[2, 5, 8] = transpose_4.reshape(2, 5, 8)
linear_3: f32[2, 5, 8] = linear(reshape, o.weight, o.bias)
x: f32[2, 5, 8] = add(l_x_, linear_3)
linear_4: f32[2, 5, 16] = linear(x, up.weight, up.bias)
gelu: f32[2, 5, 16] = gelu(linear_4)
linear_5: f32[2, 5, 8] = linear(gelu, down.weight, down.bias)
add_2: f32[2, 5, 8] = add(x, linear_5)
return (add_2)""",
        )

    def test_bert_exported(self) -> None:
        self.assertExpectedInline(
            readable(ExportTrace(Bert().eval(), (X, MASK)).rewrite(k=3, ffn_k=4)[2]),
            """\
x: f32[2, 5, 8] = input
mask: f32[2, 1, 1, 5] = input
linear: f32[2, 5, 8] = aten.linear(x, q.weight, q.bias)
view: f32[2, 5, 2, 4] = aten.view(linear, [2, 5, -1, 4])
transpose: f32[2, 2, 5, 4] = aten.transpose.int(view, 1, 2)
linear_1: f32[2, 5, 8] = aten.linear(x, k.weight, k.bias)
view_1: f32[2, 5, 2, 4] = aten.view(linear_1, [2, 5, -1, 4])
transpose_1: f32[2, 2, 5, 4] = aten.transpose.int(view_1, 1, 2)
linear_2: f32[2, 5, 8] = aten.linear(x, v.weight, v.bias)
view_2: f32[2, 5, 2, 4] = aten.view(linear_2, [2, 5, -1, 4])
transpose_2: f32[2, 2, 5, 4] = aten.transpose.int(view_2, 1, 2)
attention: f32[2, 2, 5, 4] = topk_fx.attention(transpose, transpose_1, transpose_2, [mask], 'add($0)', 0.5, 3)
transpose_4: f32[2, 5, 2, 4] = aten.transpose.int(attention, 1, 2)
reshape: f32[2, 5, 8] = aten.reshape(transpose_4, [2, 5, 8])
linear_3: f32[2, 5, 8] = aten.linear(reshape, o.weight, o.bias)
add_1: f32[2, 5, 8] = aten.add.Tensor(x, linear_3)
ffn: f32[2, 5, 8] = topk_fx.ffn(add_1, up.weight, up.bias, None, None, down.weight, down.bias, 'gelu', 4)
add_2: f32[2, 5, 8] = aten.add.Tensor(add_1, ffn)
return (add_2)""",
        )

    def test_llama_compiled(self) -> None:
        self.assertExpectedInline(
            readable(DynamoTrace(Llama().eval(), (X,)).rewrite(k=3, ffn_k=4)[2]),
            """\
l_x_: f32[2, 5, 8] = input
linear: f32[2, 5, 8] = linear(l_x_, q.weight, None)
view: f32[2, 5, 2, 4] = linear.view(2, 5, -1, 4)
q: f32[2, 2, 5, 4] = view.transpose(1, 2)
linear_1: f32[2, 5, 4] = linear(l_x_, k.weight, None)
view_1: f32[2, 5, 1, 4] = linear_1.view(2, 5, -1, 4)
transpose_1: f32[2, 1, 5, 4] = view_1.transpose(1, 2)
linear_2: f32[2, 5, 4] = linear(l_x_, v.weight, None)
view_2: f32[2, 5, 1, 4] = linear_2.view(2, 5, -1, 4)
transpose_2: f32[2, 1, 5, 4] = view_2.transpose(1, 2)
attention: f32[2, 2, 5, 4] = topk_fx.attention(q, transpose_1, transpose_2, [], 'add(where(le(j, i), 0.0, -3.4028234663852886e+38))', 0.5, 3)
contiguous: f32[2, 2, 5, 4] = attention.contiguous()
transpose_4: f32[2, 5, 2, 4] = contiguous.transpose(1, 2)
reshape_2: f32[2, 5, 8] = transpose_4.reshape(2, 5, 8)
linear_3: f32[2, 5, 8] = linear(reshape_2, o.weight, None)
x_2: f32[2, 5, 8] = add(l_x_, linear_3)
ffn: f32[2, 5, 8] = topk_fx.ffn(x_2, up.weight, None, gate.weight, None, down.weight, None, 'silu', 4)
add_2: f32[2, 5, 8] = add(x_2, ffn)
return (add_2)""",
        )

    def test_llama_exported_with_dynamic_length(self) -> None:
        length = torch.export.Dim("length", min=2, max=64)
        trace = ExportTrace(Llama().eval(), (X,), dynamic_shapes=({1: length},))
        self.assertExpectedInline(
            readable(trace.rewrite(k=0.25)[2]),
            """\
x: f32[2, s27, 8] = input
sym_size_int_5: s27 = aten.sym_size.int(x, 1)
linear: f32[2, s27, 8] = aten.linear(x, q.weight)
view: f32[2, s27, 2, 4] = aten.view(linear, [2, sym_size_int_5, -1, 4])
transpose: f32[2, 2, s27, 4] = aten.transpose.int(view, 1, 2)
linear_1: f32[2, s27, 4] = aten.linear(x, k.weight)
view_1: f32[2, s27, 1, 4] = aten.view(linear_1, [2, sym_size_int_5, -1, 4])
transpose_1: f32[2, 1, s27, 4] = aten.transpose.int(view_1, 1, 2)
linear_2: f32[2, s27, 4] = aten.linear(x, v.weight)
view_2: f32[2, s27, 1, 4] = aten.view(linear_2, [2, sym_size_int_5, -1, 4])
transpose_2: f32[2, 1, s27, 4] = aten.transpose.int(view_2, 1, 2)
sym_size_int: s27 = aten.sym_size.int(transpose_2, -2)
add_3: s27 + 3 = add(sym_size_int, 3)
floordiv: ((s27 + 3)//4) = floordiv(add_3, 4)
attention: f32[2, 2, s27, 4] = topk_fx.attention(transpose, transpose_1, transpose_2, [], 'add(where(le(j, i), 0.0, -3.4028234663852886e+38))', 0.5, floordiv)
transpose_4: f32[2, s27, 2, 4] = aten.transpose.int(attention, 1, 2)
reshape_2: f32[2, s27, 8] = aten.reshape(transpose_4, [2, sym_size_int_5, 8])
linear_3: f32[2, s27, 8] = aten.linear(reshape_2, o.weight)
add_1: f32[2, s27, 8] = aten.add.Tensor(x, linear_3)
linear_4: f32[2, s27, 16] = aten.linear(add_1, gate.weight)
silu: f32[2, s27, 16] = aten.silu(linear_4)
linear_5: f32[2, s27, 16] = aten.linear(add_1, up.weight)
mul_7: f32[2, s27, 16] = aten.mul.Tensor(silu, linear_5)
linear_6: f32[2, s27, 8] = aten.linear(mul_7, down.weight)
add_2: f32[2, s27, 8] = aten.add.Tensor(add_1, linear_6)
return (add_2)""",
        )

    def test_gpt2_compiled(self) -> None:
        self.assertExpectedInline(
            readable(DynamoTrace(GPT2(), (X,)).rewrite(k=3)[2]),
            """\
l_x_: f32[2, 5, 8] = input
l_self_buffers_past_: bool[1, 1, 5, 5] = input
linear: f32[2, 5, 24] = linear(l_x_, attn.weight, attn.bias)
split = linear.split(8, dim=2)
y: f32[2, 5, 8] = getitem(split, 0)
y_1: f32[2, 5, 8] = getitem(split, 1)
y_2: f32[2, 5, 8] = getitem(split, 2)
view: f32[2, 5, 2, 4] = y.view(2, 5, 2, -1)
q: f32[2, 2, 5, 4] = view.permute(0, 2, 1, 3)
view_1: f32[2, 5, 2, 4] = y_1.view(2, 5, 2, -1)
k: f32[2, 2, 5, 4] = view_1.permute(0, 2, 1, 3)
view_2: f32[2, 5, 2, 4] = y_2.view(2, 5, 2, -1)
v: f32[2, 2, 5, 4] = view_2.permute(0, 2, 1, 3)
attention: f32[2, 2, 5, 4] = topk_fx.attention(q, k, v, [l_self_buffers_past_], 'keep($0, -10000.0)', 0.5, 3)
permute_3: f32[2, 5, 2, 4] = attention.permute(0, 2, 1, 3)
contiguous: f32[2, 5, 2, 4] = permute_3.contiguous()
view_3: f32[2, 5, 8] = contiguous.view(2, 5, 8)
return (view_3)""",
        )

    def test_t5_compiled_in_training(self) -> None:
        self.assertExpectedInline(
            readable(DynamoTrace(T5(), (X, MASK)).rewrite(k="all")[2]),
            """\
l_x_: f32[2, 5, 8] = input
l_mask_: f32[2, 1, 1, 5] = input
linear: f32[2, 5, 8] = linear(l_x_, q.weight, None)
view: f32[2, 5, 2, 4] = linear.view(2, 5, -1, 4)
q: f32[2, 2, 5, 4] = view.transpose(1, 2)
linear_1: f32[2, 5, 8] = linear(l_x_, k.weight, None)
view_1: f32[2, 5, 2, 4] = linear_1.view(2, 5, -1, 4)
k: f32[2, 2, 5, 4] = view_1.transpose(1, 2)
linear_2: f32[2, 5, 8] = linear(l_x_, v.weight, None)
view_2: f32[2, 5, 2, 4] = linear_2.view(2, 5, -1, 4)
v: f32[2, 2, 5, 4] = view_2.transpose(1, 2)
permute_default: f32[2, 9] = aten.permute(positions.weight, [1, 0])
unsqueeze_default: f32[1, 2, 9] = aten.unsqueeze(permute_default, 0)
unsqueeze_default_1: f32[1, 2, 1, 9] = aten.unsqueeze(unsqueeze_default, 2)
attention: f32[2, 2, 5, 4] = topk_fx.attention(q, k, v, [unsqueeze_default_1, l_mask_], 'add(add(lookup($0, add(sub(j, i), 4)), $1))', 1.0, 5)
transpose_4: f32[2, 5, 2, 4] = attention.transpose(1, 2)
reshape: f32[2, 5, 8] = transpose_4.reshape(2, 5, 8)
linear_3: f32[2, 5, 8] = linear(reshape, o.weight, None)
x: f32[2, 5, 8] = add(l_x_, linear_3)
ffn: f32[2, 5, 8] = topk_fx.ffn(x, up.weight, None, None, None, down.weight, None, 'relu', 16)
add_3: f32[2, 5, 8] = add(x, ffn)
return (add_3)""",
        )

    def test_modules_traced_symbolically(self) -> None:
        self.assertExpectedInline(
            SymbolicTrace(OneHead()).rewrite(k=0.5, ffn_k=4)[2],
            """\
x = input
mask = input
q = self.q(x)
k = self.k(x)
v = self.v(x)
sym_size_int = aten.sym_size.int(v, -2)
add_1 = add(sym_size_int, 1)
floordiv = floordiv(add_1, 2)
dropout_probability = self.dropout_probability()
attention = topk_fx.attention(q, k, v, [mask], 'fill($0, -inf)', 0.3535533905932738, floordiv, dropout_probability)
add = add(x, attention)
ffn_0_weight = self.ffn.0.weight
ffn_0_bias = self.ffn.0.bias
ffn_2_weight = self.ffn.2.weight
ffn_2_bias = self.ffn.2.bias
ffn = topk_fx.ffn(add, ffn_0_weight, ffn_0_bias, None, None, ffn_2_weight, ffn_2_bias, 'relu', 4)
return ffn""",
        )

    def test_sdpa_compiled(self) -> None:
        inputs = (drawn(2, 2, 5, 4), drawn(2, 2, 7, 4), drawn(2, 2, 7, 4), torch.ones(5, 7, dtype=torch.bool))
        self.assertExpectedInline(
            DynamoTrace(SDPA(), inputs).rewrite(k=3)[2],
            """\
l_q_: f32[2, 2, 5, 4] = input
l_k_: f32[2, 2, 7, 4] = input
l_v_: f32[2, 2, 7, 4] = input
l_keep_: bool[5, 7] = input
attention: f32[2, 2, 5, 4] = topk_fx.attention(l_q_, l_k_, l_v_, [l_keep_], 'mask($0)', 0.5, 3, zero_empty_rows=True)
attention_1: f32[2, 2, 5, 4] = topk_fx.attention(l_q_, l_k_, l_v_, [], 'causal', 0.5, 3, zero_empty_rows=True)
add: f32[2, 2, 5, 4] = add(attention, attention_1)
return (add)""",
        )

    def test_moved_axes_compiled(self) -> None:
        """What an einsum over axes in other places costs: permutations, which are views."""

        def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            scores = torch.einsum("bqhd,bkhd->bqkh", q, k) + mask
            return torch.einsum("bqkh,bkhd->bqhd", scores.softmax(2), v)

        inputs = (drawn(2, 5, 3, 4), drawn(2, 7, 3, 4), drawn(2, 7, 3, 4), drawn(1, 1, 7, 1))
        self.assertExpectedInline(
            DynamoTrace(model, inputs).rewrite(k=3)[2],
            """\
l_q_: f32[2, 5, 3, 4] = input
l_k_: f32[2, 7, 3, 4] = input
l_mask_: f32[1, 1, 7, 1] = input
l_v_: f32[2, 7, 3, 4] = input
permute_default_2: f32[2, 3, 5, 4] = aten.permute(l_q_, [0, 2, 1, 3])
permute_default_5: f32[2, 3, 4, 7] = aten.permute(l_k_, [0, 2, 3, 1])
transpose_int: f32[2, 3, 7, 4] = aten.transpose.int(permute_default_5, -2, -1)
permute_default_7: f32[2, 3, 4, 7] = aten.permute(l_v_, [0, 2, 3, 1])
transpose_int_1: f32[2, 3, 7, 4] = aten.transpose.int(permute_default_7, -2, -1)
permute_default_8: f32[1, 1, 1, 7] = aten.permute(l_mask_, [0, 3, 1, 2])
attention: f32[2, 3, 5, 4] = topk_fx.attention(permute_default_2, transpose_int, transpose_int_1, [permute_default_8], 'add($0)', 1.0, 3)
permute_default_10: f32[2, 5, 3, 4] = aten.permute(attention, [0, 2, 1, 3])
return (permute_default_10)""",
        )

    def test_report_of_sites_and_refusals(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, self.decoder = T5(), Bert()

            def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
                x = self.decoder(self.encoder(x, mask), mask)
                return x, (x @ x.mT).softmax(-1)

        report = DynamoTrace(Model().eval(), (X, MASK)).rewrite(k=3, when="always", lowering="aten")[1]
        self.assertExpectedInline(
            str(report),
            """\
topk_fx: GraphModule: 2 of 3 attention sites rewritten; 1 of 2 ffn sites rewritten; left dense: 1 ffn_k_not_given, 1 probabilities_used_elsewhere
where      kind       shapes                   k     dense  top-k  what was done
---------  ---------  -----------------------  ----  -----  -----  ---------------------------------------------------------------------------------------------
encoder    attention  scores [2,2,5,5], D 4    3     400 B  480 B  rewritten, aten
encoder    ffn        tokens [2,5], hidden 16  0.25  640 B  320 B  rewritten, aten
decoder    attention  scores [2,2,5,5], D 4    3     400 B  480 B  rewritten, aten
decoder    ffn        tokens [2,5], hidden 16        640 B         left dense: ffn_k_not_given (gelu units are rarely zero: give ffn_k to rewrite it)
softmax_2  attention                                               left dense: probabilities_used_elsewhere (the probabilities softmax_2 are used by the output)""",
        )

    def test_report_of_long_sequences(self) -> None:
        """Bytes of what dense holds and of what top-k keeps, and of the mask that reaches the op."""
        keep = torch.ones(1024, 4096, dtype=torch.bool)
        inputs = (drawn(1, 8, 1024, 2), drawn(1, 8, 4096, 2), drawn(1, 8, 4096, 2), keep)
        trace = ExportTrace(lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, keep), inputs)
        _, report, _ = trace.rewrite(k=64, lowering="aten")
        self.assertExpectedInline(
            str(report),
            """\
topk_fx: exported program: 1 of 1 attention sites rewritten
where      kind       shapes                       k   dense    top-k    mask     what was done
---------  ---------  ---------------------------  --  -------  -------  -------  ---------------
attention  attention  scores [1,8,1024,4096], D 2  64  128 MiB  4.0 MiB  4.0 MiB  rewritten, aten""",
        )
        (site,) = report
        assert site.dense_bytes == 8 * 1024 * 4096 * 4
        assert site.topk_bytes == 8 * 1024 * 64 * (4 + 4)
        assert site.mask_bytes == 1024 * 4096

    def test_report_of_nothing(self) -> None:
        report = DynamoTrace(nn.Linear(SIZE, 2), (X,)).rewrite(k=3)[1]
        self.assertExpectedInline(
            str(report),
            """\
topk_fx: GraphModule: no softmax, attention call or FFN found; nothing was changed""",
        )
