"""What bench/fusion_study.py reports: rows of its CSV in, Markdown tables and pictures out."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev
from typing import Any

from attnfuse.cli.demo import COLOURS, CONDITIONS, INK, NUM_CLASSES

Row = dict[str, Any]

TESTED = (*CONDITIONS, "image drowned", "audio drowned")
HEADINGS = {"both": "image and audio", "image": "image only", "audio": "audio only"}
HEADER = [HEADINGS.get(name, name) for name in TESTED]


# rows


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [{column: _number(text) for column, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def distinct(rows: Sequence[Row], column: str) -> list[Any]:
    """The values of a column, each once, in the order they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def overall(row: Row) -> float:
    """The mean accuracy over all conditions."""
    return mean(row[name] for name in TESTED)


def choose(validation: Sequence[Row], setting: str) -> tuple[float, float]:
    """The rate and the factor that, each alone, have the best mean over conditions and seeds."""

    def best(aid: str) -> float:
        rows = select(validation, setting=setting, arm=aid)
        return max(distinct(rows, aid), key=lambda value: mean(map(overall, select(rows, **{aid: value}))))

    return best("dropout"), best("balance")


# tables


def spread(values: Sequence[float], sign: str = "") -> str:
    """mean ± standard deviation over seeds; the mean alone if there is one seed."""
    shown = f"{mean(values):{sign}.3f}".replace("-", "\N{MINUS SIGN}")
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):.3f}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def accuracies(rows: Sequence[Row]) -> list[str]:
    return [spread([row[name] for row in rows]) for name in TESTED]


def choice_table(validation: Sequence[Row]) -> str:
    lines = []
    for setting in distinct(validation, "setting"):
        chosen = choose(validation, setting)
        of_setting = select(validation, setting=setting)
        for rate, factor in distinct([row | {"aids": (row["dropout"], row["balance"])} for row in of_setting], "aids"):
            rows = select(of_setting, dropout=rate, balance=factor)
            mark = " (chosen)" if (rate, factor) in ((chosen[0], 0), (0, chosen[1])) else ""
            means = [f"{mean(row[name] for row in rows):.3f}" for name in TESTED]
            score = f"{mean(map(overall, rows)):.3f}"
            lines.append([setting, f"{rate:g}", f"{factor:g}", *means, score + mark])
    return markdown(["setting", "dropout rate", "balance factor", *HEADER, "mean of the five"], lines)


def training_table(rows: Sequence[Row]) -> str:
    lines = []
    for setting in distinct(rows, "setting"):
        for arm in distinct(rows, "arm"):
            of_arm = select(rows, setting=setting, arm=arm)
            aids = [f"{aid} {of_arm[0][aid]:g}" for aid in ("dropout", "balance") if of_arm[0][aid]]
            means = [*accuracies(of_arm), spread([overall(row) for row in of_arm])]
            mass = spread([row["image_mass"] for row in of_arm])
            lines.append([setting, ", ".join(aids) or "neither", *means, mass])
    return markdown(["setting", "trained with", *HEADER, "mean of the five", "mass on the image"], lines)


EFFECTS = {
    "dropout": ("dropout", "neither"),
    "dropout, where there is balance": ("both", "balance"),
    "balance": ("balance", "neither"),
    "balance, where there is dropout": ("both", "dropout"),
}


def effects_table(rows: Sequence[Row]) -> str:
    """Differences within a seed: the same pairs, noise, batches and first weights on both sides."""
    lines = []
    for setting in distinct(rows, "setting"):
        for effect, (with_it, without) in EFFECTS.items():
            pairs = list(
                zip(select(rows, setting=setting, arm=with_it), select(rows, setting=setting, arm=without))
            )
            gains = [[a[name] - b[name] for a, b in pairs] for name in TESTED]
            gains.append([overall(a) - overall(b) for a, b in pairs])
            lines.append([setting, effect, *(spread(gain, "+") for gain in gains)])
    return markdown(["setting", "adding", *HEADER, "mean of the five"], lines)


def layers_table(rows: Sequence[Row]) -> str:
    total = sum(row["cpu_seconds"] for row in rows)
    lines = []
    for layer in distinct(rows, "layer"):
        of_layer = select(rows, layer=layer)
        seconds = sum(row["cpu_seconds"] for row in of_layer)
        mass = [row["image_mass"] for row in of_layer]
        first = of_layer[0]
        lines.append(
            [
                first["level"],
                layer,
                f"{first['parameters'] - first['encoder_parameters']:,.0f}",
                f"{seconds / len(of_layer):.1f} s, {seconds / total:.1%}",
                *accuracies(of_layer),
                "" if math.isnan(mass[0]) else spread(mass),
            ]
        )
    return markdown(["level", "layer", "parameters", "training time, share", *HEADER, "mass on the image"], lines)


def tables(measured: dict[str, list[Row]]) -> list[str]:
    made: dict[str, tuple[Callable[[Sequence[Row]], str], ...]] = {
        "fusion_training_choice": (choice_table,),
        "fusion_training": (training_table, effects_table),
        "fusion_layers": (layers_table,),
    }
    return [make(rows) for name, rows in measured.items() for make in made[name]]


# pictures: dots are seeds, bars their mean


ARM_COLOURS = {"neither": "#888888", "balance": "#E69F00", "dropout": "#0072B2", "both": "#009E73"}
ARM_NAMES = {"neither": "neither", "balance": "balance loss", "dropout": "dropout", "both": "both aids"}
SETTING_TITLES = {"even": "both are noisy", "audio leads": "audio is clear"}
LANE = 0.19


def _axes(figure: Any, widths: Sequence[float]) -> Any:
    """Panels side by side, in per cent."""
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(1, len(widths), width_ratios=widths)
    for axes in panels:
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
    return panels


def _dots(axes: Any, y: float, values: Sequence[float], colour: str) -> float:
    """Seeds as dots, their mean as a bar; the mean."""
    axes.plot(values, [y] * len(values), "o", color=colour, markersize=3.2, alpha=0.45, markeredgewidth=0)
    middle = mean(values)
    axes.plot([middle], [y], "|", color=colour, markersize=9, markeredgewidth=2.2)
    return middle


def _beside(axes: Any, text: str, values: Sequence[float], y: float, colour: str, left: bool = False) -> None:
    x, shift, align = (min(values), -6, "right") if left else (max(values), 6, "left")
    axes.annotate(text, (x, y), (shift, 0), textcoords="offset points", ha=align, va="center", color=colour,
                  fontsize=8, fontweight="bold")  # fmt: skip


def draw_training(measured: dict[str, list[Row]], figure: Any) -> None:
    """A panel of accuracies for each setting, and one of the mass that each arm leaves the image."""
    rows = measured["fusion_training"]
    settings = distinct(rows, "setting")
    panels = _axes(figure, [1.0] * len(settings) + [0.62])
    for axes, setting in zip(panels, settings):
        for place, condition in enumerate(TESTED):
            for lane, (arm, colour) in enumerate(ARM_COLOURS.items()):
                y = place + (lane - 1.5) * LANE
                values = [row[condition] for row in select(rows, setting=setting, arm=arm)]
                middle = _dots(axes, y, values, colour)
                if condition == "image":  # where they are far apart
                    _beside(axes, ARM_NAMES[arm], values, y, colour, left=middle > 0.5)
        axes.set_yticks(range(len(TESTED)), HEADER)
        axes.set_ylim(len(TESTED) - 0.5, -0.5)
        axes.axvline(1 / NUM_CLASSES, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.text(1 / NUM_CLASSES + 0.01, -0.47, "chance", fontsize=7.5, va="top")
        axes.set_title(f"Accuracy, trained where {SETTING_TITLES[setting]}", fontweight="bold")
    axes = panels[-1]
    for place, setting in enumerate(settings):
        for lane, (arm, colour) in enumerate(ARM_COLOURS.items()):
            y = place + (lane - 1.5) * LANE
            values = [row["image_mass"] for row in select(rows, setting=setting, arm=arm)]
            _dots(axes, y, values, colour)
            _beside(axes, ARM_NAMES[arm], values, y, colour)
    axes.set_yticks(range(len(settings)), [SETTING_TITLES[setting].replace(" ", "\n", 1) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_title("Mass on the image", fontweight="bold")


def draw_layers(measured: dict[str, list[Row]], figure: Any) -> None:
    """A line for each layer: its accuracies, its share of the mass, its training time."""
    rows = measured["fusion_layers"]
    names = distinct(rows, "layer")
    left, middle, right = _axes(figure, (1.6, 0.62, 0.62))
    levels = [select(rows, layer=name)[0]["level"] for name in names]
    places = [number + 0.9 * len(set(levels[: number + 1])) for number in range(len(names))]
    for name, y in zip(names, places):
        of_layer = select(rows, layer=name)
        for condition in CONDITIONS:
            _dots(left, y, [row[condition] for row in of_layer], COLOURS[condition])
        mass = mean(row["image_mass"] for row in of_layer)
        if mass == 1:
            middle.text(0.02, y, "a softmax for each", fontsize=7, va="center")
        elif not math.isnan(mass):
            middle.barh(y, mass, 0.62, color=COLOURS["image"])
            middle.barh(y, 1 - mass, 0.62, left=mass, color=COLOURS["audio"])
        seconds = mean(row["cpu_seconds"] for row in of_layer)
        right.barh(y, seconds, 0.62, color="#bbbbbb")
        right.annotate(f"{seconds:.0f}", (seconds, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    for axes in (left, middle, right):
        axes.set_ylim(places[-1] + 0.7, places[0] - 1.5)
        axes.set_yticks(places if axes is left else [], names if axes is left else [])
    for level in dict.fromkeys(levels):
        y = places[levels.index(level)] - 0.95
        left.annotate(f"{level} level" if level != "training" else "training aid", (0, y), (-4, 0), va="center",
                      xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8,
                      fontweight="bold")  # fmt: skip
    left.set_xlim(math.floor(10 * min(row[name] for row in rows for name in CONDITIONS) - 0.1) / 10, 1)
    top = {name: mean(row[name] for row in select(rows, layer=names[0])) for name in CONDITIONS}
    for name, align in zip(sorted(top, key=lambda name: top[name]), ("right", "left", "left")):
        left.text(top[name], places[0] - 0.8, HEADINGS[name], ha=align, va="center", color=COLOURS[name],
                  fontsize=8, fontweight="bold")  # fmt: skip
    middle.annotate("image", (0.02, places[0] - 0.8), color=COLOURS["image"], fontsize=8, fontweight="bold")
    middle.annotate("audio", (0.98, places[0] - 0.8), color=COLOURS["audio"], fontsize=8, fontweight="bold", ha="right")
    longest = max(mean(row["cpu_seconds"] for row in select(rows, layer=name)) for name in names)
    right.set_xlim(0, 1.15 * longest)
    right.set_xticks([])
    right.grid(False)
    left.set_title("Test accuracy", fontweight="bold")
    middle.set_title("Attention mass", fontweight="bold")
    right.set_title("Training, CPU s", fontweight="bold")


SIZES = {"fusion_training": (12.0, 4.6), "fusion_layers": (10.5, 7.4)}


def picture(draw: Callable[[dict[str, list[Row]], Any], None], measured: dict[str, list[Row]], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style: Any = dict.fromkeys(inked, INK) | {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    style |= {f"axes.spines.{side}": False for side in ("top", "right", "left", "bottom")}
    with rc_context(style):
        figure = Figure(figsize=SIZES[path.stem], dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        draw(measured, figure)
        figure.savefig(path)
