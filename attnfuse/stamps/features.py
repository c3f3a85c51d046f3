"""The three parts of a stamp as numbers: pixels of its picture, words of its caption, sound of its description."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnfuse.mel import NUM_BANDS, SAMPLE_RATE, log_mel

SIDE, PATCH = 32, 8
PICTURE_DIM = 4 * PATCH * PATCH
CAPTION_DIM, CAPTION_WORDS = 128, 12
SPEECH_FRAMES = 8
SPEECH_DIM = SPEECH_FRAMES * NUM_BANDS
SPEECH_SECONDS = 4.0


def load_picture(path: Path) -> Tensor:
    """(4, SIDE, SIDE) in [0, 1]: red, green and blue times opacity, and opacity; as large as fits, centred."""
    from PIL import Image

    with Image.open(path) as stored:
        image = stored.convert("RGBA")
    scale = SIDE / max(image.size)
    width, height = (max(1, round(scale * n)) for n in image.size)
    # premultiplied, so that what transparent pixels hold does not bleed into their neighbours
    small = image.convert("RGBa").resize((width, height), Image.Resampling.BOX)
    canvas = Image.new("RGBa", (SIDE, SIDE))
    canvas.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return pixels.view(SIDE, SIDE, 4).permute(2, 0, 1) / 255


def patches(pictures: Tensor) -> Tensor:
    """(N, 4, SIDE, SIDE) -> tokens (N, 16, PICTURE_DIM), row after row of PATCH x PATCH squares, about centred."""
    count = SIDE // PATCH
    cut = (2 * pictures - 1).unflatten(3, (count, PATCH)).unflatten(2, (count, PATCH))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def embed_caption(caption: str) -> Tensor:
    """(words, CAPTION_DIM): a word is the sum of its letter groups, each a random sign at a hashed place.

    Groups of 3 to 5 letters with the word's ends marked, and the whole word: Bojanowski et al., 2017, "Enriching
    Word Vectors with Subword Information". Places by hashing instead of a vocabulary: Weinberger et al., 2009,
    "Feature Hashing for Large Scale Multitask Learning". So there is nothing to fit, and no unknown word.
    """
    words = re.findall(r"\w+", caption.lower())[:CAPTION_WORDS]
    table = torch.zeros(len(words), CAPTION_DIM)
    for row, word in zip(table, words, strict=True):
        marked = f"<{word}>"
        groups = {marked} | {marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)}
        for group in groups:
            code = zlib.crc32(group.encode())
            row[code % CAPTION_DIM] += 1.0 if code >> 31 else -1.0
        row *= (CAPTION_DIM / len(groups)) ** 0.5
    return table


def load_speech(path: Path) -> Tensor:
    """(samples,) at SAMPLE_RATE, silence at both ends taken off, root mean square 1, SPEECH_SECONDS at most."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    step = round(rate / SAMPLE_RATE)
    if step < 1 or abs(rate - step * SAMPLE_RATE) > 0.01 * rate:
        raise ValueError(f"{path} has {rate} samples a second, a multiple of {SAMPLE_RATE} is needed")
    wave = samples[: len(samples) // step * step].reshape(-1, step * samples.shape[1]).mean(1)
    (loud,) = (abs(wave) > 0.02 * abs(wave).max(initial=0.0)).nonzero()
    if len(loud) == 0:
        raise ValueError(f"{path} is silent")
    wave = wave[loud[0] : loud[-1] + 1][: int(SPEECH_SECONDS * SAMPLE_RATE)]
    return torch.from_numpy(wave / (wave**2).mean() ** 0.5)


def hear(waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (N, T, SPEECH_DIM) and how many of them each wave fills (N,); a wave without samples fills none."""
    sizes = torch.tensor([len(wave) for wave in waves])
    return log_mel(torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True), sizes, SPEECH_FRAMES)
