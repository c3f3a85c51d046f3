"""attnfuse: attention over a list of sources, for multimodal models."""

from .functional import attention, explain, joint_attention, multi_source_attention, varlen_attention
from .problem import AuxOutput, AuxRequest, Source, Stream

__version__ = "0.1.0"

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "Source",
    "Stream",
    "attention",
    "explain",
    "joint_attention",
    "multi_source_attention",
    "varlen_attention",
]
