"""Training aids: learn to do without a modality, and not to ignore one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnfuse.fusion.decision import stack_wide
from attnfuse.fusion.evidential import check_classes
from attnfuse.nn.modalities import Modality, check_dims, gather_modalities, positive, presence_matrix


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


class MissingModalityToken(nn.Module):
    """Put learned tokens in the place of a modality that is absent.

        x_s = x_s where s is present, else token_s                  token_s (T, d_s), learned

        model(*token(inputs, mask, present))

    A fusion module without this leaves absent modalities out; with it, the model learns what to assume of them.
    The idea is the mask token (Devlin et al., 2019, "BERT: Pre-training of Deep Bidirectional Transformers for
    Language Understanding") given to whole modalities, as in Lee et al., 2023, "Multimodal Prompting with Missing
    Modalities for Visual Recognition". The tokens are trained by samples that lack the modality: if the data has
    none, hide some with `ModalityDropout` first.

    Args:
        dims: modality name -> feature size d; the order of the dict is the order of `present`.
        num_tokens: T, one for all or name -> T.

    forward(inputs, mask=None, present=None) -> (inputs, mask, present), for any fusion module:
        inputs  name -> (B, d), or (B, N, d); missing names are absent
        mask    name -> (B, N) bool, True = real token, or (B,) integer lengths
        present (B, S) bool, or name -> (B,) bool
    What comes back names every modality. A (B, d) input stays one, and a missing name becomes one, if T is 1.
    Otherwise they are (B, max(N, T), d) with a bool mask: the tokens stand first and the rest is padding, zeros.
    `present` is (B, S), all True. A token has a gradient from the samples that got it and from no others, which
    is 0 if there are none; an absent input gets gradient 0, and what it held is gone.
    All absent: every modality is its tokens. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, dims: Mapping[str, int], num_tokens: int | Mapping[str, int] = 1) -> None:
        super().__init__()
        self.dims = check_dims(dims)
        if isinstance(num_tokens, Mapping):
            counts = check_dims(num_tokens, "num_tokens")
            if counts.keys() != self.dims.keys():
                raise ValueError(f"num_tokens must name the modalities {list(dims)}, got {list(counts)}")
        else:
            counts = dict.fromkeys(self.dims, positive(num_tokens, "num_tokens"))
        self.tokens = nn.ModuleDict({name: nn.Embedding(counts[name], dim) for name, dim in self.dims.items()})
        for table in self.tokens.parameters():
            nn.init.normal_(table, std=0.02)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None], Tensor]:
        views = gather_modalities(inputs, self.dims, mask, present)
        filled: dict[str, Tensor] = {}
        real: dict[str, Tensor | None] = {}
        for name, view in views.items():
            filled[name], real[name] = self._fill(view, self.tokens.get_parameter(f"{name}.weight"))
            if filled[name].shape[1] == 1 and (name not in inputs or inputs[name].dim() == 2):
                filled[name], real[name] = filled[name].squeeze(1), None
        return filled, real, torch.ones_like(presence_matrix(views))

    def _fill(self, view: Modality, token: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, d) and its mask (B, L), L = max(N, T)."""
        length, count = view.tokens.shape[1], token.shape[0]
        longest = max(length, count)
        tokens = nn.functional.pad(view.tokens, (0, 0, 0, longest - length))
        visible = nn.functional.pad(view.visible, (0, longest - length), value=False)
        table = nn.functional.pad(token.to(tokens.dtype), (0, 0, 0, longest - count))
        here = view.present[:, None]
        token_rows = torch.arange(longest, device=tokens.device) < count
        return torch.where(here[..., None], tokens, table), torch.where(here, visible, token_rows)


class OGMGE:
    """Slow down the encoders of the modalities that are ahead: on-the-fly gradient modulation, with noise.

        score_s(b) = softmax(logits_s)[b, target_b]
        rho_s      = Σ_b score_s(b) / Σ_b mean of score_t(b) over the other modalities t present in b
                     both sums over the samples b that have s and some other modality
        k_s        = 1 - tanh(alpha · rho_s) if rho_s > 1, else 1
        grad       = k_s · grad + noise,   noise ~ N(0, std(grad)²)       each parameter of encoder s

    Peng, Wei, Deng, Wang and Hu, 2022, "Balanced Multimodal Learning via On-the-fly Gradient Modulation": one modality
    that learns fast satisfies the loss and leaves the others untrained. The noise, of the size the gradient had,
    gives back what slower steps cost in generalisation (the GE in the name). With two modalities, both always
    present, rho is the paper's; comparing on shared samples keeps a modality that comes only with easy samples
    from looking strong. Used after backward and before the step, in the epochs where it is wanted:

        balance = OGMGE({"image": image_encoder, "audio": audio_encoder}, alpha=0.5)   # once
        loss.backward()
        balance(logits, target, present); optimizer.step()

    Args:
        encoders: modality name -> the module that only this modality uses; the order is that of `present`.
        alpha: how strongly, > 0.
        noise: False for modulation alone (OGM).
        generator: for the noise, on the device of the parameters: the same seed gives the same run.

    __call__(logits, target, present=None) -> name -> k_s, a scalar tensor:
        logits  name -> (B, C), what each modality predicts alone: the inputs of `LateFusion`, or per_modality of a
                `ConcatFusion` with out_dim = C, plus bias / S; missing names are absent
        target  (B,) integer classes; samples with a negative one, such as -100, do not count
        present (B, S) bool, or name -> (B,) bool
    A modality that nobody has, or that is never met with another, has k = 1, and no noise where its gradient is 0.
    Parameters without a gradient are left alone. In data-parallel training give every process the logits of the
    whole batch and an equally seeded generator, or their parameters drift apart. Raises TypeError or ValueError
    naming the argument.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        alpha: float = 0.5,
        *,
        noise: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(encoders, Mapping) or not all(isinstance(e, nn.Module) for e in encoders.values()):
            raise TypeError("encoders must be a dict of modality name to nn.Module")
        check_dims(dict.fromkeys(encoders, 1), "encoders")
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        owner: dict[Tensor, str] = {}
        for name, encoder in encoders.items():
            for parameter in encoder.parameters():
                if owner.setdefault(parameter, name) != name:
                    raise ValueError(
                        f"encoders must not share parameters, got one in {owner[parameter]!r} and {name!r}"
                    )
        self.encoders = dict(encoders)
        self.alpha = alpha
        self.noise = noise
        self.generator = generator

    @torch.no_grad()
    def __call__(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        first = next(iter(logits.values()), None) if isinstance(logits, Mapping) else None
        classes = first.shape[-1] if isinstance(first, Tensor) and first.dim() else 1
        dims = dict.fromkeys(self.encoders, classes)
        views = gather_modalities(logits, dims, None, present, vectors_only=True, argument="logits")
        presence = presence_matrix(views)
        check_classes(target, presence.shape[0])
        strength = self._coefficients(torch.softmax(stack_wide(views), -1), target.to(presence.device), presence)
        coefficients = dict(zip(views, strength.unbind(), strict=True))
        for name, encoder in self.encoders.items():
            for parameter in encoder.parameters():
                if parameter.grad is not None:
                    self._modulate(parameter.grad, coefficients[name])
        return coefficients

    def _coefficients(self, probability: Tensor, target: Tensor, presence: Tensor) -> Tensor:
        """k (S,) from p_s (B, S, C)."""
        count = presence.shape[1]
        picked = target.long().clamp(0, probability.shape[-1] - 1)[:, None, None].expand(-1, count, 1)
        score = probability.gather(-1, picked).squeeze(-1).masked_fill(~presence, 0.0)
        others = ~torch.eye(count, dtype=torch.bool, device=score.device)
        company = (presence[:, None] & others).sum(-1)
        # summed over the others, not all minus one's own: a score of 1e-12 must survive beside one of 1
        rivals = (score[:, None] * others).sum(-1) / company.clamp_min(1)
        compared = presence & (company > 0) & (target >= 0)[:, None]
        mine, theirs = (x.masked_fill(~compared, 0.0).sum(0) for x in (score, rivals))
        ratio = mine / theirs.clamp_min(torch.finfo(score.dtype).tiny)
        return torch.where(ratio > 1, 1 - torch.tanh(self.alpha * ratio), 1.0)

    def _modulate(self, grad: Tensor, coefficient: Tensor) -> None:
        spread = grad.std(correction=0)
        grad.mul_(coefficient.to(grad.device))
        if self.noise:
            draw = torch.randn(grad.shape, dtype=grad.dtype, device=grad.device, generator=self.generator)
            grad.add_(draw * spread)


def source_balance_loss(mass: Tensor, present: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """How far the attention of a batch is from using every modality that was there: KL(wanted || received).

        wanted_s   = mean over samples of present_bs / (number of modalities present in b)
        received_s = mean over samples of mass_bs
        loss       = Σ_s wanted_s · log(wanted_s / received_s)       >= 0, and 0 when they agree

    Both are means over the batch: a single sample may lean on one modality as much as it needs, but one that
    the whole batch ignores costs more the more it is ignored and is pulled back: the gradient on its mass is
    -wanted / received. Mixtures of experts keep their experts in use in this way (Shazeer et al., 2017).
    Add it to the task's loss with a small factor, such as 0.01 to 0.1. Mass is where attention goes, not what the
    prediction depends on: where a modality can be missing, use `ModalityDropout` (docs/fusion_study.md measures both).

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
