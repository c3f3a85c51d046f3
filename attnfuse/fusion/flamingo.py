"""Flamingo's two blocks: media into a few tokens, and those tokens into a language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnfuse.functional import multi_source_attention
from attnfuse.nn.heads import merge_heads, split_heads
from attnfuse.problem import AuxOutput, AuxRequest, Source


class PerceiverResampler(nn.Module):
    """Any number of media tokens in, num_latents tokens out, for each medium on its own.

        x       = media + frame_embs[f] (+ media_time_embs[t])
        latents = latents + Wo · attention(q(norm latents) -> norm x, norm latents)      depth times
        latents = latents + ff(norm latents)
        out     = norm(latents)

    The resampler of Alayrac et al., 2022, "Flamingo: a Visual Language Model for Few-Shot Learning", with the
    arguments and the state_dict of open_flamingo. The latents look at the media tokens and at themselves: two
    sources of one attention, where other implementations concatenate them in every layer.

    Args:
        dim: size of a token, in and out.
        depth: number of layers.
        dim_head, heads: size and number of attention heads.
        num_latents: tokens that come out of each medium.
        max_num_media: size of a learned table of the medium's place t in the sequence; None: no such table.
        max_num_frames: size of a learned table of the frame f in a medium; None: no such table.
        ff_mult: hidden size of the feedforward over dim.
        backend: name of a backend, or None for the documented order.

    forward(x, mask=None, present=None) -> (B, T, num_latents, dim):
        x       (B, T, F, v, dim): T media of F frames (1 for an image) of v tokens
        mask    (B, T, F, v) bool, True = real token
        present (B, T) bool, or (B,) bool, which says it of all media of a sample
    A medium that is absent, has no real token or no token at all gives 0 and gets gradient 0; what it or its
    padding holds is never seen. Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_positive(
            dim=dim, depth=depth, dim_head=dim_head, heads=heads, num_latents=num_latents,
            max_num_media=max_num_media, max_num_frames=max_num_frames, ff_mult=ff_mult,
        )  # fmt: skip
        self.dim = dim
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs: nn.Parameter | None = None
        if max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim))
        self.media_time_embs: nn.Parameter | None = None
        if max_num_media is not None:
            self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers = nn.ModuleList(
            PerceiverLayer([PerceiverAttention(dim, dim_head, heads, backend), _feed_forward(dim, ff_mult)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        if x.dim() != 5 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (B, T, F, v, {self.dim}), got {tuple(x.shape)}")
        batch, media, frames, tokens = x.shape[:4]
        for name, length, table in (
            ("max_num_media", media, self.media_time_embs),
            ("max_num_frames", frames, self.frame_embs),
        ):
            if table is not None and length > table.shape[0]:
                raise ValueError(f"x has shape {tuple(x.shape)}: {length} is over {name}={table.shape[0]}")
        visible = _visible((batch, media, frames, tokens), mask, present, x.device)
        if visible is None and frames * tokens == 0:
            visible = torch.zeros(x.shape[:4], dtype=torch.bool, device=x.device)
        if visible is not None:
            x = x.masked_fill(~visible[..., None], 0.0)
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:media, None]

        # Media do not meet here: to the attention each is a sample of its own.
        x = x.reshape(batch * media, frames * tokens, self.dim)
        keys = None if visible is None else visible.reshape(batch * media, frames * tokens)
        latents = self.latents.expand(batch * media, -1, -1)
        for layer in self.layers:
            latents = layer(x, latents, keys)
        out: Tensor = self.norm(latents)
        if keys is not None:
            out = out.masked_fill(~keys.any(1)[:, None, None], 0.0)
        return out.view(batch, media, *out.shape[1:])


class PerceiverLayer(nn.ModuleList):
    """A PerceiverAttention and a feedforward, each with its residual; a list, as in open_flamingo's state_dict."""

    def forward(self, x: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        attn, ff = self
        latents = latents + attn(x, latents, mask)
        latents = latents + ff(latents)
        return latents


class PerceiverAttention(nn.Module):
    """Latents attending to media tokens and to themselves, under one softmax and one projection.

        out = Wo · attention(norm_latents(l)·Wq -> norm_media(x)·Wkv, norm_latents(l)·Wkv)

    forward(x (B, Nx, dim), latents (B, Nl, dim), mask (B, Nx) bool or None) -> (B, Nl, dim).
    """

    def __init__(self, dim: int, dim_head: int, heads: int, backend: str | None) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        latents = self.norm_latents(latents)
        out = multi_source_attention(
            split_heads(self.to_q(latents), self.heads).transpose(1, 2),
            [Source(*self._key_value(self.norm_media(x)), mask=mask), Source(*self._key_value(latents))],
            backend=self.backend,
        )
        return self.to_out(merge_heads(out))

    def _key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """key and value (B, H, N, D), views of one matrix product."""
        key, value = split_heads(self.to_kv(x), 2 * self.heads).chunk(2, dim=2)
        return key.transpose(1, 2), value.transpose(1, 2)


class GatedCrossAttentionBlock(nn.Module):
    """Lets the tokens of a frozen language model look at media, by gates that start closed.

        x = x + tanh(attn_gate) · Wo · attention(q(norm x) -> the media before each token)
        x = x + tanh(ff_gate) · ff(norm x)

    The GATED XATTN-DENSE layer of Alayrac et al., 2022, "Flamingo: a Visual Language Model for Few-Shot
    Learning", with the arguments and the state_dict of open_flamingo. Every medium is a source of its own, and
    which tokens see it is one bit for each of them, not a mask over all pairs.

    A token sees the last medium before it, or with only_attend_immediate_media=False all media before it. One
    with no medium before it, or only such as are absent, or more markers before it than there are media, sees
    nothing and gets 0 from the attention; the feedforward still serves it. (open_flamingo averages all media
    in the last case, and in the first too with only_attend_immediate_media=False, where a token then reads
    media from the future.)

    A sample without any medium comes out unchanged, as the language model alone would have it: neither
    the attention nor the feedforward touches it, and it gives no gradient to their parameters.

    Args:
        dim: size of a text token.
        dim_visual: size of a media token.
        dim_head, heads: size and number of attention heads.
        ff_mult: hidden size of the feedforward over dim.
        only_attend_immediate_media: see above.
        backend: name of a backend, or None for the documented order.

    forward(x, media, media_locations=None, use_cached_media=False, *, mask=None, present=None,
            return_aux=None) -> (B, N, dim):
        x       (B, N, dim), finite
        media   (B, T, n, dim_visual), such as PerceiverResampler gives; None or T = 0: nobody has any, and
                source_mass then has one column of 0
        media_locations (B, N) bool, True at the token that stands for the next medium; None: every token sees
                all media
        use_cached_media: all of x comes after the last marker of media_locations, whose length is then free
        mask    (B, T, n) bool, True = real media token
        present (B, T) bool, or (B,) bool, which says it of all media of a sample
        return_aux=AuxRequest(...): a pair of x and an AuxOutput, whose source_mass is (B, H, N, T).
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_positive(dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads, ff_mult=ff_mult)
        self.attn = MaskedCrossAttention(
            dim, dim_visual, dim_head, heads, only_attend_immediate_media, backend
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = _feed_forward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,
        media: Tensor | None,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        *,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        return_aux: AuxRequest | None = None,
    ) -> Tensor | tuple[Tensor, AuxOutput]:
        dim, dim_visual = self.attn.to_q.in_features, self.attn.to_kv.in_features
        if x.dim() != 3 or x.shape[-1] != dim:
            raise ValueError(f"x must have shape (B, N, {dim}), got {tuple(x.shape)}")
        if media is None:
            media, mask, present = x.new_zeros(x.shape[0], 0, 0, dim_visual), None, None
        if media.dim() != 4 or media.shape[0] != x.shape[0] or media.shape[-1] != dim_visual:
            raise ValueError(
                f"media must have shape (B, T, n, {dim_visual}) with B={x.shape[0]}, got {tuple(media.shape)}"
            )
        _check_locations(media_locations, x, use_cached_media)
        visible = _visible(tuple(media.shape[:3]), mask, present, media.device)
        if visible is not None:
            media = media.masked_fill(~visible[..., None], 0.0)
        if media.shape[1] == 0:  # then as one medium without tokens, so that there is a source to attend to
            media, visible, mask = media.new_zeros(x.shape[0], 1, 0, dim_visual), None, None
        sources = self.attn.sources(media, visible, mask is not None, media_locations, use_cached_media)
        out, aux = self.attn(x, sources, return_aux)
        fused = x + self.attn_gate.tanh() * out
        fused = fused + self.ff_gate.tanh() * self.ff(fused)
        if visible is None:
            visible = torch.ones(media.shape[:3], dtype=torch.bool, device=media.device)
        fused = torch.where(visible.flatten(1).any(1)[:, None, None], fused, x)
        return fused if return_aux is None else (fused, aux)


class MaskedCrossAttention(nn.Module):
    """Text tokens attending to the media before them, each medium a source: `GatedCrossAttentionBlock`."""

    def __init__(
        self,
        dim: int,
        dim_visual: int,
        dim_head: int,
        heads: int,
        only_attend_immediate_media: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.only_attend_immediate_media = only_attend_immediate_media
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def sources(
        self,
        media: Tensor,
        visible: Tensor | None,
        has_padding: bool,
        media_locations: Tensor | None,
        use_cached_media: bool,
    ) -> list[Source]:
        """One for each medium, seen by the tokens it comes before."""
        # (B, T, n, H, D) each: a medium is a slice, never a copy
        key, value = split_heads(self.to_kv(media), 2 * self.heads).chunk(2, dim=3)
        text_time = None
        if media_locations is not None:
            # how many markers stand before each token, its own included
            text_time = (
                media_locations.sum(1, keepdim=True) if use_cached_media else media_locations.cumsum(1)
            )
        sources = []
        for t in range(media.shape[1]):
            mask = visible[:, t, None, None] if visible is not None and has_padding else None
            if text_time is not None:
                reached = text_time == t + 1 if self.only_attend_immediate_media else text_time > t
                rows = reached[:, None, :, None]
                mask = rows if mask is None else rows & mask
            present = None if visible is None else visible[:, t].any(1)
            sources.append(Source(key[:, t].transpose(1, 2), value[:, t].transpose(1, 2), mask, present))
        return sources

    def forward(
        self, x: Tensor, sources: list[Source], return_aux: AuxRequest | None
    ) -> tuple[Tensor, AuxOutput]:
        out, aux = multi_source_attention(
            split_heads(self.to_q(self.norm(x)), self.heads).transpose(1, 2),
            sources,
            return_aux=return_aux or AuxRequest(),
            backend=self.backend,
        )
        return self.to_out(merge_heads(out)), aux


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    """Pre-norm feedforward without biases, numbered as in open_flamingo's state_dict."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


def _visible(
    shape: tuple[int, ...], mask: Tensor | None, present: Tensor | None, device: torch.device
) -> Tensor | None:
    """(B, T, ...) bool, True at the real tokens of present media, or None where nothing was said."""
    for name, given, accepted in (
        ("mask", mask, (shape,)),
        ("present", present, (shape[:2], shape[:1])),
    ):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.dtype != torch.bool:
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a bool tensor, got {got}")
        if tuple(given.shape) not in accepted:
            shapes = " or ".join(str(x) for x in accepted)
            raise ValueError(f"{name} must have shape {shapes}, got {tuple(given.shape)}")
    if present is None:
        return None if mask is None else mask.to(device)
    here = present.to(device).view(*present.shape, *(1,) * (len(shape) - present.dim())).expand(shape)
    return here if mask is None else mask.to(device) & here


def _check_locations(media_locations: Tensor | None, x: Tensor, use_cached_media: bool) -> None:
    if media_locations is None:
        return
    if not isinstance(media_locations, Tensor) or media_locations.dtype != torch.bool:
        got = media_locations.dtype if isinstance(media_locations, Tensor) else type(media_locations).__name__
        raise TypeError(f"media_locations must be a bool tensor of shape (B, N), got {got}")
    fits = media_locations.dim() == 2 and media_locations.shape[0] == x.shape[0]
    if not fits or (not use_cached_media and media_locations.shape[1] != x.shape[1]):
        free = "; N is free with use_cached_media=True"
        raise ValueError(
            f"media_locations must have shape (B, N) = {tuple(x.shape[:2])}{free}, "
            f"got {tuple(media_locations.shape)}"
        )


def _check_positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size <= 0:
            raise ValueError(f"{name} must be positive, got {size}")
