"""Whether a site that could be rewritten is: what the configuration says about it."""

from __future__ import annotations

from topk_fx.activation import ACTIVATIONS
from topk_fx.config import DEFAULT_FFN_K, Keep, SiteConfig, kept_count

from .sites import AttentionSite, FFNSite, Refusal


def judge_attention(site: AttentionSite, config: SiteConfig, pays: bool) -> Refusal | None:
    """Why an attention site stays dense under a configuration, or None. `pays`: whether top-k would take less time."""
    if not config.enabled:
        return Refusal("disabled_by_config", "sites= turns it off", site.output)
    key_count = site.scores_shape[-1] if site.scores_shape is not None else None
    if isinstance(key_count, int) and config.k != "all" and kept_count(config.k, key_count) >= key_count:
        return Refusal("k_covers_all_keys", f"k={config.k} keeps all {key_count} keys", site.output)
    if config.when == "pays" and not pays:
        return Refusal("dense_is_faster", "give k or when='always' to rewrite it", site.output)
    return None


def judge_ffn(site: FFNSite, config: SiteConfig, pays: bool, lowering: str | None) -> Refusal | None:
    """Why an FFN site stays dense under a configuration, or None.

    `pays`: whether top-k would take less time; `lowering`: the one that is forced.
    """
    if not config.enabled:
        return Refusal("disabled_by_config", "sites= turns it off", site.output)
    if config.ffn_k is None and not ACTIVATIONS[site.activation].is_relu_like:
        return Refusal(
            "ffn_k_not_given", f"{site.activation} units are rarely zero: give ffn_k to rewrite it", site.output
        )
    hidden_size = site.hidden_size
    if not isinstance(hidden_size, int):
        return Refusal("shape_unknown", "the shape of the up projection's weight was not traced", site.output)
    keep = ffn_keep(config)
    if keep != "all" and kept_count(keep, hidden_size) >= hidden_size:
        return Refusal("k_covers_all_units", f"ffn_k={keep} keeps all {hidden_size} units", site.output)
    if config.ffn_when == "pays" and not pays:
        return Refusal("dense_is_faster", "give ffn_k or when='always' to rewrite it", site.output)
    if site.up is None and lowering in ("cpu", "triton"):
        detail = "the kernels start at an up projection, which is the down projection of another FFN here"
        return Refusal("layer_in_two_ffns", detail, site.output)
    return None


def ffn_keep(config: SiteConfig) -> Keep:
    return DEFAULT_FFN_K if config.ffn_k is None else config.ffn_k
