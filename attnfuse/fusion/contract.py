"""The forward that every module taking a dict of modalities shares."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from attnfuse.fusion.output import FusionOutput
from attnfuse.nn.modalities import Modality, check_dims, gather_modalities


class ModalityFusion(nn.Module):
    """A fusion module that sees its inputs through `gather_modalities` and nothing else.

    Subclasses say in `fuse` what becomes of the views. They never meet an input as it was given, so what an
    absent modality or padding holds cannot reach them.

    dims: modality name -> feature size; the order of the dict is the order of `present` and of the views.
    vectors_only: whether the inputs are (B, d) alone, as predictions are.
    """

    vectors_only = False

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.dims = check_dims(dims)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
    ) -> FusionOutput:
        return self.fuse(self.views(inputs, mask, present))

    def views(
        self,
        inputs: Mapping[str, Tensor],
        mask: Mapping[str, Tensor | None] | None,
        present: Tensor | Mapping[str, Tensor] | None,
    ) -> dict[str, Modality]:
        """The arguments of `forward`, checked, one view for each modality of `dims`."""
        return gather_modalities(inputs, self.dims, mask, present, vectors_only=self.vectors_only)

    def fuse(self, views: Mapping[str, Modality]) -> FusionOutput:
        raise NotImplementedError
