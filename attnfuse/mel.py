"""Sound as tokens: log-mel spectra, a few frames to a token."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BANDS = 24
SAMPLE_RATE = 11025  # plenty for words
_WINDOW, _HOP = 256, 165  # 23 ms every 15 ms
_BAND_EDGES_HZ = (80.0, 5400.0)


def log_mel(waves: Tensor, sizes: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Tokens of `frames` log-mel frames, and how many of them each wave fills.

    waves: (N, L) at SAMPLE_RATE, 0 past `sizes` (N,), with a root mean square of about 1.
    Returns (N, T, frames * NUM_BANDS), 0 past the second result (N,).
    """
    spectrum = torch.stft(waves, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), return_complex=True)
    bands = spectrum.abs().square().transpose(1, 2) @ _filters() / _WINDOW
    levels = torch.log10(bands + 1e-3) + 1.0
    tokens = levels[:, : levels.shape[1] // frames * frames].unflatten(1, (-1, frames)).flatten(2)
    lengths = (1 + sizes // _HOP) // frames
    heard = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens * heard[..., None], lengths


def _filters() -> Tensor:
    """Triangles spaced evenly in mel, each of unit area: (_WINDOW // 2 + 1, NUM_BANDS)."""
    low, high = (2595 * torch.log10(1 + torch.tensor(edge) / 700) for edge in _BAND_EDGES_HZ)
    mel = low + (high - low) * torch.linspace(0, 1, NUM_BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles / triangles.sum(0).clamp(min=1e-6)
