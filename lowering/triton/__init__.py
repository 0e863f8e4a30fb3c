"""The lowering for GPUs: Triton kernels. Triton is imported when one of them runs.

    availability            whether they can compute an attention, or why not
    forward, backward       which of them run for given tensors, with which block sizes
    ffn                     the same for FFNs
    arguments, score_code   how tensors and score functions are handed to them
    launch                  whether they are started at once, or from code that Inductor generates
    kernels/
      bound                 a threshold for each query, below its k-th largest score        \\
      collect               the keys at or above it                                          | prefill, training
      finish                exact scores of these, selection, softmax, sum of the values    /
      decode                the same for few queries: all scores are written, K is read once
      backward              the sparse gradients
      ffn                   hidden units, selection, and the sum of the kept columns
      scores, selection     what these share
"""

from .availability import why_not
from .backward import attention_backward
from .ffn import ffn_backward, ffn_forward, ffn_why_not
from .forward import attention_forward

__all__ = ["attention_backward", "attention_forward", "ffn_backward", "ffn_forward", "ffn_why_not", "why_not"]
