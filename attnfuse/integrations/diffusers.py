"""attnfuse as an attention backend of diffusers.

    from attnfuse.integrations.diffusers import register
    register()
    model.set_attention_backend("attnfuse")

Models that hand their attention to diffusers' dispatcher (Flux, QwenImage, HunyuanVideo, Wan, LTX, ...) reach it
there. The others compute attention inside their processors; `set_attention_backend("attnfuse")` puts this module's
processors in the place of those it knows, and refuses a model that has any other:

    SD3, AuraFlow           JointAttnProcessor            two streams, not concatenated
    CogVideoX               CogVideoXAttnProcessor        text and video, not concatenated
    PixArt, U-Nets          AttnProcessor
    Lumina2                 Lumina2AttnProcessor          key heads shared, not repeated
    IP-Adapter of a U-Net   IPAdapterAttnProcessor        text and image prompts in one per-source call

`model.set_attn_processor(JointAttnProcessor())` and the like work too, without `register`. Setting another backend, or
reset_attention_backend(), gives the model its own processors back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    AuraFlowAttnProcessor2_0,
    CogVideoXAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    MochiAttention,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from torch import Tensor

from attnfuse.functional import attention, joint_attention, multi_source_attention
from attnfuse.problem import AuxRequest, Source, Stream

NAME = "attnfuse"
# The registry, its enum and what is wrapped below are private to diffusers: versions whose own they were tested with.
TESTED = ("0.42",)


def register(*, allow_untested: bool = False) -> None:
    """Make "attnfuse" a name that `set_attention_backend` takes; nothing changes until a model is given it.

    Args:
        allow_untested: go on with a diffusers other than those in TESTED.

    Raises:
        RuntimeError: the version of diffusers was not tested.
    """
    found = diffusers.__version__
    if not allow_untested and ".".join(found.split(".")[:2]) not in TESTED:
        raise RuntimeError(
            f"attnfuse was tested with diffusers {', '.join(TESTED)}, got {found}: "
            "register(allow_untested=True) tries it all the same"
        )
    names = attention_dispatch.AttentionBackendName
    if NAME in names._value2member_map_:
        return
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[member.name] = member
    names._member_names_.append(member.name)
    names._value2member_map_[NAME] = member
    attention_dispatch._AttentionBackendRegistry.register(member)(dispatched_attention)
    ModelMixin.set_attention_backend = _set_attention_backend(ModelMixin.set_attention_backend)
    ModelMixin.reset_attention_backend = _reset_attention_backend(ModelMixin.reset_attention_backend)


def dispatched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """What diffusers' dispatcher calls: (B, N, H, D) in and out, the lse as (B, N, H).

    attn_mask: (B, Nk), or anything that broadcasts to (B, H, Nq, Nk); bool (True = attend) or additive.
    """
    if _parallel_config is not None:
        raise ValueError("attnfuse does not serve diffusers' context parallelism: _parallel_config must be None")
    # diffusers' own backends take a (B, Nk) mask for one of keys.
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    found = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p, is_causal, scale,
        enable_gqa, return_aux=AuxRequest(lse=True) if return_lse else None,
    )  # fmt: skip
    if not return_lse:
        return found.transpose(1, 2)
    out, aux = found
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def _heads(attn: Attention, x: Tensor, heads: int | None = None) -> Tensor:
    """(B, N, H D) -> (B, H, N, D), a view."""
    return x.unflatten(-1, (heads or attn.heads, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)  # type: ignore[no-any-return]


def _output(attn: Attention, x: Tensor) -> Tensor:
    """The output projection and its dropout."""
    return attn.to_out[1](attn.to_out[0](x))  # type: ignore[no-any-return]


class JointAttnProcessor(JointAttnProcessor2_0):  # type: ignore[misc]
    """SD3 and AuraFlow (MM-DiT, Esser et al. 2024, arXiv 2403.03206): two streams, none concatenated."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: neither SD3 nor AuraFlow masks its streams")
        streams = [
            Stream(
                _normed(attn.norm_q, _heads(attn, attn.to_q(hidden_states))),
                _normed(attn.norm_k, _heads(attn, attn.to_k(hidden_states))),
                _heads(attn, attn.to_v(hidden_states)),
            )
        ]
        if encoder_hidden_states is None:
            (out,) = joint_attention(streams, scale=attn.scale)
            return _output(attn, _merged(out))
        streams.append(
            Stream(
                _normed(attn.norm_added_q, _heads(attn, attn.add_q_proj(encoder_hidden_states))),
                _normed(attn.norm_added_k, _heads(attn, attn.add_k_proj(encoder_hidden_states))),
                _heads(attn, attn.add_v_proj(encoder_hidden_states)),
            )
        )
        out, context = (_merged(x) for x in joint_attention(streams, scale=attn.scale))
        return _output(attn, out), context if attn.context_pre_only else attn.to_add_out(context)


class CogVideoXAttnProcessor(CogVideoXAttnProcessor2_0):  # type: ignore[misc]
    """CogVideoX: text and video share their projections; each is projected and attends as a stream of its own."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: CogVideoX does not mask its streams")
        streams = []
        for x, rotary in ((encoder_hidden_states, None), (hidden_states, image_rotary_emb)):
            q = _normed(attn.norm_q, _heads(attn, attn.to_q(x)))
            k = _normed(attn.norm_k, _heads(attn, attn.to_k(x)))
            if rotary is not None:
                q = apply_rotary_emb(q, rotary)
                k = k if attn.is_cross_attention else apply_rotary_emb(k, rotary)
            v = _heads(attn, attn.to_v(x))
            streams.append(Stream(q.to(v.dtype), k.to(v.dtype), v))
        text, video = (_output(attn, _merged(x)) for x in joint_attention(streams))
        return video, text


class AttnProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """The processor of PixArt and of the U-Nets: self- or cross-attention over tokens or pixels."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        tokens, finish = _enter(attn, hidden_states, temb)
        query, source = self._source(attn, tokens, encoder_hidden_states, attention_mask)
        return finish(multi_source_attention(query, [source]))  # type: ignore[no-any-return]

    @staticmethod
    def _source(
        attn: Attention, tokens: Tensor, context: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Source]:
        if context is None:
            context = tokens
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        batch, length = context.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        key = _normed(attn.norm_k, _heads(attn, attn.to_k(context)))
        query = _normed(attn.norm_q, _heads(attn, attn.to_q(tokens)))
        return query, Source(key, _heads(attn, attn.to_v(context)), attention_mask)


def _enter(attn: Attention, hidden_states: Tensor, temb: Tensor | None) -> tuple[Tensor, Any]:
    """The tokens (B, N, C) of tokens or pixels, and what makes of their attention what the module returns."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    pixels = hidden_states.shape[2:] if hidden_states.dim() == 4 else None
    tokens = hidden_states if pixels is None else hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)

    def finish(out: Tensor) -> Tensor:
        x = _output(attn, _merged(out))
        if pixels is not None:
            x = x.transpose(1, 2).unflatten(2, pixels)
        if attn.residual_connection:
            x = x + residual
        return x / attn.rescale_output_factor  # type: ignore[no-any-return]

    return tokens, finish


class IPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """Decoupled cross-attention (IP-Adapter, Ye et al. 2023, arXiv 2308.06721) as one call over sources.

    out = text's attention + sum_n scale_n · image prompt n's, each softmaxed alone. A mask for image prompts
    (ip_adapter_masks) weighs by the query's position and is not served.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, list[Tensor]],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        if ip_adapter_masks is not None:
            raise ValueError("ip_adapter_masks must be None: attnfuse weighs an image prompt as a whole")
        if not isinstance(encoder_hidden_states, tuple):
            raise TypeError("encoder_hidden_states must be (text, [image prompts]), got one tensor")
        text, prompts = encoder_hidden_states
        tokens, finish = _enter(attn, hidden_states, temb)
        query, source = AttnProcessor._source(attn, tokens, text, attention_mask)
        sources, weights = [source], [1.0]
        for x, weight, to_k, to_v in zip(prompts, self.scale, self.to_k_ip, self.to_v_ip):
            sources.append(Source(_heads(attn, to_k(x)), _heads(attn, to_v(x))))
            weights.append(float(weight))
        return finish(  # type: ignore[no-any-return]
            multi_source_attention(query, sources, normalization="per_source", source_weights=weights)
        )


class Lumina2AttnProcessor(Lumina2AttnProcessor2_0):  # type: ignore[misc]
    """Lumina2: grouped key heads are shared by index, never repeated; the padding mask stays one of keys."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        dim = query.shape[-1] // attn.heads
        query = _normed(attn.norm_q, query.unflatten(-1, (-1, dim)))
        key = _normed(attn.norm_k, key.unflatten(-1, (-1, dim)))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, use_real=False)
            key = apply_rotary_emb(key, image_rotary_emb, use_real=False)
        scale = attn.scale
        if base_sequence_length is not None:  # proportional attention
            scale *= math.sqrt(math.log(hidden_states.shape[1], base_sequence_length))
        out = attention(
            query.to(value.dtype).transpose(1, 2),
            key.to(value.dtype).transpose(1, 2),
            value.unflatten(-1, (-1, dim)).transpose(1, 2),
            key_mask=None if attention_mask is None else attention_mask.bool().view(attention_mask.shape[0], -1),
            scale=scale,
            enable_gqa=True,
        )
        return _output(attn, _merged(out))


PROCESSORS: dict[type, type] = {
    JointAttnProcessor2_0: JointAttnProcessor,
    AuraFlowAttnProcessor2_0: JointAttnProcessor,
    CogVideoXAttnProcessor2_0: CogVideoXAttnProcessor,
    AttnProcessor2_0: AttnProcessor,
    Lumina2AttnProcessor2_0: Lumina2AttnProcessor,
    IPAdapterAttnProcessor2_0: IPAdapterAttnProcessor,
}


def _processors(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, (Attention, MochiAttention, AttentionModuleMixin)):
            processor = getattr(module, "processor", None)
            if processor is not None:
                yield name, processor


def use_own_processors(model: torch.nn.Module) -> None:
    """Change the processors that compute attention themselves to this module's, in place, weights and scales kept.

    Raises:
        ValueError: some processor neither dispatches nor is one of PROCESSORS, or the model has none at all.
    """
    found = dict(_processors(model))
    bypassing = {
        name: processor
        for name, processor in found.items()
        if not hasattr(processor, "_attention_backend") and type(processor) not in PROCESSORS.values()
    }
    unknown = sorted({type(p).__name__ for p in bypassing.values() if type(p) not in PROCESSORS})
    if unknown or not found:
        what = f"computes attention in {', '.join(unknown)}, past the dispatcher" if found else "has no attention"
        raise ValueError(
            f"{type(model).__name__} {what}: attnfuse cannot be its backend "
            "(attnfuse.integrations.torch.patch_sdpa serves what calls F.scaled_dot_product_attention)"
        )
    for processor in bypassing.values():
        if type(processor) in PROCESSORS:  # one object may serve several modules
            processor._attnfuse_replaced = type(processor)
            processor.__class__ = PROCESSORS[type(processor)]


def restore_processors(model: torch.nn.Module) -> None:
    """Undo `use_own_processors`; processors that were set by hand stay."""
    for _, processor in _processors(model):
        theirs = processor.__dict__.pop("_attnfuse_replaced", None)
        if theirs is not None:
            processor.__class__ = theirs


def _set_attention_backend(original: Any) -> Any:
    @functools.wraps(original)
    def set_attention_backend(self: Any, backend: str) -> None:
        if backend.lower() == NAME:
            use_own_processors(self)
        else:
            restore_processors(self)
        original(self, backend)

    return set_attention_backend


def _reset_attention_backend(original: Any) -> Any:
    @functools.wraps(original)
    def reset_attention_backend(self: Any) -> None:
        restore_processors(self)
        original(self)

    return reset_attention_backend
