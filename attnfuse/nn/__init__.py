"""Attention layers on the attnfuse kernels."""

from attnfuse.nn.block import JointBlock
from attnfuse.nn.layers import CrossAttention, MultiSourceCrossAttention, SelfAttention
from attnfuse.nn.multihead import MultiheadAttention

__all__ = ["CrossAttention", "JointBlock", "MultiSourceCrossAttention", "MultiheadAttention", "SelfAttention"]
