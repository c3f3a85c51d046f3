"""`attnfuse check`: every conformance case on every backend this machine can run, against its error budget.

The cases, the budget and the judgement are those of `attnfuse.testing`, which the test suite uses too. A GPU is used
where there is one; elsewhere the Triton kernels run in Triton's interpreter, on CPU tensors. ATTNFUSE_EMULATE=1 has the
CUDA kernels emulated, on CPU tensors too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from attnfuse.cli import info, table

if TYPE_CHECKING:
    from attnfuse.testing import Case

# A backend that does not serve a dtype says so, and it is counted as skipped.
QUICK = ("float32", "bfloat16")
FULL = ("float32", "bfloat16", "float16", "float64")
SHOWN = 3  # failures of a family spelled out; --json has them all


@dataclass
class Line:
    """One case family on one backend. worst: error / budget, at most 1 where all is well."""

    backend: str
    family: str
    checks: int = 0  # quantities held to their budgets
    failed: int = 0
    skipped: int = 0  # cases, one by dtype
    worst: float = 0.0
    where: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        if self.failed:
            return "FAILED"
        return "ok" if self.checks else "skipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}: under three minutes")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this one (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=FULL, help="only this one (may be repeated)")
    parser.add_argument("--family", action="append", metavar="NAME", help="only this one (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported
    from attnfuse import dispatch, testing

    families = dict(testing.families())
    backends = _chosen("--backend", args.backend, dispatch.BACKENDS)
    chosen = {name: families[name] for name in _chosen("--family", args.family, families)}
    dtypes = args.dtype or (QUICK if args.quick else FULL)

    begun = time.perf_counter()
    unavailable = {name: reason for name in backends if (reason := dispatch.BACKENDS[name].available())}
    running = [name for name in backends if name not in unavailable]
    # aten is torch's CPU kernel; the others run where the GPU is.
    on_cpu = ("aten", "cuda") if os.environ.get("ATTNFUSE_EMULATE") == "1" else ("aten",)
    lines: list[Line] = []
    reasons: Counter[tuple[str, str]] = Counter()
    with ExitStack() as stack:
        # The interpreter computes with numpy, which warns of what is masked afterwards; errors are judged below.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        advance = _progress(stack, len(running) * len(dtypes) * sum(map(len, chosen.values())), args.json)
        for backend in running:
            device = "cuda" if on_gpu and backend not in on_cpu else "cpu"
            for family, cases in chosen.items():
                line = Line(backend, family)
                lines.append(line)
                for case in cases:
                    for dtype in dtypes:
                        advance(f"{backend} {family}")
                        _one(line, case, getattr(torch, dtype), device, reasons)
    seconds = time.perf_counter() - begun

    # A backend asked for by name and not there is no success.
    missing = [name for name in args.backend or () if name in unavailable]
    passed = not missing and any(line.checks for line in lines) and not any(line.failed for line in lines)
    if args.json:
        _print_json(lines, reasons, unavailable, passed, seconds)
    else:
        _print_table(lines, reasons, unavailable, passed, seconds)
    return 0 if passed else 1


def _chosen(option: str, asked: list[str] | None, known: Any) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(asked or known))


def _one(line: Line, case: Case, dtype: Any, device: str, reasons: Counter[tuple[str, str]]) -> None:
    """Judge one case in one dtype and enter it in `line`."""
    from attnfuse import testing

    label = f"{case} {str(dtype).removeprefix('torch.')}"
    try:
        reason = testing.serves(case, line.backend, dtype, device)
        if reason is not None:
            line.skipped += 1
            reasons[line.backend, reason] += 1
            return
        results = testing.judge(case, line.backend, dtype, device)
    except Exception as error:
        line.checks += 1
        line.failed += 1
        line.worst, line.where = float("inf"), f"{label} raised"
        last = traceback.extract_tb(error.__traceback__)[-1]
        line.failures.append(f"{label}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})")
        return
    for result in results:
        line.checks += 1
        if not result.passed:
            line.failed += 1
            line.failures.append(f"{label}: {result.quantity} is off by {result.error:.3g}, budget {result.budget:.3g}")
        ratio = _ratio(result.error, result.budget)
        if ratio > line.worst or not line.where:
            line.worst, line.where = ratio, f"{result.quantity} of {label}"


def _ratio(error: float, budget: float) -> float:
    if error <= budget:
        return error / budget if budget else 0.0
    return error / budget if budget and error == error else float("inf")


def _progress(stack: ExitStack, total: int, is_json: bool) -> Callable[[str], None]:
    """A function to call before each case: it moves a bar on a terminal, and does nothing elsewhere."""
    if is_json or not table.is_rich():
        return lambda label: None
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    progress = stack.enter_context(
        Progress(
            TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
        )
    )
    task = progress.add_task("", total=total)
    return lambda label: progress.update(task, advance=1, description=label)


def _print_table(
    lines: list[Line], reasons: Counter[tuple[str, str]], unavailable: dict[str, str], passed: bool, seconds: float
) -> None:
    rows = [
        (
            line.backend, line.family, line.status, str(line.checks), str(line.skipped),
            f"{line.worst:.2f}" if line.checks else "-", line.where or "-",
        )
        for line in lines
    ]  # fmt: skip
    colours = {"ok": "", "FAILED": "bold red", "skipped": "dim"}
    columns = ("backend", "family", "status", "checks", "skipped", "error/budget", "at its worst in")
    table.show(columns, rows, [colours[line.status] for line in lines])
    for line in lines:
        for failure in line.failures[:SHOWN]:
            print(f"FAILED {line.backend}: {failure}")
        if len(line.failures) > SHOWN:
            print(f"FAILED {line.backend}: and {len(line.failures) - SHOWN} more in {line.family}")
    for (backend, reason), count in reasons.items():
        print(f"skipped {backend}, {count} cases: {reason}")
    for backend, reason in unavailable.items():
        print(f"not run {backend}: {reason}")
    checks, failed = sum(line.checks for line in lines), sum(line.failed for line in lines)
    if not checks:
        print("FAILED: nothing was checked")
    verdict = "passed" if passed else "FAILED"
    print(
        f"{verdict}: {checks} checks, {failed} failed, {sum(reasons.values())} cases skipped, {seconds:.0f} s, "
        f"on {info.device()}"
    )


def _print_json(
    lines: list[Line], reasons: Counter[tuple[str, str]], unavailable: dict[str, str], passed: bool, seconds: float
) -> None:
    report = {
        "passed": passed,
        "seconds": round(seconds, 1),
        "machine": info.gather(),
        "lines": [
            asdict(line) | {"status": line.status, "worst": line.worst if line.worst < float("inf") else None}
            for line in lines
        ],
        "skipped": [{"backend": b, "reason": reason, "cases": count} for (b, reason), count in reasons.items()],
        "not_run": unavailable,
    }
    print(json.dumps(report, indent=2))
