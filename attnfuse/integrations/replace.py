"""nn.MultiheadAttention modules of a finished model, changed in place to attnfuse's."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from attnfuse.nn.multihead import MultiheadAttention
from attnfuse.problem import MAX_HEAD_DIM


class Replacement(NamedTuple):
    """What `replace_attention` did, by module name ("" is the model itself).

    replaced: now attnfuse's. left: attention modules that stay as they are, each with the reason.
    """

    replaced: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}: {', '.join(self.replaced) or 'none'}"]
        return "\n".join(lines + [f"left {name}: {reason}" for name, reason in self.left.items()])


def replace_attention(model: nn.Module, *, backend: str | None = None) -> Replacement:
    """Change every nn.MultiheadAttention of `model` to attnfuse.nn.MultiheadAttention, in place.

    Those of nn.TransformerEncoderLayer, nn.TransformerDecoderLayer and nn.Transformer are among them. A module keeps
    its identity, its Parameter objects (an optimizer that holds them goes on), its hooks and its mode; the state_dict
    stays. Call it before torch.compile, fully_shard or DistributedDataParallel.

    Args:
        backend: for every replaced module, as in `attnfuse.attention`.

    Returns:
        Replacement(replaced, left): names, and for each attention module that was left the reason.
    """
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and module.head_dim <= MAX_HEAD_DIM:
            MultiheadAttention.adopt(module, backend)
            replaced.append(name)
        elif (reason := _why_left(module)) is not None:
            left[name] = reason
    return Replacement(replaced, left)


def _why_left(module: nn.Module) -> str | None:
    """None where a module is no attention, or has one inside that is named itself."""
    kind = type(module).__name__
    if isinstance(module, MultiheadAttention):
        return "is attnfuse's already"
    if type(module) is nn.MultiheadAttention:
        return f"has head dim {module.head_dim}, attnfuse serves 1 to {MAX_HEAD_DIM}"
    if isinstance(module, nn.MultiheadAttention):
        return f"is a {kind}, a subclass of nn.MultiheadAttention that may compute something else"
    if _is_attention(module) and not any(map(_is_attention, list(module.modules())[1:])):
        return f"is a {kind}, not an nn.MultiheadAttention: patch_sdpa serves what calls torch's attention function"
    return None


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()
