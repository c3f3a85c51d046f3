"""Multimodal fusion at three levels, under one presence contract.

    forward(inputs, mask=None, present=None) -> FusionOutput

A modality may be missing from the dict, or absent for a sample: it contributes nothing and gets no gradient.
"""

from attnfuse.fusion.decision import LateFusion
from attnfuse.fusion.feature import ConcatFusion
from attnfuse.fusion.model import BottleneckFusion, MultimodalTransformer
from attnfuse.fusion.output import FusionOutput
from attnfuse.fusion.training import ModalityDropout, source_balance_loss

__all__ = [
    "BottleneckFusion",
    "ConcatFusion",
    "FusionOutput",
    "LateFusion",
    "ModalityDropout",
    "MultimodalTransformer",
    "source_balance_loss",
]
