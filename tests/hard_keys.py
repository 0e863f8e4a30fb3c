"""Keys, or queries, of which int8 knows little, or too little: what screening must not lose a key of."""

from __future__ import annotations

import math

import torch
from inputs import integers


def normal(*shape, dtype=torch.float32, generator=None):
    return torch.randn(shape, generator=generator).to(dtype)


def near_ties(key, generator):
    """All keys within the margin of each other, and float32 tells some of them apart."""
    return (key[..., :1, :] + 1e-6 * key).contiguous()


def rising(key, generator):
    return key * 0.01 + torch.arange(key.size(-2)).view(-1, 1) / 100


def clusters(key, generator):
    """Hundreds of keys in the same place, then others."""
    return torch.cat(
        [key[..., :1, :].expand_as(key)[..., : key.size(-2) // 2, :], key[..., key.size(-2) // 2 :, :]], -2
    )


def one_value(where, x):
    def change(key, generator):
        key = key.clone()
        key[(*where, 0)] = x
        return key

    return change


HARD = {
    "ties": lambda key, generator: integers(*key.shape, generator=generator),
    "all_equal": lambda key, generator: torch.ones_like(key),
    "all_zero": lambda key, generator: torch.zeros_like(key),
    "near_ties": near_ties,
    "rising": rising,
    "falling": lambda key, generator: -rising(key, generator),
    "clusters": clusters,
    "large_key": lambda key, generator: key * torch.where(torch.arange(key.size(-2)) == 5, 1e4, 1.0).view(-1, 1),
    "large_column": lambda key, generator: key * torch.where(torch.arange(key.size(-1)) == 0, 1e4, 1.0),
    "large_mean": lambda key, generator: key + 1000,
    "many_sizes": lambda key, generator: key * torch.logspace(-6, 6, key.size(-2)).view(-1, 1),
    "huge": lambda key, generator: key * 1e37,
    "tiny": lambda key, generator: key * 1e-37,
    "subnormal": lambda key, generator: key * 1e-42,
    "infinite_key": one_value((0, 0, -1), math.inf),
    "nan_key": one_value((0, 0, 3), math.nan),
}
"""Each makes hard keys [B, H, L, D] of random ones, from a generator if it draws."""
