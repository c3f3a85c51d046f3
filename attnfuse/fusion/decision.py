"""Decision-level fusion: one prediction per modality in, one prediction out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnfuse.fusion.contract import ModalityFusion
from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import Modality, check_dims, positive, presence_matrix

METHODS = ("mean", "weighted", "product", "max", "vote")


def same_size(names: Sequence[str], size: int, names_argument: str, size_argument: str) -> dict[str, int]:
    """name -> size for modalities that all have the same one, checked."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        got = f"the single str {names!r}" if isinstance(names, str) else type(names).__name__
        raise TypeError(f"{names_argument} must be a sequence of names, got {got}")
    if len(set(names)) != len(names):
        raise ValueError(f"{names_argument} must not repeat a name, got {list(names)}")
    return check_dims(dict.fromkeys(names, positive(size, size_argument)), names_argument)


def stack_wide(views: Mapping[str, Modality]) -> Tensor:
    """(B, S, d) in float32 or wider, 0 where absent: what vector modalities hold."""
    stacked = torch.stack([view.pooled() for view in views.values()], 1)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


class LateFusion(ModalityFusion):
    """Combine the class probabilities p_s = softmax(logits_s) of the modalities that are present.

        mean      p ∝ Σ_s p_s
        weighted  p = Σ_s w_s p_s      w = softmax of learned scores over the present modalities
        product   p ∝ Π_s p_s
        max       p ∝ max_s p_s
        vote      p ∝ number of s whose best class it is + mean_s p_s

    The rules of Kittler et al., 1998, "On Combining Classifiers". In vote the mean, which is below 1, breaks
    ties and keeps every class possible and the result differentiable.

    Args:
        modalities: the names, in the order of `present`.
        num_classes: C.
        method: one of the above.

    forward(inputs, mask=None, present=None) -> FusionOutput(logits, per_modality):
        inputs  name -> (B, C) logits; missing names are absent
        mask    accepted for the common signature; predictions have no tokens, so an entry raises
        present (B, S) bool, or name -> (B,) bool
        logits are log p (B, C), normalised, float32 or wider: give them to cross_entropy or nll_loss.
        per_modality holds log p_s (B, C), 0 where absent.
    All absent: the uniform distribution. Raises TypeError or ValueError naming the argument.
    """

    vectors_only = True

    def __init__(self, modalities: Sequence[str], num_classes: int, method: str = "mean") -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        super().__init__(same_size(modalities, num_classes, "modalities", "num_classes"))
        self.method = method
        self.scores = nn.Parameter(torch.zeros(len(self.dims))) if method == "weighted" else None

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        presence = presence_matrix(views)
        log_p = torch.log_softmax(stack_wide(views), dim=-1)
        # A sample with nothing present counts all its modalities, which are uniform there because absent
        # logits are 0: no reduction below meets an empty set, so none can make a NaN, not even backwards.
        nobody = ~presence.any(1, keepdim=True)
        fused = self._combine(log_p, presence | nobody)
        uniform = torch.log_softmax(torch.zeros_like(fused), dim=-1)
        silent = log_p.masked_fill(~presence[..., None], 0.0)
        return FusionOutput(
            logits=torch.where(nobody, uniform, fused),
            per_modality=dict(zip(views, silent.unbind(1), strict=True)),
        )

    def _combine(self, log_p: Tensor, active: Tensor) -> Tensor:
        """log p (B, C) from log p_s (B, S, C) and who counts (B, S), at least one in each row."""
        left_out = ~active[..., None]
        if self.scores is not None:
            log_w = torch.log_softmax(self.scores.to(log_p.dtype).masked_fill(~active, -torch.inf), dim=-1)
            score = torch.logsumexp(log_p + log_w[..., None], dim=1)
        elif self.method == "product":
            score = log_p.masked_fill(left_out, 0.0).sum(1)
        elif self.method == "max":
            score = log_p.masked_fill(left_out, -torch.inf).amax(1)
        elif self.method == "vote":
            probability = log_p.exp().masked_fill(left_out, 0.0)
            ballots = torch.zeros_like(log_p).scatter(-1, log_p.argmax(-1, keepdim=True), 1.0)
            votes = ballots.masked_fill(left_out, 0.0).sum(1)
            mean = probability.sum(1) / active.sum(1, keepdim=True)
            score = torch.log((votes + mean).clamp_min(torch.finfo(log_p.dtype).tiny))
        else:
            score = torch.logsumexp(log_p.masked_fill(left_out, -torch.inf), dim=1)
        return torch.log_softmax(score, dim=-1)


class StackingFusion(ModalityFusion):
    """A classifier over the predictions of classifiers, which learns how far to trust each.

        log p_s = log_softmax(logits_s)
        score   = b + Σ_{s present} (W_s · log p_s + f_s)
        log p   = log_softmax(score)                        hidden=None
        log p   = log_softmax(V · gelu(score) + c)          with a hidden layer

    Stacking of Wolpert, 1992, "Stacked Generalization". The meta-classifier is one matrix over all log p_s and
    all presence flags, cut into one slot per modality: f_s is the weight of the flag of s, so it learns what
    the presence of s alone says about the class, and an absent s enters as zeros with flag 0. Without a
    hidden layer it starts as W_s = 1/S, b = f_s = 0, the mean of the log p_s, and learns from there.
    Wolpert's rule is to fit it on predictions for samples that the modalities' classifiers were not trained
    on: on their own training set they look better than they are.

    Args:
        names: the modalities, in the order of `present`.
        num_classes: C.
        hidden: size of the hidden layer; None for a linear meta-classifier.

    forward(inputs, mask=None, present=None) -> FusionOutput(logits, per_modality): as `LateFusion`; logits are
    log p (B, C), normalised, float32 or wider, per_modality log p_s (B, C), 0 where absent.
    All absent: a learned prior, log_softmax(b) or log_softmax(V · gelu(b) + c), the same for every sample; before
    training and without a hidden layer it is uniform. Raises TypeError or ValueError naming the argument.
    """

    vectors_only = True

    def __init__(self, names: Sequence[str], num_classes: int, hidden: int | None = None) -> None:
        super().__init__(same_size(names, num_classes, "names", "num_classes"))
        width = num_classes if hidden is None else positive(hidden, "hidden")
        self.slots = nn.ModuleDict({name: nn.Linear(num_classes, width) for name in self.dims})
        self.bias = nn.Parameter(torch.zeros(width))
        self.head: nn.Module = nn.Identity()
        if hidden is not None:
            self.head = nn.Sequential(nn.GELU(), nn.Linear(hidden, num_classes))
        # the bound nn.Linear would use on the concatenation: its fan-in is all the modalities together
        bound = (len(self.dims) * num_classes) ** -0.5
        with torch.no_grad():
            for name in self.dims:
                weight = self.slots.get_parameter(f"{name}.weight")
                if hidden is None:
                    weight.copy_(torch.eye(num_classes) / len(self.dims))
                else:
                    weight.uniform_(-bound, bound)
                self.slots.get_parameter(f"{name}.bias").zero_()

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        absent = ~presence_matrix(views)[..., None]
        log_p = torch.log_softmax(stack_wide(views), dim=-1).masked_fill(absent, 0.0)
        silent = dict(zip(views, log_p.unbind(1), strict=True))
        # A missing modality goes through its slot too: its weights then have gradient 0 rather than none.
        slots = [self.slots[name](x.to(self.bias.dtype)) for name, x in silent.items()]
        stacked = torch.stack(slots, 1).masked_fill(absent, 0.0)
        score = self.head(stacked.sum(1) + self.bias.to(stacked.dtype))
        return FusionOutput(logits=torch.log_softmax(score.to(log_p.dtype), dim=-1), per_modality=silent)
