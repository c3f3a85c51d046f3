"""Joint attention over streams that keep their own weights: the multimodal diffusion transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnfuse.functional import joint_attention
from attnfuse.nn.heads import check_dropout, merge_heads, split_heads
from attnfuse.nn.modalities import Modality, gather_modalities, key_mask
from attnfuse.nn.rope import RotaryEmbedding, check_rope, rotation
from attnfuse.problem import AuxOutput, AuxRequest, Stream
from attnfuse.rope import qk_norm_rope

Masks = Sequence[Tensor | None]
Present = Tensor | Sequence[Tensor | None]


class JointAttention(nn.Module):
    """Every token of every stream attends to all streams; each stream has its own projections.

        q_s, k_s, v_s = x_s·Wqkv_s        out_s = Wo_s · attention(norm q_s -> norm k_1, ..., norm k_S)

    With a rope, q_s and k_s are then rotated by the positions of their tokens, as in FLUX (Black Forest Labs, 2024).
    The attention of Esser et al., 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis" (MM-DiT), for any number of streams. Nothing is concatenated. Parameters are named as in
    lucidrains/mmdit: to_qkv.s, to_out.s, q_rmsnorms.s, k_rmsnorms.s.

    Args:
        dim_modalities: size of a token in each stream.
        dim_head, heads: size and number of attention heads, common to all streams.
        qk_rmsnorm: RMSNorm on each head of q and k, with weights for each stream and head.
        rope: rotary position embedding common to all streams, of at most dim_head elements.
        rope_interleaved: which elements form a pair, as `interleaved` in `attnfuse.rope.qk_norm_rope`.
        dropout: on attention probabilities, in training only.
        softcap: z -> softcap · tanh(z / softcap) on the logits.
        backend: name of a backend, or None for the documented order.

    forward(inputs, masks=None, present=None, return_aux=None, positions=None):
        inputs  one (B, N_s, dim_s) for each stream; a stream that nobody has is (B, 0, dim_s)
        masks   for each stream (B, N_s) bool, True = real token, (B,) integer lengths, or None
        present (B, S) bool, or for each stream (B,) bool or None
        positions for each stream (N_s,) or (B, N_s), with several axes (..., axes), or None, which counts from 0
        -> a tuple of (B, N_s, dim_s), 0 at padded tokens and in absent streams; with
        return_aux=AuxRequest(...) a pair of that and a list of AuxOutput, one for each stream's queries, whose
        source_mass is (B, H, N_s, S).
    An absent stream contributes nothing and gets gradient 0; what it or padding holds is never seen. Raises
    TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dim_modalities: Sequence[int],
        dim_head: int = 64,
        heads: int = 8,
        *,
        qk_rmsnorm: bool = False,
        rope: RotaryEmbedding | None = None,
        rope_interleaved: bool = False,
        dropout: float = 0.0,
        softcap: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim_modalities = _check_sizes(dim_modalities, dim_head=dim_head, heads=heads)
        self.heads, self.dropout = heads, check_dropout(dropout)
        self.softcap, self.backend = softcap, backend
        self.rope, self.rope_interleaved = check_rope(rope, dim_head), rope_interleaved
        inner = dim_head * heads
        self.to_qkv = nn.ModuleList(nn.Linear(dim, 3 * inner, bias=False) for dim in self.dim_modalities)
        self.to_out = nn.ModuleList(nn.Linear(inner, dim, bias=False) for dim in self.dim_modalities)
        self.q_rmsnorms: nn.ModuleList | None = None
        self.k_rmsnorms: nn.ModuleList | None = None
        if qk_rmsnorm:
            self.q_rmsnorms = nn.ModuleList(MultiHeadRMSNorm(dim_head, heads) for _ in self.dim_modalities)
            self.k_rmsnorms = nn.ModuleList(MultiHeadRMSNorm(dim_head, heads) for _ in self.dim_modalities)

    def forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks | None = None,
        present: Present | None = None,
        return_aux: AuxRequest | None = None,
        positions: Masks | None = None,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], list[AuxOutput]]:
        views = gather_streams(inputs, self.dim_modalities, masks, present, "inputs", "masks")
        outs, aux = self.attend([view.tokens for view in views], views, return_aux, positions)
        result = tuple(
            out.masked_fill(~view.visible[..., None], 0.0) for out, view in zip(outs, views, strict=True)
        )
        return result if return_aux is None else (result, aux)

    def attend(
        self,
        tokens: Sequence[Tensor],
        views: Sequence[Modality],
        return_aux: AuxRequest | None,
        positions: Masks | None,
    ) -> tuple[list[Tensor], list[AuxOutput]]:
        """The attention itself: `tokens` are what is projected, `views` say what of them is there."""
        if positions is not None:
            _check_count("positions", positions, self.dim_modalities)
        streams = []
        for s, (x, view) in enumerate(zip(tokens, views, strict=True)):
            where = None if positions is None else positions[s]
            cos, sin = rotation(self.rope, x.shape[1], where, f"positions[{s}]")
            query, key, value = split_heads(self.to_qkv[s](x), 3 * self.heads).chunk(3, dim=2)
            if self.q_rmsnorms is not None and self.k_rmsnorms is not None:
                query, key = self.q_rmsnorms[s](query), self.k_rmsnorms[s](key)
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            if cos is not None:  # the norms are not part of this pass: they have weights for each head
                backend = "reference" if self.backend == "reference" else None
                query, key = qk_norm_rope(
                    query, key, cos=cos, sin=sin, interleaved=self.rope_interleaved, backend=backend
                )
            streams.append(Stream(query, key, value, mask=view.mask, present=view.present))
        outs, aux = joint_attention(
            streams,
            dropout_p=self.dropout if self.training else 0.0,
            softcap=self.softcap,
            return_aux=return_aux or AuxRequest(),
            backend=self.backend,
        )
        return [project(merge_heads(out)) for project, out in zip(self.to_out, outs, strict=True)], aux


class MMDiTBlock(nn.Module):
    """A block of the multimodal diffusion transformer, for any number of streams.

        shift, scale, gate = Linear_s(silu(time_cond))        for the attention, and again for the feedforward
        x_s = x_s + gate · joint_attention(norm(x_s)·(1 + scale) + shift, over all streams)
        x_s = x_s + gate · ff_s(norm(x_s)·(1 + scale) + shift)

    Esser et al., 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"; the
    modulation is adaLN-Zero (Peebles and Xie, 2023, "Scalable Diffusion Models with Transformers"): its linear
    layers start at 0, so a new block is the identity. Streams meet in the attention only and are never
    concatenated. Arguments are named as in lucidrains/mmdit.

    Args:
        dim_modalities: size of a token in each stream.
        dim_head, heads: size and number of attention heads, common to all streams.
        dim_cond: size of time_cond; None: no modulation, the norms have weights of their own and there are
            no gates.
        qk_rmsnorm, rope, rope_interleaved, dropout, softcap, backend: as `JointAttention`.
        ff_mult: hidden size of each feedforward over its dim.

    forward(modality_tokens, modality_masks=None, time_cond=None, present=None, return_aux=None, positions=None):
        modality_tokens one (B, N_s, dim_s) for each stream; a stream that nobody has is (B, 0, dim_s)
        modality_masks  for each stream (B, N_s) bool, True = real token, (B,) integer lengths, or None
        time_cond       (B, dim_cond), exactly where dim_cond was given
        present         (B, S) bool, or for each stream (B,) bool or None
        positions       for each stream, as `JointAttention`
        -> a tuple of (B, N_s, dim_s); with return_aux=AuxRequest(...) a pair of that and a list of AuxOutput.
    An absent stream, and a padded token, contributes nothing, is never seen whatever it holds, and comes out
    exactly as it went in. Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        dim_modalities: Sequence[int],
        dim_head: int = 64,
        heads: int = 8,
        dim_cond: int | None = None,
        *,
        qk_rmsnorm: bool = False,
        rope: RotaryEmbedding | None = None,
        rope_interleaved: bool = False,
        dropout: float = 0.0,
        softcap: float | None = None,
        ff_mult: float = 4.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim_modalities = _check_sizes(dim_modalities, dim_cond=dim_cond, ff_mult=ff_mult)
        self.dim_cond = dim_cond
        self.joint_attn = JointAttention(
            dim_modalities,
            dim_head,
            heads,
            qk_rmsnorm=qk_rmsnorm,
            rope=rope,
            rope_interleaved=rope_interleaved,
            dropout=dropout,
            softcap=softcap,
            backend=backend,
        )
        affine = dim_cond is None
        self.attn_layernorms = nn.ModuleList(
            nn.LayerNorm(dim, elementwise_affine=affine) for dim in self.dim_modalities
        )
        self.ff_layernorms = nn.ModuleList(
            nn.LayerNorm(dim, elementwise_affine=affine) for dim in self.dim_modalities
        )
        self.feedforwards = nn.ModuleList(_feed_forward(dim, ff_mult) for dim in self.dim_modalities)
        self.to_cond: nn.ModuleList | None = None
        if dim_cond is not None:
            self.to_cond = nn.ModuleList(nn.Linear(dim_cond, 6 * dim) for dim in self.dim_modalities)
            for parameter in self.to_cond.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        modality_masks: Masks | None = None,
        time_cond: Tensor | None = None,
        present: Present | None = None,
        return_aux: AuxRequest | None = None,
        positions: Masks | None = None,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], list[AuxOutput]]:
        views = gather_streams(
            modality_tokens, self.dim_modalities, modality_masks, present, "modality_tokens", "modality_masks"
        )
        modulations = self._modulations(time_cond, views[0].tokens.shape[0])
        normed = [
            _modulate(norm(view.tokens), m[:2])
            for norm, view, m in zip(self.attn_layernorms, views, modulations, strict=True)
        ]
        attended, aux = self.joint_attn.attend(normed, views, return_aux, positions)
        everything = modality_masks is None and present is None
        results = []
        for s, (view, m) in enumerate(zip(views, modulations, strict=True)):
            x = _add(view.tokens, attended[s], m[2:3])
            x = _add(x, self.feedforwards[s](_modulate(self.ff_layernorms[s](x), m[3:5])), m[5:])
            # Rows that are not there pass by on the outside: nothing of the block's reaches them.
            results.append(x if everything else torch.where(view.visible[..., None], x, modality_tokens[s]))
        return tuple(results) if return_aux is None else (tuple(results), aux)

    def _modulations(self, time_cond: Tensor | None, batch: int) -> list[tuple[Tensor, ...]]:
        """For each stream shift, scale and gate of the attention, then of the feedforward, (B, 1, dim) each."""
        if self.to_cond is None:
            if time_cond is not None:
                raise ValueError("time_cond must be None where dim_cond was not given")
            return [()] * len(self.dim_modalities)
        if time_cond is None or tuple(time_cond.shape) != (batch, self.dim_cond):
            got = None if time_cond is None else tuple(time_cond.shape)
            raise ValueError(f"time_cond must have shape {(batch, self.dim_cond)}, got {got}")
        active = F.silu(time_cond)
        return [linear(active)[:, None].chunk(6, dim=-1) for linear in self.to_cond]


class MultiHeadRMSNorm(nn.Module):
    """RMSNorm over each head of (B, N, H, D), with a weight for each head, in the dtype it was given."""

    def __init__(self, dim_head: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, dim_head))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.to(self.gamma.dtype), x.shape[-1:], eps=1e-6)
        return (normed * self.gamma.squeeze(1)).to(x.dtype)


def gather_streams(
    inputs: Sequence[Tensor],
    dims: Sequence[int],
    masks: Masks | None,
    present: Present | None,
    inputs_name: str,
    masks_name: str,
) -> list[Modality]:
    """One `Modality` for each stream: `gather_modalities` for streams known by their place."""
    _check_count(inputs_name, inputs, dims)
    for s, (x, dim) in enumerate(zip(inputs, dims, strict=True)):
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != dim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{inputs_name}[{s}] must have shape (B, N, {dim}), got {got}")
    by_place = {str(s): x for s, x in enumerate(inputs)}
    key_masks: dict[str, Tensor | None] = {}
    if masks is not None:
        _check_count(masks_name, masks, dims)
        for s, (mask, x) in enumerate(zip(masks, inputs, strict=True)):
            if mask is not None:
                key_masks[str(s)] = key_mask(mask, x.shape[0], x.shape[1], f"{masks_name}[{s}]")
    if present is not None and not isinstance(present, Tensor):
        _check_count("present", present, dims)
        present_by_place = {str(s): here for s, here in enumerate(present) if here is not None}
    sizes = {str(s): dim for s, dim in enumerate(dims)}
    columns = present if present is None or isinstance(present, Tensor) else present_by_place
    return list(gather_modalities(by_place, sizes, key_masks, columns, argument=inputs_name).values())


def _check_count(name: str, given: Sequence[object], dims: Sequence[int]) -> None:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a tuple or list with one entry per stream, got {type(given).__name__}")
    if len(given) != len(dims):
        raise ValueError(f"{name} must have one entry per stream, got {len(given)} for {len(dims)}")


def _check_sizes(dim_modalities: Sequence[int], **sizes: float | None) -> tuple[int, ...]:
    if not isinstance(dim_modalities, (list, tuple)):
        raise TypeError(f"dim_modalities must be a tuple of sizes, got {type(dim_modalities).__name__}")
    if not dim_modalities or any(dim <= 0 for dim in dim_modalities):
        raise ValueError(f"dim_modalities must hold positive sizes, at least one, got {dim_modalities}")
    for name, size in sizes.items():
        if size is not None and size <= 0:
            raise ValueError(f"{name} must be positive, got {size}")
    return tuple(dim_modalities)


def _feed_forward(dim: int, mult: float) -> nn.Sequential:
    hidden = int(dim * mult)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


def _modulate(x: Tensor, shift_scale: tuple[Tensor, ...]) -> Tensor:
    """x·(1 + scale) + shift, or x where there is no modulation."""
    if not shift_scale:
        return x
    shift, scale = shift_scale
    return torch.addcmul(shift, x, 1 + scale)


def _add(x: Tensor, update: Tensor, gate: tuple[Tensor, ...]) -> Tensor:
    """x + gate·update, or x + update where there is no modulation."""
    return torch.addcmul(x, gate[0], update) if gate else x + update
