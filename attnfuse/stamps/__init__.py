"""Tux Paint's stamps: pictures with a caption and a spoken description, each part missing here and there.

Nothing is downloaded or copied: the stamps are read where Debian's package tuxpaint-stamps-default (GPL-2) puts
them. `stamps` gives the splits as tokens for a fusion module, `draw_samples` a picture of some of them.
"""

from attnfuse.stamps.figure import draw_samples
from attnfuse.stamps.items import FOLDER, Item
from attnfuse.stamps.splits import Split, Stamps, stamps

__all__ = ["FOLDER", "Item", "Split", "Stamps", "draw_samples", "stamps"]
