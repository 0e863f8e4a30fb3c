"""op -> kernel: registers what computes each topk_fx op. ATen chunks serve every device, C++ kernels
processors, Triton kernels GPUs."""

from topk_fx.ops import library

from . import aten, cpu, dispatch, triton
from .choice import choose, lowering_of, lowering_to_run, pays

library.impl("attention_forward", dispatch.attention_forward, "CompositeExplicitAutograd")
library.impl("attention_backward", dispatch.attention_backward, "CompositeExplicitAutograd")
library.impl("ffn_forward", aten.ffn_forward, "CompositeExplicitAutograd")
library.impl("ffn_backward", aten.ffn_backward, "CompositeExplicitAutograd")

__all__ = ["aten", "choose", "cpu", "lowering_of", "lowering_to_run", "pays", "triton"]
