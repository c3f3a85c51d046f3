"""The CPU figures: time against torch, in turn in one run, and peak memory against length.

    python bench/cpu.py [--quick] [--json]

plain     attention against F.scaled_dot_product_attention, B2 H8 N2048 D64
sources   one 4096-key source and one 256-key source, B8 H8 Nq256 D64, against concatenating and calling
          F.scaled_dot_product_attention with the equivalent mask; the long source in 2 of 8 samples, then in all
memory    how far the process's peak rises over one forward and backward, N 4096 to 32768, H1 D64
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnfuse
from attnfuse import Source

Call = Callable[[], Any]


def compare(ours: Call, theirs: Call, pairs: int) -> dict[str, float]:
    """Medians of `pairs` runs in turn, and of their ratios pair by pair."""
    times: list[tuple[float, float]] = []
    for n in range(pairs + 1):
        started = time.perf_counter()
        ours()
        between = time.perf_counter()
        theirs()
        if n:  # the first pair warms up
            times.append((between - started, time.perf_counter() - between))

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    return {
        "attnfuse_ms": median([a for a, _ in times]) * 1e3,
        "torch_ms": median([b for _, b in times]) * 1e3,
        "ratio": median([a / b for a, b in times]),
    }


def with_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    def call() -> None:
        out = function(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return call


def both_passes(
    case: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], pairs: int
) -> list[dict[str, Any]]:
    """A row for the forward under no_grad and one for forward + backward; the results must agree first."""
    tolerance = {"rtol": 0.02, "atol": 0.02} if inputs[0].dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), **tolerance)
    with torch.no_grad():
        forward = compare(lambda: ours(*inputs), lambda: theirs(*inputs), pairs)
    both = compare(with_backward(ours, *inputs), with_backward(theirs, *inputs), pairs)
    return [{"case": case, "pass": "forward", **forward}, {"case": case, "pass": "forward + backward", **both}]


def plain(dtype: torch.dtype, pairs: int) -> list[dict[str, Any]]:
    inputs = [torch.randn(2, 8, 2048, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    case = f"plain {str(dtype)[6:]}"
    return both_passes(case, attnfuse.attention, F.scaled_dot_product_attention, inputs, pairs)


def sources(count: int, pairs: int) -> list[dict[str, Any]]:
    shapes = [(8, 8, 256, 64), *[(8, 8, 4096, 64)] * 2, *[(8, 8, 256, 64)] * 2]
    inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    present = torch.zeros(8, dtype=torch.bool)
    present[torch.tensor([1, 5] if count == 2 else range(8))] = True
    seen = torch.cat([present[:, None].expand(8, 4096), torch.ones(8, 256).bool()], 1)[:, None, None]
    mask = None if count == 8 else seen

    def ours(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        return attnfuse.multi_source_attention(q, [Source(k1, v1, present=present), Source(k2, v2)])

    def theirs(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2), attn_mask=mask)

    return both_passes(f"sources, long one in {count} of 8", ours, theirs, inputs, pairs)


def peak_megabytes() -> float:
    """The process's peak resident memory (Linux)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def peak_rise(length: int) -> float:
    """Megabytes by which the process's peak rises over one forward and backward (run in a process of its own)."""
    shapes = [(1, 1, 64, 64)] * 3
    with_backward(attnfuse.attention, *[torch.randn(*s, requires_grad=True) for s in shapes])()
    inputs = [torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = peak_megabytes()
    with_backward(lambda q, k, v: attnfuse.multi_source_attention(q, [Source(k, v), Source(k, v)]), *inputs)()
    return peak_megabytes() - before


def memory(lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        # A fresh process each, so that no earlier peak hides this one's.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rise = pool.submit(peak_rise, length).result()
        rows.append({"case": f"memory N {length}", "pass": "forward + backward", "peak_rise_mb": rise})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time and memory of attnfuse against torch.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    args = parser.parse_args()
    torch.manual_seed(0)
    pairs = 3 if args.quick else 11
    rows: list[dict[str, Any]] = []
    lengths = [4096, 8192] if args.quick else [4096, 8192, 16384, 32768]
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: plain(torch.float32, pairs),
        lambda: plain(torch.bfloat16, pairs),
        lambda: sources(2, pairs),
        lambda: sources(8, pairs),
        lambda: memory(lengths),
    ]
    for make in parts:
        rows += (part := make())
        for row in () if args.json else part:
            figures = "  ".join(f"{k} {v:.3f}" if k == "ratio" else f"{k} {v:.1f}" for k, v in list(row.items())[2:])
            print(f"{row['case']:32} {row['pass']:20} {figures}", flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
