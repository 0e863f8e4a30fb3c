"""Guesses what the forward of a Hugging Face model accepts, from its signature and its configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

Inputs = dict[str, Any]
BATCH, LENGTH = 2, 16


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments to try, the likeliest first. Every text has padding, so that masks matter."""
    guesses = _Guesses(model)
    images: list[Inputs] = []
    for source in (guesses.images, guesses.audio, guesses.series, guesses.texts, guesses.features):
        for guess in source():
            guess = guesses.completed(guess)
            if source == guesses.images and {"input_ids", "decoder_input_ids"} <= guess.keys():
                images.append({k: v for k, v in guess.items() if k != "decoder_input_ids"})
            yield guess
    yield from images
    yield guesses.completed({})


def with_placeholders(inputs: Inputs, model: nn.Module, error: str) -> list[Inputs]:
    """The same inputs with as many image tokens as there are image features, if an error says that these differ."""
    numbers = [int(x) for x in re.findall(r"\d+", error)]
    names = ("image_token_id", "image_token_index", "media_placeholder_token_id", "audio_token_id", "audio_token_index")
    token = _first(model.config, *names)
    if "input_ids" not in inputs or not numbers or token is None or "token" not in error.lower():
        return []
    told = re.search(r"features:?\s*(\d+)", error)
    count = int(told.group(1)) if told else max(numbers[:2])
    if count > 4096:
        return []
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == token, 7)
    found = []
    for n in {count // len(ids), count} - {0}:
        filled = torch.cat([ids[:, :4], torch.full((len(ids), n), token), ids[:, 4:]], 1)
        new = {**inputs, "input_ids": filled}
        if "attention_mask" in new:
            new["attention_mask"] = torch.ones_like(filled)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in new or name in inspect.signature(model.forward).parameters:
                new[name] = (filled == token).long()
        found.append(new)
    return found


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the attributes that is set."""
    return next((x for name in names if (x := getattr(config, name, None)) is not None), default)


class _Guesses:
    def __init__(self, model: nn.Module) -> None:
        config = self.config = model.config
        parameters = inspect.signature(model.forward).parameters
        self.takes = set(parameters)
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.required = [
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self.main = getattr(model, "main_input_name", "input_ids")
        self.generator = torch.Generator().manual_seed(0)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = _first(text, "vocab_size", default=_first(config, "vocab_size"))
        self.vocabulary = vocabulary if isinstance(vocabulary, int) and vocabulary else 200
        hidden = _first(text, "hidden_size", "d_model", default=64)
        self.hidden = hidden if isinstance(hidden, int) else 64
        least = min(10, max(1, self.vocabulary - 2))
        self.ids = torch.randint(
            least, max(min(self.vocabulary, 800), least + 1), (BATCH, LENGTH), generator=self.generator
        )
        self.ids %= self.vocabulary
        self.mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        self.mask[1, -4:] = 0
        self.text = {"input_ids": self.ids} if "input_ids" in self.takes else {}
        if "attention_mask" in self.takes and self.main in ("input_ids", "inputs_embeds"):
            self.text["attention_mask"] = self.mask
        self.decoder: Inputs = {"decoder_input_ids": self.ids[:, :8]} if "decoder_input_ids" in self.takes else {}
        if "use_cache" in self.takes:
            self.decoder["use_cache"] = False
        self._read_vision(config)

    def _read_vision(self, config: Any) -> None:
        names = ("vision_config", "backbone_config", "vision_encoder_config", "image_encoder_config", "encoder")
        inner = [x for name in names if isinstance(x := getattr(config, name, None), PreTrainedConfig)]
        vision = config if hasattr(config, "image_size") or not inner else inner[0]
        channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
        self.channels = channels if isinstance(channels, int) else 3
        image = _first(vision, "image_size", "input_size", "img_size", default=64)
        self.image = _pair(64 if isinstance(image, dict) else image)
        patch = _first(vision, "patch_size", default=16)
        self.patch = _pair(16 if isinstance(patch, dict) else patch)[0]
        frames, temporal = _first(vision, "num_frames", default=4), _first(vision, "temporal_patch_size", default=2)
        self.frames = frames if isinstance(frames, int) else 4
        self.patch_values = self.channels * (temporal if isinstance(temporal, int) else 2) * self.patch**2

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def completed(self, guess: Inputs) -> Inputs:
        """What forward takes of a guess, and something for each argument that it requires."""
        guess = {name: value for name, value in guess.items() if name in self.takes or self.takes_any}
        return {**guess, **{name: self._value(name) for name in self.required if name not in guess}}

    def images(self) -> Iterator[Inputs]:
        if "pixel_values" in self.takes:
            for pixels in self._pixels():
                count = len(pixels["pixel_values"]) if pixels["pixel_values"].dim() > 2 else 1
                count = count if count <= BATCH else 1
                words = {name: x[:count] for name, x in {"attention_mask": self.mask, **self.text}.items()}
                decoder = {name: x[:count] if isinstance(x, Tensor) else x for name, x in self.decoder.items()}
                pixels = {name: x for name, x in pixels.items() if name in self.takes}
                has_words = "input_ids" in self.takes
                yield {**pixels, **(words if has_words else {}), **decoder}
                if has_words and "input_ids" not in self.required and self.main == "pixel_values":
                    yield {**pixels, **self.decoder}
        if self.main == "pixel_values_videos":
            yield {"pixel_values_videos": self.draw(1, self.frames, self.channels, *self.image)}

    def _pixels(self) -> Iterator[Inputs]:
        c, (h, w) = self.channels, self.image
        yield {"pixel_values": self.draw(BATCH, c, h, w)}
        if h < 224:
            yield {"pixel_values": self.draw(1, c, 224, 224)}
        yield {"pixel_values": self.draw(1, self.frames, c, h, w)}
        if {"pixel_position_ids", "pixel_attention_mask", "spatial_shapes"} & self.takes:
            grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).view(1, 16, 2)
            patches = {"pixel_values": self.draw(1, 16, c * self.patch**2)}
            mask = torch.ones(1, 16, dtype=torch.long)
            yield {**patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]])}
            yield {**patches, "pixel_position_ids": grid}
            whole = torch.ones(1, 1, h, w, dtype=torch.bool)
            yield {"pixel_values": self.draw(1, 1, c, h, w), "pixel_attention_mask": whole}
        yield {"pixel_values": self.draw(64, self.patch_values), "image_grid_thw": torch.tensor([[1, 8, 8]])}
        ratios = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long)}
        yield {"pixel_values": self.draw(1, 1, c, h, w), **ratios}
        for crops, scale in ((1, 1), (5, 2)):
            sizes = torch.tensor([[h * scale, w * scale]])
            yield {"pixel_values": self.draw(1, crops, c, h, w), "image_sizes": sizes}
        yield {"pixel_values": self.draw(1, c, h, w), "image_sizes": torch.tensor([[h, w]])}
        yield {"pixel_values": self.draw(1, c, 512, 512)}

    def audio(self) -> Iterator[Inputs]:
        names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "feat_dim", "input_dim")
        inner = ("encoder_config", "audio_config", "speech_config", "audio_encoder_config", "thinker_config")
        configs = [self.config, *(getattr(self.config, name, None) for name in inner)]
        mel = next((x for config in configs if isinstance(x := _first(config, *names), int)), 80)
        if self.main == "input_features" or "input_features" in self.required:
            frames = 2 * _first(self.config, "max_source_positions", default=100)
            shapes = ((2, mel, frames), (2, frames, mel), (2, 100, mel), (2, mel, 100), (1, 64, 160), (1, mel, 3000))
            for shape in shapes:
                guess = {"input_features": self.draw(*shape), **self.decoder}
                if "attention_mask" in self.takes and shape[2] == mel:
                    yield {**guess, "attention_mask": torch.ones(shape[:2], dtype=torch.long)}
                if "input_ids" in self.text:
                    yield {**guess, "input_ids": self.ids[: shape[0]]}
                if "feature_lens" in self.takes:
                    yield {"input_features": self.draw(mel, 64), "feature_lens": torch.tensor([64])}
                yield guess
        if self.main == "input_values" or "input_values" in self.required:
            for shape in (
                (1, 16000),
                (1, 1, 16000),
                (1, _first(self.config, "max_length", default=1024), mel),
                (1, 100, 80),
            ):
                guess = {"input_values": self.draw(*shape)}
                if "decoder_input_values" in self.takes:
                    guess["decoder_input_values"] = self.draw(1, 10, mel)
                yield {**guess, **{name: x[:1] if isinstance(x, Tensor) else x for name, x in self.decoder.items()}}

    def series(self) -> Iterator[Inputs]:
        if "past_values" not in self.takes:
            return
        context, future = (_first(self.config, n, default=32) for n in ("context_length", "prediction_length"))
        lags, width = (
            _first(self.config, "lags_sequence", default=[0]) or [0],
            _first(self.config, "input_size", default=1),
        )
        past, features = context + max(lags), _first(self.config, "num_time_features", default=0)
        yield {
            "past_values": self.draw(2, past) if width == 1 else self.draw(2, past, width),
            "past_observed_mask": torch.ones(2, past), "past_time_features": self.draw(2, past, features),
            "future_values": self.draw(2, future), "future_time_features": self.draw(2, future, features),
        }  # fmt: skip
        yield {"past_values": self.draw(2, context, _first(self.config, "num_input_channels", default=1))}
        frequency = {"freq": torch.zeros(2, 1, dtype=torch.long)} if "freq" in self.takes else {}
        yield {"past_values": self.draw(2, context), "past_values_padding": torch.zeros(2, context), **frequency}
        yield {"past_values": [self.draw(context), self.draw(context)], **frequency}

    def texts(self) -> Iterator[Inputs]:
        if not self.text:
            return
        base = {**self.text, **self.decoder}
        if "bbox" in self.takes:
            for box in (
                self.zeros(BATCH, LENGTH, 4),
                *(torch.rand(BATCH, LENGTH, n, generator=self.generator) for n in (4, 8)),
            ):
                yield {**base, "bbox": box}
        if "visual_feats" in self.takes:
            size = _first(self.config, "visual_feat_dim", default=64)
            yield {**base, "visual_feats": self.draw(BATCH, 5, size), "visual_pos": self.draw(BATCH, 5, 4)}
        if "token_type_ids" in self.takes:
            yield {**base, "token_type_ids": self.zeros(BATCH, LENGTH)}
        yield base
        books = _first(self.config, "num_codebooks", "n_codes_total", default=0)
        if isinstance(books, int) and books > 1:
            codes = (self.ids % max(self.vocabulary - 1, 2))[:, :, None].expand(BATCH, LENGTH, books).contiguous()
            yield {**self.text, "input_ids": codes}
            yield {**base, "decoder_input_ids": self.zeros(BATCH * books, 4)}
        unmasked = {name: x for name, x in base.items() if name != "attention_mask"}
        yield unmasked
        for length in (64, 256):
            mask = {"attention_mask": torch.ones(BATCH, length, dtype=torch.long)} if "attention_mask" in base else {}
            yield {**unmasked, "input_ids": self.ids.repeat(1, length // LENGTH), **mask}

    def features(self) -> Iterator[Inputs]:
        """Vectors in the place of tokens."""
        mask = {"attention_mask": self.mask} if "attention_mask" in self.takes else {}
        if "inputs_embeds" in self.takes:
            yield {"inputs_embeds": self.draw(BATCH, LENGTH, self.hidden), **mask}
        if "hidden_states" in self.takes:
            yield {"hidden_states": self.draw(BATCH, LENGTH, self.hidden)}
            for name in ("grid_thw", "image_grid_thw"):
                yield {"hidden_states": self.draw(64, self.patch_values), name: torch.tensor([[1, 8, 8]])}
        if "inputs" in self.takes:
            for names in (("d_model", "hidden_size"), ("d_latents",)):
                yield {"inputs": self.draw(BATCH, LENGTH, _first(self.config, *names, default=64))}
        if "states" in self.takes:
            sizes = (_first(self.config, name, default=n) for name, n in (("state_dim", 17), ("act_dim", 4)))
            states, actions = (self.draw(1, 6, size) for size in sizes)
            steps = {"timesteps": torch.arange(6)[None], "attention_mask": torch.ones(1, 6)}
            rewards = {"rewards": self.draw(1, 6, 1), "returns_to_go": self.draw(1, 6, 1)}
            yield {"states": states, "actions": actions, **rewards, **steps}

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long)

    def _value(self, name: str) -> Any:
        """Something for a required argument, by its name."""
        match name:
            case "image_grid_thw" | "grid_thw" | "video_grid_thw":
                return torch.tensor([[1, 8, 8]])
            case "context_input_ids" | "labels":
                return self.ids
            case "qformer_input_ids" | "task_inputs":
                return self.ids[:1]
            case "prompt_pixel_values" | "prompt_masks":
                return self.draw(1, self.channels, *self.image)
            case "pixel_values_videos":
                return self.draw(1, self.frames, self.channels, *self.image)
            case "spatial_shapes":
                return torch.tensor([[4, 4]])
            case "position_ids":
                return torch.arange(LENGTH)[None]
            case "attention_mask":
                return self.mask
            case "pixel_attention_mask":
                return torch.ones(1, 16, dtype=torch.long)
            case "input_features_mask":
                return torch.ones(1, 100, dtype=torch.bool)
            case "freq":
                return self.zeros(2, 1)
            case "timesteps":
                return torch.zeros(2)
            case "audio_codes":
                return self.zeros(2, 4, 8)
            case "audio_values":
                return self.draw(1, 1, 1024)
            case "bbox":
                return self.zeros(BATCH, LENGTH, 4)
            case "token_type_ids":
                return self.zeros(BATCH, LENGTH)
            case "input_points":
                return torch.zeros(1, 1, 1, 2)
            case "target_values":
                return self.draw(2, 32)
        return self.draw(BATCH, 8 if name == "query_embeds" else LENGTH, self.hidden)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (int(size[0]), int(size[-1])) if isinstance(size, Sequence) else (int(size), int(size))
