"""Fusion of beliefs: one Gaussian per modality in, one Gaussian out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.decision import same_size, stack_wide
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import Modality, presence_matrix

Beliefs: TypeAlias = Mapping[str, "Tensor | tuple[Tensor, Tensor]"]


class ProductOfExperts(ModalityFusion):
    """The product of the Gaussians N(mean_s, var_s) of the modalities that are present.

        T_s  = 1 / var_s                                the precision of an expert, for each dimension
        var  = 1 / (T_0 + Σ_s T_s)                      T_0 = 1, mean_0 = 0: the prior expert N(0, I)
        mean = var · Σ_s T_s · mean_s

    Products of experts: Hinton, 2002, "Training Products of Experts by Minimizing Contrastive Divergence"; the
    closed form with a prior expert and missing modalities: Wu and Goodman, 2018, "Multimodal Generative Models
    for Scalable Weakly-Supervised Learning" (MVAE). Computed from log variances as a softmax over experts, so
    that no precision overflows. The module has no parameters: the encoders make mean and log variance.

    Args:
        names: the modalities, in the order of `present`.
        dim: D.
        prior: multiply by N(0, I). Without it a single expert is returned as it is.

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, uncertainty):
        inputs      name -> (mean (B, D), logvar (B, D)), or one tensor (B, 2·D) holding mean, then logvar
        mask        accepted for the common signature; a belief has no tokens, so an entry raises
        present     (B, S) bool, or name -> (B,) bool
        fused       mean (B, D), float32 or wider
        per_modality  mean_s (B, D), 0 where absent
        uncertainty (B,), the mean of var over its D dimensions: at most 1 with the prior
    `posterior` takes the same arguments and returns (mean, logvar), what a VAE samples from.
    All absent: N(0, I), with or without the prior: fused 0, uncertainty 1. Raises TypeError or ValueError naming
    the argument.
    """

    vectors_only = True

    def __init__(self, names: Sequence[str], dim: int, prior: bool = True) -> None:
        super().__init__({name: 2 * size for name, size in same_size(names, dim, "names", "dim").items()})
        self.dim = dim
        self.prior = prior

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        mean, logvar, experts = self._product(views)
        # absent beliefs are all 0, mean and log variance
        means = dict(zip(views, experts[:, :-1].unbind(1), strict=True))
        return FusionOutput(fused=mean, per_modality=means, uncertainty=logvar.exp().mean(-1))

    def posterior(
        self,
        inputs: Beliefs,
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """mean (B, D) and logvar (B, D) of the product."""
        mean, logvar, _ = self._product(self.views(inputs, mask, present))
        return mean, logvar

    def views(
        self,
        inputs: Beliefs,
        mask: Mapping[str, Tensor | None] | None,
        present: Tensor | Mapping[str, Tensor] | None,
    ) -> dict[str, Modality]:
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs must be a dict of modality name to belief, got {type(inputs).__name__}")
        joined = {name: self._joined(name, value) for name, value in inputs.items()}
        return super().views(joined, mask, present)

    def _joined(self, name: str, value: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """A pair as one (B, 2·D) tensor."""
        if isinstance(value, Tensor):
            return value
        argument = f"inputs[{name!r}]"
        if not isinstance(value, tuple | list) or len(value) != 2:
            got = f"{len(value)} of them" if isinstance(value, tuple | list) else type(value).__name__
            raise TypeError(f"{argument} must be a pair (mean, logvar) or a tensor (B, {2 * self.dim}), got {got}")
        for part, x in zip(("mean", "logvar"), value, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"{argument} must have a tensor as its {part}, got {type(x).__name__}")
            if x.dim() != 2 or x.shape[1] != self.dim:
                raise ValueError(f"{argument} must have a {part} of shape (B, {self.dim}), got {tuple(x.shape)}")
        mean, logvar = value
        if mean.shape != logvar.shape:
            raise ValueError(
                f"{argument} must have mean and logvar of one shape, got {tuple(mean.shape)} and {tuple(logvar.shape)}"
            )
        return torch.stack([mean, logvar], 1).flatten(1)

    def _product(self, views: Mapping[str, Modality]) -> tuple[Tensor, Tensor, Tensor]:
        """mean (B, D), logvar (B, D), and the experts' own means (B, S + 1, D), the prior last."""
        nobody = ~presence_matrix(views).any(1)
        means, logvars = stack_wide(views).chunk(2, dim=-1)
        # The prior is one more expert, with mean and log variance 0. Without it, it still speaks where nobody
        # else does: no softmax below is over an empty set.
        means, logvars = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (means, logvars))
        prior = torch.ones_like(nobody) if self.prior else nobody
        silent = ~torch.stack([*(view.present for view in views.values()), prior], 1)[..., None]
        log_precision = (-logvars).masked_fill(silent, -torch.inf)
        mean = (torch.softmax(log_precision, dim=1) * means).sum(1)
        return mean, -torch.logsumexp(log_precision, dim=1), means

    def extra_repr(self) -> str:
        return f"names={list(self.dims)}, dim={self.dim}, prior={self.prior}"
