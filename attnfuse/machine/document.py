"""The readable tables, made from docs/machine_code.csv: docs/predicted_ceilings.md and docs/cuda_machine_code.md."""

from __future__ import annotations

from collections.abc import Sequence

from .. import build
from .model import BANKS, EX2, ISSUE, MACHINES
from .published import PUBLISHED
from .table import Line

DOCS = build.CSRC.parent / "docs"
COMMAND = "`attnfuse inspect --arch 80 90 100 120 --write`"


def write(lines: Sequence[Line]) -> None:
    """Both documents."""
    (DOCS / "predicted_ceilings.md").write_text(ceilings(lines))
    (DOCS / "cuda_machine_code.md").write_text(cuda(lines))


def ceilings(lines: Sequence[Line]) -> str:
    """The text of docs/predicted_ceilings.md."""
    out = [
        "# Predicted ceilings",
        "",
        _paragraph(f"""
            Predictions: nothing on this page was timed. Each kernel is compiled for the card, its tile loops are found
            in the machine code by control flow, and the instructions of one ordinary iteration are counted by the unit
            that executes them ({COMMAND}; every figure is in [machine_code.csv](machine_code.csv), made with
            {", ".join(sorted({line.toolchain for line in lines}))}).
        """),
        "",
        "    ceiling = peak * tensor / repeated / max(tensor, ex2, fp32, issue, shared)          clocks of one SM",
        "",
        _paragraph(f"""
            A ceiling is what the loop would reach if its busiest unit never waited. Latency, barriers, the loop's ends
            and masked tiles come on top: what the last table's kernels reached, where their authors tell it of the same
            tile, is {" and ".join(f"{p.reached / p.ceiling:.2f}" for p in PUBLISHED if p.reached)} of their ceiling.
            So a ceiling is what a kernel cannot exceed, and it tells two kernels apart only where theirs differ by
            much.
        """),
        "",
        _paragraph(f"""
            Units, per SM and clock: {ISSUE} warp instructions, {EX2} exponentials, {BANKS} bytes of the data path that
            L1 and shared memory have in common (loads, stores and atomics, shuffles, operands of wgmma, what bulk
            copies write and bulk reductions read; bank conflicts not seen), and
        """),
        "",
        *_markdown(
            ("", "tensor, bf16 FLOP", "float32 results", "peak TFLOP/s"),
            [
                (f"sm_{arch} ({m.card})", str(m.tensor or "unknown"), str(m.fp32), str(m.peak or "unknown"))
                for arch, m in MACHINES.items()
            ],
        ),
        "",
        _paragraph("""
            The columns ex2, fp32, issue and shared are clocks relative to the tensor cores', so what is above 100 %
            binds. Repeated is products done over products needed: a padded head dim, or several warps that compute the
            same. Hidden is the share of exponentials that stand between a wgmma and the wait for it, within one warp:
            the rest can overlap with products of other warps only. On sm_90 mma.sync (the CUDA kernels of csrc/sm80)
            is counted at the rate of wgmma, which it is known not to reach. On sm_100 the shared memory that tcgen05
            reads is not documented and not counted; on sm_120 the tensor rate differs from card to card. float32
            kernels multiply by fused multiply-adds: no ceiling is given for them.
        """),
    ]
    for arch in MACHINES:
        for language, title in (("triton", "Triton"), ("cuda", "CUDA C++")):
            chosen = [
                line for line in lines
                if line.language == language and line.arch == f"sm_{arch}" and line.loop
                and ("fp16" not in line.kernel) and line.loop.startswith("full")
            ]  # fmt: skip
            if chosen:
                out += ["", f"## {title}, sm_{arch}, full tiles", "", *_markdown(CEILING, list(map(_ceiling, chosen)))]
    out += [
        "",
        "## Published kernels, sm_90",
        "",
        _paragraph("""
            Those marked * were compiled from their sources and read by the same model; attnfuse/machine/published.py
            says of which commit and how. The other lines are others' figures, whose shared memory is of products and
            copies alone. Nothing was measured here.
        """),
        "",
        *_markdown(
            ("kernel", "pass", "head dim", "instructions", "per element", "ex2", "issue", "shared", "ceiling",
             "reached"),
            [
                (
                    p.title, p.pass_, str(p.head_dim), str(p.instructions), f"{p.per_element:.2f}",
                    f"{p.ex2:.0%}", f"{p.issue:.0%}", f"{p.shared:.0%}", f"{p.ceiling:.0f}",
                    "-" if p.reached is None else str(p.reached),
                )
                for p in PUBLISHED
            ],
        ),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def cuda(lines: Sequence[Line]) -> str:
    """The text of docs/cuda_machine_code.md."""
    chosen = [line for line in lines if line.language == "cuda"]
    out = [
        "# Machine code of the CUDA kernels",
        "",
        _paragraph(f"""
            Compiled by {", ".join(sorted({line.toolchain for line in chosen}))}, read by {COMMAND}. Nothing here was
            timed: these are properties of the code.
        """),
        "",
        _paragraph("""
            Instructions are those of one iteration over an ordinary tile: what is branched around there (masks,
            softcap, unaligned copies, rescaling) is not counted. Products, exponentials and accesses of shared memory
            are of one warp. Where a pass has two kernels at a head dim, `true` is for cards whose blocks may have
            99 KB, and `value` and `key` are two launches; of the kernels for few queries a third number is the rows
            they take. `sm90::` are Hopper's own kernels (wgmma and tensor copies),
            compiled for sm_90a: one loop walks full and masked tiles, and what local memory it touches is touched for
            masked ones.
        """),
        "",
        *_markdown(
            ("kernel", "arch", "tile", "registers", "local bytes", "shared KB", "blocks an SM", "instructions",
             "products", "exponentials", "shared accesses", "local in loops", "in a step"),
            [_cuda(line) for line in chosen],
        ),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


CEILING = (
    "kernel", "tile", "registers", "blocks an SM", "instructions", "per element", "repeated", "ex2", "fp32", "issue",
    "shared", "hidden", "local in loops", "in a step", "binds", "ceiling",
)  # fmt: skip


def _ceiling(line: Line) -> tuple[str, ...]:
    return (
        line.kernel, line.tile, line.registers, line.blocks_per_sm, line.instructions, line.per_element, line.repeated,
        *(_share(x, line.tensor) for x in (line.ex2, line.fp32, line.issue, line.shared)),
        f"{float(line.overlapped):.0%}" if line.overlapped else "-", line.local_in_loops,
        line.local_in_step, line.binding,
        line.ceiling or "unknown",
    )  # fmt: skip


def _cuda(line: Line) -> tuple[str, ...]:
    mix = {name: int(count) for name, _, count in (part.partition(":") for part in line.mix.split())}
    counts = (mix.get("product", 0), mix.get("ex2", 0) + mix.get("mufu", 0), mix.get("shared", 0))
    inside = tuple(map(str, (line.instructions, *counts))) if line.loop else ("-",) * 4
    sizes = (f"{int(line.shared_bytes) / 1024:.1f}", line.blocks_per_sm) if line.loop else ("-", "-")
    local = (line.local_in_loops, line.local_in_step or "-")
    return line.kernel, line.arch, line.tile, line.registers, line.local_bytes, *sizes, *inside, *local


def _share(clocks: str, tensor: str) -> str:
    return f"{float(clocks) / float(tensor):.0%}" if tensor and float(tensor) else "-"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
