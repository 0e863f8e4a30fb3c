"""The lowering for processors: C++ kernels, compiled on first use."""

from .attention import attention_forward, prepare, why_not
from .attention_backward import attention_backward
from .ffn import ffn_backward, ffn_forward, ffn_why_not

__all__ = [
    "attention_backward",
    "attention_forward",
    "ffn_backward",
    "ffn_forward",
    "ffn_why_not",
    "prepare",
    "why_not",
]
