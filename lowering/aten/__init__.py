"""The lowering that runs anywhere: chunks of ATen calls."""

from .attention import attention_backward, attention_forward
from .ffn import ffn_backward, ffn_forward
from .sparse_ffn import sparse_ffn_backward

__all__ = ["attention_backward", "attention_forward", "ffn_backward", "ffn_forward", "sparse_ffn_backward"]
