"""`attnfuse inspect`: compile the kernels for a card that is not here, and tell from machine code how good they are."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from attnfuse.cli import table

if TYPE_CHECKING:
    from attnfuse.machine.pool import Step
    from attnfuse.machine.reading import Reading

# Of both languages; "dkdv1", "split16" and "few16" are Triton's, "rows" is CUDA's.
PASSES = ("fwd", "dq", "dkdv", "dkdv1", "split", "split16", "combine", "few", "few16", "reduce", "rows")
VARIANTS = ("plain", "causal", "everything", "several")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=(80, 90, 100, 120), help="default: 90")
    parser.add_argument("--language", nargs="+", default=["triton", "cuda"], choices=("triton", "cuda"))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 96, 128, 256], choices=(64, 96, 128, 256))
    parser.add_argument("--pass", dest="passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"), help="of Triton's")
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), help="of Triton's", choices=VARIANTS)
    parser.add_argument("--mix", action="store_true", help="each loop's instructions by kind, a tile and an element")
    parser.add_argument("--workers", type=int, help="compilers at once; default: one a core")
    parser.add_argument("--write", action="store_true", help="put what was read into docs/machine_code.csv")
    parser.add_argument("--accept-worse", action="store_true", help="let --write make a kernel's line worse")
    parser.add_argument("--object", type=Path, help="read this object or cubin instead; needs --tile")
    parser.add_argument("--tile", help="of --object: rows x columns of one iteration, such as 128x128")
    parser.add_argument("--warps", type=int, default=8, help="of --object: warps that run the loop")
    parser.add_argument("--block-warps", type=int, help="of --object: warps of the block, where more")
    parser.add_argument("--depths", type=int, nargs="+", default=[], help="of --object: the inner size of each product "
                        "of a tile, such as 128 128")  # fmt: skip
    parser.add_argument("--copied", type=int, default=0, help="of --object: bytes that bulk copies bring for a tile")
    parser.add_argument("--reduced", type=int, default=0, help="of --object: bytes that bulk reductions read of a tile")
    parser.add_argument("--shared", type=int, default=0, help="of --object: bytes of dynamic shared memory")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    from attnfuse.machine import document
    from attnfuse.machine import table as kept_table

    if args.write and not kept_table.PATH.parent.is_dir():
        raise ValueError(f"--write needs a checkout: {kept_table.PATH.parent} is not there")
    if args.object is not None:
        readings = _read_object(args)
    else:
        readings = _read_kernels(args)
    readings.sort(key=lambda r: (r.language, r.arch, r.kernel))
    if args.json:
        print(json.dumps([asdict(reading) for reading in readings], indent=2))
    else:
        _print(readings, args.mix)
    failed = [reading for reading in readings if reading.error]
    if args.object is not None:
        return int(bool(failed))
    found = kept_table.lines(reading for reading in readings if not reading.error)
    old = kept_table.kept() if kept_table.PATH.exists() else []
    worse = kept_table.worse(old, found)
    if not args.json:
        for sentence in worse:
            print(f"worse than in {kept_table.PATH.name}: {sentence}")
    if args.write and not failed and (not worse or args.accept_worse):
        kept_table.PATH.write_text(kept_table.to_csv(kept_table.merged(old, found)))
        document.write(kept_table.kept())
        return 0
    return int(bool(failed or worse))


def _read_kernels(args: argparse.Namespace) -> list[Reading]:
    from attnfuse.machine import cuda_code, pool, triton_code

    found: list[Reading] = []
    tasks: list[pool.Task] = []
    builds: list[pool.Build] = []
    if "triton" in args.language:
        os.environ.pop("TRITON_INTERPRET", None)
        wanted = triton_code.configs(
            args.arch, args.dtype, args.head_dim, [p for p in args.passes if p in triton_code.PASSES], args.variant
        )
        known = {config: triton_code.read_known(config) for config in wanted}
        found += [reading for reading in known.values() if reading is not None]
        tasks = pool.triton_tasks([config for config in wanted if known[config] is None], args.workers)
    if "cuda" in args.language:
        reason = cuda_code.why_not()
        if reason is not None:
            raise ValueError(f"the CUDA kernels cannot be compiled: {reason} (--language triton leaves them out)")
        builds = [pool.cuda_build(arch, args.head_dim, args.passes, args.workers) for arch in args.arch]
    with ExitStack() as stack:
        step = _progress(stack, pool.effort(tasks, builds), args.json)
        found += pool.done(tasks, builds, args.workers, step)
    return found


def _read_object(args: argparse.Namespace) -> list[Reading]:
    from attnfuse.machine.model import MACHINES, Work
    from attnfuse.machine.reading import read_function
    from attnfuse.machine.sass import functions

    sizes = (args.tile or "").split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"--object needs --tile as rows x columns, such as 128x128, got {args.tile!r}")
    if not args.object.exists():
        raise ValueError(f"--object must name an object or a cubin, {args.object} is not there")
    work = Work(
        int(sizes[0]), int(sizes[1]), args.warps, tuple(args.depths), args.copied, args.shared, args.block_warps,
        args.reduced,
    )  # fmt: skip
    found = []
    for function in functions(args.object):
        arch = int(function.arch.removeprefix("sm_").rstrip("af"))
        if arch in args.arch and arch in MACHINES:
            found.append(read_function(function, work, "object", arch, function.name, "", args.tile))
    if not found:
        raise ValueError(f"{args.object} holds no machine code for sm_{', sm_'.join(map(str, args.arch))}")
    return found


COLUMNS = (
    "kernel", "tile", "regs", "local", "smem KB", "blocks/SM", "loop", "instr", "/element", "repeated", "ex2", "fp32",
    "issue", "smem", "hidden", "local in loop", "in a step", "binds", "ceiling",
)  # fmt: skip


def _print(readings: Sequence[Reading], mix: bool) -> None:
    from attnfuse.machine.published import PUBLISHED

    rows = [row for reading in readings for row in _rows(reading)]
    table.show(COLUMNS, rows)
    print("repeated: products done over products needed (padding, or warps that compute the same).")
    print("ex2, fp32, issue, smem: clocks relative to the tensor cores'; hidden: exponentials issued while a wgmma is")
    print("in flight; ceiling: TFLOP/s if the busiest unit never waited. Counted from machine code, nothing was timed.")
    if any(r.arch == 90 for r in readings):
        print("\nPublished kernels on sm_90; those marked * were compiled from their sources and read by this model:")
        table.show(
            ("kernel", "pass", "head dim", "instr", "/element", "ex2", "issue", "smem", "ceiling", "reached"),
            [
                (p.title, p.pass_, str(p.head_dim), str(p.instructions), _number(p.per_element, ".2f"),
                 *(f"{x:.0%}" for x in (p.ex2, p.issue, p.shared)), f"{p.ceiling:.0f}", _number(p.reached, "d"))
                for p in PUBLISHED
            ],
        )  # fmt: skip
    if mix:
        print("\nInstructions of an iteration, by kind (for one score element):")
        for reading in readings:
            for loop in reading.loops:
                scale = loop.per_element / loop.instructions
                kinds = ", ".join(f"{kind} {n} ({n * scale:.2f})" for kind, n in loop.mix.items())
                print(f"{reading.name} {loop.name}: {kinds}")
    for reading in readings:
        for sentence in reading.complaints:
            print(f"{reading.name}: ptxas says {sentence}")
        if reading.error:
            print(f"FAILED {reading.name}: {reading.error}")


def _rows(reading: Reading) -> list[tuple[str, ...]]:
    head = (reading.name, reading.tile, str(reading.registers), str(reading.local))
    sizes = (f"{reading.shared / 1024:.1f}", str(reading.blocks)) if reading.loops else ("-", "-")
    if not reading.loops:
        rest = ("-",) * 8
        return [(*head, *sizes, "-", *rest, str(reading.loop_local), "-", "-", "-")]
    return [
        (
            *head, *sizes, loop.name, str(loop.instructions), f"{loop.per_element:.2f}", f"{loop.repeated:.2f}",
            *(f"{x / loop.tensor:.0%}" if loop.tensor else f"{x:.0f} clk"
              for x in (loop.ex2, loop.fp32, loop.issue, loop.shared)),
            _number(loop.overlapped, ".0%"), str(loop.local), str(loop.step_local),
            loop.binding, _number(loop.ceiling, ".0f"),
        )
        for loop in reading.loops
    ]  # fmt: skip


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def _progress(stack: ExitStack, total: float, is_json: bool) -> Callable[[Step], None]:
    """A function to call after each step: it moves a bar on a terminal, and does nothing elsewhere."""
    if is_json or not table.is_rich():
        return lambda step: None
    from rich import progress as bar

    progress = stack.enter_context(
        bar.Progress(
            bar.TextColumn("{task.description:<48}"), bar.BarColumn(), bar.TaskProgressColumn(),
            bar.TimeElapsedColumn(), bar.TimeRemainingColumn(), transient=True,
            # The speed of the whole run so far: steps differ, and come in by several.
            speed_estimate_period=3600,
        )
    )  # fmt: skip
    task = progress.add_task("", total=total)
    return lambda step: progress.update(task, advance=step.effort, description=step.name)
