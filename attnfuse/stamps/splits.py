"""The stamps as three splits of tokens for a fusion module."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnfuse.stamps.features import (
    CAPTION_DIM,
    PICTURE_DIM,
    SIDE,
    SPEECH_DIM,
    embed_caption,
    hear,
    load_picture,
    load_speech,
    patches,
)
from attnfuse.stamps.items import FOLDER, Item, find_items

MODALITIES = ("picture", "caption", "speech")
_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Split:
    """Some stamps; row n of every tensor is one of them."""

    picture: Tensor  # (N, 4, SIDE, SIDE), as `load_picture`; 0 where there is none
    caption: Tensor  # (N, W, CAPTION_DIM), a token a word
    caption_lengths: Tensor  # (N,)
    speech: Tensor  # (N, T, SPEECH_DIM), 120 ms a token
    speech_lengths: Tensor  # (N,)
    present: Tensor  # (N, 3) bool, columns as MODALITIES
    label: Tensor  # (N,) index into Stamps.categories
    item: Tensor  # (N,) index into Stamps.items

    def __len__(self) -> int:
        return self.label.shape[0]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"picture": patches(self.picture), "caption": self.caption, "speech": self.speech}

    @property
    def mask(self) -> dict[str, Tensor]:
        return {"caption": self.caption_lengths, "speech": self.speech_lengths}

    def __getitem__(self, index: Tensor) -> Split:
        return Split(**{name: x[index] for name, x in vars(self).items()})

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Split]:
        """Mini-batches in an order drawn from `generator`, pictures mirrored and moved by a few pixels at random."""
        for index in torch.randperm(len(self), generator=generator).split(size):
            batch = self[index]
            yield Split(**vars(batch) | {"picture": _jitter(batch.picture, generator)})


@dataclass(frozen=True)
class Stamps:
    train: Split
    val: Split
    test: Split
    categories: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def dims(self) -> dict[str, int]:
        """Modality -> size of a token, as fusion modules take it."""
        return dict(zip(MODALITIES, (PICTURE_DIM, CAPTION_DIM, SPEECH_DIM), strict=True))

    @property
    def max_lengths(self) -> dict[str, int]:
        """Modality -> most tokens of a stamp."""
        return {name: max(1, x.shape[1]) for name, x in self.train.inputs.items()}


def stamps(folder: str | Path = FOLDER, *, language: str = "fr") -> Stamps:
    """Read the stamps and split them 60 : 20 : 20, the same way every time and in each category.

    Stamps with the same caption stay together: six are "A flower.", and whoever has seen one knows the others.

    Args:
        folder: where they are; the default is where Debian's tuxpaint-stamps-default has them.
        language: of the spoken descriptions: "fr", "ca", "es", "ro", ... have nearly all, "el" two thirds, "da" one.
    Raises FileNotFoundError saying what to install if the stamps are not there, ImportError if Pillow or soundfile
    is not.
    """
    items = find_items(Path(folder), language)
    try:
        pictures = [load_picture(item.picture) if item.picture else torch.zeros(4, SIDE, SIDE) for item in items]
        waves = [load_speech(item.speech) if item.speech else torch.zeros(0) for item in items]
    except ImportError as error:
        raise ImportError("stamps needs Pillow and soundfile: pip install attnfuse[stamps]") from error
    captions = [embed_caption(item.caption or "") for item in items]
    speech, speech_lengths = hear(waves)
    caption_lengths = torch.tensor([len(caption) for caption in captions])
    categories = tuple(sorted({item.category for item in items}))
    drawn = torch.tensor([item.picture is not None for item in items])
    everything = Split(
        picture=torch.stack(pictures),
        caption=torch.nn.utils.rnn.pad_sequence(captions, batch_first=True),
        caption_lengths=caption_lengths,
        speech=speech,
        speech_lengths=speech_lengths,
        present=torch.stack([drawn, caption_lengths > 0, speech_lengths > 0], 1),
        label=torch.tensor([categories.index(item.category) for item in items]),
        item=torch.arange(len(items)),
    )
    parts = {name: everything[torch.tensor(index)] for name, index in _divide(items).items()}
    return Stamps(**parts, categories=categories, items=tuple(items))


def _divide(items: Sequence[Item]) -> dict[str, list[int]]:
    """Split -> indices of its items."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, item in enumerate(items):
        groups[item.category][item.caption or item.name].append(n)
    parts: dict[str, list[int]] = {name: [] for name in _SHARES}
    for category in sorted(groups):
        order = list(groups[category].values())
        random.Random(category).shuffle(order)
        total = sum(len(group) for group in order)
        counts = dict.fromkeys(_SHARES, 0)
        for group in order:
            # where most is missing of its share
            name = max(_SHARES, key=lambda split: _SHARES[split] * total - counts[split])
            parts[name] += group
            counts[name] += len(group)
    return parts


def _jitter(pictures: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """Mirror every other picture and move each by up to `reach` pixels."""
    count, side = len(pictures), pictures.shape[-1]
    mirrored = torch.rand(count, generator=generator) < 0.5
    pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    padded = torch.nn.functional.pad(pictures, (reach,) * 4)
    steps = torch.randint(2 * reach + 1, (2, count, 1), generator=generator) + torch.arange(side)
    rows, columns = steps[0][:, None, :, None], steps[1][:, None, None, :]
    sample, channel = torch.arange(count)[:, None, None, None], torch.arange(4)[:, None, None]
    return padded[sample, channel, rows, columns]
