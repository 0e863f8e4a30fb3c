"""A sample of the zoo (examples/zoo.py): models of every kind, whose attention is all rewritten and gives dense."""

from __future__ import annotations

import pytest

import zoo

SAMPLE = {
    "albert": "one layer used twice",
    "bart": "encoder and decoder",
    "beit": "images, with a bias of relative positions",
    "bloom": "linear biases, baddbmm",
    "bros": "boxes on a page, an einsum of positions",
    "clip": "text and images",
    "convbert": "attention beside dynamic convolution",
    "deepseek_v3": "latent attention: keys and values of different size",
    "diffllama": "the difference of two attentions",
    "distilbert": "padding alone",
    "falcon": "one head of keys for all queries",
    "gemma2": "soft caps and sliding windows",
    "gpt2": "Conv1D layers",
    "gpt_neox": "rotary positions on a part of the head",
    "gpt_oss": "sinks, and experts between the layers",
    "lxmert": "attention across text and images",
    "mistral": "a sliding window",
    "mpt": "biases of positions and a boolean mask",
    "opt": "learned positions",
    "qwen3": "normed queries and keys",
    "roformer": "rotary positions spelled out",
    "t5": "buckets of relative positions",
    "time_series_transformer": "a time series",
    "vit": "images, no mask",
    "wav2vec2": "sound",
}
"""Architectures, and what each adds."""

EAGER_ALONE = {
    "bloom", "bros", "convbert", "gemma2", "gpt_oss", "lxmert", "mpt", "roformer", "time_series_transformer",
}  # fmt: skip
"""Which have no other implementation of attention."""

RUNS = [(name, "eager") for name in SAMPLE] + [(name, "sdpa") for name in SAMPLE if name not in EAGER_ALONE]

DATA_DEPENDENT_BIAS = {"beit", "bros"}
"""Whose bias is a tensor of queries x keys that no positions tell: no other leaves one."""


@pytest.mark.parametrize(("architecture", "attention"), RUNS)
def test_attention_of_architecture_is_rewritten_and_gives_dense(architecture: str, attention: str) -> None:
    result = zoo.run(architecture, attention)
    assert (result.problem, result.detail) == ("", "")
    sites = result.of_kind("attention")
    assert sites
    assert [site.reason for site in sites] == [""] * len(sites)
    if architecture not in DATA_DEPENDENT_BIAS:
        assert [site.mask_bytes for site in sites] == [0] * len(sites)
