"""Workload by workload, peer by peer: check, time, weigh, and write a row.

A row exists only if the results of that very call passed their check (checks.py). What gave no row is kept with its
reason: a peer that cannot run the case is no failure; one that runs and is wrong is, and so is attnfuse raising.
"""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnfuse
from attnfuse.bench import measure
from attnfuse.bench.checks import Oracle, Verdict
from attnfuse.bench.peers import Call, Peer, peers
from attnfuse.bench.workloads import Inputs, Workload, make_inputs
from attnfuse.cli import info

PASSES = ("forward", "backward", "both")


@dataclass
class Row:
    """One line of the CSV file. Times in milliseconds; ratio: this peer's time over the baseline's, round by round."""

    workload: str
    group: str
    shape: str
    scale: str  # what a smaller machine made smaller, "1" if nothing
    source: str
    dtype: str
    pass_: str
    clock: str  # events (GPU), wall, or cpu: the CPU time of one thread
    peer: str
    peer_version: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    baseline: str
    ratio: float | None
    peak_mb: float
    tflops: float
    gb_per_s: float
    share_of_product: float  # of the machine's own matrix product
    share_of_copy: float  # of its own copy
    product_tflops: float
    copy_gb_per_s: float
    checked: str
    worst_error_over_budget: float
    device: str
    torch: str
    triton: str
    cuda: str
    attnfuse: str
    commit: str
    command: str


@dataclass
class Refusal:
    """A case that gave no row, and why. failed: the results were wrong, or attnfuse raised."""

    workload: str
    dtype: str
    peer: str
    reason: str
    failed: bool


@dataclass
class Plan:
    """What is to be measured, and how much time and work may go into it."""

    workloads: Sequence[Workload]
    dtypes: Sequence[torch.dtype]
    peers: Sequence[str]
    baseline: str
    device: str
    command: str
    seconds: float = 2.0  # of rounds for each workload, dtype and direction
    entries: float = 2.0**24  # (row, column) pairs the reference may look at for one case
    passes: Sequence[str] = PASSES
    time_limit: float | None = None
    cpu_time: bool = False  # the CPU time of the one thread torch then uses, instead of wall time

    @property
    def clock(self) -> measure.Clock:
        return time.thread_time if self.cpu_time else time.perf_counter

    @property
    def clock_name(self) -> str:
        return "events" if self.device != "cpu" else "cpu" if self.cpu_time else "wall"


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    ceilings: dict[str, measure.Ceilings] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)  # left out because the time was up

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not any(refusal.failed for refusal in self.refusals)


class Failure(Exception):
    """The case gives no row; `failed` as in Refusal."""

    def __init__(self, reason: str, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


def run(plan: Plan, write: Callable[[Row], None], advance: Callable[[str], None]) -> Report:
    """Measure everything in `plan`. `write` gets each row as it comes, `advance` the name of what comes next."""
    report = Report()
    known = peers()
    chosen = [known[name] for name in plan.peers]
    machine = Machine.here(plan)
    begun = time.perf_counter()
    for dtype in plan.dtypes:
        report.ceilings[short(dtype)] = measure.ceilings(dtype, plan.device, plan.clock)
        for workload in plan.workloads:
            late = plan.time_limit is not None and time.perf_counter() - begun > plan.time_limit
            if late:
                report.unmeasured.append(f"{workload.name} {short(dtype)}")
                continue
            advance(f"{workload.name} {short(dtype)}")
            for row in _one(plan, workload, dtype, chosen, machine, report):
                report.rows.append(row)
                write(row)
            if plan.device != "cpu":
                torch.cuda.empty_cache()
    return report


@dataclass
class Machine:
    """The columns that are the same in every row."""

    device: str
    torch: str
    triton: str
    cuda: str
    attnfuse: str
    commit: str
    command: str

    @staticmethod
    def here(plan: Plan) -> Machine:
        threads = torch.get_num_threads()
        used = f", {threads} thread{'s' if threads > 1 else ''}" if plan.device == "cpu" else ""
        device = info.device() + used
        return Machine(
            device, torch.__version__, info.installed("triton") or "none", torch.version.cuda or "none",
            attnfuse.__version__, commit(), plan.command,
        )  # fmt: skip


def commit() -> str:
    """The commit of the checkout this file is in, + if it has changes; ATTNFUSE_COMMIT where there is no history."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=12", "HEAD") if git("ls-files", "runner.py") else ""
        changed = "+" if found and git("status", "--porcelain", "--untracked-files=no") else ""
    except OSError:
        found, changed = "", ""
    return found + changed or os.environ.get("ATTNFUSE_COMMIT", "unknown")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class _Ready:
    """A peer that passed its checks: its call, and its verdicts on out alone and on out and gradients."""

    peer: Peer
    call: Call
    forward: Verdict
    training: Verdict | None


def _one(
    plan: Plan, workload: Workload, dtype: torch.dtype, chosen: Sequence[Peer], machine: Machine, report: Report
) -> Iterator[Row]:
    """The rows of one workload in one dtype."""
    inputs = make_inputs(workload, dtype, plan.device)
    oracle = Oracle(inputs, plan.entries)
    ready: list[_Ready] = []
    for peer in chosen:
        reason = peer.why_not(workload, plan.device)
        try:
            if reason is not None:
                raise Failure(reason, failed=False)
            ready.append(_prepare(peer, inputs, oracle, plan.passes))
        except Failure as failure:
            report.refusals.append(Refusal(workload.name, short(dtype), peer.name, str(failure), failure.failed))
    forward = [x for x in ready if "forward" in plan.passes]
    training = [x for x in ready if x.training is not None]
    laps = {
        "forward": measure.race(
            {x.peer.name: _forward(x.call) for x in forward}, plan.device, plan.seconds, plan.clock
        ),
        "training": measure.race(
            {x.peer.name: _training(x.call, inputs) for x in training}, plan.device, plan.seconds, plan.clock
        ),
    }  # fmt: skip
    found = report.ceilings[short(dtype)]
    for x in ready:
        peaks = {"forward": _peak_forward(x, plan), "both": _peak_training(x, inputs, plan)}
        peaks["backward"] = peaks["both"]
        for pass_ in plan.passes:
            verdict = x.forward if pass_ == "forward" else x.training
            if verdict is None:
                continue
            times = _times(laps, x.peer.name, pass_)
            others = _times(laps, plan.baseline, pass_)
            p20, p50, p80 = measure.percentiles(times)
            tflops = workload.flops(pass_) / p50 / 1e9
            rate = workload.bytes(pass_, dtype.itemsize) / p50 / 1e6
            yield Row(
                workload.name, workload.group, workload.shape, workload.scale, workload.source, short(dtype), pass_,
                plan.clock_name, x.peer.name, x.peer.version(), p20, p50, p80, len(times), plan.baseline,
                measure.percentiles([a / b for a, b in zip(times, others)])[1] if others else None,
                peaks[pass_] / 2**20, tflops, rate, tflops / found.tflops, rate / found.gb_per_s, found.tflops,
                found.gb_per_s, verdict.coverage, verdict.worst, **asdict(machine),
            )  # fmt: skip


def _prepare(peer: Peer, inputs: Inputs, oracle: Oracle, passes: Sequence[str]) -> _Ready:
    """The peer's call with its verdicts; raises Failure where there can be no row."""
    ours = peer.package == "attnfuse"

    def tried(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            raise Failure(f"out of memory: {str(error).splitlines()[0]}", failed=ours) from None
        except Exception as error:  # what a library raises when it does not serve a case is its own affair
            words = str(error).strip().splitlines() or [""]
            raise Failure(f"{type(error).__name__}: {words[0][:300]}", failed=ours) from error

    def training() -> tuple[list[Tensor], Sequence[Tensor]]:
        outs = call()
        return [out.detach() for out in outs], torch.autograd.grad(outs, inputs.tensors(), inputs.grads)

    def right(verdict: Verdict) -> Verdict:
        if not verdict.passed:
            raise Failure(f"wrong: {'; '.join(verdict.failures)}", failed=True)
        return verdict

    call: Call = tried(lambda: peer.prepare(inputs))
    with torch.no_grad():
        forward = right(oracle.judge(tried(call), None))
    if all(pass_ == "forward" for pass_ in passes):
        return _Ready(peer, call, forward, None)
    return _Ready(peer, call, forward, right(oracle.judge(*tried(training))))


def _forward(call: Call) -> measure.Contestant:
    def run(watch: measure.Stopwatch) -> None:
        with torch.no_grad():
            watch.mark()
            call()
            watch.mark()

    return run


def _training(call: Call, inputs: Inputs) -> measure.Contestant:
    """Forward and backward, with a mark between them."""

    def run(watch: measure.Stopwatch) -> None:
        watch.mark()
        outs = call()
        watch.mark()
        torch.autograd.grad(outs, inputs.tensors(), inputs.grads)
        watch.mark()

    return run


def _times(laps: dict[str, dict[str, list[list[float]]]], peer: str, pass_: str) -> list[float]:
    """Milliseconds of each round."""
    rounds = laps["forward" if pass_ == "forward" else "training"].get(peer, [])
    return [{"forward": lap[0], "backward": lap[-1], "both": sum(lap)}[pass_] for lap in rounds]


def _peak_forward(x: _Ready, plan: Plan) -> int:
    def run() -> None:
        with torch.no_grad():
            x.call()

    return measure.peak_bytes(run, plan.device)


def _peak_training(x: _Ready, inputs: Inputs, plan: Plan) -> int:
    def run() -> None:
        torch.autograd.grad(x.call(), inputs.tensors(), inputs.grads)

    return 0 if x.training is None else measure.peak_bytes(run, plan.device)


class CsvFile:
    """Rows into a file as they come, so that what stops a run takes nothing with it."""

    def __init__(self, path: Path, append: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.names = [f.name for f in fields(Row)]
        if append and path.exists():
            return
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(self.names)

    def write(self, row: Row) -> None:
        held = asdict(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_cell(held[name]) for name in self.names])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that CsvFile wrote; raises ValueError if it is another one."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != [f.name for f in fields(Row)]:
            raise ValueError(f"{path} is not a CSV file that this version of attnfuse bench wrote")
        kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float}
        kinds["float | None"] = lambda text: float(text) if text else None
        return [Row(**{f.name: kinds.get(str(f.type), str)(row[f.name]) for f in fields(Row)}) for row in reader]


def _cell(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value
