"""Training aids: learn to do without a modality, and not to ignore one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ModalityDropout(nn.Module):
    """Hide whole modalities from a fusion module during training.

    Each present modality of each sample is dropped with probability p, independently. With
    `keep_at_least_one`, a sample that would lose all of its modalities keeps one of them, drawn uniformly.
    A sample that had none still has none. Identity in eval. No rescaling: fusion modules normalise over what
    is present. After Neverova et al., 2015, "ModDrop: Adaptive Multi-Modal Gesture Recognition".

        out = model(inputs, present=drop(present))

    Args:
        p: probability, one for all or one per modality in the order of `present`; 0 <= p <= 1.
        keep_at_least_one: see above.

    forward(present, generator=None): present (B, S) bool -> (B, S) bool, never True where it was False.
    """

    def __init__(self, p: float | Sequence[float], keep_at_least_one: bool = True) -> None:
        super().__init__()
        self.p = tuple(p) if isinstance(p, Sequence) else (p,)
        if not self.p or not all(0.0 <= rate <= 1.0 for rate in self.p):
            raise ValueError(f"p must be a probability or one for each modality, got {p}")
        self.keep_at_least_one = keep_at_least_one

    def forward(self, present: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not isinstance(present, Tensor) or present.dtype != torch.bool:
            got = present.dtype if isinstance(present, Tensor) else type(present).__name__
            raise TypeError(f"present must be a bool tensor of shape (B, S), got {got}")
        if present.dim() != 2:
            raise ValueError(f"present must be a bool tensor of shape (B, S), got {tuple(present.shape)}")
        if len(self.p) not in (1, present.shape[1]):
            raise ValueError(f"present has {present.shape[1]} modalities, p was given for {len(self.p)}")
        if not self.training:
            return present
        draw = torch.rand(present.shape, device=present.device, generator=generator)
        kept = present & (draw >= torch.tensor(self.p, device=present.device))
        if not self.keep_at_least_one:
            return kept
        # A second draw, so that which one survives does not depend on the rates.
        lot = torch.rand(present.shape, device=present.device, generator=generator)
        first = lot.masked_fill(~present, -1.0).argmax(1, keepdim=True)
        survivor = torch.zeros_like(present).scatter(1, first, True) & present
        return torch.where(kept.any(1, keepdim=True), kept, survivor)

    def extra_repr(self) -> str:
        return f"p={self.p}, keep_at_least_one={self.keep_at_least_one}"


def source_balance_loss(mass: Tensor, present: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """How far the attention of a batch is from using every modality that was there: KL(wanted || received).

        wanted_s   = mean over samples of present_bs / (number of modalities present in b)
        received_s = mean over samples of mass_bs
        loss       = Σ_s wanted_s · log(wanted_s / received_s)       >= 0, and 0 when they agree

    Both are means over the batch: a single sample may lean on one modality as much as it needs, but one that
    the whole batch ignores costs more the more it is ignored and is pulled back: the gradient on its mass is
    -wanted / received. Mixtures of experts keep their experts in use in this way (Shazeer et al., 2017).
    Add it to the task's loss with a small factor, such as 0.01 to 0.1.

    mass:    (B, S), or (B, ..., S) whose middle dimensions (heads, queries) are averaged: `source_mass`.
    present: (B, S) bool; default all. Samples with nothing present do not count; a batch of those costs 0.
    eps:     added to both shares, so that a modality with mass 0 costs log(1/eps) and not infinity.
    Returns a scalar, float32 or wider. Raises ValueError for a wrong shape, TypeError for a wrong dtype.
    """
    if not isinstance(mass, Tensor) or not mass.is_floating_point():
        got = mass.dtype if isinstance(mass, Tensor) else type(mass).__name__
        raise TypeError(f"mass must be a floating-point tensor, got {got}")
    if mass.dim() < 2:
        raise ValueError(f"mass must have shape (B, ..., S), got {tuple(mass.shape)}")
    # one middle dimension at least, so that (B, S) takes the same path
    shares = mass.to(torch.promote_types(mass.dtype, torch.float32)).unsqueeze(1).flatten(1, -2).mean(1)
    if present is None:
        present = torch.ones(shares.shape, dtype=torch.bool, device=shares.device)
    if present.dtype != torch.bool:
        raise TypeError(f"present must have dtype torch.bool, got {present.dtype}")
    if present.shape != shares.shape:
        raise ValueError(
            f"present must have shape (B, S) = {tuple(shares.shape)}, got {tuple(present.shape)}"
        )
    fair = present.to(shares.dtype) / present.sum(1, keepdim=True).clamp_min(1)
    wanted = _normalised(fair.sum(0) + eps)
    received = _normalised(shares.masked_fill(~present, 0.0).sum(0) + eps)
    return torch.sum(wanted * torch.log(wanted / received))


def _normalised(shares: Tensor) -> Tensor:
    return shares / shares.sum()
