"""Tiny models of Hugging Face architectures with random weights, and inputs that they accept. Nothing is downloaded.

    model, inputs = build("llama", "sdpa")  # eval mode, float32, CPU; inputs: keyword arguments of forward
    outputs = model(**inputs)

A configuration is shrunk field by field, to two layers or one of each kind. Where that breaks an architecture, whose
fields may depend on each other, a wider size is tried. What the rules cannot know stands in SIZES and MODEL_CLASSES.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tiny_inputs import candidates, with_placeholders

WIDTHS = {"tiny": 64, "middle": 512, "full": None}
"""The sizes that are tried, and the hidden size that each allows; "full" leaves every width as it is."""

_WIDE = [
    "colqwen2",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "sam3",
]
_FULL = [
    "codegen", "csm", "donut-swin", "efficientnet", "florence2", "gptj", "layoutlmv3", "lilt", "mamba2", "mimi",
    "moonshine", "reformer", "sam", "sam_hq", "sapiens2", "swin", "xclip", "zamba2",
]  # fmt: skip
SIZES = {**dict.fromkeys(_WIDE, "middle"), **dict.fromkeys(_FULL, "full")}
"""Where the sizes before this one are known not to run."""

MODEL_CLASSES = {
    "edgetam_video": "EdgeTamModel", "llama4": "Llama4ForConditionalGeneration", "qwen3_5": "Qwen3_5Model",
    "qwen3_5_moe": "Qwen3_5MoeModel", "reformer": "ReformerModel", "sam3_video": "Sam3TrackerModel",
}  # fmt: skip
"""Where the first class that transformers names for an architecture does not run by itself."""

TASKS = (
    "FOR_SPEECH_SEQ_2_SEQ", "FOR_CAUSAL_LM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_MASKED_LM",
    "FOR_MULTIMODAL_LM", "FOR_IMAGE_CLASSIFICATION", "FOR_PRETRAINING", "FOR_KEYPOINT_MATCHING", "FOR_OBJECT_DETECTION",
    "FOR_DEPTH_ESTIMATION", "FOR_TEXT_TO_WAVEFORM", "FOR_MASK_GENERATION", "FOR_TIME_SERIES_PREDICTION",
)  # fmt: skip
MOST_PARAMETERS = 6e8


class NotBuilt(Exception):
    """No tiny model of an architecture ran; the message says why the first that was tried did not."""


def architectures() -> list[str]:
    """The model types of the installed transformers that have a model class."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if _model_classes(name))


def build(architecture: str, attention: str = "eager") -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode and keyword arguments that its forward accepts: the same ones in every call.

    Args:
        architecture: a `model_type` of transformers.
        attention: its `attn_implementation`, "eager" or "sdpa".

    Raises:
        NotBuilt: no size, model class and inputs were found that run, or the model has no such attention.
    """
    problem = ""
    sizes = list(WIDTHS)
    for size in sizes[sizes.index(SIZES.get(architecture, "tiny")) :]:
        for name in _model_classes(architecture):
            try:
                model = _model(architecture, name, size, attention)
            except Exception as error:
                if "does not support an attention implementation" in str(error):
                    raise NotBuilt(f"{architecture} has no {attention} attention") from None
                problem = problem or f"{name}: {type(error).__name__}: {error}"
                continue
            try:
                return model, _find_inputs(model)
            except NotBuilt as error:
                problem = problem or f"{name}: {error}"
    raise NotBuilt(f"{architecture}: {' '.join(problem.split())[:300]}")


def _model_classes(architecture: str) -> list[str]:
    """The names of at most two model classes, the likeliest first."""
    names: list[str] = []
    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_"), {})
        found = mapping.get(architecture, ())
        names += [name for name in ([found] if isinstance(found, str) else found) if name not in names]
    return [MODEL_CLASSES[architecture]] if architecture in MODEL_CLASSES else names[:2]


def _model(architecture: str, name: str, size: str, attention: str) -> nn.Module:
    model_class = getattr(transformers, name)
    config = tiny_config(CONFIG_MAPPING[architecture], size)
    if size != "tiny":
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class._from_config(config).parameters())
        if parameters > MOST_PARAMETERS:
            raise NotBuilt(f"{parameters:.1e} parameters")
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=attention).eval()


def _find_inputs(model: nn.Module) -> dict[str, Any]:
    """The first candidate that the model runs on."""
    problem = ""
    for candidate in candidates(model):
        attempts = [candidate]
        for attempt in attempts:
            try:
                torch.manual_seed(0)
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model(**attempt)
                return attempt
            except Exception as error:
                problem = problem or f"{', '.join(attempt)}: {type(error).__name__}: {error}"
                if attempt is candidate:
                    attempts += with_placeholders(candidate, model, str(error))
    raise NotBuilt(problem)


# The largest value that a field of a configuration may have, for fields that mean the same.
LAYERS = {
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers", "encoder_num_layers", "decoder_num_layers", "depth",
    "num_hidden_groups", "decoder_num_hidden_layers", "encoder_num_hidden_layers", "num_blocks", "layers",
    "num_residual_layers", "num_block_repeats", "memory_attention_num_layers", "perceiver_depth", "l_layers",
    "r_layers", "x_layers", "vision_layers", "text_layers",
}  # fmt: skip
HEADS = {
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "attention_heads", "heads", "decoder_num_attention_heads", "encoder_num_attention_heads",
    "num_decoder_attention_heads", "num_encoder_attention_heads", "nhead",
}  # fmt: skip
KEY_HEADS = {
    "num_key_value_heads", "num_kv_heads", "decoder_num_key_value_heads", "encoder_num_key_value_heads",
    "multi_query_group_num",
}  # fmt: skip
HIDDEN = {
    "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "embedding_size", "encoder_hidden_size",
    "decoder_hidden_size", "width", "embedding_dim", "emb_dim", "model_dim", "encoder_hidden_dim",
    "encoder_embed_dim", "decoder_embed_dim", "d_embed", "projection_dim", "hidden_size_global",
    "word_embed_proj_dim", "out_hidden_size", "text_embed_dim", "output_hidden_size", "decoder_hidden_dim", "out_dim",
    "fusion_hidden_size", "projector_hidden_size", "text_hidden_size", "vision_hidden_size", "attention_hidden_size",
    "lru_width", "output_dim", "backbone_hidden_size", "pooler_hidden_size", "hidden_channels",
}  # fmt: skip
INNER = {
    "intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_inner", "mlp_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size", "ffn_hidden_size",
    "decoder_intermediate_size", "dim_feedforward", "encoder_intermediate_size", "ffn_intermediate_size",
    "shared_intermediate_size", "intermediate_size_mlp", "feed_forward_dim", "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size", "encoder_ffn_size", "expert_intermediate_size", "adapter_hidden_size",
}  # fmt: skip
AT_EVERY_SIZE = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "sliding_window": 8, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "num_nextn_predict_layers": 0, "n_words": 1000,
}  # fmt: skip
WHERE_UNSET = {"num_experts_per_tok": 2, "prediction_length": 8}
WHERE_NARROW = {"n_shared_experts": 1, "top_k_experts": 2, "index_topk": 8, "index_n_heads": 4, "index_head_dim": 16}
_HEAD_SIZES = {
    "head_dim", "d_kv", "kv_channels", "attention_head_dim", "dim_head", "global_head_dim", "qk_nope_head_dim",
    "v_head_dim", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim", "ssm_state_size",
    "num_mel_bins",
}  # fmt: skip
WHERE_TINY = {
    **dict.fromkeys(_HEAD_SIZES, 16),
    "moe_k": 2, "linear_num_key_heads": 2, "max_position_embeddings": 128, "n_positions": 128, "mamba_n_heads": 8,
    "mamba_num_heads": 8, "qk_rope_head_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 32, "linear_num_value_heads": 4,
    "max_window_layers": 1, "num_queries": 8, "num_denoising": 8, "max_num_queries": 8, "num_query_tokens": 8,
}  # fmt: skip


def tiny_config(
    config_class: type[PreTrainedConfig], size: str, like: PreTrainedConfig | None = None
) -> PreTrainedConfig:
    """A small configuration of a class; `like` is what it is made from, by default the class's own default."""
    values = dict((config_class() if like is None else like).__dict__)
    is_hierarchical = isinstance(values.get("depths"), Sequence)  # as Swin: the widths of stages depend on each other
    changes = _changes(values, size, is_hierarchical)
    if getattr(config_class, "model_type", "") == "dbrx":
        changes["attn_config"] = {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}
    if like is not None:  # what the parent's default has set
        default = config_class().__dict__
        kept = {k: v for k, v in values.items() if not k.startswith("_") and k in default and v != default[k]}
        changes = {**kept, **changes}
    config = config_class(**changes)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def _changes(values: Mapping[str, Any], size: str, is_hierarchical: bool) -> dict[str, Any]:
    """The fields that get another value."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = tiny_config(type(value), size, value)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], PreTrainedConfig):
            changes[name] = type(value)(tiny_config(type(x), size, x) for x in value)
    depth = 2
    if is_hierarchical:
        changes["depths"] = type(values["depths"])(min(2 if n < 2 else 1, x) for n, x in enumerate(values["depths"]))
    else:
        depth, lists = _one_layer_of_each_kind(values)
        changes |= lists
    special = [k for k, v in values.items() if k.endswith(("_token_id", "_token_index", "_id")) and _is_int(v, 1000)]
    changes |= {name: 900 + n for n, name in enumerate(sorted(special))}
    if isinstance(values.get("eos_token_id"), list):
        changes["eos_token_id"] = 2
    heads = next((values[name] for name in ("num_attention_heads", "num_heads", "n_head") if name in values), None)
    for name, value in values.items():
        if _is_int(value):
            bound = _bound(name, value, size, is_hierarchical, depth, value == heads)
            changes |= {} if bound is None or value <= bound else {name: bound}
    if size != "full":
        changes |= _narrow_images(values) | _narrow_heads(values, WIDTHS[size] or 0, size)
    changes |= {
        name: n for name, n in {"num_experts_per_tok": 2, "prediction_length": 8}.items() if values.get(name, n) is None
    }
    return changes | _rope(values, changes, size)


def _bound(name: str, value: int, size: str, is_hierarchical: bool, depth: int, as_many_as_heads: bool) -> int | None:
    """The largest value of a field, or None."""
    if is_hierarchical and name in LAYERS | HIDDEN | HEADS:
        return None
    if name in LAYERS:
        return depth if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") else 2
    if name.endswith("vocab_size") and name != "type_vocab_size":
        return 1000
    tables = [AT_EVERY_SIZE]
    if size != "full":
        width = WIDTHS[size]
        if name in HIDDEN:
            return width
        if name in INNER:
            return 96 if size == "tiny" else 256
        if name in HEADS:
            return 4
        if name in KEY_HEADS:
            return 4 if as_many_as_heads else 2
        tables.append(WHERE_NARROW)
    if size == "tiny":
        tables.append(WHERE_TINY)
    return next((table[name] for table in tables if name in table), None)


def _one_layer_of_each_kind(values: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many layers are kept, two at least, and the fields that list a value for each layer cut to those."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    depth = next((values[name] for name in names if _is_int(values.get(name))), 0)
    if depth <= 2:
        return 2, {}
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == depth and k[0] != "_"}
    kept: dict[tuple[str, ...], int] = {}
    for layer in range(depth):
        kind = tuple(str(v[layer]) for v in lists.values() if isinstance(v[layer], (str, bool, type(None))))
        kept.setdefault(kind, layer)
    layers = list(kept.values())[:6]
    layers = sorted(layers + [n for n in range(depth) if n not in layers][: max(0, 2 - len(layers))])
    return len(layers), {name: type(v)(v[n] for n in layers) for name, v in lists.items()}


def _narrow_images(values: Mapping[str, Any]) -> dict[str, Any]:
    image, patch = values.get("image_size"), values.get("patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
    if isinstance(image, (list, tuple)) and all(map(_is_int, image)):
        return {"image_size": type(image)(min(x, 64) for x in image)}
    if _is_int(image) and image > 64:
        return {"image_size": max(4 * patch, 32) if _is_int(patch) and patch else 64}
    return {}


def _narrow_heads(values: Mapping[str, Any], width: int, size: str) -> dict[str, Any]:
    changes = {"head_dim": width // 4} if values.get("head_dim", 0) is None else {}
    if size == "tiny" and "qk_rope_head_dim" in values:  # of latent attention, whose head size is a sum
        changes |= {"head_dim": 8} if "head_dim" in values else {}
        changes |= {"qk_head_dim": 24} if _is_int(values.get("qk_head_dim")) else {}
    return changes


def _rope(values: Mapping[str, Any], changes: Mapping[str, Any], size: str) -> dict[str, Any]:
    rope = values.get("rope_parameters", 0)
    if isinstance(rope, dict) and "mrope_section" in rope and size == "tiny":  # sections add up to half the head size
        head_size = changes.get("head_dim") or values.get("head_dim") or 16
        half = int(head_size // 2 * (rope.get("partial_rotary_factor") or 1.0))
        count = len(rope["mrope_section"])
        sections = [half // count + (half % count if n == 0 else 0) for n in range(count)]
        return {"rope_parameters": {**rope, "mrope_section": sections}}
    if rope is None or rope == {} or (isinstance(rope, dict) and rope.get("rope_theta", 0) is None):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return {}


def _is_int(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
