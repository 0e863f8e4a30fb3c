"""Keys with a copy in int8, by which decoding finds the few keys that it must read."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import DTypeError, ShapeError
from .shapes import PANEL_KEYS, column_quads


class ScreenedKeys:
    """A copy of keys in int8, with proven bounds of what rounding changed: attention by it is the same and reads less.

    Kept beside the key cache of a decoder, and given to `topk_fx.attention(..., screened_keys=...)` together with the
    keys themselves. A step of up to eight query rows a key head reads the copy, D + 12 bytes a key, and then only those
    keys whose bounds allow them to be among the k largest; the selection, and each bit of the result, are those without
    the copy. Scores may be masked (booleans, causal) to be screened, but not biased.

    Args:
        key: [B, H, L, D], floating-point; it is read once, and not kept.
        capacity: how many keys there is room for without another allocation; by default a quarter more than L.

    On a device or processor without kernels for it (they need AVX512-VNNI and AVX512-BF16, float32, bfloat16 or float16
    and D up to 512) there is no copy, `why_no_copy` says why, and attention computes all scores.

    The copy is of the keys as they were: after a key was overwritten in the cache, build it anew. It has no gradient.

    Raises:
        ShapeError, DTypeError: key or rows are not accepted; the message says why.
    """

    length: int
    why_no_copy: str

    def __init__(self, key: Tensor, *, capacity: int | None = None) -> None:
        from .lowering.cpu.key_copy import why_no_copy  # topk_fx.lowering imports what stands beside this file

        _check_rows("key", key)
        key = key.detach()
        self.shape, self.dtype, self.length = (*key.shape[:2], key.size(-1)), key.dtype, 0
        self.why_no_copy = why_no_copy(key)
        # Any mean gives true bounds: that of the first keys makes them narrow.
        mean = key.float().mean(2) if key.size(2) else key.new_zeros(self.shape, dtype=torch.float32)
        self.means = torch.where(mean.abs() < 2.0**30, mean, 0.0)
        self.panels, self.facts = self._allocate(0)
        self._reserve(max(key.size(2) + key.size(2) // 4 if capacity is None else capacity, key.size(2)))
        self.extend(key)

    def extend(self, rows: Tensor) -> None:
        """Adds keys `length`, `length` + 1 ..., rows [B, H, n, D] of the keys' dtype, in place where there is room."""
        _check_rows("rows", rows)
        if (*rows.shape[:2], rows.size(-1)) != self.shape or rows.dtype != self.dtype:
            batch, heads, size = self.shape
            raise ShapeError(
                f"rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; "
                f"these keys take [{batch}, {heads}, n, {size}] of {self.dtype}"
            )
        length = self.length + rows.size(2)
        if not self.why_no_copy:
            if length > self.capacity:
                self._reserve(length + length // 2)
            torch.ops.topk_fx.copy_keys(rows.detach(), self.panels, self.facts, self.means, self.length)
        self.length = length

    @property
    def capacity(self) -> int:
        """How many keys there is room for."""
        return self.panels.size(2) * PANEL_KEYS

    def _allocate(self, panels: int) -> tuple[Tensor, Tensor]:
        batch, heads, size = self.shape
        integers = self.means.new_zeros(batch, heads, panels, column_quads(size) * 4 * PANEL_KEYS, dtype=torch.uint8)
        return integers, self.means.new_zeros(batch, heads, panels, 3, PANEL_KEYS)

    def _reserve(self, keys: int) -> None:
        if self.why_no_copy:
            return
        used, before = self.panels.size(2), (self.panels, self.facts)
        self.panels, self.facts = self._allocate(-(-keys // PANEL_KEYS))
        for new, old in zip((self.panels, self.facts), before, strict=True):
            new[:, :, :used] = old


def _check_rows(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name} is a {type(x).__name__}; accepted: a torch.Tensor")
    if not x.is_floating_point():
        raise DTypeError(f"{name} has dtype {x.dtype}; accepted: float64, float32, bfloat16, float16")
    if x.dim() != 4 or 0 in (x.size(0), x.size(1), x.size(3)):
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; accepted: [batch, heads, length, head size]")
