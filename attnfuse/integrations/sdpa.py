"""F.scaled_dot_product_attention computed by attnfuse, for as long as a `with` block runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse.functional import _torch_attention, attention
from attnfuse.integrations.jagged import jagged_attention


class Patch:
    """What an active `patch_sdpa` did: `served` calls, and `passed`, how often torch was left a call, by reason.

    Calls in compiled code are not counted.
    """

    def __init__(self, backend: str | None, unsupported: str) -> None:
        self.backend = backend
        self.unsupported = unsupported
        self.served = 0
        self.passed: Counter[str] = Counter()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Any:
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if self.unsupported == "raise":
            out = _serve(self.backend, *given)
        else:
            try:
                out = _serve(self.backend, *given)
            except (ValueError, TypeError) as reason:
                self._count(str(reason))
                return _torch_attention(*given[:6], scale=scale, enable_gqa=enable_gqa)
        self._count(None)
        return out

    def _count(self, reason: str | None) -> None:
        if torch.compiler.is_compiling():
            return
        with _lock:
            if reason is None:
                self.served += 1
            else:
                self.passed[reason] += 1


_lock = threading.RLock()
_active: tuple[Patch, ...] = ()  # replaced as a whole, so that a thread that reads it needs no lock
_replaced: Any = None  # what stood in torch.nn.functional before
_fast_path = True


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention while a patch is active; torch's own for whoever kept it past the last one."""
    active = _active
    if not active:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return active[-1](query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _serve(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    if isinstance(query, Tensor) and query.is_nested:
        if attn_mask is not None:
            raise ValueError("attn_mask must be None with nested tensors: their lengths are the mask")
        return jagged_attention(
            query, key, value, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            backend=backend,
        )  # fmt: skip
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, Tensor) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not _is_fake(x):
            raise TypeError(f"{name} must be a plain tensor, got the subclass {type(x).__name__}")
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend)


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor)


@contextmanager
def patch_sdpa(*, backend: str | None = None, unsupported: str = "raise") -> Iterator[Patch]:
    """Within the block, F.scaled_dot_product_attention is attnfuse.attention, for every thread of the process.

        with patch_sdpa() as patch:
            model(x)
        patch.served

    Python code that looks the function up in torch.nn.functional is reached, torch's own modules included; a reference
    taken before (`from torch.nn.functional import scaled_dot_product_attention`) is not. While any patch is active,
    the fused inference paths of nn.MultiheadAttention and nn.TransformerEncoderLayer are off: they would go past it.
    Compile a model inside the block. Checkpointed blocks are run again by the backward: keep it inside too.

    Blocks nest, also across threads: the patch entered last serves, and when the last one is left, torch's function is
    back.

    Args:
        backend: as in `attnfuse.attention`.
        unsupported: what happens to a call attnfuse does not serve (a head dim over 256, a tensor subclass):
            "raise" raises the reason; "torch" gives it to torch and counts it in `passed`.

    Raises:
        within the block, what F.scaled_dot_product_attention raises, with torch's words in the message.
    """
    if unsupported not in ("raise", "torch"):
        raise ValueError(f"unsupported must be 'raise' or 'torch', got {unsupported!r}")
    patch = Patch(backend, unsupported)
    _enter(patch)
    try:
        yield patch
    finally:
        _leave(patch)


def _enter(patch: Patch) -> None:
    global _active, _replaced, _fast_path
    with _lock:
        if not _active:
            _fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            if F.scaled_dot_product_attention is not _scaled_dot_product_attention:
                _replaced = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = _scaled_dot_product_attention  # type: ignore[assignment]
        _active = (*_active, patch)


def _leave(patch: Patch) -> None:
    global _active
    with _lock:
        _active = tuple(entered for entered in _active if entered is not patch)
        if _active:
            return
        torch.backends.mha.set_fastpath_enabled(_fast_path)
        # Where somebody else has patched over it since, theirs stays, and reaches torch's through ours.
        if F.scaled_dot_product_attention is _scaled_dot_product_attention:
            F.scaled_dot_product_attention = _replaced
