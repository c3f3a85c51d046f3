"""Pictures of a CSV file of `attnfuse bench`; a step of its own, so that a file from another machine can be drawn here.

    attnfuse bench --plot attnfuse_bench.csv [--out FOLDER]

ratios.png    attnfuse's time, and its peak memory, over each peer's: left of 1 attnfuse needs less
ceilings.png  what was reached, below what the machine reached in a large product and a large copy in the same run
"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, told apart with any colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
INK = "#333333"
PASS_TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}

Rows = list[dict[str, str]]


def draw(csv_path: Path, out: Path) -> list[Path]:
    """Both pictures of the file, next to each other in `out`; raises ValueError if it holds no row."""
    with csv_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{csv_path} holds no row to draw")
    out.mkdir(parents=True, exist_ok=True)
    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style: Any = dict.fromkeys(inked, INK) | {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    paths = []
    with rc_context(style):
        for suffix, make in (("ratios", _ratios), ("ceilings", _ceilings)):
            figure = make(rows)
            if figure is not None:
                paths.append(out / f"{csv_path.stem}_{suffix}.png")
                figure.savefig(paths[-1])
    return paths


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _cases(rows: Rows) -> dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]]:
    """{(workload, dtype): {(pass, peer): row}}, in the order of the file."""
    cases: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["workload"], row["dtype"]), {})[row["pass_"], row["peer"]] = row
    return cases


def _where(row: dict[str, str]) -> str:
    """The machine and the command, for the foot of a picture."""
    cuda = "" if row["cuda"] == "none" else f", CUDA {row['cuda']}"
    said = (
        f"{row['device']}; torch {row['torch']}{cuda}; attnfuse {row['attnfuse']} at {row['commit']}; {row['command']}"
    )
    return "\n".join(textwrap.wrap(said, 170))


def _ratios(rows: Rows) -> Figure | None:
    """One line a workload, one mark a peer."""
    cases = _cases(rows)
    peers = [name for name in dict.fromkeys(row["peer"] for row in rows) if name != "attnfuse"]
    panels = [p for p in ("forward", "both") if any(row["pass_"] == p for row in rows)] or ["backward"]
    cases = {case: held for case, held in cases.items() if any((p, "attnfuse") in held for p in panels)}
    if not peers or not cases:
        return None
    several = len({dtype for _, dtype in cases}) > 1
    figure = _figure(3.2 * (len(panels) + 1) + 3.4, 0.36 * len(cases) + 1.9)
    axes = figure.subplots(1, len(panels) + 1, sharey=True, squeeze=False)[0]
    for panel, axis in zip([*panels, "memory"], axes):
        pass_ = panels[-1] if panel == "memory" else panel
        column = "peak_mb" if panel == "memory" else "p50_ms"
        seen = [1.0]
        for y, held in enumerate(cases.values()):
            ours = held.get((pass_, "attnfuse"))
            for n, peer in enumerate(peers):
                theirs = held.get((pass_, peer))
                if ours is None or theirs is None or not float(theirs[column]):
                    continue
                ratio = float(ours[column]) / float(theirs[column])
                if panel != "memory" and peer == ours["baseline"] and ours["ratio"]:
                    ratio = float(ours["ratio"])
                seen.append(ratio)
                colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
                axis.plot([1, ratio], [y, y], color=colour, linewidth=1, alpha=0.35)
                axis.plot(ratio, y, marker, color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)
        axis.axvline(1, color=INK, linewidth=0.9)
        _log_axis(axis, seen)
        what = "peak memory" if panel == "memory" else "time"
        axis.set_title(f"{what}, {PASS_TITLES[pass_]}", fontweight="bold")
        axis.set_xlabel("attnfuse / peer")
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
    labels = []
    for (workload, dtype), held in cases.items():
        row = next(iter(held.values()))
        smaller = "" if row["scale"] == "1" else " *"
        labels.append(f"{workload}{f' {dtype}' if several else ''}{smaller}\n{row['shape']}")
    axes[0].set_yticks(range(len(cases)), labels, fontsize=7)
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    handles = [
        axes[0].plot([], [], MARKERS[n % len(MARKERS)], color=PALETTE[n % len(PALETTE)], label=peer)[0]
        for n, peer in enumerate(peers)
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(peers), frameon=False)
    star = "* made smaller than the model's own shape; " if any(row["scale"] != "1" for row in rows) else ""
    figure.supxlabel(f"left of 1: attnfuse needs less. {star}{_where(rows[0])}", fontsize=6.5, x=0.01, ha="left")
    return figure


def _log_axis(axis: Any, seen: list[float]) -> None:
    """A logarithmic axis that shows 1 and all of `seen`, with plain numbers on it."""
    axis.set_xscale("log")
    axis.set_xlim(min(0.5, min(seen) / 1.25), max(2.0, max(seen) * 1.25))
    wide = max(seen) / min(seen) > 30
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _ceilings(rows: Rows) -> Figure | None:
    """TFLOP/s against operations a byte, with the roof that the two ceilings make (Williams et al. 2009)."""
    passes = [p for p in ("forward", "backward") if any(row["pass_"] == p for row in rows)]
    ours = [row for row in rows if row["peer"] == "attnfuse" and row["pass_"] in passes]
    if not ours:
        return None
    dtypes = list(dict.fromkeys(row["dtype"] for row in ours))
    figure = _figure(5.6 * len(passes), 4.4 * len(dtypes))
    grid = figure.subplots(len(dtypes), len(passes), squeeze=False)
    groups = list(dict.fromkeys(row["group"] for row in ours))
    for axes, dtype in zip(grid, dtypes):
        for axis, pass_ in zip(axes, passes):
            here = [row for row in rows if row["dtype"] == dtype and row["pass_"] == pass_]
            _roof(axis, here, groups)
            axis.set_title(f"{PASS_TITLES[pass_]}, {dtype}", fontweight="bold")
    handles = [
        grid[0][0].plot([], [], "o", color=PALETTE[n % len(PALETTE)], label=group)[0]
        for n, group in enumerate(groups)
    ]
    baseline = ours[0]["baseline"]
    handles += [
        grid[0][0].plot([], [], "o", color=INK, label="attnfuse")[0],
        grid[0][0].plot([], [], "o", color=INK, markerfacecolor="white", label=baseline)[0],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False)
    figure.supxlabel(_where(rows[0]), fontsize=6.5, x=0.01, ha="left")
    return figure


def _label(axis: Any, points: dict[str, tuple[float, float]]) -> None:
    """A name beside each point, but for those that would be written over another's."""
    axis.get_ylim()  # settles the limits that are still to be drawn from the data
    taken: list[tuple[float, float]] = []
    for name, point in points.items():
        x, y = axis.transAxes.inverted().transform(axis.transData.transform(point))
        if all(abs(x - a) > 0.17 or abs(y - b) > 0.03 for a, b in taken):
            taken.append((x, y))
            axis.annotate(name, point, (5, -2), textcoords="offset points", fontsize=6, va="top")


def _roof(axis: Any, rows: Rows, groups: list[str]) -> None:
    """One panel: attnfuse filled, the baseline hollow, a line between the two of a workload."""
    if not rows:
        return
    # A CPU does billions where a GPU does trillions.
    unit, per_tera = ("GFLOP/s", 1e3) if float(rows[0]["product_tflops"]) < 2 else ("TFLOP/s", 1.0)
    points: dict[str, dict[str, tuple[float, float]]] = {}
    colours = {}
    for row in rows:
        tflops, rate = float(row["tflops"]), float(row["gb_per_s"])
        if row["peer"] in ("attnfuse", row["baseline"]) and rate:
            points.setdefault(row["workload"], {})[row["peer"]] = (tflops * 1e3 / rate, tflops * per_tera)
            colours[row["workload"]] = PALETTE[groups.index(row["group"]) % len(PALETTE)]
    product, copy = float(rows[0]["product_tflops"]) * per_tera, float(rows[0]["copy_gb_per_s"]) / 1e3 * per_tera
    knee = product / copy
    intensities = [x for held in points.values() for x, _ in held.values()]
    low, high = min(*intensities, knee) / 2, max(*intensities, knee) * 2
    axis.plot([low, knee, high], [low * copy, product, product], color=INK, linewidth=1.2)
    axis.annotate(
        f"a large product: {product:.3g} {unit}", (high, product), (0, 4), textcoords="offset points", ha="right",
        fontsize=7,
    )  # fmt: skip
    axis.annotate(
        f"a large copy: {copy * 1e3 / per_tera:.3g} GB/s", (low, low * copy), (6, 2), textcoords="offset points",
        fontsize=7, va="top",
    )  # fmt: skip
    for workload, held in points.items():
        colour = colours[workload]
        if len(held) == 2:
            axis.plot(*zip(*held.values()), color=colour, linewidth=1, alpha=0.5)
        for peer, (x, y) in sorted(held.items(), key=lambda item: item[0] == "attnfuse"):
            face = colour if peer == "attnfuse" else "white"
            axis.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=5)
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    _label(axis, {name: held.get("attnfuse") or next(iter(held.values())) for name, held in points.items()})
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("operations for each byte that has to move")
    axis.set_ylabel(unit)
    axis.grid(color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)
