"""op -> kernel: registers what computes each topk_fx op. ATen chunks serve every device, C++ kernels
processors, Triton kernels GPUs. Code that Inductor generates calls the op; for Triton kernels it launches these."""

from topk_fx.ops import library

from . import aten, cpu, dispatch, triton
from .choice import choose, ffn_lowering_of, lowering_of, lowering_to_run, pays
from .inductor import register_for

library.impl("attention_forward", dispatch.attention_forward, "CompositeExplicitAutograd")
library.impl("attention_backward", dispatch.attention_backward, "CompositeExplicitAutograd")
library.impl("attention_screened", dispatch.attention_screened, "CompositeExplicitAutograd")
library.impl("copy_keys", dispatch.copy_keys, "CompositeExplicitAutograd")
library.impl("ffn_forward", dispatch.ffn_forward, "CompositeExplicitAutograd")
library.impl("ffn_backward", dispatch.ffn_backward, "CompositeExplicitAutograd")

__all__ = [
    "aten", "choose", "cpu", "ffn_lowering_of", "lowering_of", "lowering_to_run", "pays", "register_for", "triton",
]  # fmt: skip
