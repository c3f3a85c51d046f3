"""A picture of some stamps and of where a model looked."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnfuse.fusion.output import FusionOutput
from attnfuse.mel import SAMPLE_RATE
from attnfuse.stamps.features import SPEECH_SECONDS, load_speech
from attnfuse.stamps.items import Item
from attnfuse.stamps.splits import MODALITIES, Split, Stamps

COLOURS = {"picture": "#E69F00", "caption": "#56B4E9", "speech": "#009E73"}  # Okabe and Ito: safe for the colour-blind


def draw_samples(
    path: str | Path,
    data: Stamps,
    split: Split,
    fusion: Callable[..., FusionOutput],
    head: Callable[[Tensor], Tensor],
    count: int = 6,
    *,
    artwork: bool = True,
) -> None:
    """Draw `count` stamps of `split`, each with its parts, the prediction and the attention mass of each modality.

    The stamps come from as many categories as there are rows; every other one has a part missing, if there is such.

    Args:
        path: of the file; its ending decides the format.
        fusion, head: inputs -> FusionOutput with source_mass, and its fused -> logits, both in eval mode.
        artwork: False draws names instead of pictures, captions and sounds, which are under GPL-2.
    Raises ImportError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_samples needs matplotlib: pip install attnfuse[stamps]") from error

    chosen = split[_choose(split, count)]
    with torch.no_grad():
        out = fusion(chosen.inputs, chosen.mask, chosen.present)
        predicted = head(out.fused).argmax(1) if out.fused is not None else None
    if predicted is None or out.source_mass is None:
        raise ValueError("fusion must give fused and source_mass, and did not")

    widths = [1.1, 2.4, 1.6, 2.2] if artwork else [2.8, 2.2]
    figure = Figure(figsize=(sum(widths) + 2.2, 1.15 * len(chosen) + 0.4), layout="constrained", facecolor="white")
    grid = figure.subplots(len(chosen), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for n, axes in enumerate(grid):
        item = data.items[int(chosen.item[n])]
        verdict = (data.categories[int(chosen.label[n])], data.categories[int(predicted[n])])
        if artwork:
            _draw_picture(axes[0], item)
            _draw_speech(axes[2], item)
        _write(axes[1 if artwork else 0], item.caption or "no caption" if artwork else item.name, *verdict)
        _draw_mass(axes[-1], out.source_mass[n], chosen.present[n])
    grid[0, -1].set_title("attention mass", fontsize=9)
    figure.savefig(path, dpi=110)


def _choose(split: Split, count: int) -> Tensor:
    """Indices of `count` stamps, one category after the other, complete and incomplete ones in turn."""
    complete = split.present.all(1).tolist()
    categories = split.label.unique().tolist()
    left = list(range(len(split)))
    chosen: list[int] = []
    while left and len(chosen) < count:
        turn = len(chosen)
        here = [n for n in left if split.label[n] == categories[turn % len(categories)]] or left
        chosen.append(next((n for n in here if complete[n] == (turn % 2 == 0)), here[0]))
        left.remove(chosen[-1])
    return torch.tensor(chosen)


def _draw_picture(axes: Any, item: Item) -> None:
    axes.axis("off")
    if item.picture is None:
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=9, color="#777777")
        return
    from PIL import Image

    with Image.open(item.picture) as stored:
        image = stored.convert("RGBA")
    image.thumbnail((256, 256))
    axes.imshow(image)


def _draw_speech(axes: Any, item: Item) -> None:
    axes.axis("off")
    axes.set_xlim(0, SPEECH_SECONDS)
    if item.speech is None:
        axes.text(SPEECH_SECONDS / 2, 0, "no description", ha="center", va="center", fontsize=9, color="#777777")
        axes.set_ylim(-1, 1)
        return
    wave = load_speech(item.speech)
    seconds = torch.arange(len(wave)) / SAMPLE_RATE
    axes.plot(seconds[::8], wave[::8], lw=0.4, color=COLOURS["speech"])
    axes.set_ylim(-7, 7)


def _write(axes: Any, text: str, category: str, predicted: str) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.text(0, 0.95, "\n".join(textwrap.wrap(text, 34, max_lines=3)), va="top", fontsize=9)
    verdict = f"{category}: right" if category == predicted else f"{category}, taken for {predicted}"
    axes.text(0, 0.05, verdict, va="bottom", fontsize=8, color="#0072B2" if category == predicted else "#D55E00")


def _draw_mass(axes: Any, mass: Tensor, present: Tensor) -> None:
    for row, (name, share, here) in enumerate(zip(MODALITIES, mass.tolist(), present.tolist(), strict=True)):
        axes.barh(row, share, color=COLOURS[name])
        axes.text(share + 0.02, row, f"{share:.2f}" if here else "absent", va="center", fontsize=8)
    axes.set(xlim=(0, 1.25), xticks=[], yticks=range(3), yticklabels=MODALITIES)
    axes.tick_params(labelsize=8, length=0)
    axes.invert_yaxis()
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
