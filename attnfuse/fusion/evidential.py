"""Evidential fusion: predictions that know how much they rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnfuse.fusion.decision import same_size, stack_wide
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import gather_modalities, positive, presence_matrix

EVIDENCE = {"softplus": nn.functional.softplus, "relu": torch.relu}
LOSSES = ("mse", "digamma")


class EvidentialFusion(nn.Module):
    """Dempster's rule over one Dirichlet distribution per modality.

        e_s     = softplus(logits_s)                 evidence for each of K classes, 0 where absent
        alpha_s = 1 + e_s                            Dirichlet parameters of one modality
        alpha   = 1 + K · (Π_s (1 + e_s / K) - 1)    of all together
        p       = alpha / Σ_k alpha_k                expected class probabilities
        u       = K / Σ_k alpha_k                    uncertainty, in (0, 1]

    Evidence as Dirichlet parameters: Sensoy, Kaplan and Kandemir, 2018, "Evidential Deep Learning to Quantify
    Classification Uncertainty"; one such opinion per view, combined by Dempster's rule: Han, Zhang, Fu and Zhou,
    2021, "Trusted Multi-View Classification". Their rule on belief masses b = e / Σ alpha and u,

        b = (b_1 b_2 + b_1 u_2 + b_2 u_1) / (1 - conflict),    u = u_1 u_2 / (1 - conflict),

    becomes the product above when written in evidence e = K b / u: the order of the modalities does not matter, and
    one without evidence, or absent, is a factor 1. What the rule cannot do: evidence only ever grows, so
    modalities that contradict each other do not raise the uncertainty.

    Args:
        num_classes: K.
        names: the modalities, in the order of `present`. Without them they are whatever the inputs hold, in
            that order, and a `present` matrix must have a column for each of those.
        evidence: "softplus" (Han et al.) or "relu" (Sensoy et al.; no gradient once the evidence is 0).

    forward(inputs, mask=None, present=None) -> FusionOutput(fused, per_modality, logits, uncertainty):
        inputs  name -> (B, K) evidence logits; missing names are absent
        mask    accepted for the common signature; predictions have no tokens, so an entry raises
        present (B, S) bool, or name -> (B,) bool
        fused   alpha (B, K), for `evidential_loss`
        per_modality  evidence e_s (B, K), 0 where absent: alpha_s is 1 + it
        logits  log p (B, K), normalised: give them to nll_loss
        uncertainty  u (B,)
    All float32 or wider. All absent: alpha 1, p uniform, uncertainty 1. Raises TypeError or ValueError naming the
    argument.
    """

    def __init__(
        self, num_classes: int, *, names: Sequence[str] | None = None, evidence: str = "softplus"
    ) -> None:
        super().__init__()
        self.num_classes = positive(num_classes, "num_classes")
        self.dims = None if names is None else same_size(names, num_classes, "names", "num_classes")
        if evidence not in EVIDENCE:
            raise ValueError(f"evidence must be one of {tuple(EVIDENCE)}, got {evidence!r}")
        self.evidence = evidence

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> FusionOutput:
        classes = self.num_classes
        dims = self._found(inputs, present) if self.dims is None else self.dims
        views = gather_modalities(inputs, dims, mask, present, vectors_only=True)
        absent = ~presence_matrix(views)[..., None]
        evidence = EVIDENCE[self.evidence](stack_wide(views)).masked_fill(absent, 0.0)
        # log alpha = log(1 + K (e^t - 1)) with t = Σ_s log(1 + e_s / K), written so that neither a large t
        # overflows nor a small one is rounded away: p and u are finite whatever the evidence.
        t = torch.log1p(evidence / classes).sum(1)
        log_alpha = t + torch.log1p((1 - classes) * torch.expm1(-t))
        log_strength = torch.logsumexp(log_alpha, dim=-1, keepdim=True)
        return FusionOutput(
            fused=log_alpha.exp(),
            per_modality=dict(zip(views, evidence.unbind(1), strict=True)),
            logits=log_alpha - log_strength,
            uncertainty=torch.exp(math.log(classes) - log_strength).squeeze(-1),
        )

    def _found(
        self, inputs: Mapping[str, Tensor], present: Tensor | Mapping[str, Tensor] | None
    ) -> dict[str, int]:
        """The modalities of this call, for a module that was not told their names."""
        names = list(inputs) if isinstance(inputs, Mapping) else []
        if isinstance(present, Mapping):
            names += [name for name in present if name not in names]
        elif not names and isinstance(present, Tensor) and present.dim() == 2:
            names = [f"column {s}" for s in range(present.shape[1])]  # whatever they are called, they are absent
        return dict.fromkeys(names, self.num_classes)

    def extra_repr(self) -> str:
        names = None if self.dims is None else list(self.dims)
        return f"num_classes={self.num_classes}, names={names}, evidence={self.evidence!r}"


def evidential_loss(
    alpha: Tensor,
    target: Tensor,
    epoch: int | None = None,
    annealing_epochs: int = 10,
    *,
    method: str = "mse",
    reduction: str = "mean",
) -> Tensor:
    """Fit a Dirichlet distribution to class labels, and take back evidence for the wrong classes.

        mse      Σ_k (y_k - p_k)² + p_k (1 - p_k) / (A + 1)     A = Σ_k alpha_k, p = alpha / A
        digamma  Σ_k y_k · (ψ(A) - ψ(alpha_k))                  the expected cross-entropy
        loss     = that + λ · KL(Dir(ã) || Dir(1))              ã = y + (1 - y) · alpha
        λ        = min(1, epoch / annealing_epochs), 1 if no epoch is given

    Sensoy, Kaplan and Kandemir, 2018, "Evidential Deep Learning to Quantify Classification Uncertainty".
    The KL term asks for no evidence where it misleads; annealing lets the network find out first what evidence is.
    For several modalities Han et al., 2021, add the losses of each and of all:

        loss = evidential_loss(out.fused, target, epoch)
        loss = loss + sum(evidential_loss(1 + e, target, epoch) for e in out.per_modality.values())

    Where a modality is absent its alpha is the constant 1: that adds a constant and no gradient.

    alpha:     (B, K), each at least 1: `EvidentialFusion`'s fused, or 1 + per_modality.
    target:    (B,) integer classes in 0..K-1.
    method:    "mse", the authors' choice, or "digamma", whose gradients are larger when the class is missed.
    reduction: "mean", "sum", or "none" for (B,).
    Returns float32 or wider. A batch of none costs 0. Raises TypeError or ValueError naming the argument.
    """
    if method not in LOSSES:
        raise ValueError(f"method must be one of {LOSSES}, got {method!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(f"alpha must be a floating-point tensor, got {got}")
    if alpha.dim() != 2:
        raise ValueError(f"alpha must have shape (B, K), got {tuple(alpha.shape)}")
    check_classes(target, alpha.shape[0])
    if positive(annealing_epochs, "annealing_epochs") and epoch is not None and epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")

    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    right = torch.zeros_like(alpha).scatter(-1, target[:, None].long(), 1.0)
    strength = alpha.sum(-1, keepdim=True)
    if method == "mse":
        p = alpha / strength
        fit = (right - p).square() + p * (1 - p) / (strength + 1)
    else:
        fit = right * (torch.digamma(strength) - torch.digamma(alpha))
    anneal = 1.0 if epoch is None else min(1.0, epoch / annealing_epochs)
    loss = fit.sum(-1) + anneal * _kl_to_uniform(torch.where(right > 0, 1.0, alpha))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, loss.shape[0])


def check_classes(target: Tensor, batch: int) -> None:
    """Raise unless `target` is (B,) integers."""
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be an integer tensor of classes, got {got}")
    if target.shape != (batch,):
        raise ValueError(f"target must have shape {(batch,)}, got {tuple(target.shape)}")


def _kl_to_uniform(alpha: Tensor) -> Tensor:
    """KL(Dir(alpha) || Dir(1)) (B,) for alpha (B, K)."""
    strength = alpha.sum(-1, keepdim=True)
    normaliser = torch.lgamma(strength.squeeze(-1)) - math.lgamma(alpha.shape[-1]) - torch.lgamma(alpha).sum(-1)
    return normaliser + ((alpha - 1) * (torch.digamma(alpha) - torch.digamma(strength))).sum(-1)
