"""Decoupled cross-attention: sources that are added to one another instead of competing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from attnfuse.nn.layers import BranchOptions, MultiSourceCrossAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


class DecoupledCrossAttention(MultiSourceCrossAttention):
    """One query, several sources, each with its own key and value projection, softmax and scale.

        out = Wo · Σ_s scale_s · attention(x·Wq -> x_s·Wk_s, x_s·Wv_s)

    The text and image attention of Ye et al., 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for
    Text-to-Image Diffusion Models", and of Wan's image-to-video models (Wan Team, 2025, "Wan: Open and
    Advanced Large-Scale Video Generative Models"), for any number of sources of any length: each comes under
    its name, so nothing is concatenated before and split by a count of tokens after.

    Args: as `attnfuse.nn.MultiSourceCrossAttention`, without normalization, and
        scales: source name -> scale; 1 for names not given. Scale 0 turns a source off.
        learn_scales: whether the scales are trained; they are in the state_dict either way.

    forward(query, sources, mask=None, present=None, return_aux=None) as there. An absent source contributes
    nothing and gets gradient 0, and what the others add does not depend on it; with all absent the output is
    out_proj's bias. source_mass is 1 for a source that is seen and 0 for one that is not: there is no
    competition to measure. Raises TypeError or ValueError naming the argument.
    """

    source_weights: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_dims: Mapping[str, int],
        *,
        scales: Mapping[str, float] | None = None,
        learn_scales: bool = False,
        bias: bool = True,
        softcap: float | None = None,
        **attention: Unpack[BranchOptions],
    ) -> None:
        super().__init__(
            embed_dim, num_heads, kv_dims, bias=bias, normalization="per_source", softcap=softcap, **attention
        )
        self.source_weights.requires_grad_(learn_scales)
        self.set_scales({} if scales is None else scales)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each source, by name."""
        return dict(zip(self.kv_dims, self.source_weights.tolist(), strict=True))

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Change the scales of the sources named; the others keep theirs."""
        if not isinstance(scales, Mapping):
            raise TypeError(f"scales must be a dict of source name to number, got {type(scales).__name__}")
        unknown = [name for name in scales if name not in self.kv_dims]
        if unknown:
            raise ValueError(f"scales has unknown sources {unknown}, accepted are {list(self.kv_dims)}")
        for name, scale in scales.items():
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise TypeError(f"scales[{name!r}] must be a number, got {type(scale).__name__}")
        with torch.no_grad():
            for s, name in enumerate(self.kv_dims):
                if name in scales:
                    self.source_weights[s] = scales[name]
