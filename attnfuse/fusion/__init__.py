"""Multimodal fusion at three levels, under one presence contract.

    forward(inputs, mask=None, present=None) -> FusionOutput

A modality may be missing from the dict, or absent for a sample: it contributes nothing and gets no gradient.
Blocks that work on token tensors keep the signature their users know, with the same promises.
"""

from attnfuse.fusion.adapter import DecoupledCrossAttention
from attnfuse.fusion.crossmodal import CoAttentionBlock, CrossmodalTransformer
from attnfuse.fusion.decision import LateFusion, StackingFusion
from attnfuse.fusion.evidential import EvidentialFusion, evidential_loss
from attnfuse.fusion.experts import ProductOfExperts
from attnfuse.fusion.feature import ConcatFusion, FiLM, GatedMultimodalUnit, SumFusion
from attnfuse.fusion.flamingo import GatedCrossAttentionBlock, PerceiverResampler
from attnfuse.fusion.mmdit import JointAttention, MMDiTBlock
from attnfuse.fusion.model import BottleneckFusion, MultimodalTransformer
from attnfuse.fusion.output import FusionOutput
from attnfuse.fusion.pool import AttentionPoolFusion
from attnfuse.fusion.qformer import QFormer
from attnfuse.fusion.tensor import LowRankTensorFusion, TensorFusion
from attnfuse.fusion.training import OGMGE, MissingModalityToken, ModalityDropout, source_balance_loss
from attnfuse.nn.layers import MultiSourceCrossAttention

__all__ = [
    "OGMGE",
    "AttentionPoolFusion",
    "BottleneckFusion",
    "CoAttentionBlock",
    "ConcatFusion",
    "CrossmodalTransformer",
    "DecoupledCrossAttention",
    "EvidentialFusion",
    "FiLM",
    "FusionOutput",
    "GatedCrossAttentionBlock",
    "GatedMultimodalUnit",
    "JointAttention",
    "LateFusion",
    "LowRankTensorFusion",
    "MMDiTBlock",
    "MissingModalityToken",
    "ModalityDropout",
    "MultiSourceCrossAttention",
    "MultimodalTransformer",
    "PerceiverResampler",
    "ProductOfExperts",
    "QFormer",
    "StackingFusion",
    "SumFusion",
    "TensorFusion",
    "evidential_loss",
    "source_balance_loss",
]
