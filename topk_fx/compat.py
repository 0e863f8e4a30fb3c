"""What differs between torch 2.11 and 2.15, and every torch internal that topk_fx stands on, in one place."""

from __future__ import annotations

from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

SingleLevelFunction = _SingleLevelFunction
"""The base of an autograd.Function that runs inside the dispatcher, below functorch's own levels.

`torch.autograd.Function.apply` hands over to functorch while one of its transforms is active; an op's kernel is called
when functorch has already peeled off its level, so that it must record on that level alone.
"""

single_level_autograd = enable_single_level_autograd_function
"""Allows `SingleLevelFunction.apply` while a functorch transform is active."""
