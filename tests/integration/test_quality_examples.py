"""What the figures of quality stand on: the rules that top-k is compared with, the intervals, the retrieval task."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import pytest
import torch
from models import DynamoTrace, assert_same, drawn
from torch import Tensor
from torch.nn import functional as F

import manpages
import topk_fx
from controls import CHUNK, CausalKeys, FFNUnits, with_ops_replaced
from quality import bootstrap
from scores import score

LENGTH = CHUNK + 7
INPUTS = (drawn(1, 4, LENGTH, 8, seed=1), drawn(1, 2, LENGTH, 8, seed=2), drawn(1, 2, LENGTH, 8, seed=3))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def under_rule(rule: str, k: int, inputs: tuple[Tensor, ...] = INPUTS) -> Tensor:
    trace = DynamoTrace(causal, inputs)
    op, module = torch.ops.topk_fx.attention.default, functools.partial(CausalKeys, rule, k)
    return trace.callable(with_ops_replaced(trace.program, topk_fx.TopKConfig(k=1), op, module))(*inputs)


@pytest.mark.parametrize("rule", ["random", "recent"])
def test_rule_that_keeps_every_key_is_dense(rule: str) -> None:
    assert_same(under_rule(rule, LENGTH), causal(*INPUTS))


def test_recent_keys_are_a_window() -> None:
    rows = torch.arange(LENGTH)
    distance = rows[:, None] - rows
    expected = F.scaled_dot_product_attention(*INPUTS, attn_mask=(distance >= 0) & (distance < 5), enable_gqa=True)
    assert_same(under_rule("recent", 5), expected)


def test_random_keys_are_as_many_as_asked_and_of_the_past() -> None:
    """With equal scores, and a value of 1 at each key's own place, the weights can be read off the output."""
    length = 40
    zeros, places = torch.zeros(1, 2, length, 40), torch.eye(length).expand(1, 2, length, length)
    weights = under_rule("random", 3, (zeros, zeros, places))
    assert torch.equal((weights > 0).sum(-1), torch.arange(1, length + 1).clamp(max=3).expand(1, 2, length))
    assert weights.triu(1).abs().max() == 0
    assert not torch.equal(weights[0, 0], weights[0, 1]), "heads draw for themselves"


def test_other_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="plain causal attention"):
        CausalKeys("random", 3, 0)(*INPUTS, [], "", 1.0, 3)


@pytest.mark.parametrize("gated", [False, True])
def test_units_are_kept_by_their_rule(gated: bool) -> None:
    x, up, gate, down = drawn(5, 6), drawn(20, 6, seed=1), drawn(20, 6, seed=2), drawn(6, 20, seed=3)
    down[:, 4] *= 100
    arguments = (x, up, None, gate if gated else None, None, down, None, "relu")
    reference = functools.partial(topk_fx.reference.ffn, x, up, down, gate_weight=gate if gated else None)
    assert_same(FFNUnits("magnitude", 0.25)(*arguments), reference(k=5))
    assert_same(FFNUnits("contribution", 1.0)(*arguments), reference(k="all"))
    # Units scaled to output rows of norm 1 contribute what they are.
    norms = down.norm(dim=0)
    scaled = (x, up * norms[:, None], None, arguments[3], None, down / norms, None, "relu")
    assert_same(FFNUnits("contribution", 0.25)(*arguments), FFNUnits("magnitude", 0.25)(*scaled))


def test_threshold_keeps_what_is_above_it() -> None:
    x, up, down = drawn(50, 6), drawn(20, 6, seed=1), drawn(6, 20, seed=3)
    arguments = (x, up, None, None, None, down, None, "relu")
    recording = FFNUnits("threshold", 1.0)
    recording.record = []
    assert_same(recording(*arguments), topk_fx.reference.ffn(x, up, down, k="all"))
    sizes = torch.cat(recording.record)
    unit = FFNUnits("threshold", 0.1, threshold=sizes.quantile(0.9).item())
    unit(*arguments)
    assert unit.kept / unit.all == pytest.approx(0.1, abs=0.002)


def test_interval_holds_the_mean_as_often_as_it_says() -> None:
    draw = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(100):
        blocks = torch.randn(4, 16, 1, generator=draw).expand(4, 16, 8).reshape(4, 128)  # neighbours are alike
        interval = bootstrap(blocks, lambda mean: mean, block=8)
        assert interval.low < interval.value < interval.high
        assert interval.value == pytest.approx(blocks.mean().item(), abs=1e-6)
        hits += interval.low < 0 < interval.high
    assert 88 <= hits <= 100


def test_scores_are_of_the_token_that_follows() -> None:
    window = torch.arange(9)
    logits = 3 * F.one_hot((window + 1) % 9, 9).float()
    dense = logits.clone()
    dense[2:4, 0] = 9
    scores = score(lambda _: logits, window[None], [dense[:-1]], lambda: None)
    assert scores.correct.mean() == 1
    assert scores.agrees.sum() == 6
    assert_same(scores.loss[0], F.cross_entropy(logits[:-1], window[1:], reduction="none").double())
    assert torch.equal(scores.kl[0] > 1e-6, torch.tensor([False, False, True, True] + [False] * 4))


def test_pages_are_plain_text(tmp_path: Path) -> None:
    source = r""".\" a comment
.TH SOCKET 2
.SH NAME
socket \- create an \fIend\-point\fP
.SH DESCRIPTION
.BR socket ()
creates
.I one
"""
    (tmp_path / "man2").mkdir()
    for name, text in (("socket", source + "word " * 80), ("alias", ".so man2/socket.2")):
        (tmp_path / "man2" / f"{name}.2.gz").write_bytes(gzip.compress(text.encode()))
    assert manpages.load_pairs(10, tmp_path) == [
        ("create an end-point", "socket() creates one " + " ".join(["word"] * 80))
    ]
