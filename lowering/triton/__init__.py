"""The lowering for GPUs: Triton kernels. Triton is imported when one of them runs.

    availability      whether they can compute an attention, or why not
    launch            which of them run for given tensors, with which block sizes
    score_code        a score function as text that the kernels call
    kernels/
      bound           a threshold for each query, below its k-th largest score      \\
      collect         the keys above it                                              | prefill and training
      finish          exact scores of these, selection, softmax, sum of the values  /
      decode          the same for few queries: all scores are written, K is read once
      backward        the sparse gradients
      scores, selection    what these share
"""

from .availability import why_not
from .launch import attention_backward, attention_forward

__all__ = ["attention_backward", "attention_forward", "why_not"]
