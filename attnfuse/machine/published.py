"""Inner loops of published kernels on sm_90, read from machine code by the model of `model.py`: nothing is timed here.

FlashAttention-3's, but for the one whose line names no commit, are of its own sources (github.com/Dao-AILab/
flash-attention, hopper/ at commit 0251105 of August 2026, CUTLASS at its submodule's 7127592), of the kernel that runs
where nothing is asked for: bf16, no mask, softcap, varlen, GQA, split or paging. One instantiation a file, such as

    #include "flash_bwd_launch_template.h"
    template void run_flash_bwd<90, 128, 80, 128, cutlass::bfloat16_t, false, false, false, false, false, false,
                                2, 2, true, false, true, 2, 1, 2, 1, false>(Flash_bwd_params&, cudaStream_t);

with the arguments of its run_mha_bwd_hdim64, 128 and 256, or run_flash_fwd's with clusters of two where it has them,
compiled by nvcc 13.0.88 with the flags of its setup.py:

    nvcc -cubin -arch=sm_90a -O3 -std=c++17 --expt-relaxed-constexpr --expt-extended-lambda --use_fast_math -DNDEBUG
        -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DCUTLASS_ENABLE_GDC_FOR_SM90 -Ihopper -Icutlass/include
    attnfuse inspect --object bwd128.cubin --tile 80x128 --warps 8 --block-warps 12 --depths 128 128 128 128 128
        --copied 40960 --reduced 40960

Copied are the bytes that bulk copies bring to shared memory for a tile: K and V rows in the forward, Q and dO rows in
the backward. Reduced is what bulk reductions, by a warp of their own, read there to add a tile of dQ: rows x head dim
x 4 bytes; at 256 the loop itself adds dQ, from registers. The other lines are others' figures, whose shares of shared
memory are of products and copies alone. Reached is the throughput their authors publish for long sequences without a
mask (FlashAttention-3, arXiv:2407.08608, and the benchmarks of its repository), on H100.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    name: str
    pass_: str
    head_dim: int
    instructions: int  # an iteration
    per_element: float
    ex2: float  # clocks relative to the tensor cores', as the next two
    issue: float
    shared: float
    reached: int | None  # TFLOP/s
    compiled: bool = False  # as the first paragraph says

    @property
    def title(self) -> str:
        return f"{self.name} *" if self.compiled else self.name

    @property
    def ceiling(self) -> float:
        return 989 / max(1.0, self.ex2, self.issue, self.shared)


def flash_attention_3(pass_: str, head_dim: int) -> Published:
    """FlashAttention-3's kernel for "fwd" or "bwd" without a mask at head dim 64, 128 or 256."""
    (found,) = (p for p in PUBLISHED if p.compiled and (p.pass_, p.head_dim) == (pass_, head_dim))
    return found


PUBLISHED = (
    Published("FlashAttention-3 192x192", "fwd", 64, 618, 6.44, 1.02, 0.80, 1.271, 497, compiled=True),
    Published("FlashAttention-3 128x176", "fwd", 128, 580, 6.59, 0.51, 0.41, 0.852, None, compiled=True),
    Published("FlashAttention-3 128x80", "fwd", 256, 459, 11.47, 0.26, 0.36, 0.966, None, compiled=True),
    Published("FlashAttention-3 128x128", "bwd", 64, 705, 11.02, 0.40, 0.55, 1.325, None, compiled=True),
    Published("FlashAttention-3 80x128", "bwd", 128, 506, 12.65, 0.20, 0.32, 1.19, None, compiled=True),
    Published("FlashAttention-3 64x80", "bwd", 256, 509, 25.45, 0.10, 0.32, 1.46, None, compiled=True),
    Published("FlashAttention-3 128x128", "fwd", 128, 469, 7.3, 0.52, 0.46, 0.88, None),
    Published("Triton, 128x128", "fwd", 128, 490, 7.7, 0.52, 0.48, 0.88, None),
    Published("ThunderKittens 192x128", "fwd", 128, 597, 9.3, 0.52, 0.58, 0.79, None),
)
