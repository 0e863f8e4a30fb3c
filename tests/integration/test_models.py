"""Tiny random models of transformers: every attention is rewritten, under both of its implementations."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import KeepingTopK, assert_same, drawn
from torch import Tensor, nn

import topk_fx

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCABULARY = 2, 9, 31


def token_ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, Tensor]:
    """Token ids of which one sequence is padded on the left, as for generation."""
    return {"input_ids": token_ids(), "attention_mask": (torch.arange(LENGTH) >= torch.tensor([[0], [3]])).long()}


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model class with a small configuration, its inputs, and how many attentions it has."""

    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    attentions: int
    has_sdpa: bool = True

    def build(self, implementation: str, **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.settings, **settings}, attn_implementation=implementation)
        return getattr(transformers, self.model)(config).eval()


CASES = {
    "bert": Case("BertModel", "BertConfig", SMALL, padded, 1),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2},
                  lambda: {**padded(), "use_cache": False}, 1),
    "mistral": Case("MistralForCausalLM", "MistralConfig", {**SMALL, "num_key_value_heads": 2, "sliding_window": 4},
                    lambda: {**padded(), "use_cache": False}, 1),
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config",
                   {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
                    "attn_logit_softcapping": 2.0},
                   lambda: {**padded(), "use_cache": False}, 2, has_sdpa=False),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config",
                 {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": VOCABULARY},
                 lambda: {**padded(), "use_cache": False}, 1),
    "t5": Case("T5ForConditionalGeneration", "T5Config",
               {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY,
                "decoder_start_token_id": 0},
               lambda: {**padded(), "decoder_input_ids": token_ids(1, 6), "use_cache": False}, 3, has_sdpa=False),
    "vit": Case("ViTModel", "ViTConfig",
                {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                 "image_size": 12, "patch_size": 4},
                lambda: {"pixel_values": drawn(BATCH, 3, 12, 12)}, 1),
    "whisper": Case("WhisperModel", "WhisperConfig",
                    {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
                     "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
                     "max_source_positions": 10, "max_target_positions": 12, "vocab_size": VOCABULARY,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
                    lambda: {"input_features": drawn(BATCH, 8, 20), "decoder_input_ids": token_ids(1, 6),
                             "use_cache": False}, 3),
}  # fmt: skip
RUNS = [(name, impl) for name, case in CASES.items() for impl in ("eager", "sdpa") if impl == "eager" or case.has_sdpa]


def tensors_of(output: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(dict(output)) if isinstance(x, Tensor)]


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, backend="topk", fullgraph=True, options={"inner": "eager", **options})


def attention_sites() -> list[topk_fx.Site]:
    return [site for report in topk_fx.reports() for site in report if site.kind == "attention"]


@pytest.mark.parametrize(("name", "implementation"), RUNS, ids=lambda part: str(part))
def test_every_attention_is_rewritten_and_all_keys_give_dense(name: str, implementation: str) -> None:
    case = CASES[name]
    model, inputs = case.build(implementation), case.inputs()
    with torch.no_grad():
        expected = tensors_of(model(**inputs))
        found = tensors_of(compiled(model, k="all", ffn_k="all")(**inputs))
    assert_same(found, expected)
    assert [(site.rewritten, site.reason) for site in attention_sites()] == [(True, "")] * case.attentions


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_gradients_with_all_keys_are_those_of_dense(name: str) -> None:
    """In training mode, with every dropout at 0."""
    case = CASES[name]
    gradients = []
    for is_compiled in (False, True):
        model = case.build("eager").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        run = compiled(model, k="all") if is_compiled else model
        output = tensors_of(run(**case.inputs()))[0]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        gradients.append({n: zeros[n] if p.grad is None else p.grad for n, p in model.named_parameters()})
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    assert_same(*({n: gradient / largest for n, gradient in found.items()} for found in gradients))
    assert [site.rewritten for site in attention_sites()] == [True] * case.attentions


@pytest.mark.parametrize(("name", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager")])
def test_finite_k_is_the_reference_and_not_dense(name: str, implementation: str) -> None:
    case = CASES[name]
    model, inputs = case.build(implementation), case.inputs()
    with torch.no_grad():
        dense = model(**inputs).logits
        with KeepingTopK(2):
            expected = model(**inputs).logits
        found = compiled(model, k=2)(**inputs).logits
    kept = inputs["attention_mask"].bool()  # what a padded position puts out depends on how its empty row is filled
    assert_same(found[kept], expected[kept])
    assert (found[kept] - dense[kept]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "mistral"])
def test_every_rewrite_is_validated(name: str) -> None:
    """Padding, causal and sliding-window masks, grouped heads, and a table of relative positions."""
    case = CASES[name]
    model, inputs = case.build("eager"), case.inputs()
    compiled(model, k=2, ffn_k=2, validate="raise")(**inputs)
    _, exported = topk_fx.rewrite(torch.export.export(model, (), inputs, strict=False), k=2, ffn_k=2, validate="raise")
    for report in (*topk_fx.reports(), exported):
        assert [site.reason for site in report] == [""] * len(report)
        assert not [site.detail for site in report if "validation" in site.detail]
        assert len([site for site in report if site.kind == "attention"]) == case.attentions


def test_sites_are_named_by_their_modules() -> None:
    case = CASES["bert"]
    options = {"k": 2, "sites": {"encoder.layer.0.*": False}}
    compiled(case.build("sdpa", num_hidden_layers=2), **options)(**case.inputs())
    assert [(site.where, site.reason) for site in attention_sites()] == [
        ("encoder.layer.0.attention.self", "disabled_by_config"),
        ("encoder.layer.1.attention.self", ""),
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_exported_model_is_rewritten(implementation: str) -> None:
    case = CASES["bert"]
    model, inputs = case.build(implementation), case.inputs()
    program, report = topk_fx.rewrite(torch.export.export(model, (), inputs, strict=False), k="all")
    assert [site.rewritten for site in report if site.kind == "attention"] == [True] * case.attentions
    with torch.no_grad():
        assert_same(tensors_of(program.module()(**inputs)), tensors_of(model(**inputs)))


def test_generation_with_cache_gives_the_tokens_of_dense() -> None:
    """Prefill, then a query at a time over a growing cache."""
    model = CASES["llama"].build("sdpa")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**padded(), **options)
    model.forward = torch.compile(model.forward, backend="topk", options={"k": "all", "inner": "eager"})
    assert torch.equal(model.generate(**padded(), **options), expected)
    sites = attention_sites()
    assert sites
    assert all(site.rewritten for site in sites)
