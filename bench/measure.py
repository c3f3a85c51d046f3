"""Time, peak memory, and what the machine itself can do.

On a GPU a duration lies between two events on the stream, and a buffer larger than the L2 cache is written before each.
On a CPU it is wall time, and all contestants take turns in every round, so that what other processes take from the
machine strikes all of them: ratios are formed round by round. Where others take most of the machine, the CPU time of a
single thread (`time.thread_time`) is the clock to use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # more than any card's L2

Contestant = Callable[["Stopwatch"], None]
Clock = Callable[[], float]


class Stopwatch:
    """Marks on the device's own time line: `mark` sets one, `laps` reads the milliseconds between them.

    clock: what a mark reads on a CPU.
    """

    def __init__(self, device: str, clock: Clock = time.perf_counter) -> None:
        self.on_gpu = device != "cpu"
        self.clock = clock
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.clock())

    def laps(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:])
        if not self.on_gpu:
            return [(b - a) * 1e3 for a, b in pairs]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def race(
    contestants: dict[str, Contestant], device: str, seconds: float, clock: Clock = time.perf_counter, most: int = 25
) -> dict[str, list[list[float]]]:
    """The laps of each contestant, round by round: 3 rounds at least, `most` at most, no new one after `seconds`.

    The first round warms up and is thrown away.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device != "cpu" else None
    found: dict[str, list[list[float]]] = {name: [] for name in contestants}
    order = list(contestants)
    started = time.perf_counter()
    for turn in range(most + 1):
        if turn > 3 and time.perf_counter() - started > seconds:
            break
        watches = {}
        first = turn % max(1, len(order))
        # Whoever comes after a contestant that fills the caches pays for it: nobody does so in every round.
        for name in order[first:] + order[:first]:
            run = contestants[name]
            watches[name] = watch = Stopwatch(device, clock)
            if flush is not None:
                flush.zero_()
            run(watch)
        for name, watch in watches.items():
            laps = watch.laps()
            if turn:
                found[name].append(laps)
    return found


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, each a value that was measured."""
    ordered = sorted(values)
    low, middle, high = (ordered[round(p * (len(ordered) - 1))] for p in (0.2, 0.5, 0.8))
    return low, middle, high


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """How far what torch's allocator holds rises during `run`, above what it held before.

    On a CPU the allocator keeps no such count, but torch's profiler reports each allocation and release.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@dataclass
class Ceilings:
    """What this machine reached in this run: a large matrix product in the dtype, and a large copy (read + write)."""

    tflops: float
    gb_per_s: float
    how: str


def ceilings(
    dtype: torch.dtype, device: str, clock: Clock = time.perf_counter, seconds: float = 1.0
) -> Ceilings:
    """The best of a few products and copies: a ceiling is what the machine can do when nothing disturbs it."""
    side, nbytes = (8192, 2**30) if device != "cpu" else (2048, 2**28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def timed(work: Callable[[], Tensor]) -> Contestant:
        def run(watch: Stopwatch) -> None:
            watch.mark()
            work()
            watch.mark()

        return run

    laps = race(
        {"product": timed(lambda: torch.mm(a, b, out=product)), "copy": timed(lambda: target.copy_(source))},
        device, seconds, clock,
    )  # fmt: skip
    fastest = {name: min(lap for (lap,) in rounds) for name, rounds in laps.items()}
    return Ceilings(
        2 * side**3 / fastest["product"] / 1e9,
        2 * nbytes / fastest["copy"] / 1e6,
        f"{side}^3 product, {nbytes // 2**20} MiB copy",
    )
