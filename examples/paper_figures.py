"""Figures that the paper publishes, read from its plots: float32, a GPU of 2021, forward and backward.

Gupta et al. 2021, *Memory-efficient Transformers via Top-k Attention*, arXiv:2106.06899.
"""

from __future__ import annotations

PAPER: dict[str, dict[str, dict[int, tuple[float, float]]]] = {
    # Batch 1, 12 heads of 64, chunks of 1,024 queries; by length.
    "attention": {
        "vanilla": {2048: (1.06, 0.179), 4096: (4.82, 0.223), 10240: (29.7, 0.377)},
        "chunked dense": {2048: (0.86, 0.204), 4096: (1.69, 0.224), 10240: (4.31, 0.416), 61440: (28.6, 8.59)},
        "paper's code, k=128": {2048: (0.24, 0.184), 4096: (0.58, 0.219), 10240: (1.17, 0.372), 61440: (9.63, 7.09)},
    },
    # 512 x 512 tokens of 768, chunks of 16,384 tokens; by hidden size.
    "ffn": {
        "vanilla": {2048: (9.27, 0.458), 6144: (26.3, 1.00)},
        "paper's code, k=512": {2048: (7.78, 0.657), 6144: (8.04, 1.25), 65536: (12.3, 9.86)},
    },
    # 12 layers, chunks of 1,024 queries; by length.
    "model": {
        "vanilla": {2048: (9.24, 0.338)},
        "chunked dense": {16384: (14.4, 7.48)},
        "paper's code, k=64": {2048: (1.40, 0.441), 16384: (11.2, 6.00), 32768: (28.0, 21.9)},
    },
}
"""For each part and rival, by size: GiB and seconds."""
