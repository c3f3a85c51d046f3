"""Rotary position embedding for layers: the tables, and the norm and rotation of query and key in one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnfuse.rope import qk_norm_rope


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin for rotary position embedding, from positions of one or several axes.

        angle_d = position · base^(-2d / size),  d = 0 .. size/2 - 1

    Su et al., 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding". With several axes, each axis of
    the position (time, row, column of a patch) turns its own share of the head, as in Wang et al., 2024, "Qwen2-VL",
    and in FLUX, so that text, image and audio tokens share one embedding.

    Args:
        dim: how many elements of a head are rotated, R: even, at most the head dim.
        base: of the frequencies; 10000 in the paper, larger for longer contexts.
        axes: the even shares of `dim` of each axis, such as (16, 56, 56); default one axis with all of it.

    forward(positions):
        positions   N, for 0 .. N - 1; or a tensor, int or float, (N,) or (B, N), with several axes
                    (N, axes) or (B, N, axes)
        -> cos and sin, (N, R/2) or (B, N, R/2) float32, without a gradient

    Angles are computed in float64 and the module holds no float buffer: neither `module.to(torch.bfloat16)` nor
    autocast blurs a position.

    Raises ValueError for sizes that do not fit together, TypeError for positions that are no number or tensor.
    """

    steps: Tensor
    axis: Tensor

    def __init__(self, dim: int, *, base: float = 10000.0, axes: Sequence[int] | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
        shares = (dim,) if axes is None else tuple(axes)
        if any(share < 2 or share % 2 for share in shares) or sum(shares) != dim:
            raise ValueError(f"axes must be even sizes that add up to dim={dim}, got {shares}")
        self.dim, self.base, self.axes = dim, float(base), shares
        # Integers, which .to(dtype) leaves alone: (d, size) of each frequency, and whose axis it is.
        steps = [(d, share) for share in shares for d in range(share // 2)]
        axis = [n for n, share in enumerate(shares) for _ in range(share // 2)]
        self.register_buffer("steps", torch.tensor(steps), persistent=False)
        self.register_buffer("axis", torch.tensor(axis), persistent=False)

    def forward(self, positions: Tensor | int) -> tuple[Tensor, Tensor]:
        if isinstance(positions, int):
            positions = torch.arange(positions, device=self.steps.device)
            if len(self.axes) > 1:
                raise ValueError(f"positions must be a tensor (..., {len(self.axes)}) with several axes, got a number")
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions must be a torch.Tensor or a number, got {type(positions).__name__}")
        if len(self.axes) == 1:
            positions = positions[..., None]
        if positions.dim() not in (2, 3) or positions.shape[-1] != len(self.axes):
            wanted = "(N,) or (B, N)" if len(self.axes) == 1 else f"(N, {len(self.axes)}) or (B, N, {len(self.axes)})"
            given = tuple(positions.shape[:-1] if len(self.axes) == 1 else positions.shape)
            raise ValueError(f"positions must have shape {wanted}, got {given}")
        step, size = self.steps.double().unbind(-1)
        angle = positions.detach().double()[..., self.axis] * self.base ** (-2.0 * step / size)
        return angle.cos().float(), angle.sin().float()

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}" + (f", axes={self.axes}" if len(self.axes) > 1 else "")


def check_rope(rope: RotaryEmbedding | None, head_dim: int) -> RotaryEmbedding | None:
    """`rope`, checked to fit a head of that size."""
    if rope is None:
        return None
    if not isinstance(rope, RotaryEmbedding):
        raise TypeError(f"rope must be a RotaryEmbedding or None, got {type(rope).__name__}")
    if rope.dim > head_dim:
        raise ValueError(f"rope must rotate at most the {head_dim} elements of a head, got dim={rope.dim}")
    return rope


def rotation(
    rope: RotaryEmbedding | None, length: int, positions: Tensor | None, argument: str = "positions"
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin for `length` tokens, numbered from 0 where no positions are given; None and None without a rope."""
    if rope is None:
        if positions is not None:
            raise ValueError(f"{argument} must be None where rope was not given")
        return None, None
    if positions is None:
        return rope(length)
    if isinstance(positions, Tensor) and length not in positions.shape[:2]:
        raise ValueError(f"{argument} must have one entry for each of {length} tokens, got {tuple(positions.shape)}")
    return rope(positions)


class QKNormRope(nn.Module):
    """`attnfuse.rope.qk_norm_rope` with the norms' weights: what stands between a projection and attention.

        query, key = rotate(q_weight · query / rms(query)), rotate(k_weight · key / rms(key))

    Args:
        head_dim: size of a head D.
        qk_norm: False leaves out the norms and their weights.
        eps, interleaved, backend: as in `qk_norm_rope`.

    forward(query, key, cos=None, sin=None):
        query (B, Hq, N, D), key (B, Hkv, N, D), cos and sin as `RotaryEmbedding` makes them; without the tables
        there is no rotation
        -> query and key of the same shapes
    """

    def __init__(
        self,
        head_dim: int,
        *,
        qk_norm: bool = True,
        eps: float = 1e-6,
        interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"head_dim must be positive, got {head_dim}")
        self.head_dim, self.eps, self.interleaved, self.backend = head_dim, eps, interleaved, backend
        self.q_weight = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.k_weight = nn.Parameter(torch.ones(head_dim)) if qk_norm else None

    def forward(
        self, query: Tensor, key: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(
            query, key, self.q_weight, self.k_weight, cos, sin,
            eps=self.eps, interleaved=self.interleaved, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        norm = f", eps={self.eps:g}" if self.q_weight is not None else ", qk_norm=False"
        return f"{self.head_dim}{norm}, interleaved={self.interleaved}"
