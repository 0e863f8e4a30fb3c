"""Which lowering computes a site, and when a site is worth rewriting."""

from __future__ import annotations

import pytest
import torch
from topk_fx.lowering.choice import AVAILABLE

import topk_fx
from topk_fx import TopKConfig, lowering
from topk_fx.config import LOWERINGS
from topk_fx.errors import LoweringUnavailableError, TopKError


def test_aten_is_chosen_where_nothing_is_asked_for():
    assert lowering.choose(TopKConfig()) == "aten"


@pytest.mark.parametrize("name", AVAILABLE)
def test_available_lowering_is_chosen_when_asked_for(name):
    assert lowering.choose(TopKConfig(lowering=name)) == name


@pytest.mark.parametrize("name", sorted({*LOWERINGS} - {*AVAILABLE}))
def test_unavailable_lowering_is_an_error_and_no_silent_other(name):
    message = rf"lowering='{name}' cannot run: .*{name} kernels; available: 'aten'"
    with pytest.raises(LoweringUnavailableError, match=message):
        lowering.choose(TopKConfig(lowering=name))
    linear = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(TopKError, match=message):
        topk_fx.rewrite(linear, lowering=name)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("keep", [1, 0.5, "all"])
def test_aten_never_pays_by_time(kind, keep):
    assert not lowering.pays(kind, (2, 8, 4096, 65536), keep)
    assert not lowering.pays(kind, None, keep)


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward", "ffn_forward", "ffn_backward"])
def test_inner_ops_have_a_kernel_on_every_device(op):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"topk_fx::{op}", "CPU")
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"topk_fx::{op}", "CUDA")
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"topk_fx::{op}", "Meta")
