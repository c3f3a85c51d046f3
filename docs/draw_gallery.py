"""Draws the data flow of every layer in gallery.md: python docs/draw_gallery.py [folder], default docs/gallery.

A diagram is a grid of cells, "kind:label", in rows a, b, c, ... and columns 0, 1, 2, ...; arrows are "a0>b1". A digit
after the kind makes the cell as tall as that many rows, counted around its own. Colours are those of Okabe and Ito,
which the colour-blind can tell apart; every picture brings its own light ground, for pages that are dark.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# kind -> face, edge, text, dashed
STYLES = {
    "T": ("#56B4E9", "#2b6f99", "black", False),  # a modality: text
    "I": ("#E69F00", "#8f6300", "black", False),  # image
    "A": ("#4fc3a1", "#00664a", "black", False),  # audio
    "Q": ("#e3b7d0", "#8c4a6e", "black", False),  # an input that is always there
    ".": ("white", "#555555", "black", False),  # an operation
    "@": ("#F0E442", "#8a8200", "black", False),  # an attention
    "p": ("#e6e6e6", "#777777", "black", True),  # learned, whatever the input
    ">": ("#0072B2", "#004b75", "white", False),  # a result
}
STEP_X, STEP_Y, WIDTH, HEIGHT = 1.75, 0.62, 1.4, 0.42

Diagram = tuple[list[str], str]
THREE = ["T:text", "I:image", "A:audio"]


def rows(*columns: str | list[str]) -> list[str]:
    """Three rows from columns: a list has a cell for each, a string stands in the middle row."""
    full = [column if isinstance(column, list) else ["", column, ""] for column in columns]
    return ["|".join(column[r] for column in full) for r in range(3)]


def each(cell: str) -> list[str]:
    return [cell] * 3


INTO = "a0>a1 b0>b1 c0>c1 "
MEET = INTO + "a1>b2 b1>b2 c1>b2 b2>b3"

DIAGRAMS: dict[str, Diagram] = {
    "ConcatFusion": (rows(THREE, each(".:W · mean"), [".:", ".:sum", "p:b"], ">:fused"), MEET + " c2>b2"),
    "SumFusion": (rows(THREE, each(".:W · mean + b"), ".:sum of those\nthat are there", ">:fused"), MEET),
    "GatedMultimodalUnit": (
        [
            *rows(THREE, each(".:h = tanh(W · mean)"), ".3:Σ z · h", ">:fused"),
            " | .:z = softmax of G x\nover those there | | >:source_mass",
        ],
        INTO + "a0>d1 b0>d1 c0>d1 a1>b2 b1>b2 c1>b2 d1>b2 b2>b3 d1>d3",
    ),
    "FiLM": (
        ["Q:x | .:γ · x + β | >:out", "T:condition | .:γ, β = W · mean | "],
        "a0>a1 b0>b1 b1>a1 a1>a2",
    ),
    "TensorFusion": (
        rows(THREE, each(".:[1, mean]"), ".3:outer product,\nflattened", ".:W z + b", ">:fused"),
        INTO + "a1>b2 b1>b2 c1>b2 b2>b3 b3>b4",
    ),
    "LowRankTensorFusion": (
        rows(THREE, each(".:1 + U · mean"), ".3:product,\nrank times", [".:", ".:Σ w · product + b", ""], ">:fused"),
        INTO + "a1>b2 b1>b2 c1>b2 b2>b3 b3>b4",
    ),
    "AttentionPoolFusion": (
        [
            "T:text | .:norm(P x) | | | ",
            "I:image | .:norm(P x) | @3:one softmax\nover all tokens | .:norm, mean | >:fused",
            "A:audio | .:norm(P x) | | | ",
            " | p:queries | | | >:source_mass",
        ],
        INTO + "a1>b2 b1>b2 c1>b2 d1>b2 b2>b3 b3>b4 b2>d4",
    ),
    "MultiSourceCrossAttention": (
        [
            "Q:query | .:Wq | | | ",
            "T:text | .:Wk, Wv | | | ",
            "I:image | .:Wk, Wv | @4:one softmax\nover all keys | .:Wo | >:out",
            "A:audio | .:Wk, Wv | | | >:source_mass",
        ],
        "a0>a1 b0>b1 c0>c1 d0>d1 a1>c2 b1>c2 c1>c2 d1>c2 c2>c3 c3>c4 c2>d4",
    ),
    "DecoupledCrossAttention": (
        [
            "Q:query | .:Wq | | | ",
            "T:text | .:Wk, Wv | @:softmax | | ",
            "I:image | .:Wk, Wv | @:softmax | .:Σ scale · out | >:out",
            "A:audio | .:Wk, Wv | @:softmax | | ",
        ],
        "a0>a1 b0>b1 c0>c1 d0>d1 a1>b2 a1>c2 a1>d2 b1>b2 c1>c2 d1>d2 b2>c3 c2>c3 d2>c3 c3>c4",
    ),
    "CrossmodalTransformer": (
        [
            *rows(
                THREE,
                each(".:P x + modality"),
                ["@:reads the others"] * 3,
                ["@:reads itself"] * 3,
                "@3:query reads\nall streams",
                ["", ">:fused", ">:source_mass"],
            )
        ],
        INTO + "a1>a2 b1>b2 c1>c2 a1>b2 a1>c2 b1>a2 b1>c2 c1>a2 c1>b2 a2>a3 b2>b3 c2>c3 a3>b4 b3>b4 c3>b4 b4>b5 b4>c5",
    ),
    "CoAttentionBlock": (
        ["T:a | @:a reads b | .:mlp | >:a", "I:b | @:b reads a | .:mlp | >:b"],
        "a0>a1 a0>b1 b0>a1 b0>b1 a1>a2 b1>b2 a2>a3 b2>b3",
    ),
    "BottleneckFusion": (
        [
            "T:text | @:reads x and z | | @:reads x and z | | ",
            "I:image | @:reads x and z | | @:reads x and z | .:mean of means | >:fused",
            "A:audio | @:reads x and z | | @:reads x and z | | ",
            "p:bottleneck z | | .:mean of the z | | | ",
        ],
        "a0>a1 b0>b1 c0>c1 d0>a1 d0>b1 d0>c1 a1>d2 b1>d2 c1>d2 "
        "a1>a3 b1>b3 c1>c3 d2>a3 d2>b3 d2>c3 a3>b4 b3>b4 c3>b4 b4>b5",
    ),
    "PerceiverResampler": (
        [
            "I:one medium | .:+ frame, + time | @2:latents read\nmedia + latents | .:mlp | .:norm | >:latents",
            "p:latents | | | | | ",
        ],
        "a0>a1 a1>a2 b0>a2 a2>a3 a3>a4 a4>a5",
    ),
    "GatedCrossAttentionBlock": (
        [
            "Q:text | .:norm, Wq | @3:reads the media\nbefore it | .:· tanh(gate) | .:mlp · tanh(gate) | >:text",
            "I:medium 1 | .:Wk, Wv | | | | ",
            "A:medium 2 | .:Wk, Wv | | | | ",
        ],
        "a0>a1 b0>b1 c0>c1 a1>a2 b1>a2 c1>a2 a2>a3 a3>a4 a4>a5",
    ),
    "QFormer": (
        [
            "p:queries | @:read themselves | @4:read all\nmodalities | .:mlp | .:norm, mean | >:fused",
            "T:text | .:P x + modality | | | | ",
            "I:image | .:P x + modality | | | | >:source_mass",
            "A:audio | .:P x + modality | | | | ",
        ],
        "a0>a1 a1>a2 b0>b1 c0>c1 d0>d1 b1>a2 c1>a2 d1>a2 a2>a3 a3>a4 a4>a5 a2>c5",
    ),
    "JointAttention": (
        rows(
            THREE,
            each(".:Wq, Wk, Wv"),
            "@3:every query\nreads all streams",
            each(".:Wo"),
            [">:text", ">:image", ">:audio"],
        ),
        INTO + "a1>b2 b1>b2 c1>b2 b2>a3 b2>b3 b2>c3 a3>a4 b3>b4 c3>c4",
    ),
    "MMDiTBlock": (
        [
            "T:text | .:norm, modulate | | .:· gate, mlp | >:text",
            "Q:time | .:shift, scale, gate | @3:joint attention | | ",
            "I:image | .:norm, modulate | | .:· gate, mlp | >:image",
        ],
        "a0>a1 b0>b1 c0>c1 b1>a1 b1>c1 a1>b2 c1>b2 b2>a3 b2>c3 a3>a4 c3>c4",
    ),
    "MultimodalTransformer": (
        rows(
            THREE,
            each(".:P x + modality"),
            "@3:every token\nreads all",
            "@3:query reads\nall tokens",
            [">:per_modality", ">:fused", ">:source_mass"],
        ),
        INTO + "a1>b2 b1>b2 c1>b2 b2>b3 b2>a4 b3>b4 b3>c4",
    ),
    "LateFusion": (
        rows(
            ["T:text logits", "I:image logits", "A:audio logits"],
            each(".:softmax"),
            ".:mean, product,\nmax, vote, ...",
            ">:logits",
        ),
        MEET,
    ),
    "StackingFusion": (
        rows(["T:text logits", "I:image logits", "A:audio logits"], each(".:W log p + flag"), ".:sum + b", ">:logits"),
        MEET,
    ),
    "ProductOfExperts": (
        [
            "T:text μ, σ² | .:1 / σ² | | ",
            "I:image μ, σ² | .:1 / σ² | .4:mean weighted\nby precision | >:fused",
            "A:audio μ, σ² | .:1 / σ² | | >:uncertainty",
            "p:prior N(0, 1) | .:1 | | ",
        ],
        INTO + "d0>d1 a1>b2 b1>b2 c1>b2 d1>b2 b2>b3 b2>c3",
    ),
    "EvidentialFusion": (
        rows(
            ["T:text logits", "I:image logits", "A:audio logits"],
            each(".:evidence e"),
            ".3:Dempster's rule:\nΠ (1 + e / K)",
            [">:fused α", ">:logits", ">:uncertainty"],
        ),
        INTO + "a1>b2 b1>b2 c1>b2 b2>a3 b2>b3 b2>c3",
    ),
    "ModalityDropout": (["Q:present | .:drop each with\nprobability p | .:keep one | >:present"], "a0>a1 a1>a2 a2>a3"),
    "MissingModalityToken": (
        ["T:text | .:there? | >:text", "p:text token | | "],
        "a0>a1 b0>a1 a1>a2",
    ),
    "OGMGE": (
        [
            "T:text logits | .:who is ahead? | .:gradient · k\n+ noise | >:text encoder",
            "I:image logits | | .:gradient | >:image encoder",
        ],
        "a0>a1 b0>a1 a1>a2 a1>b2 a2>a3 b2>b3",
    ),
}


class Cell:
    """One box: where it is, how tall, what it says."""

    def __init__(self, text: str, row: int, column: int, count: int) -> None:
        kind, _, self.label = text.partition(":")
        self.kind, span = kind[0], int(kind[1:] or 1)
        self.x, middle = column * STEP_X, row
        # a tall cell keeps within the grid
        top = min(max(0, row - (span - 1) // 2), count - span)
        middle = top + (span - 1) / 2
        self.y, self.half = -middle * STEP_Y, HEIGHT / 2 + (span - 1) * STEP_Y / 2

    def reach(self, y: float) -> float:
        """The height at which an arrow from or to `y` meets this cell."""
        inner = max(0.0, self.half - HEIGHT / 2)
        return min(max(y, self.y - inner), self.y + inner)


def draw(diagram: Diagram) -> Figure:
    lines, arrows = diagram
    cells = {}
    for r, line in enumerate(lines):
        for c, text in enumerate(part.strip() for part in line.split("|")):
            if text and text != ".:":
                cells["abcdefgh"[r] + str(c)] = Cell(text, r, c, len(lines))
    columns = 1 + max(int(name[1]) for name in cells)
    size = ((columns - 1) * STEP_X + WIDTH + 0.3, (len(lines) - 1) * STEP_Y + HEIGHT + 0.3)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    left, top = -WIDTH / 2 - 0.15, HEIGHT / 2 + 0.15
    axes.set(xlim=(left, left + size[0]), ylim=(top - size[1], top))
    axes.axis("off")
    figure.patch.set(facecolor="#fbfbf8")
    for pair in arrows.split():
        a, b = (cells[name] for name in pair.split(">"))
        if a.x == b.x:
            sign = 1 if b.y > a.y else -1
            start, end = (a.x, a.y + sign * a.half), (b.x, b.y - sign * b.half)
        else:
            start, end = (a.x + WIDTH / 2, a.reach(b.y)), (b.x - WIDTH / 2, b.reach(a.y))
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, lw=1, color="#444444",
                                       shrinkA=0, shrinkB=0))  # fmt: skip
    for cell in cells.values():
        face, edge, text, dashed = STYLES[cell.kind]
        axes.add_patch(FancyBboxPatch(
            (cell.x - WIDTH / 2, cell.y - cell.half), WIDTH, 2 * cell.half, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=face, edgecolor=edge, lw=1, linestyle="--" if dashed else "-",
        ))  # fmt: skip
        axes.text(cell.x, cell.y, cell.label, ha="center", va="center", fontsize=8.5, color=text, linespacing=1.1)
    return figure


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, diagram in DIAGRAMS.items():
        path = folder / f"{name}.svg"
        # text as text: small files, and words that can be searched
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attnfuse", "font.family": "sans-serif"}):
            draw(diagram).savefig(path, metadata={"Date": None, "Creator": None})
        path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))
    print(f"{len(DIAGRAMS)} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "gallery")
