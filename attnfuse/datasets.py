"""AV-digits: real 8x8 scans of handwritten digits paired with the same digit spoken by a speech synthesiser.

Nothing is downloaded: the scans come with scikit-learn, the voices with the espeakng-loader wheel. Scans and
speakers of one split never occur in another, so test accuracy is on unseen handwriting and unseen voices.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnfuse.mel import NUM_BANDS as NUM_BANDS  # what a token is made of: part of this module's interface
from attnfuse.mel import SAMPLE_RATE, log_mel

# Where either modality alone is right four times in five, so that two have something to add to one. Chosen on
# the validation split by `attnfuse demo --choose-noise`, which prints these two numbers.
IMAGE_NOISE = 0.35
AUDIO_SNR_DB = -8.0

SPEAKERS = {
    "train": (
        "m1",
        "m2",
        "m4",
        "m5",
        "m7",
        "f1",
        "f2",
        "f5",
        "Alex",
        "Andy",
        "Annie",
        "adam",
        "belinda",
        "david",
        "edward",
        "ian",
        "john",
        "linda",
        "michel",
        "pablo",
        "steph",
        "victor",
    ),
    "val": ("m3", "f3", "Denis", "benjamin", "paul", "steph2"),
    "test": ("m6", "f4", "Alicia", "Gene", "Mike", "boris", "quincy", "travis"),
}
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")
TEMPOS = ((135, 40), (155, 60), (180, 50), (205, 45))  # words per minute, pitch: one per accent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_FRAMES = 2  # to a token
_ESPEAK = threading.Lock()  # the synthesiser keeps its state in globals
_MISSING = "av_digits needs scikit-learn and espeakng-loader: pip install attnfuse[demo]"


@dataclass(frozen=True)
class Split:
    """One split; row n of every tensor is one pair of a scan and an utterance of the same digit."""

    image: Tensor  # (N, 8, 8) the noisy scan, a row to a token
    audio: Tensor  # (N, T, 2 * NUM_BANDS) two log-mel frames to a token, zero past the utterance's end
    audio_lengths: Tensor  # (N,) tokens that hold speech
    label: Tensor  # (N,)
    scan: Tensor  # (N,) which scan of load_digits
    speaker: Tensor  # (N,) index into AVDigits.speakers

    def __len__(self) -> int:
        return self.label.shape[0]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"image": self.image, "audio": self.audio}

    @property
    def mask(self) -> dict[str, Tensor]:
        return {"audio": self.audio_lengths}

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(
            self.image[index],
            self.audio[index],
            self.audio_lengths[index],
            self.label[index],
            self.scan[index],
            self.speaker[index],
        )

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Split]:
        """Mini-batches, in order or, given a generator, shuffled."""
        order = (
            torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        )
        for index in order.split(size):
            yield self[index]


@dataclass(frozen=True)
class AVDigits:
    train: Split
    val: Split
    test: Split
    speakers: tuple[str, ...]


Level = float | tuple[float, float]


def av_digits(
    seed: int = 0,
    *,
    image_noise: Level = IMAGE_NOISE,
    audio_snr_db: Level = AUDIO_SNR_DB,
    repeats: int = 1,
    limit: int | None = None,
) -> AVDigits:
    """The three splits with noise added.

    Args:
        seed: decides who is paired with whom and every noise sample; which scans and speakers are in which
            split does not depend on it.
        image_noise: standard deviation of the Gaussian noise on pixels in [0, 1]; a pair (low, high) draws a
            level for each sample.
        audio_snr_db: signal-to-noise ratio of white noise added to the waveform; a pair draws likewise.
        repeats: pairs made of each training scan, every time with another utterance and other noise.
        limit: keep only this many pairs of each split.
    """
    pixels, digits = _scans()
    speech = _speech()
    names = tuple(name for group in SPEAKERS.values() for name in group)
    # One fixed draw: changing the seed must not move a scan from test to train.
    shuffled = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    scans = dict(zip(SPEAKERS, shuffled.tensor_split([1000, 1300]), strict=True))
    splits = {}
    for number, (split, group) in enumerate(SPEAKERS.items()):
        generator = torch.Generator().manual_seed(3 * seed + number)
        scan = scans[split].repeat(repeats if split == "train" else 1)[:limit]
        label = digits[scan]
        speaker = torch.tensor([names.index(name) for name in group])
        speaker = speaker[torch.randint(len(group), label.shape, generator=generator)]
        accent = torch.randint(len(ACCENTS), label.shape, generator=generator)
        utterance = (speaker * len(ACCENTS) + accent) * len(WORDS) + label
        sigma = _draw(image_noise, label.shape, generator)
        noisy = pixels[scan] + sigma[:, None, None] * torch.randn(pixels[scan].shape, generator=generator)
        waves = [speech[i] for i in utterance.tolist()]
        audio, lengths = _noisy_log_mel(waves, _draw(audio_snr_db, label.shape, generator), generator)
        splits[split] = Split(2 * noisy - 0.6, audio, lengths, label, scan, speaker)
    return AVDigits(**splits, speakers=names)


def _draw(level: Level, shape: torch.Size, generator: torch.Generator) -> Tensor:
    low, high = level if isinstance(level, tuple) else (level, level)
    return low + (high - low) * torch.rand(shape, generator=generator)


def _scans() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(_MISSING) from error
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)


def _noisy_log_mel(waves: list[Tensor], snr_db: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens of two noisy log-mel frames (N, T, 2 * NUM_BANDS) and how many of them each wave fills."""
    size = torch.tensor([len(wave) for wave in waves])
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    inside = torch.arange(padded.shape[1]) < size[:, None]
    rms = (padded.square().sum(1) / size).sqrt()
    noise = torch.randn(padded.shape, generator=generator) * 10 ** (-snr_db / 20)[:, None]
    noisy = (padded / rms[:, None] + noise) * inside
    # Level is taken out, as a recorder's gain control does: only the ratio tells speech from noise.
    noisy = noisy / (noisy.square().sum(1) / size).sqrt()[:, None]
    return log_mel(noisy, size, _FRAMES)


_memory: list[Tensor] = []


def _speech() -> list[Tensor]:
    """Every utterance as a waveform in [-1, 1], ordered by speaker, accent and digit; synthesised once."""
    with _ESPEAK:
        if not _memory:
            _memory.extend(_load_or_synthesise())
        return _memory


def _load_or_synthesise() -> list[Tensor]:
    import numpy as np

    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(_MISSING) from error
    library = Path(espeakng_loader.get_library_path())
    recipe = repr((SAMPLE_RATE, SPEAKERS, ACCENTS, TEMPOS, WORDS, library.stat().st_size))
    cache = _cache_dir() / f"av_digits-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.npz"
    try:
        with np.load(cache) as stored:
            samples, sizes = stored["samples"], stored["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raw = _synthesise(library, espeakng_loader.get_data_path())
        halved = [_halve_rate(np.frombuffer(wave, np.int16)) for wave in raw]
        samples, sizes = np.concatenate(halved), np.array([len(wave) for wave in halved])
        # A cache that cannot be written costs a second next time and nothing else.
        with contextlib.suppress(OSError):
            _write_whole(cache, lambda file: np.savez(file, samples=samples, sizes=sizes))
    waves = torch.from_numpy(samples.astype(np.float32) / 32768)
    return list(waves.split(sizes.tolist()))


def _halve_rate(wave: Any) -> Any:
    pairs = wave[: len(wave) // 2 * 2].reshape(-1, 2)
    return pairs.mean(1).astype(wave.dtype)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnfuse"


def _write_whole(path: Path, write: Any) -> None:
    """Write under another name and rename: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _synthesise(library: Path, data: str) -> list[bytes]:
    """16-bit samples of each utterance, by espeak-ng's C interface (speak_lib.h)."""
    synchronous, utf8_text, rate_parameter, pitch_parameter, dont_exit = 2, 1, 1, 3, 0x8000
    espeak = ctypes.CDLL(str(library))
    callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    espeak.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    espeak.espeak_SetSynthCallback.argtypes = [ctypes.c_void_p]
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    heard: list[bytes] = []

    def receive(samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = callback_type(receive)
    espeak.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    if espeak.espeak_Initialize(synchronous, 0, data.encode(), dont_exit) != 2 * SAMPLE_RATE:
        raise RuntimeError(f"espeak-ng could not start with the voices in {data}")
    utterances = []
    try:
        # Else breath and roughness are drawn from the clock.
        espeak.espeak_ng_SetRandSeed(0)
        espeak.espeak_SetSynthCallback(ctypes.cast(callback, ctypes.c_void_p))
        for speaker in (name for group in SPEAKERS.values() for name in group):
            for accent, (rate, pitch) in zip(ACCENTS, TEMPOS, strict=True):
                if espeak.espeak_SetVoiceByName(f"{accent}+{speaker}".encode()) != 0:
                    raise RuntimeError(f"espeak-ng has no voice {accent}+{speaker}")
                espeak.espeak_SetParameter(rate_parameter, rate, 0)
                espeak.espeak_SetParameter(pitch_parameter, pitch, 0)
                for word in WORDS:
                    heard.clear()
                    text = word.encode()
                    espeak.espeak_Synth(text, len(text) + 1, 0, 1, 0, utf8_text, None, None)
                    utterances.append(b"".join(heard))
    finally:
        # The library must not keep a pointer to a callback that is about to be freed.
        espeak.espeak_SetSynthCallback(None)
        espeak.espeak_Terminate()
    return utterances
