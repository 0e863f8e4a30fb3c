"""Score functions that leave the gradients of kept scores as they are, so that a backward needs no code for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from topk_fx.score import Name, Program


def keeps_gradients(program: Program, operands: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether a program does nothing but mask keys out, and whether it does nothing but add terms.

    In both cases the gradient of a kept score is that of its product.
    """
    only_masks = only_adds = True
    current = Name("s")
    for number, call in enumerate(program.operations):
        name = Name(f"%{number}")
        if name not in program.score_dependent:
            continue
        others = [x for x in call.arguments if x != current]
        first_alone = call.arguments[0] == current and len(others) == len(call.arguments) - 1
        is_boolean = call.name == "mask" and operands[call.arguments[1].index].dtype == torch.bool
        only_masks &= first_alone and (is_boolean or (call.name in ("keep", "fill") and call.arguments[2] == -math.inf))
        only_adds &= len(others) == 1 and (call.name == "add" or (first_alone and call.name in ("sub", "mask")))
        only_adds &= not is_boolean
        current = name
    is_result = current == program.result
    return only_masks and is_result, only_adds and is_result
