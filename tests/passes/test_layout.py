"""A path of permutations and views takes every tensor that belongs to the scores to the place where the scores go."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same
from topk_fx.passes.emit import Emitter
from topk_fx.passes.layout import Layout, LayoutError, Permute, View, whole_axis
from torch import Tensor, fx

B, H, LQ, LK = 2, 3, 5, 7
SCORES = (B, H, LQ, LK)


def follow(scores: Tensor, layout: Layout) -> Tensor:
    """The moves of a layout as tensor calls: the meaning of `apply`."""
    for move in layout.moves:
        scores = scores.permute(move.dims) if isinstance(move, Permute) else scores.reshape(move.after)
    return scores


def emitted(layout: Layout, x: Tensor, axes: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """What the nodes emitted for x by `Layout.apply` compute, and where they say that i and j stand."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode() as mode:
        node.meta["val"] = mode.from_tensor(x)
    output = graph.output(node)
    moved, axes = layout.apply(Emitter(output), node, axes)
    output.args = (moved,)
    return fx.GraphModule({}, graph)(x), axes


def paths(keys: int) -> dict[str, Layout]:
    """Ways from the product to the softmax, of scores [B, H, LQ, keys]."""
    scores = (B, H, LQ, keys)
    start = Layout((), (-2, -1), 4)
    transposed = start.then(Permute((0, 1, 3, 2)))
    return {
        "none": start,
        "transposed": transposed,
        "heads_last": start.then(Permute((0, 2, 3, 1))),
        "heads_joined": start.then(View.between(scores, (B * H, LQ, keys), (2, 3))),
        "grouped_then_transposed": start.then(View.between(scores, (B, 1, H, LQ, keys), (2, 3))).then(
            Permute((0, 1, 2, 4, 3))
        ),
        "transposed_then_joined": transposed.then(View.between((B, H, keys, LQ), (B * H, keys, LQ), (3, 2))),
    }


PATHS = paths(LK)


@pytest.mark.parametrize("path", PATHS)
def test_layout_moves_scores_and_axes_together(path: str) -> None:
    layout = PATHS[path]
    scores = torch.arange(math.prod(SCORES), dtype=torch.float32).view(SCORES)
    moved, axes = emitted(layout, scores, (-2, -1))
    assert_same(moved, follow(scores, layout))
    i, j = (axis % moved.dim() for axis in axes)
    assert (i, j) == tuple(axis % moved.dim() for axis in layout.axes)
    assert (moved.size(i), moved.size(j)) == (LQ, LK)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape", [(LQ, LK), (1, LK), (LK,), (H, 1, LK), (B, 1, 1, LK), (B, 1, LQ, 1), (1, H, LQ, LK)], ids=str
)
def test_layout_moves_a_mask_as_its_broadcast_scores(path: str, shape: tuple[int, ...]) -> None:
    """A mask may lack axes of the scores or have 1 in their place; afterwards it still broadcasts to the same."""
    layout = PATHS[path]
    mask = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    end = follow(mask.expand(SCORES), layout)
    moved, _ = emitted(layout, mask if mask.dim() > 1 else mask.unsqueeze(0), (-2, -1))
    assert_same(moved.expand(end.shape), end)


@pytest.mark.parametrize("path", PATHS)
def test_layout_inverse_returns_to_the_start(path: str) -> None:
    layout = PATHS[path]
    scores = torch.arange(math.prod(SCORES), dtype=torch.float32).view(SCORES)
    there, axes = emitted(layout, scores, (-2, -1))
    back, axes = emitted(layout.inverse((-2, -1)), there, axes)
    assert_same(back, scores)
    assert tuple(axis % 4 for axis in axes) == (2, 3)


@pytest.mark.parametrize("path", PATHS)
def test_layout_moves_a_query_of_another_size(path: str) -> None:
    """The query has D where the scores have keys, so views must use its own size there."""
    query = torch.randn(B, H, LQ, 11)
    moved, axes = emitted(PATHS[path], query, (-2, -1))
    assert_same(moved, follow(query, paths(11)[path]))
    assert [moved.size(axis) for axis in axes] == [LQ, 11]


def test_view_that_joins_queries_and_heads_is_refused() -> None:
    with pytest.raises(LayoutError, match="splits or joins the queries or keys"):
        View.between(SCORES, (B, H * LQ, LK), (2, 3))


def test_view_that_splits_keys_is_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"a view from \(2, 3, 5, 8\) to \(2, 3, 5, 4, 2\) splits or joins the queries or keys"
    ):
        View.between((B, H, LQ, 8), (B, H, LQ, 4, 2), (2, 3))


def test_view_that_swaps_equal_sizes_is_not_mistaken_for_none() -> None:
    """[6, 4, 4] seen as [4, 6, 4]: a key axis of the right size, but other elements."""
    with pytest.raises(LayoutError):
        View.between((6, 4, 4), (4, 6, 4), (1, 2))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_whole_axis_is_found_exactly_where_its_elements_stay_together(data: st.DataObject) -> None:
    """Whatever is found has the axis' size, and elements with equal index on it have equal index where it was found."""
    before = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    factors = [n for size in before for n in ([2, 2] if size == 4 and data.draw(st.booleans()) else [size])]
    cuts = data.draw(st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1))
    after = [factors[0]]
    for size, is_cut in zip(factors[1:], cuts, strict=True):
        if is_cut:
            after.append(size)
        else:
            after[-1] *= size
    axis = data.draw(st.integers(0, len(before) - 1))
    index = torch.arange(before[axis]).view([-1 if n == axis else 1 for n in range(len(before))]).expand(before)
    viewed = index.reshape(after)
    try:
        found = whole_axis(before, after, axis)
    except LayoutError:
        assert tuple(after) != before
        return
    expected = torch.arange(after[found]).view([-1 if n == found else 1 for n in range(len(after))]).expand(after)
    assert torch.equal(viewed, expected)
