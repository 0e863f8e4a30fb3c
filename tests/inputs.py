"""What the tests feed the ops, and how near to the definition a result must come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topk_fx import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tolerance(dtype: torch.dtype) -> float:
    """What rounding explains, as a share of the largest magnitude: once to `dtype`, and some dozen times in between.

    The latter in the dtype that `reference.compute` takes: a score, an exponential, a sum and a product each.
    """
    return torch.finfo(dtype).eps + 32 * torch.finfo(reference.compute(torch.empty(0, dtype=dtype)).dtype).eps


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """`actual` is `expected` up to `tolerance` of its dtype; NaN and inf stand in the same places."""
    finite = expected.detach().double()[expected.isfinite()]
    magnitude = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=0,
        atol=tolerance(actual.dtype) * magnitude,
        equal_nan=True,
    )


def integers(*shape: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None) -> Tensor:
    """Integers from -2 to 2. Scores of them are exact in every dtype and in any order of summation.

    So equal scores are ties for every lowering, there are many, and no two others are near enough to be taken for one.
    """
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def attention_inputs(
    batch: Sequence[int] = (2,),
    heads: int = 3,
    queries: int = 9,
    keys: int = 11,
    head_size: int = 4,
    value_size: int = 5,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value as leaves that require a gradient; the sizes are odd, and no two the same."""
    key_heads = heads if key_heads is None else key_heads
    query = integers(*batch, heads, queries, head_size, dtype=dtype, generator=generator)
    key = integers(*batch, key_heads, keys, head_size, dtype=dtype, generator=generator)
    value = torch.randn(*batch, key_heads, keys, value_size, generator=generator).to(dtype)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def separated_inputs(keys: int = 6, key_heads: int = 2, **sizes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """float64 inputs whose scores lie so far apart that no finite difference changes a selection."""
    for _ in range(1000):
        shape = {"batch": (1,), "heads": 2, "queries": 4, "head_size": 3, "value_size": 2, **sizes}
        query, key, value = attention_inputs(keys=keys, key_heads=key_heads, dtype=torch.float64, **shape)
        query, key = torch.randn_like(query), torch.randn_like(key)
        scores = query @ key.repeat_interleave(query.size(1) // key_heads, 1).transpose(-2, -1)
        if (scores.sort().values.diff().amin() > 0.01).item():
            return query.requires_grad_(), key.requires_grad_(), value
    raise AssertionError("no draw in a thousand has separated scores: ask for fewer queries or keys")


def _embedded(x: Tensor, before: int, after: int, step: int, dim: int) -> Tensor:
    """x as a slice of a larger tensor that is NaN everywhere else."""
    shape = list(x.shape)
    shape[dim] = before + shape[dim] * step + after
    larger = x.new_full(shape, torch.nan)
    index = [slice(None)] * x.dim()
    index[dim] = slice(before, before + x.size(dim) * step, step)
    larger[tuple(index)] = x
    return larger[tuple(index)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "length_before_heads": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "head_size_before_length": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "every_second_row": lambda x: _embedded(x, 1, 0, 2, -2),
    "columns_of_wider_rows": lambda x: _embedded(x, 2, 1, 1, -1),
    "heads_of_packed_qkv": lambda x: _embedded(x, 1, 2, 1, -3),
    "expanded_over_heads": lambda x: x[..., :1, :, :].expand_as(x),
}
"""Ways in which a tensor can lie in memory; all keep its values, but for the expanded one."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in a layout, as a leaf that requires a gradient."""
    return LAYOUTS[layout](x.detach()).requires_grad_()


def double(x: Any) -> Any:
    """A copy in float64, with a gradient of its own, of a tensor that has one; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def assert_matches(op: Callable[..., Tensor], definition: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Value and every gradient of `op` are those of `definition` in float64. Returns the op's value."""
    actual = op(*args, **kwargs)
    args64 = [double(x) for x in args]
    kwargs64 = {name: double(x) for name, x in kwargs.items()}
    expected = definition(*args64, **kwargs64)
    assert actual.shape == expected.shape
    assert_near(actual, expected)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    given64 = [x for x in (*args64, *kwargs64.values()) if isinstance(x, Tensor) and x.requires_grad]
    if given:
        grad = torch.randn(actual.shape).to(actual.dtype)
        actual_grads = torch.autograd.grad(actual, given, grad)
        expected_grads = torch.autograd.grad(expected, given64, grad.double())
        for x, actual_grad, expected_grad in zip(given, actual_grads, expected_grads, strict=True):
            assert actual_grad.dtype == x.dtype
            assert actual_grad.shape == x.shape
            assert_near(actual_grad, expected_grad)
    return actual


class LargestTensor(TorchDispatchMode):
    """While it is entered: the largest tensor that an ATen call makes, in elements, views of its arguments not counted.

    It sees the calls of a function, not those inside an op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.op = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                numel = x.untyped_storage().nbytes() // x.element_size()
                self.numel, self.op = max((self.numel, self.op), (numel, str(func)))
        return output
