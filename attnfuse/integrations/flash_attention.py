"""This package's kernels behind the operators torch's scaled_dot_product_attention calls when it picks flash attention.

torch.nn.attention's registry of flash attention implementations takes a function that puts kernels in place of torch's
for the CUDA key of five aten operators (torch/nn/attention/_fa4.py is torch's own example):

    _scaled_dot_product_flash_attention, ..._backward
        (B, H, N, D): F.scaled_dot_product_attention
    _flash_attention_forward, ..._no_dropout_inplace, ..._backward
        (B, N, H, D), or (T, H, D) with cum_seq_q: nested tensors and torch.nn.attention.varlen

Masks align to the lower right there: the last query sees the last key. Each argument that these kernels do not serve
raises by name. logsumexp is the natural one, float32, (B, H, N), or (H, T) where sequences are packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfuse import dispatch, functional
from attnfuse.ops import _like
from attnfuse.problem import AuxRequest, Problem, Source, bind

NAME = "attnfuse"
NEEDS = [True, False, False, False, True, True, False, False, False, False, False, False]  # query, key, value


class FlashAttention:
    """The five operators, with `backend` as in `attnfuse.attention`."""

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def operators(self) -> dict[str, Any]:
        """By name, those that this version of torch has."""
        ours = {
            "_scaled_dot_product_flash_attention": self.sdpa_forward,
            "_scaled_dot_product_flash_attention_backward": self.sdpa_backward,
            "_flash_attention_forward": self.flash_forward,
            "_flash_attention_forward_no_dropout_inplace": self.flash_forward_inplace,
            "_flash_attention_backward": self.flash_backward,
        }
        return {name: function for name, function in ours.items() if hasattr(torch.ops.aten, name)}

    def sdpa_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        if return_debug_mask:
            raise _unserved("return_debug_mask", True)
        problem = _problem(query, key, value, dropout_p, is_causal, scale)
        out, lse, _ = self._module(problem).forward(problem)
        out = _like(out, torch.empty_like(query)) if out.shape == query.shape else out
        state, unused, debug = _random_state(problem)
        return out, lse, None, None, query.shape[2], key.shape[2], state, unused, debug

    def sdpa_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = _problem(query, key, value, dropout_p, is_causal, scale, philox_seed)
        return self._gradients(problem, out, logsumexp, grad_out)

    def flash_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if return_debug_mask:
            raise _unserved("return_debug_mask", True)
        for name, given in others.items():
            # num_splits 0 and 1 are both "as the kernel likes"
            if given is not None and not (name == "num_splits" and given <= 1):
                raise _unserved(name, given)
        window = _window(window_size_left, window_size_right)
        if cum_seq_q is not None:
            if dropout_p > 0:
                raise _unserved("dropout_p with packed sequences", dropout_p)
            out, aux = functional.varlen_attention(
                query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal=is_causal, scale=scale,
                window_size=window, enable_gqa=True, seqused_k=seqused_k, alibi_slopes=alibi_slopes,
                return_aux=AuxRequest(lse=True), backend=self.backend,
            )  # fmt: skip
            return out, aux.lse.transpose(0, 1).contiguous(), *_random_state(None, query)
        if seqused_k is not None:
            raise _unserved("seqused_k without cum_seq_q", tuple(seqused_k.shape))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        problem = _problem(q, k, v, dropout_p, is_causal, scale, window=window, alibi_slopes=alibi_slopes)
        out, lse, _ = self._module(problem).forward(problem)
        return out.transpose(1, 2), lse, *_random_state(problem)

    def flash_forward_inplace(self, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result, lse, *_ = self.flash_forward(*args, **kwargs)
        out.copy_(result)
        return lse

    def flash_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = _window(window_size_left, window_size_right)
        if cum_seq_q is None:
            q, k, v, o, g = (x.transpose(1, 2) for x in (query, key, value, out, grad_out))
            problem = _problem(q, k, v, dropout_p, is_causal, scale, rng_state, window)
            dq, dk, dv = self._gradients(problem, o, logsumexp, g)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        problem, rows, columns = functional._varlen_problem(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, None, scale, window, True, None, 0.0,
            None, None, None,
        )  # fmt: skip
        cum_seq_k = cum_seq_q if cum_seq_k is None else cum_seq_k
        tokens_q = functional._packed_index(cum_seq_q, rows, query.shape[0])
        tokens_k = functional._packed_index(cum_seq_k, columns, key.shape[0])
        grads = self._gradients(
            problem,
            _padded(out, tokens_q, problem, 0.0),
            _padded(logsumexp.transpose(0, 1), tokens_q, problem, float("-inf")),  # a row past the end sees nothing
            _padded(grad_out, tokens_q, problem, 0.0),
        )
        dq, dk, dv = (x.transpose(1, 2)[t] for x, t in zip(grads, (tokens_q, tokens_k, tokens_k)))
        return dq, dk, dv

    def _gradients(self, problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._module(problem).backward(problem, out, lse, lse.new_empty(0), grad_out, None, None, NEEDS)
        source = problem.sources[0]
        dq, dk, dv = (
            _like(grad, torch.empty_like(x))
            for grad, x in zip((found.query, *found.sources[0][:2]), (problem.query, source.key, source.value))
        )
        return dq, dk, dv

    def _module(self, problem: Problem) -> Any:
        name = dispatch.choose(problem, self.backend)
        if name == "reference":
            reasons = "; ".join(f"{n}: {reason}" for n, reason in dispatch.reasons(problem).items() if reason)
            raise RuntimeError(f"attnfuse has no kernel with a backward for this call: {reasons}")
        return dispatch.load(name)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    random_state: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Problem:
    """(B, H, N, D) inputs as a problem aligned to the lower right; with the forward's `random_state`, its dropout."""
    problem = bind(
        query, [Source(key, value, window=window)], scale=scale, enable_gqa=True, alibi_slopes=alibi_slopes,
        dropout_p=0.0 if random_state is not None else dropout_p, is_single=True,
    )  # fmt: skip
    if random_state is not None and dropout_p > 0:
        problem.dropout_p, problem.seed = dropout_p, random_state.view(torch.int64)[0]
    source = problem.sources[0]
    source.causal = is_causal
    if source.is_banded() or alibi_slopes is not None:
        source.offset = key.shape[2] - query.shape[2]
    return problem


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _random_state(problem: Problem | None, like: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What torch keeps for the backward: (2,) uint64, which holds our seed, an unused () and no debug mask."""
    x = problem.query if problem is not None else like
    assert x is not None
    state = torch.zeros(2, dtype=torch.int64, device=x.device)
    if problem is not None and problem.seed is not None:
        state[0] = problem.seed
    unused = torch.zeros((), dtype=torch.uint64, device=x.device)
    return state.view(torch.uint64), unused, torch.empty(0, dtype=x.dtype, device=x.device)


def _padded(packed: Tensor, tokens: tuple[Tensor, Tensor], problem: Problem, fill: float) -> Tensor:
    """(T, H, ...) as (N, H, longest, ...), `fill` past each sequence's end."""
    batch, heads, rows, _ = problem.query.shape
    padded = packed.new_full((batch, heads, rows, *packed.shape[2:]), fill)  # kernels read a contiguous lse
    padded.transpose(1, 2)[tokens] = packed
    return padded


def _unserved(name: str, given: object) -> RuntimeError:
    return RuntimeError(f"attnfuse's flash attention does not serve {name}, got {given!r}")


class Handle:
    """What torch's registry keeps while the implementation is active."""

    def __init__(self, library: torch.library.Library | None) -> None:
        self.library = library

    def remove(self) -> None:
        """torch's own kernels are back once the library is gone."""
        self.library = None


def put_in_place(implementation: FlashAttention, key: str = "CUDA") -> Handle:
    """The implementation's operators as the kernels of dispatch key `key`."""
    library = torch.library.Library("aten", "IMPL", key)
    for name, function in implementation.operators().items():
        library.impl(name, function, key)
    return Handle(library)


def activate() -> Handle:
    """What torch.nn.attention.activate_flash_attention_impl("attnfuse") calls."""
    missing = {name: dispatch.load(name).available() for name in ("cuda", "triton")}
    if all(missing.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise RuntimeError(f"attnfuse cannot be activated, neither of its GPU backends is here: {reasons}")
    return put_in_place(FlashAttention())


def register() -> None:
    """Make the name known to torch.nn.attention; nothing changes until the user activates it."""
    register_impl = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register_impl is not None:
        register_impl(NAME, register_fn=activate)
