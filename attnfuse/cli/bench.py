"""`attnfuse bench`: attnfuse against what a user would call in its place, on this machine, on workloads or own shapes.

Every row passed a check of its own results first; a wrong result gives no row and exit code 1. On a CPU the workloads
are made smaller by a stated rule (`attnfuse.bench.workloads.scaled`) and each row says by how much.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from attnfuse.cli import table

if TYPE_CHECKING:
    from attnfuse.bench.runner import Report, Row

DTYPES = ("float32", "bfloat16", "float16", "float64")
PASSES = ("forward", "backward", "both")
CSV_NAME = "attnfuse_bench.csv"
# Billions of operations of a forward on a CPU: half a second for two cores at most, with the backward and all peers.
CPU_GFLOP = {True: 1.0, False: 16.0}  # by --quick
SECONDS = {True: 0.8, False: 4.0}
ENTRIES = {True: 2.0**20, False: 2.0**24}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds: under three minutes on a CPU")
    parser.add_argument(
        "--workload", action="append", default=[], metavar="NAME", help="a workload or a group of --list (repeatable)"
    )
    parser.add_argument(
        "--shape", action="append", default=[],
        help="your own, such as b=2,h=16,kv=4,q=256,k=4096+256,d=64,causal (repeatable; also fill=PERCENT, absent)",
    )  # fmt: skip
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--against", action="append", metavar="PEER", help="only this peer; the first is the baseline (repeatable)"
    )
    parser.add_argument("--pass", action="append", choices=PASSES, dest="passes", help="only this one (repeatable)")
    parser.add_argument(
        "--gflop", type=float, help="make workloads smaller until a forward has this many billion operations"
    )
    parser.add_argument("--seconds", type=float, help="time for the rounds of one workload in one direction")
    parser.add_argument(
        "--cpu-time", action="store_true", help="on a busy CPU: one thread, and its CPU time instead of wall time"
    )
    parser.add_argument("--time-limit", type=float, help="begin no further workload after this many seconds")
    parser.add_argument("--out", type=Path, default=Path(), help=f"folder for {CSV_NAME} and the pictures")
    parser.add_argument("--no-plots", action="store_true", help="only the CSV file")
    parser.add_argument("--append", action="store_true", help=f"add rows to the {CSV_NAME} that is there")
    parser.add_argument(
        "--plot", type=Path, metavar="CSV", help="measure nothing: print and draw what is in this file"
    )
    parser.add_argument("--list", action="store_true", help="the workloads, with shape and source, and the peers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list()
    if args.plot is not None:
        if not args.plot.is_file():
            raise ValueError(f"--plot must name a CSV file of this command, got {args.plot}")
        return _show(args.plot, args.out, args.json)
    for name in ("gflop", "seconds", "time_limit"):
        if (given := getattr(args, name)) is not None and given <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {given:g}")

    import torch

    from attnfuse.bench import peers, runner, workloads

    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = peers.peers()
    chosen = list(dict.fromkeys(["attnfuse", *(args.against or peers.default_peers(device, args.quick))]))
    for name in chosen:
        if name not in named:
            raise ValueError(f"--against must be one of {', '.join(named)}, got {name!r}")
    if args.cpu_time and device != "cpu":
        raise ValueError("--cpu-time is for a CPU: on a GPU the device's own events are the clock")
    gflop = args.gflop or (CPU_GFLOP[args.quick] if device == "cpu" else None)
    own = [workloads.parse_shape(text) for text in args.shape]
    listed = [] if own and not args.workload else workloads.select(args.workload, args.quick)
    if gflop is not None:
        listed = [workloads.scaled(w, gflop) for w in listed]
    if args.gflop is not None:  # a shape that was asked for is only made smaller where that was asked for too
        own = [workloads.scaled(w, args.gflop) for w in own]
    plan = runner.Plan(
        own + listed,
        [getattr(torch, name) for name in args.dtype or (["bfloat16"] if device == "cuda" else ["float32"])],
        chosen,
        next(name for name in [*(args.against or ()), "torch"] if not name.startswith("attnfuse")),
        device,
        shlex.join(["attnfuse", *_without_out(args.command_line)]),
        args.seconds or SECONDS[args.quick],
        ENTRIES[args.quick] if device == "cpu" else 2.0**28,
        args.passes or PASSES,
        args.time_limit,
        args.cpu_time,
    )
    if args.cpu_time:
        torch.set_num_threads(1)  # a thread's clock does not see the others
    begun = time.perf_counter()
    csv_file = runner.CsvFile(args.out / CSV_NAME, args.append)
    with ExitStack() as stack:
        advance = _progress(stack, len(plan.workloads) * len(plan.dtypes))
        report = runner.run(plan, csv_file.write, advance)
    if args.json:
        print(json.dumps({
            "passed": report.passed, "rows": [asdict(row) for row in report.rows],
            "refusals": [asdict(x) for x in report.refusals], "unmeasured": report.unmeasured,
            "csv": str(csv_file.path),
        }, indent=2))  # fmt: skip
        return 0 if report.passed else 1
    _print_rows(report.rows)
    _print_refusals(report)
    if report.rows and not args.no_plots:
        _draw(csv_file.path, args.out)
    seconds = time.perf_counter() - begun
    print(f"{'passed' if report.passed else 'FAILED'}: {len(report.rows)} rows in {csv_file.path}, {seconds:.0f} s")
    return 0 if report.passed else 1


def _without_out(words: Sequence[str]) -> list[str]:
    """The command as it is written down: where the files went changes no figure."""
    return [
        word
        for n, word in enumerate(words)
        if word != "--out" and not word.startswith("--out=") and words[n - 1 : n] != ["--out"]
    ]


def _list() -> int:
    from attnfuse.bench import peers, workloads

    rows = [(w.name, w.group, w.shape, w.source) for w in workloads.workloads()]
    table.show(("workload", "group", "shape", "source"), rows)
    print(f"peers: {', '.join(peers.peers())}")
    return 0


def _show(csv_path: Path, out: Path, as_json: bool) -> int:
    """The table and the pictures of a file that is already there."""
    from attnfuse.bench import runner

    rows = runner.read_rows(csv_path)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _print_rows(rows)
        _draw(csv_path, out)
    return 0 if rows else 1


def _draw(csv_path: Path, out: Path) -> None:
    try:
        import matplotlib  # noqa: F401  (asked for here, to say what to install)
    except ImportError:
        print("no pictures: drawing needs matplotlib: pip install attnfuse[bench]")
        return
    from attnfuse.bench import plots

    for path in plots.draw(csv_path, out):
        print(f"picture: {path}")


def _progress(stack: ExitStack, total: int) -> Callable[[str], None]:
    """A function to call before each workload: a bar with the time left on a terminal, a line on stderr elsewhere."""
    if table.is_rich():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = stack.enter_context(
            Progress(
                TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("time left"), TimeRemainingColumn(), transient=True,
            )
        )  # fmt: skip
        task = bar.add_task("", total=total)
        before = [-1]

        def move(label: str) -> None:
            before[0] += 1
            bar.update(task, completed=before[0], description=label)

        return move
    begun, done = time.perf_counter(), [0]

    def tell(label: str) -> None:
        spent = time.perf_counter() - begun
        left = f", about {spent / done[0] * (total - done[0]):.0f} s left" if done[0] else ""
        done[0] += 1
        print(f"{done[0]}/{total} {label}{left}", file=sys.stderr, flush=True)

    return tell


def _print_rows(rows: Sequence[Row]) -> None:
    """attnfuse's milliseconds, then its time over each peer's."""
    by_case: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row.workload, row.dtype, row.pass_), {})[row.peer] = row
    names = [name for name in dict.fromkeys(row.peer for row in rows) if name != "attnfuse"]
    lines = []
    for (workload, dtype, pass_), held in by_case.items():
        ours = held.get("attnfuse")
        if ours is None:
            lines.append((workload, dtype, pass_, "-", *("-" for _ in names), "-", "-", "-", "-", "-", "-"))
            continue
        ratios = []
        for name in names:
            theirs = held.get(name)
            by_round = ours.ratio if name == ours.baseline else None
            ratio = None if theirs is None else by_round or ours.p50_ms / theirs.p50_ms
            ratios.append("-" if ratio is None else f"{ratio:.2f}")
        base = held.get(ours.baseline)
        lines.append((
            workload, dtype, pass_, f"{ours.p50_ms:.3g}", *ratios, f"{ours.tflops:.3g}",
            f"{ours.share_of_product:.0%}", f"{ours.gb_per_s:.3g}", f"{ours.share_of_copy:.0%}",
            f"{ours.peak_mb:.1f}", f"{base.peak_mb:.1f}" if base else "-",
        ))  # fmt: skip
    columns = (
        "workload", "dtype", "pass", "attnfuse ms", *(f"/ {name}" for name in names), "TFLOP/s", "of product", "GB/s",
        "of copy", "peak MiB", "baseline MiB",
    )  # fmt: skip
    table.show(columns, lines)
    if rows:
        print(
            f"/ PEER: attnfuse's time over the peer's, below 1 where attnfuse is faster; / {rows[0].baseline}, the "
            "baseline, round by round"
        )
    for dtype, row in {row.dtype: row for row in rows}.items():
        print(
            f"{row.device} in {dtype}, clock {row.clock}, same run: {row.product_tflops:.3g} TFLOP/s in a large "
            f"product, {row.copy_gb_per_s:.3g} GB/s in a large copy"
        )
    smaller = {row.workload: row for row in rows if row.scale != "1"}
    if smaller:
        print(f"made smaller for this machine, {len(smaller)} of {len({row.workload for row in rows})} workloads:")
        for row in smaller.values():
            print(f"  {row.workload}: {row.shape} ({row.scale})")


def _print_refusals(report: Report) -> None:
    """What gave no row, and why."""
    counted = Counter((x.peer, x.reason) for x in report.refusals if not x.failed)
    for (peer, reason), count in counted.items():
        print(f"no row for {peer}, {count} case(s): {reason}")
    if report.unmeasured:
        print(f"not begun, the time was up: {', '.join(report.unmeasured)}")
    for x in report.refusals:
        if x.failed:
            print(f"FAILED {x.workload} {x.dtype}, {x.peer}: {x.reason}")
