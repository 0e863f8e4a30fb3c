"""The lowering for processors: C++ kernels, compiled on first use."""

from .attention import attention_backward, attention_forward, why_not
from .build import why_unavailable

__all__ = ["attention_backward", "attention_forward", "why_not", "why_unavailable"]
