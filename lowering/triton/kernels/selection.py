"""The k largest of a row, exactly: ties to the lowest index, NaN above every number."""

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-(2**31))
"""What stands for no score at all: below the key of every score."""

LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite float32. A threshold is never lower, so that a key that is masked out (-inf) is never above one."""


@triton.jit
def to_key(score):
    """float32 as int32 in the same order: NaN above all, and -0.0 equal to 0.0."""
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score != score, float("nan"), score)
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def to_score(key):
    """The float32 whose key it is."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cut_for(keys, k):
    """A cut such that k of keys [N] are at or above it, or, if equal keys stand in the way, the k-th largest itself.

    LOWEST_KEY if fewer than k are above that. Finds it bit by bit, from the sign down: a bit is set if as many as k
    keys are then still at or above the cut.
    """
    cut = tl.min(keys, 0) * 0 + LOWEST_KEY
    bit = cut
    count = k - 1
    while (bit != 0) & (count != k):
        candidate = cut ^ bit  # of the highest bit this makes 0, the middle of int32
        count = tl.sum((keys >= candidate).to(tl.int32), 0)
        cut = tl.where(count >= k, candidate, cut)
        bit = (bit >> 1) & 0x7FFFFFFF
    return cut


@triton.jit
def take_largest(keys, k):
    """Which of keys [N] are the k largest, of equal ones the first, none that is LOWEST_KEY; and the `cut_for` them."""
    cut = cut_for(keys, k)
    is_above = keys > cut
    is_equal = (keys == cut) & (keys > LOWEST_KEY)
    free = k - tl.sum(is_above.to(tl.int32), 0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= free)), cut


@triton.jit
def threshold_at(cut):
    """The score of a cut, or the lowest of all where it is none: of no key, infinity or NaN."""
    return tl.where((cut > -0x7F800000) & (cut < 0x7F800000), to_score(cut), LOWEST_SCORE)


@triton.jit
def threshold_above(cut):
    """The score just above a cut: keys that come later and equal it come too late."""
    return tl.where(cut >= 0x7F800000, float("inf"), to_score(cut + 1))


@triton.jit
def bit_count(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF
