"""Attention layers on the attnfuse kernels."""

from attnfuse.nn.block import JointBlock
from attnfuse.nn.layers import CrossAttention, MultiSourceCrossAttention, SelfAttention
from attnfuse.nn.multihead import MultiheadAttention
from attnfuse.nn.rope import QKNormRope, RotaryEmbedding
from attnfuse.nn.transformer import CrossBlock

__all__ = [
    "CrossAttention",
    "CrossBlock",
    "JointBlock",
    "MultiSourceCrossAttention",
    "MultiheadAttention",
    "QKNormRope",
    "RotaryEmbedding",
    "SelfAttention",
]
