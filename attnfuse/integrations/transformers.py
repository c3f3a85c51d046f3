"""attnfuse as an attention implementation of Hugging Face transformers.

    from attnfuse.integrations import transformers as attnfuse_transformers

    attnfuse_transformers.register()
    model.set_attn_implementation("attnfuse")       # or from_pretrained(..., attn_implementation="attnfuse")

transformers asks two registries: one for the mask of a forward pass, one for the attention of a layer. Its own masks
are (B, 1, Nq, Nk). Ours is a `BandMask`, the same mask to whoever looks at it, held as the keys (B, Nk) and the band
that it is made of, so that causal masks, sliding windows and padding reach the kernels as flags and O(Nk) keys. Any
other pattern (images that see themselves whole, packed sequences, chunks) is a dense bool mask, as sdpa has it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils import _pytree as pytree
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from .. import dispatch
from ..functional import attention

NAME = "attnfuse"
# Minor versions that the tests and the parity table ran with, oldest first.
TESTED = ((5, 23), (5, 24))

# What layers pass along that changes nothing in softmax(QK^T)V: options of other implementations, of the model, and of
# `generate`, which Kosmos2 hands on to every layer.
HARMLESS = frozenset({
    "cache_position", "deterministic", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "seq_idx", "use_cache", *GenerationConfig().to_dict(),
    *inspect.signature(GenerationMixin.generate).parameters,
})  # fmt: skip

_backend: str | None = None


def register(backend: str | None = None) -> None:
    """Make "attnfuse" an attention implementation of every transformers model that asks the registry.

    Args:
        backend: the attnfuse backend of all these calls; None takes attnfuse's documented order for each call.

    Raises:
        ImportError: transformers is older than any tested version. ValueError: no such backend.

    Warns:
        UserWarning: transformers is newer than any tested version.

    Called again, it only changes the backend. A model class that would ignore the registry refuses the name "attnfuse"
    with a ValueError, in its constructor and in `set_attn_implementation`.
    """
    global _backend
    _check_version(transformers.__version__)
    if backend is not None:
        dispatch.load(backend)
    _backend = backend
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    _refuse_where_bypassed()


def _check_version(installed: str) -> None:
    numbers = tuple(int(part) for part in installed.split(".")[:2])
    oldest, newest = (".".join(map(str, version)) for version in (TESTED[0], TESTED[-1]))
    if numbers < TESTED[0]:
        raise ImportError(f"attnfuse needs transformers {oldest} or later, {installed} is installed")
    if numbers > TESTED[-1]:
        warnings.warn(
            f"attnfuse was tested with transformers {oldest} to {newest}, {installed} is installed: "
            "python -m attnfuse.integrations.transformers_parity compares it with eager attention, model by model",
            stacklevel=3,
        )


class Band(NamedTuple):
    """Columns i - left to i + right of row i; None leaves a side open. The intersection of two bands is a band."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Band) -> Band:
        return Band(*(a if b is None else b if a is None else min(a, b) for a, b in zip(self, other)))


class BandMask(torch.Tensor):
    """The (B, 1, Nq, Nk) bool mask, True = attend, that a key mask and a band make, in O(Nk) memory.

        mask[b, 0, i, j] = keys[b, j] and i + offset - left <= j <= i + offset + right

    Whoever computes with it (slices, adds, concatenates) computes with that dense mask.
    """

    held: Tensor  # the keys (B, Nk) bool, or (0,) for all: torch.compile wants a tensor in every tensor
    band: Band
    offset: int

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], keys: Tensor | None, band: Band, offset: int, device: torch.device | str
    ) -> BandMask:
        device = torch.device(device)
        mask: BandMask = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=torch.bool, device=device
        )
        mask.held = torch.empty(0, dtype=torch.bool, device=device) if keys is None else keys
        mask.band, mask.offset = band, offset
        return mask

    @property
    def keys(self) -> Tensor | None:
        """(B, Nk) bool, None = all."""
        return self.held if self.held.dim() == 2 else None

    def dense(self) -> Tensor:
        """The mask with every entry written out."""
        rows, columns = self.shape[2:]
        seen = band_entries(self.band, self.offset, rows, columns, self.held.device)[None, None]
        if self.keys is not None:
            seen = seen & self.keys[:, None, None]
        return seen.expand(self.shape)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Band, int]]:
        return ["held"], (self.band, self.offset)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: tuple[Band, int], size: Any, stride: Any) -> BandMask:
        held = inner["held"]
        return BandMask(tuple(size), held if held.dim() == 2 else None, *rest, held.device)

    def __repr__(self) -> str:  # type: ignore[override]
        keys = "all keys" if self.keys is None else f"keys {tuple(self.keys.shape)}"
        return f"BandMask({tuple(self.shape)}, {keys}, {self.band}, offset={self.offset})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        moves = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool)
        if moves or func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            mask = args[0]
            held = func(mask.held, **kwargs)
            return BandMask.__tensor_unflatten__({"held": held}, (mask.band, mask.offset), mask.shape, None)
        args, kwargs = pytree.tree_map(lambda x: x.dense() if isinstance(x, BandMask) else x, (args, kwargs))
        return func(*args, **kwargs)


def band_entries(band: Band, offset: int, rows: int, columns: int, device: Any) -> Tensor:
    """(Nq, Nk) bool: the band written out, row i standing at column i + offset."""
    ahead = torch.arange(columns, device=device) - (torch.arange(rows, device=device) + offset)[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if band.left is not None:
        seen = seen & (ahead >= -band.left)
    if band.right is not None:
        seen = seen & (ahead <= band.right)
    return seen


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers' mask creation gets under the name "attnfuse", with the arguments of its `sdpa_mask`.

    Returns, for a `mask_function` that is causal, bidirectional, or one of both within a sliding window: a `BandMask`;
    for a single query or where the band is everything a key mask (B, Nk), expanded and not copied to (B, 1, Nq, Nk);
    None for no mask at all. Any other pattern, and under torch.compile a band over several queries, is a dense bool
    mask. A causal mask is never left to the layer's own `is_causal`: some layers have none. No value of
    `attention_mask` (B, all tokens so far) is read, so a GPU is not waited for.
    """
    band = None if use_vmap else band_of(mask_function)
    # Dynamo cannot build a tensor of a class of ours; one given to compiled code, or a plain one, it takes.
    if band is None or (torch.compiler.is_compiling() and q_length > 1 and band != Band()):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
    keys = None
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[-1]
        keys = nn.functional.pad(attention_mask, (0, max(0, missing)))[:, kv_offset : kv_offset + kv_length]
    if q_length > 1 and band != Band():
        # A static cache counts on the device; reading it once here costs less than walking its empty end everywhere.
        offset = int(q_offset) - int(kv_offset)
        return BandMask((batch_size, 1, q_length, kv_length), keys, band, offset, device)
    if band != Band():
        # One query: its band is a key mask.
        reach = band_entries(band, q_offset - kv_offset, 1, kv_length, device)
        keys = reach if keys is None else keys & reach
    elif keys is None and allow_is_bidirectional_skip:
        return None
    elif keys is None:
        keys = torch.ones((1, 1), dtype=torch.bool, device=device)
    return keys[:, None, None].expand(batch_size, 1, q_length, kv_length)


def band_of(mask_function: Callable[..., Any]) -> Band | None:
    """The band that transformers' `mask_function` describes, or None where it is something else.

    transformers names its patterns by closures: and_masks(sliding_window_overlay(w), causal_mask_function) and so on.
    One that is not recognised here is still right, as a dense mask.
    """
    if mask_function is causal_mask_function:
        return Band(right=0)
    if mask_function is bidirectional_mask_function:
        return Band()
    if getattr(mask_function, "__module__", None) != causal_mask_function.__module__:
        return None
    held = dict(zip(mask_function.__code__.co_freevars, (c.cell_contents for c in mask_function.__closure__ or ())))
    kind = mask_function.__qualname__.split(".")[0]
    if kind == "sliding_window_overlay":
        return Band(left=held["sliding_window"] - 1)
    if kind == "sliding_window_bidirectional_overlay":
        return Band(held["sliding_window"], held["sliding_window"])
    if kind == "and_masks":
        bands = [band_of(part) for part in held["mask_functions"]]
        if all(band is not None for band in bands):
            return functools.reduce(lambda a, b: a & b, bands)  # type: ignore[operator, return-value]
    return None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a layer calls under the name "attnfuse".

        out = softmax(softcap(scaling Q K^T) + position_bias, masked, s_aux joining the denominator) V

    Args:
        module: the layer; its `is_causal` counts only where `is_causal` is None, and False where it has none.
        query: (B, H, Nq, D). key, value: (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv); H a multiple of Hkv.
        attention_mask: a `BandMask`, or broadcastable to (B, H, Nq, Nk), bool (True = attend) or additive float. Where
            one is given it alone decides; causality and `sliding_window` are asked only where there is none.
        dropout: probability that an attention weight is dropped. scaling: 1/sqrt(D) if None.
        softcap: z becomes softcap tanh(z / softcap). s_aux: (H,) sinks. position_bias: broadcastable to (B, H, Nq, Nk).

    Returns:
        out (B, Nq, H, Dv), and None in the place of the attention weights.

    Raises:
        ValueError: `output_attentions`, or an argument this does not know that is not None.
    """
    _check_kwargs(module, kwargs)
    rows = query.shape[2]
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal) and rows > 1
        if sliding_window is not None and not causal and rows > 1 and key.shape[2] > sliding_window:
            raise ValueError(
                f"{type(module).__name__} gave sliding_window={sliding_window} without a mask and without causality, "
                "which has no one meaning: give the layer the mask that transformers.masking_utils makes"
            )
        # torch's causality, from the upper left; a single query is the last of its sequence.
        band = Band(None if sliding_window is None else sliding_window - 1, 0 if causal else None)
        seen: _Seen = _BandSeen(query, key.shape[2], None, band, key.shape[2] - 1 if rows == 1 else 0)
    elif isinstance(attention_mask, BandMask):
        if tuple(attention_mask.shape[2:]) != (rows, key.shape[2]):
            raise ValueError(
                f"{type(module).__name__}: the mask is for {attention_mask.shape[2]} queries and "
                f"{attention_mask.shape[3]} keys, the layer has {rows} and {key.shape[2]}"
            )
        seen = _BandSeen(query, key.shape[2], attention_mask.keys, attention_mask.band, attention_mask.offset)
    else:
        seen = _DenseSeen(attention_mask)
    key, value, position_bias = seen.cut(key, value, position_bias)
    options = seen.options(position_bias)
    out = attention(
        query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
        softcap=softcap, sinks=s_aux, backend=_backend, **options,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _check_kwargs(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions needs the attention weights, which attnfuse never forms: "
            "use attn_implementation='eager' for this call"
        )
    for name, given in kwargs.items():
        if given is None or name == "output_attentions" or name in HARMLESS:
            continue
        hint = ": pass position_ids alone, and the mask keeps packed sequences apart" if "cu_seq" in name else ""
        raise ValueError(f"{type(module).__name__} passed {name!r}, which attnfuse attention does not know{hint}")


class _DenseSeen:
    """A mask of (B, H, Nq, Nk) entries, on its way into `attention`."""

    def __init__(self, mask: Tensor) -> None:
        # A dimension that was only expanded is one entry: padding masks expanded over the rows are key masks again.
        for d in range(mask.dim() - 1):
            if mask.shape[d] > 1 and mask.stride(d) == 0:
                mask = mask.narrow(d, 0, 1)
        self.mask = mask

    def cut(self, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return key, value, bias

    def options(self, bias: Tensor | None) -> dict[str, Any]:
        if bias is None:
            return {"attn_mask": self.mask}
        if self.mask.dtype == torch.bool:
            return {"attn_mask": bias.masked_fill(~self.mask, float("-inf"))}
        return {"attn_mask": bias + self.mask}


class _BandSeen:
    """Keys and a band, on their way into `attention`: columns no row reaches are cut off, the rest are flags."""

    def __init__(self, query: Tensor, columns: int, keys: Tensor | None, band: Band, offset: int) -> None:
        rows = query.shape[2]
        left, right = band
        start = 0 if left is None else min(max(0, offset - left), columns)
        stop = columns if right is None else max(start, min(columns, rows + offset + right))
        self.start, self.stop = start, stop
        self.rows, self.columns, self.offset = rows, stop - start, offset - start
        self.keys = keys if keys is None or self.columns == columns else keys[:, start:stop]
        # A side of the band that no row feels any more is open.
        last = rows - 1 + self.offset
        self.band = Band(
            None if left is None or last - left <= 0 else left,
            None if right is None or self.offset + right >= self.columns - 1 else right,
        )
        self.on_cpu = query.device.type == "cpu" and _backend in (None, "aten")
        self.device = query.device

    def cut(self, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The columns that some row may see, as views."""
        if self.columns == key.shape[2]:
            return key, value, bias
        if bias is not None and bias.shape[-1] > 1:
            bias = bias[..., self.start : self.stop]
        return key.narrow(2, self.start, self.columns), value.narrow(2, self.start, self.columns), bias

    def options(self, bias: Tensor | None) -> dict[str, Any]:
        """The keyword arguments of `attention` for these columns; `bias` is already cut to them."""
        options: dict[str, Any] = {"key_mask": self.keys}
        band = self.band
        if bias is not None:
            # The bias has an entry a pair anyway: the band goes into it.
            options["attn_mask"] = bias if band == Band() else bias.masked_fill(~self._entries(), float("-inf"))
        elif band == Band():
            pass
        elif not self._has_flags():
            options["attn_mask"] = self._entries()[None, None]
        else:
            if band.right == 0:
                options["is_causal"] = self.offset == 0
                options["attn_mask"] = causal_lower_right(self.rows, self.columns) if self.offset else None
                band = Band(band.left, None)
            if band != Band():
                options["window"] = tuple(band)
        return options

    def _entries(self) -> Tensor:
        return band_entries(self.band, self.offset, self.rows, self.columns, self.device)

    def _has_flags(self) -> bool:
        """Whether the band is causality and a window of `attention`: from the upper left, or causal to the last key.

        torch's kernel on a CPU has neither windows nor an offset, and the reference, which has, is einsum: there
        (Nq, Nk) bools cost less.
        """
        if self.on_cpu:
            return self.offset == 0 and self.band == Band(right=0)
        return self.offset == 0 or (self.band.right == 0 and self.offset == self.columns - self.rows > 0)


_Seen = _DenseSeen | _BandSeen


def _refuse_where_bypassed() -> None:
    """Wrap the two methods of PreTrainedModel that accept a name, once.

    transformers takes any registered name for any model, and a class that never asks the registry goes on as before
    without a word.
    """
    if hasattr(PreTrainedModel.get_correct_attn_implementation, "_attnfuse"):
        return
    constructed, changed = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation

    @functools.wraps(constructed)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == NAME:
            _check_class(type(self))
        return constructed(self, requested_attention, *args, **kwargs)

    @functools.wraps(changed)
    def set_attn_implementation(
        self: Any, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        wanted = {id(config) for config in _configs_given_our_name(self.config, attn_implementation)}
        for model in self.modules():
            if isinstance(model, PreTrainedModel) and (attn_implementation == NAME or id(model.config) in wanted):
                _check_class(type(model))
        return changed(self, attn_implementation, *args, **kwargs)

    get_correct_attn_implementation._attnfuse = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def _configs_given_our_name(config: Any, requested: Any) -> Iterator[Any]:
    """The configs within `config` that `requested`, a name or nested dict of names, gives the name "attnfuse"."""
    own = requested.get("", None) if isinstance(requested, dict) else requested
    if own == NAME:
        yield config
    for name in config.sub_configs:
        part = requested.get(name, None) if isinstance(requested, dict) else requested
        if part is not None and getattr(config, name, None) is not None:
            yield from _configs_given_our_name(getattr(config, name), part)


def _check_class(model: type[PreTrainedModel]) -> None:
    if (model._supports_sdpa or model._supports_attention_backend) and model._can_set_attn_implementation():
        return
    raise ValueError(
        f"{model.__name__} does not take its attention from transformers' AttentionInterface, so "
        f"attn_implementation={NAME!r} would change nothing in it: leave it 'eager', and where it is part of a larger "
        f"model name the other parts, as in attn_implementation={{'text_config': {NAME!r}}}"
    )
