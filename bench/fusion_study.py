"""What helps a fusion model on AV-digits: the training aids, and every fusion layer of the library.

    python bench/fusion_study.py training      ModalityDropout and source_balance_loss: neither, each alone, both
    python bench/fusion_study.py layers        every layer of bench/fusion_layers.py on the same encoders

Each writes its measurements as CSV, draws a picture and prints the tables of docs/fusion_study.md. `--tables` makes
picture and tables from the CSV that is there, without training.

What is chosen (the rate of the dropout, the factor of the loss) is chosen on the validation split, with seeds that
the test does not use, by the mean accuracy over all conditions of the table. A training is one process on one
thread, and its time is the processor's: it means the same however many run at once.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from fusion_layers import ALONE, LAYERS, build
from torch import Tensor, nn

from attnfuse.cli.demo import (
    AUDIO_RANGE,
    COLOURS,
    CONDITIONS,
    EPOCHS,
    IMAGE_RANGE,
    INK,
    MODALITY_DROPOUT,
    NUM_CLASSES,
    REPEATS,
    Loss,
    cross_entropy,
    evaluate,
    fit,
)
from attnfuse.datasets import AUDIO_SNR_DB, IMAGE_NOISE, Split, av_digits
from attnfuse.fusion import FusionOutput, source_balance_loss

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


# what is trained, and on what


@dataclass(frozen=True)
class Setting:
    """Noise that training draws from, the levels of the test, and the levels at which a modality is drowned."""

    image_range: tuple[float, float]
    audio_range: tuple[float, float]
    image: float
    audio: float
    drowned_image: float
    drowned_audio: float

    def tests(self, seed: int, split: str, limit: int | None) -> dict[str, tuple[Split, tuple[bool, bool]]]:
        """condition -> the pairs, and who is present"""

        def at(image: float, audio: float) -> Split:
            found: Split = getattr(av_digits(seed, image_noise=image, audio_snr_db=audio, limit=limit), split)
            return found

        usual, both = at(self.image, self.audio), CONDITIONS["both"]
        return {name: (usual, allowed) for name, allowed in CONDITIONS.items()} | {
            "image drowned": (at(self.drowned_image, self.audio), both),
            "audio drowned": (at(self.image, self.drowned_audio), both),
        }


SETTINGS = {
    # The levels of `attnfuse demo --choose-noise`, at which either modality alone is right four times in five;
    # drowned is the worst that training draws.
    "even": Setting(IMAGE_RANGE, AUDIO_RANGE, IMAGE_NOISE, AUDIO_SNR_DB, IMAGE_RANGE[1], AUDIO_RANGE[0]),
    # Speech so clear in training that nobody needs the image; drowned is the level of the other setting.
    "audio leads": Setting(IMAGE_RANGE, (10.0, 20.0), IMAGE_NOISE, 15.0, IMAGE_RANGE[1], AUDIO_SNR_DB),
}
TESTED = (*CONDITIONS, "image drowned", "audio drowned")
HEADINGS = {"both": "image and audio", "image": "image only", "audio": "audio only"}

RATES = (0.1, 0.3, 0.5)
FACTORS = (0.1, 0.3, 1.0)
CHOICE_SEEDS = (100, 101)


@dataclass(frozen=True)
class Arm:
    """One way to train: the rate of the modality dropout and the factor of the balance loss."""

    rate: float = 0.0
    factor: float = 0.0

    @property
    def name(self) -> str:
        used = [name for name, value in (("dropout", self.rate), ("balance", self.factor)) if value]
        return used[0] if len(used) == 1 else "both" if used else "neither"


@dataclass(frozen=True)
class Job:
    """One training and its evaluation."""

    setting: str
    layer: str
    arm: Arm
    seed: int
    split: str
    epochs: int
    limit: int | None


@lru_cache(maxsize=1)
def train_split(setting: str, seed: int, limit: int | None) -> Split:
    levels = SETTINGS[setting]
    return av_digits(
        seed, image_noise=levels.image_range, audio_snr_db=levels.audio_range, repeats=REPEATS, limit=limit
    ).train


@lru_cache(maxsize=1)
def test_splits(setting: str, seed: int, split: str, limit: int | None) -> dict[str, tuple[Split, tuple[bool, bool]]]:
    return SETTINGS[setting].tests(seed, split, limit)


def balanced(factor: float, out: FusionOutput, label: Tensor, present: Tensor) -> Tensor:
    assert out.source_mass is not None
    return cross_entropy(out, label, present) + factor * source_balance_loss(out.source_mass, present)


def work(job: Job) -> Row:
    """Train, test, and the row of the CSV."""
    torch.set_num_threads(1)
    train = train_split(job.setting, job.seed, job.limit)
    torch.manual_seed(job.seed)
    model = build(job.layer)
    usual = LAYERS[job.layer].loss if job.layer in LAYERS else cross_entropy
    loss: Loss = partial(balanced, job.arm.factor) if job.arm.factor else usual
    began = time.process_time()
    fit(model, train, epochs=job.epochs, seed=job.seed, modality_dropout=job.arm.rate, loss=loss)
    seconds = time.process_time() - began

    tests = test_splits(job.setting, job.seed, job.split, job.limit)
    results = {name: evaluate(model, split, allowed) for name, (split, allowed) in tests.items()}
    mass = results["both"][1]
    return {
        "setting": job.setting,
        "level": LAYERS[job.layer].level if job.layer in LAYERS else "model",
        "layer": job.layer,
        "arm": job.arm.name,
        "dropout": job.arm.rate,
        "balance": job.arm.factor,
        "split": job.split,
        "seed": job.seed,
        "epochs": job.epochs,
        **{name: round(accuracy, 4) for name, (accuracy, _) in results.items()},
        "image_mass": round(mass[:, 0].mean().item(), 4) if mass.shape[1] else math.nan,
        "parameters": _count(model),
        "encoder_parameters": _count(getattr(model, "encoders", nn.Module())),
        "cpu_seconds": round(seconds, 2),
        "torch": torch.__version__,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Plan:
    """How much of it: what the command line says."""

    seeds: int
    processes: int
    quick: bool

    def job(self, setting: str, layer: str, arm: Arm, seed: int, split: str) -> Job:
        epochs, limit = (1, 192) if self.quick else (EPOCHS, None)
        return Job(setting, layer, arm, seed, split, epochs, limit)

    def run(self, title: str, jobs: Sequence[Job], console: Any) -> list[Row]:
        """The row of every job, in the order of the jobs."""
        from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

        rows: dict[int, Row] = {}
        with Progress(*Progress.get_default_columns()[:-1], TimeElapsedColumn(), "left", TimeRemainingColumn(),
                      console=console) as bar:  # fmt: skip
            task = bar.add_task(title, total=len(jobs))
            for index, row in self._finished(jobs):
                rows[index] = row
                bar.advance(task)
                if not console.is_terminal:
                    console.print(f"{title}: {len(rows)} of {len(jobs)}", highlight=False)
        return [rows[index] for index in range(len(jobs))]

    def _finished(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Row]]:
        if self.processes == 1:
            yield from enumerate(map(work, jobs))
            return
        with ProcessPoolExecutor(self.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(work, job): index for index, job in enumerate(jobs)}
            for future in as_completed(waiting):
                yield waiting[future], future.result()


# the studies


def training(plan: Plan, console: Any) -> dict[str, list[Row]]:
    """Choose rate and factor for each setting on validation pairs; then train the four arms and test them."""
    rates, factors, seeds = (RATES[:1], FACTORS[:1], CHOICE_SEEDS[:1]) if plan.quick else (RATES, FACTORS, CHOICE_SEEDS)
    tried = [Arm(), *(Arm(rate=rate) for rate in rates), *(Arm(factor=factor) for factor in factors)]
    jobs = [plan.job(setting, ALONE, arm, seed, "val") for setting in SETTINGS for seed in seeds for arm in tried]
    validation = plan.run("choosing on validation pairs", jobs, console)
    jobs = []
    for setting in SETTINGS:
        rate, factor = choose(validation, setting)
        arms = (Arm(), Arm(rate=rate), Arm(factor=factor), Arm(rate, factor))
        jobs += [plan.job(setting, ALONE, arm, seed, "test") for seed in range(plan.seeds) for arm in arms]
    return {"fusion_training_choice": validation, "fusion_training": plan.run("training and testing", jobs, console)}


def choose(validation: Sequence[Row], setting: str) -> tuple[float, float]:
    """The rate and the factor that, each alone, have the best mean over conditions and seeds."""

    def best(aid: str) -> float:
        rows = select(validation, setting=setting, arm=aid)
        return max(distinct(rows, aid), key=lambda value: mean(map(overall, select(rows, **{aid: value}))))

    return best("dropout"), best("balance")


def layers(plan: Plan, console: Any) -> dict[str, list[Row]]:
    """Every layer by the same recipe, which is that of the demo with modality dropout."""
    arm = Arm(rate=MODALITY_DROPOUT)
    jobs = [plan.job("even", layer, arm, seed, "test") for seed in range(plan.seeds) for layer in LAYERS]
    return {"fusion_layers": plan.run("training and testing", jobs, console)}


# tables


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def distinct(rows: Sequence[Row], column: str) -> list[Any]:
    """The values of a column, each once, in the order they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def overall(row: Row) -> float:
    """The mean accuracy over all conditions."""
    return mean(row[name] for name in TESTED)


def spread(values: Sequence[float], sign: str = "") -> str:
    """mean ± standard deviation over seeds; the mean alone if there is one seed."""
    middle = mean(values)
    shown = f"{middle:{sign}.3f}".replace("-", "\N{MINUS SIGN}")
    if len(values) == 1:
        return shown
    return f"{shown} ± {math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1)):.3f}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def accuracies(rows: Sequence[Row]) -> list[str]:
    return [spread([row[name] for row in rows]) for name in TESTED]


HEADER = [HEADINGS.get(name, name) for name in TESTED]


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


# files


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
    axes.set_title("Attention mass on the image", fontweight="bold")


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
            middle.text(0.02, y, "each has all of its own", fontsize=7, va="center")
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


SIZES = {"fusion_training": (12.0, 4.6), "fusion_layers": (10.5, 7.4)}
STUDIES: dict[str, Any] = {"training": (training, draw_training), "layers": (layers, draw_layers)}
FILES = {"training": ("fusion_training_choice", "fusion_training"), "layers": ("fusion_layers",)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fusion layers and training aids on AV-digits.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, help="trainings of each row of the table (default 5; of layers, 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="one epoch on a few pairs: that it runs, not how well")
    parser.add_argument("--out", type=Path, help="folder for CSV and picture (default bench/results and docs)")
    parser.add_argument("--tables", action="store_true", help="no training: tables and picture from the CSV in --out")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.quick and args.out is None:
        parser.error("--quick needs --out: its figures must not replace the real ones")
    results, pictures = (args.out, args.out) if args.out else (ROOT / "bench" / "results", ROOT / "docs")
    try:
        import matplotlib  # noqa: F401  (asked for now, not after the training)
        from rich.console import Console
    except ImportError as error:
        raise ImportError("the study needs matplotlib and rich: pip install attnfuse[demo]") from error
    study, draw = STUDIES[args.study]
    if args.tables:
        missing = [name for name in FILES[args.study] if not (results / f"{name}.csv").exists()]
        if missing:
            parser.error(f"--tables needs {missing[0]}.csv in {results}, which is not there")
        measured = {name: read(results / f"{name}.csv") for name in FILES[args.study]}
    else:
        seeds = args.seeds or (1 if args.quick else {"training": 5, "layers": 3}[args.study])
        measured = study(Plan(seeds, args.jobs, args.quick), Console(stderr=True))
        results.mkdir(parents=True, exist_ok=True)
        for name, rows in measured.items():
            write(rows, results / f"{name}.csv")
    picture(draw, measured, pictures / f"fusion_{args.study}.png")
    print("\n\n".join(tables(measured)))


if __name__ == "__main__":
    main()
