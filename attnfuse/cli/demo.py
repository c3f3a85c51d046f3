"""`attnfuse demo`: what fusion at each level does on AV-digits when a modality is noisy, or gone.

Every model is trained twice by the same recipe, without and with modality dropout, on pairs whose noise
levels are drawn at random, and tested at the levels of `attnfuse.datasets` with both modalities and with each
alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnfuse.datasets import AUDIO_SNR_DB, IMAGE_NOISE, NUM_BANDS, Split, av_digits
from attnfuse.fusion import (
    BottleneckFusion,
    ConcatFusion,
    FusionOutput,
    LateFusion,
    ModalityDropout,
    MultimodalTransformer,
)

DIMS = {"image": 8, "audio": 2 * NUM_BANDS}
MAX_LENGTHS = {"image": 8, "audio": 40}
NUM_CLASSES = 10
WIDTH, HEADS, LAYERS = 32, 4, 2
BATCH, LEARNING_RATE = 64, 6e-3
MODALITY_DROPOUT = 0.3
EPOCHS = 8
REPEATS = 3  # pairs drawn from each training scan

# Training draws noise from these, so that a model must judge for each sample whom to trust.
IMAGE_RANGE = (0.0, 2 * IMAGE_NOISE)
AUDIO_RANGE = (AUDIO_SNR_DB - 12, AUDIO_SNR_DB + 12)
SWEEP_POINTS = 5

CONDITIONS = {"both": (True, True), "image": (True, False), "audio": (False, True)}


class JointClassifier(nn.Module):
    """A model-level fusion of the tokens, and a linear head."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, inputs: dict[str, Tensor], mask: dict[str, Tensor], present: Tensor) -> FusionOutput:
        out = self.fusion(inputs, mask, present)
        return out._replace(logits=self.head(out.fused))


class FeatureClassifier(nn.Module):
    """An encoder per modality; their outputs are fused, then classified."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: _encoder(name) for name in DIMS})
        self.fusion = ConcatFusion(dict.fromkeys(DIMS, WIDTH), WIDTH)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(WIDTH, NUM_CLASSES))

    def forward(self, inputs: dict[str, Tensor], mask: dict[str, Tensor], present: Tensor) -> FusionOutput:
        out = self.fusion(_encode(self.encoders, inputs, mask), present=present)
        return out._replace(logits=self.head(out.fused))


class DecisionClassifier(nn.Module):
    """A classifier per modality; their predictions are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: _encoder(name) for name in DIMS})
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, NUM_CLASSES) for name in DIMS})
        self.fusion = LateFusion(list(DIMS), NUM_CLASSES, "product")

    def forward(self, inputs: dict[str, Tensor], mask: dict[str, Tensor], present: Tensor) -> FusionOutput:
        encoded = _encode(self.encoders, inputs, mask)
        return self.fusion({name: self.heads[name](x) for name, x in encoded.items()}, present=present)


def _encoder(name: str) -> MultimodalTransformer:
    """The transformer of one modality is the multimodal one with a single name."""
    return _transformer({name: DIMS[name]})


def _transformer(dims: dict[str, int]) -> MultimodalTransformer:
    lengths = {name: MAX_LENGTHS[name] for name in dims}
    return MultimodalTransformer(dims, WIDTH, HEADS, LAYERS, max_lengths=lengths)


def _bottleneck() -> BottleneckFusion:
    return BottleneckFusion(
        DIMS, WIDTH, HEADS, LAYERS, num_bottlenecks=4, fusion_layer=LAYERS - 1, max_lengths=MAX_LENGTHS
    )


def _encode(encoders: nn.ModuleDict, inputs: dict[str, Tensor], mask: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: encoder({name: inputs[name]}, {name: mask[name]} if name in mask else None).fused
        for name, encoder in encoders.items()
    }


FUSIONS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "ConcatFusion": ("feature", FeatureClassifier),
    "BottleneckFusion": ("model", lambda: JointClassifier(_bottleneck())),
    "MultimodalTransformer": ("model", lambda: JointClassifier(_transformer(DIMS))),
    "LateFusion": ("decision", DecisionClassifier),
}
WATCHED = "MultimodalTransformer"  # the one whose source_mass is drawn


Loss = Callable[[FusionOutput, Tensor, Tensor, int], Tensor]  # (output, label, who was present, epoch from 0)


def cross_entropy(out: FusionOutput, label: Tensor, present: Tensor, epoch: int) -> Tensor:
    """The loss of the fused prediction; who was present does not matter to it, nor when."""
    assert out.logits is not None
    return nn.functional.cross_entropy(out.logits, label)


def fit(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    seed: int,
    modality_dropout: float = 0.0,
    allowed: tuple[bool, bool] = (True, True),
    loss: Loss = cross_entropy,
    on_step: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train and return in eval mode. Noise, batches and dropped modalities are the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    drop = ModalityDropout(modality_dropout, keep_at_least_one=True)
    steps = epochs * -(-len(split) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for batch in split.batches(BATCH, generator):
            present = drop(torch.tensor(allowed).repeat(len(batch), 1), generator)
            out = model(batch.inputs, batch.mask, present)
            optimizer.zero_grad()
            loss(out, batch.label, present, epoch).backward()
            optimizer.step()
            schedule.step()
            on_step()
    return model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, allowed: tuple[bool, bool] = (True, True)
) -> tuple[float, Tensor]:
    """Accuracy, and the (N, 2) mass; of a model that reports none, (N, 0)."""
    out = model(split.inputs, split.mask, torch.tensor(allowed).repeat(len(split), 1))
    mass = torch.empty(len(split), 0) if out.source_mass is None else out.source_mass
    return (out.logits.argmax(1) == split.label).float().mean().item(), mass


def measure(epochs: int, seed: int, limit: int | None, console: Any) -> dict[str, Any]:
    """Train every model and measure everything the table and the picture show."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    data = av_digits(seed, image_noise=IMAGE_RANGE, audio_snr_db=AUDIO_RANGE, repeats=REPEATS, limit=limit)
    test = av_digits(seed, limit=limit).test
    rows, models = [], {}
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    bar.disable = not console.is_terminal
    with bar:
        for name, (level, build) in FUSIONS.items():
            for rate in (0.0, MODALITY_DROPOUT):
                label = f"{name}, modality dropout {rate:g}"
                task = bar.add_task(label, total=epochs * -(-len(data.train) // BATCH))
                torch.manual_seed(seed)
                began = time.perf_counter()
                model = fit(
                    build(),
                    data.train,
                    epochs=epochs,
                    seed=seed,
                    modality_dropout=rate,
                    on_step=lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
                seconds = time.perf_counter() - began
                bar.remove_task(task)
                accuracy = {who: evaluate(model, test, allowed)[0] for who, allowed in CONDITIONS.items()}
                rows.append(
                    {
                        "level": level,
                        "fusion": name,
                        "modality_dropout": rate,
                        "accuracy": accuracy,
                        "seconds": seconds,
                    }
                )
                console.print(f"trained {label}: {seconds:.1f} s", highlight=False)
                models[name] = model  # the last of each, which is the one with modality dropout
    return {
        "seed": seed,
        "epochs": epochs,
        "train_pairs": len(data.train),
        "test_pairs": len(test),
        "image_noise": IMAGE_NOISE,
        "audio_snr_db": AUDIO_SNR_DB,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "training_seconds": sum(row["seconds"] for row in rows),
        "rows": rows,
        "sweep": sweep(models[WATCHED], seed, limit),
    }


def sweep(model: nn.Module, seed: int, limit: int | None) -> list[dict[str, float]]:
    """Test at noise levels that go from a clean image with drowned speech to the reverse."""
    points = []
    for t in torch.linspace(0, 1, SWEEP_POINTS).tolist():
        noise = IMAGE_RANGE[0] + t * (IMAGE_RANGE[1] - IMAGE_RANGE[0])
        snr = AUDIO_RANGE[0] + t * (AUDIO_RANGE[1] - AUDIO_RANGE[0])
        accuracy, mass = evaluate(
            model, av_digits(seed, image_noise=noise, audio_snr_db=snr, limit=limit).test
        )
        low, mean, high = mass[:, 0].quantile(0.1), mass[:, 0].mean(), mass[:, 0].quantile(0.9)
        points.append(
            {
                "image_noise": noise,
                "audio_snr_db": snr,
                "accuracy": accuracy,
                "image_mass": mean.item(),
                "audio_mass": mass[:, 1].mean().item(),
                "image_mass_p10": low.item(),
                "image_mass_p90": high.item(),
            }
        )
    return points


TARGET = 0.8
IMAGE_GRID = torch.arange(0.2, 0.71, 0.05).tolist()
AUDIO_GRID = torch.arange(-16.0, 1.0, 1.0).tolist()


def choose_noise(epochs: int, seed: int, limit: int | None, console: Any) -> dict[str, Any]:
    """The level at which a model of one modality alone is nearest to TARGET on the validation split."""
    image_range, audio_range = (0.0, 1.0), (-20.0, 10.0)
    data = av_digits(seed, image_noise=image_range, audio_snr_db=audio_range, repeats=REPEATS, limit=limit)
    chosen: dict[str, Any] = {"target": TARGET}
    for name, grid in (("image", IMAGE_GRID), ("audio", AUDIO_GRID)):
        torch.manual_seed(seed)
        model = fit(
            JointClassifier(_transformer(DIMS)),
            data.train,
            epochs=epochs,
            seed=seed,
            allowed=CONDITIONS[name],
        )
        accuracies = []
        for level in grid:
            levels = {"image_noise": level} if name == "image" else {"audio_snr_db": level}
            # Three draws of the noise: one validation split of 300 leaves a standard error above 0.02.
            draws = [av_digits(seed + draw, limit=limit, **levels).val for draw in range(3)]
            accuracies.append(sum(evaluate(model, val, CONDITIONS[name])[0] for val in draws) / len(draws))
            console.print(f"{name} at {level:g}: {accuracies[-1]:.3f} on validation", highlight=False)
        best = min(range(len(grid)), key=lambda i: abs(accuracies[i] - TARGET))
        chosen["image_noise" if name == "image" else "audio_snr_db"] = round(grid[best], 2)
    return chosen


def table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    levels = f"image noise {result['image_noise']:g}, audio SNR {result['audio_snr_db']:g} dB"
    table = Table(
        title=f"Test accuracy at {levels}",
        caption=f"{result['test_pairs']} pairs of unseen scans and unseen voices, "
        f"chance {1 / NUM_CLASSES:.2f}, standard error at most {0.5 / result['test_pairs'] ** 0.5:.3f}",
    )
    table.add_column("level", no_wrap=True)
    table.add_column("fusion", no_wrap=True)
    table.add_column("modality\ndropout", justify="right")
    for name in ("both", "image\nonly", "audio\nonly", "trained\nin"):
        table.add_column(name, justify="right")
    for i, row in enumerate(result["rows"]):
        table.add_row(
            row["level"],
            row["fusion"],
            f"{row['modality_dropout']:g}",
            *(f"{row['accuracy'][name]:.2f}" for name in CONDITIONS),
            f"{row['seconds']:.1f} s",
            end_section=i % 2 == 1,
        )
    return table


# Okabe and Ito's palette, told apart with any colour vision; the tint is the same model without dropout.
COLOURS = {"both": "#009E73", "image": "#0072B2", "audio": "#E69F00"}
NAMES = {"both": "both", "image": "image only", "audio": "audio only"}
INK = "#333333"


def draw(result: dict[str, Any], path: Path) -> None:
    """Left: accuracy of every model. Right: attention mass as the noise moves from the audio to the image."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style: Any = dict.fromkeys(inked, INK) | {"font.size": 9, "axes.titlesize": 10.5}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with rc_context(style):
        figure = Figure(figsize=(11.5, 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1.75, 1))
        _draw_accuracy(left, result)
        _draw_mass(right, result)
        figure.savefig(path)


def _draw_accuracy(axes: Any, result: dict[str, Any]) -> None:
    from matplotlib.patches import Patch

    width = 0.135
    for group in range(0, len(result["rows"]), 2):
        for side, row in enumerate(result["rows"][group : group + 2]):
            for slot, (name, accuracy) in enumerate(row["accuracy"].items()):
                x = group / 2 + (2 * slot + side - 2.5) * width + (slot - 1) * 0.03
                colour = COLOURS[name]
                face = colour if side else "white"
                axes.bar(x, accuracy, 0.9 * width, color=face, edgecolor=colour, linewidth=1.2)
                label = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5}
                axes.annotate(f"{100 * accuracy:.0f}", (x, accuracy), (0, 2), **label)
    axes.axhline(1 / NUM_CLASSES, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.text(3.52, 1 / NUM_CLASSES, "chance", fontsize=7.5, va="center")
    firsts = result["rows"][::2]
    names = [f"{row['fusion']}\n({row['level']} level)" for row in firsts]
    axes.set_xticks(range(len(firsts)), names, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.55, 3.5), ylim=(0, 1.0), ylabel="test accuracy")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title("Test accuracy with both modalities, and with one gone\n", fontweight="bold")
    handles = [Patch(facecolor=COLOURS[name], label=NAMES[name]) for name in CONDITIONS]
    rate = result["rows"][1]["modality_dropout"]
    handles += [
        Patch(facecolor="white", edgecolor=INK, label="without modality dropout"),
        Patch(facecolor=INK, edgecolor=INK, label=f"with, p = {rate:g}"),
    ]
    axes.legend(
        handles=handles,
        ncols=5,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        frameon=False,
        fontsize=8,
        handlelength=1.1,
        columnspacing=1.3,
        borderaxespad=0.1,
    )


def _draw_mass(axes: Any, result: dict[str, Any]) -> None:
    points = result["sweep"]
    x = range(len(points))
    beside: Any = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
    for name in DIMS:
        share = [point[f"{name}_mass"] for point in points]
        low, high = (
            [
                point[f"image_mass_{p}"] if name == "image" else 1 - point[f"image_mass_{p}"]
                for point in points
            ]
            for p in ("p10", "p90")
        )
        axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        axes.plot(x, share, color=COLOURS[name], marker="o", linewidth=2)
        axes.annotate(name, (x[-1], share[-1]), color=COLOURS[name], fontweight="bold", **beside)
    accuracy = [point["accuracy"] for point in points]
    axes.plot(x, accuracy, color=INK, linewidth=1, linestyle=(0, (1, 2)), marker=".", markersize=4)
    axes.annotate("accuracy", (x[-1], accuracy[-1]), **beside)
    labels = [
        f"{point['image_noise']:.2f}\n{point['audio_snr_db']:+.0f} dB".replace("-", "\N{MINUS SIGN}")
        for point in points
    ]
    axes.set_xticks(x, labels)
    axes.set(xlim=(-0.2, len(points) - 0.35), ylim=(0, 1), ylabel="share of attention mass, or accuracy")
    axes.set_xlabel("noise: std of the image (pixels in [0, 1])\nand signal-to-noise ratio of the audio")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title("Attention as the noise changes sides\n", fontweight="bold")
    note = f"{WATCHED}; band: middle 80 % of pairs"
    axes.annotate(note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=int, default=None, help=f"passes over the training pairs (default {EPOCHS})"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the data, the weights and the training (default 0)"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for av_digits.png (default: here)")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch on a few pairs: that it runs, not how well"
    )
    parser.add_argument("--json", action="store_true", help="print the measurements as one JSON object")
    parser.add_argument(
        "--choose-noise",
        action="store_true",
        help="instead, find on the validation split the noise levels that attnfuse.datasets uses",
    )


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401  (asked for now, not after a minute of training)
        from rich.console import Console
    except ImportError as error:
        raise ImportError("the demo needs matplotlib and rich: pip install attnfuse[demo]") from error
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    console = Console(stderr=args.json)
    epochs = args.epochs or (1 if args.quick else EPOCHS)
    limit = 64 if args.quick else None
    if args.choose_noise:
        result = choose_noise(epochs, args.seed, limit, console)
    else:
        result = measure(epochs, args.seed, limit, console)
        args.out.mkdir(parents=True, exist_ok=True)
        picture = args.out / "av_digits.png"
        draw(result, picture)
        result["picture"] = str(picture)
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    elif args.choose_noise:
        console.print(f"IMAGE_NOISE = {result['image_noise']}\nAUDIO_SNR_DB = {result['audio_snr_db']}")
    else:
        console.print(table(result))
        console.print(
            f"training took {result['training_seconds']:.0f} s in all; picture in {picture}", highlight=False
        )
    return 0
