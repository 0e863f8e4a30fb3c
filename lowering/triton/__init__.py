"""The lowering for GPUs: Triton kernels. Triton is imported when one of them runs.

    availability            whether they can compute an attention, or why not
    forward, backward       which of them run for given tensors, with which block sizes
    arguments, score_code   how tensors and score functions are handed to them
    kernels/
      bound                 a threshold for each query, below its k-th largest score        \\
      collect               the keys at or above it                                          | prefill, training
      finish                exact scores of these, selection, softmax, sum of the values    /
      decode                the same for few queries: all scores are written, K is read once
      backward              the sparse gradients
      scores, selection     what these share
"""

from .availability import why_not
from .backward import attention_backward
from .forward import attention_forward

__all__ = ["attention_backward", "attention_forward", "why_not"]
