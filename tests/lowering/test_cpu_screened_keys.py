"""Decoding by a copy of the keys in int8: the copy and its bounds, and results that are those without it, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hard_keys import HARD, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, assert_near
from topk_fx.lowering.cpu import build, screening
from torch.library import opcheck

import topk_fx
from topk_fx import ScreenedKeys
from topk_fx.errors import ConfigError, DTypeError, ShapeError, UnsupportedDerivativeError

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
needs_vnni = pytest.mark.skipif(
    bool(build.why_unavailable()) or not screening.is_available(),
    reason=f"no C++ compiler ({build.why_unavailable()}), or no AVX512-VNNI beside AVX512-BF16",
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(query, key, value, screened=None, **options):
    """Attention by a copy of the keys is attention, bit by bit. Returns what became of the rows, and the output."""
    screened = ScreenedKeys(key) if screened is None else screened
    options = {"k": 16, "enable_gqa": True, **options}
    expected = topk_fx.attention(query, key, value, **options)
    with screening.forced(False) as counts:
        actual = topk_fx.attention(query, key, value, screened_keys=screened, **options)
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert actual.isnan().equal(expected.isnan())
    return counts, actual


def in_float64(screened, head_size):
    """The copy's integers times their steps, without the rotation, [B, H, capacity, D]; and the facts [B, H, capacity]."""
    batch, heads, panels, _ = screened.panels.shape
    integers = screened.panels.view(batch, heads, panels, -1, 32, 4).permute(0, 1, 2, 4, 3, 5)
    integers = integers.reshape(batch, heads, panels * 32, -1)[..., :head_size].double() - 128
    step, lost, left = (x.reshape(batch, heads, -1).double() for x in screened.facts.unbind(3))
    size = head_size & -head_size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.size(0) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / math.sqrt(2)
    rotated = (integers * step.unsqueeze(-1)).unflatten(-1, (-1, size)) @ hadamard
    return rotated.flatten(-2), lost, left


# --- the copy


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 4, 33, 40, 64, 96, 512])
def test_bounds_of_the_copy_hold_for_the_keys(size, dtype):
    key = (normal(2, 3, 75, size) * torch.logspace(-3, 3, 75).view(-1, 1) + 5).to(dtype)
    screened = ScreenedKeys(key)
    rounded, lost, left = (x[:, :, :75] for x in in_float64(screened, size))
    centred = key.double() - screened.means.double().unsqueeze(2)
    error = (centred - rounded).norm(dim=-1)
    assert error.le(lost).all()
    assert rounded.norm(dim=-1).le(left).all()
    slack = 1e-5 * math.sqrt(size) * (key.double().norm(dim=-1) + 10 * math.sqrt(size))
    assert lost.le(error + slack).all(), "the bound is that of this key, and hardly more"
    assert error.le(0.02 * math.sqrt(size) * centred.norm(dim=-1) + slack).all(), "and int8 holds most of it"


@needs_vnni
def test_keys_that_cannot_be_bounded_say_so():
    key = normal(1, 1, 40, 16)
    key[0, 0, 3, 5], key[0, 0, 4, 5], key[0, 0, 5, 5] = math.nan, -math.inf, 1e30
    lost = ScreenedKeys(key).facts[0, 0, :, 1].flatten()
    assert lost.isinf().nonzero().flatten().tolist() == [3, 4, 5]


@needs_vnni
@pytest.mark.parametrize("steps", [(1,) * 40, (7, 1, 100, 0, 32), (300,)])
def test_extended_copy_is_that_of_all_keys(steps):
    key = normal(2, 2, 50 + sum(steps), 24)
    screened = ScreenedKeys(key[:, :, :50], capacity=90)
    first = screened.panels.data_ptr()
    for length in steps:
        screened.extend(key[:, :, screened.length : screened.length + length])
        assert (screened.panels.data_ptr() == first) == (screened.length <= 96)
    assert screened.length == key.size(2) <= screened.capacity
    whole = ScreenedKeys(key)
    whole.means = screened.means
    torch.ops.topk_fx.copy_keys(key, whole.panels, whole.facts, whole.means, 0)
    full, rest = divmod(key.size(2), 32)
    for x, y in ((screened.panels, whole.panels), (screened.facts, whole.facts)):
        assert x[:, :, :full].equal(y[:, :, :full])
    assert screened.facts[:, :, full, :, :rest].equal(whole.facts[:, :, full, :, :rest])
    check(normal(2, 4, 1, 24), key, normal(2, 2, key.size(2), 8), screened)


def test_copy_of_no_keys_can_be_extended():
    screened = ScreenedKeys(torch.empty(1, 2, 0, 8))
    key = normal(1, 2, 70, 8)
    screened.extend(key)
    check(normal(1, 2, 1, 8), key, key, screened)


# --- attention by it


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "queries"), [(2, 1), (8, 1), (2, 3), (16, 1), (4, 4), (18, 1), (8, 4)])
def test_few_keys_are_read_and_the_output_is_that_of_the_definition(heads, queries, dtype):
    query, key, value = normal(2, heads, queries, 64, dtype=dtype), *(normal(2, 2, 5000, 64, dtype=dtype) for _ in "kv")
    counts, output = check(query, key, value, k=32)
    assert counts.left == 0 < counts.screened
    assert counts.survivors / counts.screened < 3 * 32
    assert_near(output, topk_fx.reference.attention(query, key, value, k=32, enable_gqa=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_keys_are_selected_exactly(name, dtype):
    generator = torch.Generator().manual_seed(3)
    key, value = (normal(1, 2, 3000, 40, generator=generator) for _ in range(2))
    query = normal(1, 4, 1, 40, generator=generator)
    key, query, value = (x.to(dtype) for x in (HARD[name](key, generator), query, value))
    check(query, key, value)
    queries = HARD[name](normal(1, 4, 4, 40, generator=generator), generator).to(dtype)
    for n in range(4):
        check(queries[:, :, n : n + 1], key, value, scale=-0.01)


@needs_vnni
@pytest.mark.parametrize("is_query", [False, True])
def test_best_key_is_kept_although_what_it_meets_rounds_to_nothing(is_query):
    """Either its own column is lost beside a larger one, or the query's is: the bounds alone say what it is worth."""
    key = torch.zeros(1, 1, 3000, 3)
    key[..., :2999, 0] = torch.linspace(-0.01, 0.01, 2999)
    if is_query:
        key[0, 0, -1, 1] = 5.0
        query = torch.tensor([1000.0, 3.0, 0.0])
    else:
        key[..., :2999, 0] *= 100
        key[0, 0, -1, 1:] = torch.tensor([3.0, 1000.0])
        query = torch.tensor([1.0, 1.0, 0.0])
    query = query.view(1, 1, 1, 3)
    counts, output = check(query, key, torch.arange(3000.0).view(1, 1, 3000, 1), k=1, scale=1.0)
    assert (counts.screened > 0, counts.left) == (True, 0)
    assert output.item() == 2999


@needs_vnni
def test_rows_of_which_too_many_keys_survive_are_computed_without_it():
    query, key, value = normal(1, 2, 1, 16), normal(1, 2, 4000, 16), normal(1, 2, 4000, 16)
    key[:, 1] = 1
    counts, _ = check(query, key, value)
    assert min(counts.screened, counts.left) > 0
    counts, _ = check(torch.full_like(query, math.nan), key, value)
    assert counts.screened == 0


@needs_vnni
def test_masked_keys_are_not_read_and_biased_scores_not_screened():
    query, key, value = normal(2, 4, 2, 32), normal(2, 2, 2000, 32), normal(2, 2, 2000, 32)
    for mask in (
        torch.rand(2, 4, 2, 2000) < 0.1,
        torch.arange(2000) < 300,
        torch.zeros(2, 1, 1, 2000, dtype=torch.bool),
    ):
        counts, _ = check(query, key, value, attn_mask=mask)
        assert counts.left == 0 < counts.screened
    counts, _ = check(query, key, value, is_causal=True)
    assert counts.left == 0 < counts.screened
    counts, _ = check(query, key, value, attn_mask=normal(2, 4, 2, 2000))
    assert counts.screened == 0


def test_threads_change_nothing():
    query, key, value = normal(1, 4, 1, 32), normal(1, 2, 6000, 32), normal(1, 2, 6000, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(check(query, key, value, k=40)[1])
    finally:
        torch.set_num_threads(before)
    assert all(x.equal(found[0]) for x in found)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_where_there_is_no_copy_attention_is_the_same(dtype):
    query, key, value = normal(1, 4, 1, 16, dtype=dtype), *(normal(1, 2, 300, 16, dtype=dtype) for _ in "kv")
    with build.instruction_set("portable"):
        screened = ScreenedKeys(key)
        assert screened.why_no_copy
        assert screened.capacity == 0
        assert check(query, key, value, screened)[0].screened == 0
    row = normal(1, 2, 1, 16, dtype=dtype)
    screened.extend(row)
    check(query, torch.cat([key, row], 2), torch.cat([value, row], 2), screened)
    assert ScreenedKeys(normal(1, 1, 4, 513)).why_no_copy


def test_many_queries_do_not_need_it():
    query, key, value = (normal(1, 2, 400, 16) for _ in range(3))
    check(query, key, value, is_causal=True)


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    queries, keys = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 31, 64, 500, 2500]))
    size, layouts = draw(st.sampled_from([1, 7, 32, 64])), sorted(LAYOUTS)
    query = normal(batch, key_heads * group, queries, size, generator=generator)
    key = normal(batch, key_heads, keys, size, generator=generator)
    value = normal(batch, key_heads, keys, 5, generator=generator)
    key = HARD[draw(st.sampled_from(sorted(HARD)))](key, generator) if keys > 5 and draw(st.booleans()) else key
    inputs = [LAYOUTS[draw(st.sampled_from(layouts))](x.to(dtype)) for x in (query, key, value)]
    mask = torch.rand(1, 1, queries, keys, generator=generator) < draw(st.sampled_from([0.05, 0.9]))
    options = {
        "attn_mask": draw(st.sampled_from([None, mask])),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.125, 1.0, -0.5])),
        "k": draw(st.sampled_from([1, 8, 100])),
    }
    return inputs, draw(st.integers(0, keys)), options


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(problems())
def test_any_call_gives_the_same(problem):
    (query, key, value), built, options = problem
    screened = ScreenedKeys(key[:, :, :built])
    screened.extend(key[:, :, built:])
    check(query, key, value, screened, **options)


# --- compiled, and what is not accepted


def test_compiled_step_extends_the_copy_and_attends_by_it():
    def step(query, key, value, row, screened):
        screened.extend(row)
        return topk_fx.attention(
            query, torch.cat([key, row], 2), torch.cat([value, row], 2), k=8, screened_keys=screened
        )

    key, value, query = normal(1, 2, 200, 16), normal(1, 2, 200, 16), normal(1, 2, 1, 16)
    screened, compiled = ScreenedKeys(key), torch.compile(step, fullgraph=True)
    for _ in range(3):
        row = normal(1, 2, 1, 16)
        output = compiled(query, key, value, row, screened)
        key, value = torch.cat([key, row], 2), torch.cat([value, row], 2)
        assert_near(output, topk_fx.attention(query, key, value, k=8))
    assert screened.length == 203
    check(query, key, value, screened)


def test_ops_pass_opcheck():
    key, query = normal(1, 2, 100, 16), normal(1, 4, 1, 16)
    screened = ScreenedKeys(key)
    copy = (screened.panels, screened.facts, screened.means)
    opcheck(torch.ops.topk_fx.attention_screened.default, (query, key, key, [], "causal", 0.5, 8, *copy))
    if not screened.why_no_copy:
        opcheck(torch.ops.topk_fx.copy_keys.default, (normal(1, 2, 3, 16), *copy, 100))


def test_every_refusal_names_what_came():
    key, query = normal(1, 2, 50, 16), normal(1, 2, 1, 16)
    screened = ScreenedKeys(key)
    with pytest.raises(
        ShapeError, match=r"screened_keys is of keys \[1, 2, 50, 16\] .* key has shape \(1, 2, 49, 16\)"
    ):
        topk_fx.attention(query, key[:, :, 1:], key[:, :, 1:], k=4, screened_keys=screened)
    with pytest.raises(DTypeError, match="screened_keys is a Tensor"):
        topk_fx.attention(query, key, key, k=4, screened_keys=key)
    with pytest.raises(ConfigError, match=r"dropout_p=0.1 is not accepted together with screened_keys"):
        topk_fx.attention(query, key, key, k=4, screened_keys=screened, dropout_p=0.1)
    with pytest.raises(ShapeError, match=r"rows has shape \(1, 2, 1, 15\)"):
        screened.extend(normal(1, 2, 1, 15))
    with pytest.raises(ShapeError, match=r"key has shape \(2, 50, 16\)"):
        ScreenedKeys(key[0])
    with pytest.raises(DTypeError, match=r"key has dtype torch.int64"):
        ScreenedKeys(key.long())
    with pytest.raises(UnsupportedDerivativeError, match="has no gradient"):
        topk_fx.attention(query.requires_grad_(), key, key, k=4, screened_keys=screened)
    with torch.no_grad():
        check(query, key, key, screened)


@needs_vnni
def test_op_refuses_a_copy_that_does_not_fit():
    key, query = normal(1, 2, 50, 16), normal(1, 2, 1, 16)
    screened = ScreenedKeys(key)
    copy = [screened.panels, screened.facts, screened.means]
    for n, name in enumerate(("panels", "facts", "means")):
        wrong = [x[:, :1] if m == n else x for m, x in enumerate(copy)]
        with pytest.raises(ShapeError, match=f"{name} has shape"):
            torch.ops.topk_fx.attention_screened(query, key, key, [], "", 0.5, 4, *wrong)
    with pytest.raises(ShapeError, match="panels has room for 64 keys; accepted: for 70 or more"):
        torch.ops.topk_fx.copy_keys(normal(1, 2, 10, 16), *copy, 60)
