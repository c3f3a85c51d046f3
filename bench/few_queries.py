"""Predicted time of few queries over long keys, plain kernels against split ones: bytes and products, nothing is run.

    python bench/few_queries.py

Method. A pass takes the longest of three times: its bytes over the copy rate of the chip; its bytes over what the
multiprocessors it occupies can draw from the second-level cache (64 bytes a clock each); its products over what these
can multiply. Partials are written and read once at that cache's rate, each further kernel costs a launch. K and V are
read once a pass (twice in the plain backward, whose dQ pass has the forward's grid), dK and dV written once. Both
languages split alike, so the first table is of both.

The second table asks whether the CUDA kernels keep up with the copy: for each tile the clocks that its bytes take at
the multiprocessor's share of the copy rate (K and V, and in the backward dK and dV too), and those of the busiest unit
by docs/machine_code.csv, all rows of the tile being there.
"""

from __future__ import annotations

import re

import torch

from attnfuse.backends import few
from attnfuse.cli import table
from attnfuse.machine import table as machine_code
from attnfuse.triton_kernels import tuning

# NVIDIA H100 SXM: multiprocessors, clock, copy rate, second-level cache, dense bf16 FLOP a clock and multiprocessor.
MULTIPROCESSORS, CLOCK, COPY, CACHE, FLOP = 132, 1.755e9, 3.0e12, 5.5e12, 4096
DRAW = 64 * CLOCK  # bytes a second into one multiprocessor
LAUNCH = 3e-6
SHAPES = [  # name, B, H, Nq, Nk, D
    ("attention pool", 8, 12, 1, 4096, 64),
    ("Q-Former", 1, 12, 32, 16384, 64),
    ("Perceiver resampler", 1, 8, 64, 16384, 128),
    ("Perceiver resampler", 1, 8, 64, 65536, 128),
    ("bottleneck tokens", 2, 12, 4, 8192, 64),
    ("Q-Former, a batch that fills the chip", 32, 12, 32, 16384, 64),
]


def seconds(byte_count: float, products: float, programs: int) -> float:
    """Of one pass, with `products` FLOP, on as many multiprocessors as it has programs for."""
    busy = min(programs, MULTIPROCESSORS)
    return max(byte_count / COPY, byte_count / (busy * DRAW), products / (busy * FLOP * CLOCK))


def predict(batch: int, heads: int, rows: int, keys: int, dim: int) -> tuple[int, float, float, float, float]:
    """Splits, then seconds of the forward, plain and split, and of the backward, plain and query-stationary."""
    grid = batch * heads
    stream = 2 * grid * keys * dim * 2  # K and V, 16 bit
    product = 2 * grid * max(rows, 16) * keys * dim  # of one matrix product
    plain_rows = tuning.tile(90, torch.bfloat16, dim, "fwd").block_m
    plain = grid * -(-rows // plain_rows)
    splits = few.split_count(grid, keys, rows, MULTIPROCESSORS)
    partial = 2 * 4 * splits * grid * rows * (dim + 2) / CACHE + LAUNCH if splits > 1 else 0.0
    ahead = seconds(stream, 2 * product, plain)
    ahead_split = seconds(stream, 2 * product, grid * splits) + partial
    column_tiles = -(-keys // tuning.tile(90, torch.bfloat16, dim, "dkdv").block_n)
    back = seconds(stream, 3 * product, plain) + seconds(2 * stream, 4 * product, grid * column_tiles) + LAUNCH
    back_few = seconds(2 * stream, 5 * product, grid * splits) + partial
    return splits, ahead, ahead_split if 2 * plain <= MULTIPROCESSORS and splits > 1 else ahead, back, back_few


def kernels() -> list[tuple[str, ...]]:
    """For each CUDA kernel: pass, head dim, rows, KB of a tile, clocks of them, of two units, share of the busiest."""
    rows = []
    for line in machine_code.kept():
        named = re.fullmatch(r"(attn_fwd_split|attn_bwd_few)_kernel<bf16, (\d+), (\d+)>", line.kernel)
        if named is None or line.arch != "sm_90":
            continue
        pass_, dim, most = named[1], int(named[2]), int(named[3])
        columns = int(re.match(r"\d+x(\d+)", line.tile)[1])  # type: ignore[index]
        tile_bytes = (2 if pass_ == "attn_fwd_split" else 4) * columns * dim * 2
        copy = tile_bytes / (COPY / MULTIPROCESSORS / CLOCK)
        busiest = max(float(x) for x in (line.tensor, line.ex2, line.fp32, line.issue, line.shared))
        cells = (dim, most, f"{tile_bytes / 1024:.0f}", f"{copy:.0f}", line.issue, line.shared, f"{busiest / copy:.0%}")
        rows.append((pass_, *cells))
    return [tuple(map(str, row)) for row in sorted(rows)]


def main() -> None:
    columns = ("shape", "B", "H", "Nq", "Nk", "D", "splits", "fwd plain", "fwd split", "", "bwd plain", "bwd few", " ")
    rows = []
    for name, *shape in SHAPES:
        splits, ahead, ahead_split, back, back_few = predict(*shape)
        times = [f"{1e6 * t:.0f} us" for t in (ahead, ahead_split, back, back_few)]
        ratios = (f"{ahead / ahead_split:.1f}x", f"{back / back_few:.1f}x")
        rows.append((name, *map(str, shape), str(splits), *times[:2], ratios[0], *times[2:], ratios[1]))
    table.show(columns, rows)
    units = ("kernel", "D", "rows", "KB", "clocks of the copy", "of issue", "of shared memory", "busiest / copy")
    table.show(units, kernels())


if __name__ == "__main__":
    main()
