"""A caller's mistake raises at once, and the message names the argument, what came and what is accepted."""

from __future__ import annotations

import pytest
import torch
from torch import ones

import topk_fx
from topk_fx.errors import ConfigError, DTypeError, ShapeError, TopKError


def attention(query=(2, 4, 9, 8), key=(2, 4, 11, 8), value=(2, 4, 11, 5), **options):
    query, key, value = (ones(x) if isinstance(x, tuple) else x for x in (query, key, value))
    return topk_fx.attention(query, key, value, **{"k": 3, **options})


def ffn(input=(9, 6), up_weight=(16, 6), down_weight=(5, 16), **options):
    input, up_weight, down_weight = (ones(x) if isinstance(x, tuple) else x for x in (input, up_weight, down_weight))
    return topk_fx.ffn(input, up_weight, down_weight, **{"k": 3, **options})


def test_the_calls_that_the_mistakes_start_from_are_right():
    assert attention().shape == (2, 4, 9, 5)
    assert ffn().shape == (9, 5)


@pytest.mark.parametrize("call", [attention, ffn])
@pytest.mark.parametrize("k", [0, -1, 1.5, 0.0, "some", True, None, [3]], ids=repr)
def test_k_is_refused(call, k):
    with pytest.raises(ConfigError, match=r"^k=.* is not accepted.*give an int >= 1, a float in \(0, 1\]"):
        call(k=k)


@pytest.mark.parametrize("call", [attention, ffn])
@pytest.mark.parametrize("dropout_p", [-0.1, 1.5, "half", True, None, float("nan")], ids=repr)
def test_dropout_is_refused(call, dropout_p):
    with pytest.raises(ConfigError, match=r"^dropout_p=.* is not accepted: give a float in \[0, 1\]"):
        call(dropout_p=dropout_p)


ATTENTION_SHAPES = {
    "query_1d": ({"query": (8,)}, r"query has shape \(8,\); accepted: \[\.\.\., length, head size\], at least 2-D"),
    "key_1d": ({"key": (8,)}, r"key has shape \(8,\); accepted: .*at least 2-D"),
    "value_0d": ({"value": ()}, r"value has shape \(\); accepted: .*at least 2-D"),
    "head_sizes": ({"key": (2, 4, 11, 7)}, r"key has shape \(2, 4, 11, 7\) and query \(2, 4, 9, 8\): .*head size"),
    "lengths": ({"value": (2, 4, 10, 5)}, r"value has shape \(2, 4, 10, 5\) and key \(2, 4, 11, 8\): their lengths"),
    "one_key_many_values": ({"key": (2, 4, 1, 8)}, r"value has shape \(2, 4, 11, 5\) and key \(2, 4, 1, 8\)"),
    "grouped_unasked": ({"key": (2, 2, 11, 8), "value": (2, 2, 11, 5)}, r"have 4, 2, 2 heads.*pass enable_gqa=True"),
    "value_grouped_unasked": ({"value": (2, 2, 11, 5)}, r"have 4, 4, 2 heads.*pass enable_gqa=True"),
    "key_heads_do_not_divide": (
        {"key": (2, 3, 11, 8), "value": (2, 3, 11, 5), "enable_gqa": True},
        r"key has 3 heads and query has 4: the heads of key must divide",
    ),
    "value_heads_do_not_divide": (
        {"value": (2, 3, 11, 5), "enable_gqa": True},
        r"value has 3 heads and query has 4: the heads of value must divide",
    ),
    "fewer_query_heads": ({"query": (2, 2, 9, 8), "enable_gqa": True}, r"query.*heads"),
    "query_batch": ({"query": (3, 4, 9, 8)}, r"batch sizes of query, key, value and mask do not broadcast"),
    "value_batch": ({"value": (3, 4, 11, 5)}, r"batch sizes of query, key, value and mask do not broadcast"),
    "batch_5d": ({"query": (2, 2, 4, 9, 8), "key": (3, 1, 4, 11, 8)}, r"batch sizes of query, key, value and mask"),
    "batch_under_a_mask": (
        {"query": (3, 4, 9, 8), "attn_mask": ones(9, 11)},
        r"batch sizes of query, key, value and mask do not broadcast",
    ),
    "mask_keys": ({"attn_mask": ones(9, 10)}, r"attn_mask has shape \(9, 10\); it must broadcast to .*\(2, 4, 9, 11\)"),
    "mask_queries": ({"attn_mask": ones(8, 11)}, r"attn_mask has shape \(8, 11\); it must broadcast"),
    "mask_heads": ({"attn_mask": ones(3, 1, 1)}, r"attn_mask has shape \(3, 1, 1\); it must broadcast"),
    "mask_batch": ({"attn_mask": ones(3, 1, 1, 1)}, r"attn_mask has shape \(3, 1, 1, 1\); it must broadcast"),
    "mask_rank": ({"attn_mask": ones(1, 2, 4, 9, 11)}, r"attn_mask has shape \(1, 2, 4, 9, 11\); it must broadcast"),
    "mask_of_more_keys": (
        {"query": (9, 8), "key": (1, 8), "value": (1, 5), "attn_mask": ones(9, 11)},
        r"attn_mask .* must broadcast",
    ),
    "mask_of_more_queries": (
        {"query": (1, 8), "key": (11, 8), "value": (11, 5), "attn_mask": ones(9, 11)},
        r"attn_mask .* must broadcast",
    ),
}


@pytest.mark.parametrize("mistake", ATTENTION_SHAPES)
def test_attention_refuses_shapes_that_do_not_fit(mistake):
    options, message = ATTENTION_SHAPES[mistake]
    with pytest.raises(ShapeError, match=message):
        attention(**options)


ATTENTION_TYPES = {
    "query_list": ({"query": [[1.0]]}, "query is a list; accepted: a torch.Tensor"),
    "value_none": ({"value": None}, "value is a NoneType; accepted: a torch.Tensor"),
    "query_int": ({"query": ones(2, 4, 9, 8).long()}, "query has dtype torch.int64; accepted: float64, float32"),
    "key_bool": ({"key": ones(2, 4, 11, 8).bool()}, "key has dtype torch.bool; accepted: float64, float32"),
    "value_int": ({"value": ones(2, 4, 11, 5).int()}, "value has dtype torch.int32; accepted: float64, float32"),
    "query_complex": ({"query": ones(2, 4, 9, 8) * 1j}, "query has dtype torch.complex64; accepted: float64"),
    "query_float8": (
        {"query": ones(2, 4, 9, 8).to(torch.float8_e4m3fn), "key": ones(2, 4, 11, 8).to(torch.float8_e4m3fn)},
        "query has dtype torch.float8_e4m3fn; accepted: float64, float32, bfloat16, float16",
    ),
    "key_bfloat16": ({"key": ones(2, 4, 11, 8).bfloat16()}, "key has dtype torch.bfloat16 and query torch.float32"),
    "query_double": ({"query": ones(2, 4, 9, 8).double()}, "key has dtype torch.float32 and query torch.float64"),
    "value_half": ({"value": ones(2, 4, 11, 5).half()}, "value has dtype torch.float16 and query torch.float32"),
    "mask_int": ({"attn_mask": ones(9, 11).long()}, "attn_mask has dtype torch.int64; accepted: torch.bool"),
    "mask_list": ({"attn_mask": [[True]]}, "attn_mask is a list; accepted: a torch.Tensor or None"),
    "scale_str": ({"scale": "small"}, "scale is a str; accepted: a float"),
    "scale_bool": ({"scale": True}, "scale is a bool; accepted: a float"),
    "is_causal_mask": ({"is_causal": ones(9, 11)}, "is_causal is a Tensor; accepted: a bool"),
    "is_causal_none": ({"is_causal": None}, "is_causal is a NoneType; accepted: a bool"),
    "scale_tensor": ({"scale": ones(())}, "scale is a Tensor; accepted: a float"),
}


@pytest.mark.parametrize("mistake", ATTENTION_TYPES)
def test_attention_refuses_types_that_do_not_fit(mistake):
    options, message = ATTENTION_TYPES[mistake]
    with pytest.raises(DTypeError, match=message):
        attention(**options)


FFN_SHAPES = {
    "input": ({"input": (9, 7)}, r"input has shape \(9, 7\); with up_weight \(16, 6\) it must be \(9, 6\)"),
    "input_without_up": ({"up_weight": None}, r"input has shape \(9, 6\); .* and no up_weight it must be \(9, 16\)"),
    "bias_without_up": (
        {"up_weight": None, "input": (9, 16), "up_bias": ones(16)},
        "up_bias was given without up_weight; without one the input is what is activated",
    ),
    "input_0d": ({"input": ()}, r"input is a scalar; accepted: \[\.\.\., model size\]"),
    "up_weight_1d": ({"up_weight": (16,)}, r"up_weight has shape \(16,\) and down_weight \(5, 16\); accepted"),
    "up_weight_3d": ({"up_weight": (2, 16, 6)}, r"up_weight has shape \(2, 16, 6\)"),
    "down_weight_1d": ({"down_weight": (16,)}, r"down_weight \(16,\); accepted"),
    "down_weight_transposed": ({"down_weight": (16, 5)}, r"down_weight has shape \(16, 5\); .* must be \(16, 16\)"),
    "up_bias": ({"up_bias": ones(6)}, r"up_bias has shape \(6,\); with up_weight \(16, 6\) it must be \(16,\)"),
    "down_bias": ({"down_bias": ones(16)}, r"down_bias has shape \(16,\); .* it must be \(5,\)"),
    "gate_weight": ({"gate_weight": ones(6, 16)}, r"gate_weight has shape \(6, 16\); .* it must be \(16, 6\)"),
    "gate_bias": (
        {"gate_weight": ones(16, 6), "gate_bias": ones(1)},
        r"gate_bias has shape \(1,\); .* it must be \(16,\)",
    ),
}


@pytest.mark.parametrize("mistake", FFN_SHAPES)
def test_ffn_refuses_shapes_that_do_not_fit(mistake):
    options, message = FFN_SHAPES[mistake]
    with pytest.raises(ShapeError, match=message):
        ffn(**options)


FFN_TYPES = {
    "input_number": ({"input": 3}, "input is a int; accepted: a torch.Tensor"),
    "down_weight_none": ({"down_weight": None}, "down_weight is a NoneType; accepted: a torch.Tensor"),
    "input_int": ({"input": ones(9, 6).long()}, "input has dtype torch.int64; accepted: float64, float32"),
    "up_weight_half": ({"up_weight": ones(16, 6).half()}, "up_weight has dtype torch.float16 and input torch.float32"),
    "up_bias_double": ({"up_bias": ones(16).double()}, "up_bias has dtype torch.float64 and input torch.float32"),
    "gate_weight_bool": ({"gate_weight": ones(16, 6).bool()}, "gate_weight has dtype torch.bool; accepted: float64"),
}


@pytest.mark.parametrize("mistake", FFN_TYPES)
def test_ffn_refuses_types_that_do_not_fit(mistake):
    options, message = FFN_TYPES[mistake]
    with pytest.raises(DTypeError, match=message):
        ffn(**options)


def test_ffn_refuses_an_unknown_activation():
    with pytest.raises(ConfigError, match=r"activation='gleu' is not accepted: give one of 'relu',.*mean 'gelu'"):
        ffn(activation="gleu")


def test_ffn_refuses_an_activation_that_is_a_function():
    with pytest.raises(ConfigError, match=r"activation=.*relu.* is not accepted: give one of 'relu',"):
        ffn(activation=torch.relu)
    with pytest.raises(ConfigError, match=r"activation=\[\] is not accepted: give one of 'relu',"):
        ffn(activation=[])


def test_ffn_refuses_a_gate_bias_without_a_gate():
    with pytest.raises(TopKError, match=r"gate_bias.*gate_weight"):
        ffn(gate_bias=ones(16))


@pytest.mark.parametrize("call", [attention, ffn])
def test_k_is_a_keyword_that_must_be_given(call):
    function = getattr(topk_fx, call.__name__)
    with pytest.raises(TypeError, match="'k'"):
        function(ones(2, 2), ones(2, 2), ones(2, 2))


@pytest.mark.parametrize(
    ("error", "builtin"), [(ConfigError, ValueError), (ShapeError, ValueError), (DTypeError, TypeError)]
)
def test_error_is_of_topk_fx_and_of_the_builtin_kind(error, builtin):
    assert issubclass(error, TopKError)
    assert issubclass(error, builtin)
