"""The CPU figures: time against torch, in turn in one run, and peak memory against length.

    python bench/cpu.py [--quick] [--json]

plain     attention against F.scaled_dot_product_attention, B2 H8 N2048 D64
sources   one 4096-key source and one 256-key source, B8 H8 Nq256 D64, against concatenate + F.scaled_dot_product_attention
          with the equivalent mask; the long source present in 2 of 8 samples, then in all
memory    how far the process's peak rises over one forward and backward, N 4096 to 32768, H1 D64
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
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


def plain(pairs: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(2, 8, 2048, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
        sdpa = F.scaled_dot_product_attention
        with torch.no_grad():
            forward = compare(lambda: attnfuse.attention(*inputs), lambda: sdpa(*inputs), pairs)  # noqa: B023
        both = compare(with_backward(attnfuse.attention, *inputs), with_backward(sdpa, *inputs), pairs)
        name = f"plain {str(dtype)[6:]}"
        rows += [{"case": name, "pass": "forward", **forward}, {"case": name, "pass": "forward + backward", **both}]
    return rows


def sources(pairs: int) -> list[dict[str, Any]]:
    rows = []
    shapes = [(8, 8, 256, 64), *[(8, 8, 4096, 64)] * 2, *[(8, 8, 256, 64)] * 2]
    inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    for count in (2, 8):
        present = torch.zeros(8, dtype=torch.bool)
        present[torch.tensor([1, 5] if count == 2 else range(8))] = True
        seen = torch.cat([present[:, None].expand(8, 4096), torch.ones(8, 256).bool()], 1)[:, None, None]
        mask = None if count == 8 else seen

        def ours(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
            listed = [Source(k1, v1, present=present), Source(k2, v2)]  # noqa: B023
            return attnfuse.multi_source_attention(q, listed)  # type: ignore[no-any-return]

        def theirs(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
            k, v = torch.cat([k1, k2], 2), torch.cat([v1, v2], 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: B023

        torch.testing.assert_close(ours(*inputs), theirs(*inputs))
        with torch.no_grad():
            forward = compare(lambda: ours(*inputs), lambda: theirs(*inputs), pairs)  # noqa: B023
        both = compare(with_backward(ours, *inputs), with_backward(theirs, *inputs), pairs)
        name = f"sources, long one in {count} of 8"
        rows += [{"case": name, "pass": "forward", **forward}, {"case": name, "pass": "forward + backward", **both}]
    return rows


def peak_megabytes() -> float:
    """The process's peak resident memory (Linux)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def peak_rise(length: int, report: Any) -> None:
    """Megabytes by which the process's peak rises over one forward and backward (run in a process of its own)."""
    shapes = [(1, 1, 64, 64)] * 3
    with_backward(attnfuse.attention, *[torch.randn(*s, requires_grad=True) for s in shapes])()
    inputs = [torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = peak_megabytes()
    with_backward(lambda q, k, v: attnfuse.multi_source_attention(q, [Source(k, v), Source(k, v)]), *inputs)()
    report.put(peak_megabytes() - before)


def memory(lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    context = multiprocessing.get_context("spawn")
    for length in lengths:
        report = context.Queue()
        process = context.Process(target=peak_rise, args=(length, report))
        process.start()
        rise = report.get()
        process.join()
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
    for part in (plain(pairs), sources(pairs), memory([4096, 8192] if args.quick else [4096, 8192, 16384, 32768])):
        rows += part
        for row in () if args.json else part:
            figures = "  ".join(f"{k} {v:.3f}" if k == "ratio" else f"{k} {v:.1f}" for k, v in list(row.items())[2:])
            print(f"{row['case']:32} {row['pass']:20} {figures}", flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
