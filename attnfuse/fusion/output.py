"""What every fusion module returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusionOutput(NamedTuple):
    """The result of a fusion module; a field that a module does not produce is None.

    fused:        (B, E) one representation of all present modalities
    per_modality: name -> what became of each modality on its own; 0 where absent or padded
    source_mass:  (B, S) share of attention each modality received, columns in constructor order; rows sum to
                  1, or are 0 if all modalities are absent; differentiable
    logits:       (B, C) fused prediction
    uncertainty:  (B,) how little the module knows
    """

    fused: Tensor | None = None
    per_modality: dict[str, Tensor] | None = None
    source_mass: Tensor | None = None
    logits: Tensor | None = None
    uncertainty: Tensor | None = None
