"""Inner loops of published kernels on sm_90, as others' sources and machine code give them: not measured here.

Shares are of the tensor cores' clocks, as in `model.py`. Reached is the throughput their authors publish for long
sequences without a mask (FlashAttention-3, arXiv:2407.08608, and the benchmarks of its repository), on H100.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    name: str
    pass_: str
    head_dim: int
    instructions: int  # an iteration
    per_element: float | None
    ex2: float
    issue: float
    shared: float
    reached: int | None  # TFLOP/s

    @property
    def ceiling(self) -> float:
        return 989 / max(1.0, self.ex2, self.issue, self.shared)


PUBLISHED = (
    Published("FlashAttention-3 128x176", "fwd", 128, 594, 6.75, 0.51, 0.42, 0.84, None),
    Published("FlashAttention-3 128x128", "fwd", 128, 469, 7.3, 0.52, 0.46, 0.88, None),
    Published("FlashAttention-3 192x192", "fwd", 64, 632, 6.6, 1.02, 0.82, 1.25, 497),
    Published("Triton, 128x128", "fwd", 128, 490, 7.7, 0.52, 0.48, 0.88, None),
    Published("ThunderKittens 192x128", "fwd", 128, 597, 9.3, 0.52, 0.58, 0.79, None),
    Published("FlashAttention-3 80x128", "bwd", 128, 510, None, 0.20, 0.32, 1.09, None),
)
