"""RMSNorm of query and key heads and rotary position embedding, fused: what runs between a projection and attention.

Eager calls go to the autograd Function below, compiled ones to the operators, on a CPU both to plain torch:

    attnfuse::qk_norm_rope(query, key, q_weight, k_weight, cos, sin, eps, interleaved, dtype) -> query, key
    attnfuse::qk_norm_rope_backward(grad_query, grad_key, the same tensors, eps, interleaved, the layouts of query and
                                    key, needs) -> one gradient per need, in the order query, key, q_weight, k_weight

The backward is given query and key only where there is a norm: a rotation alone keeps neither alive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import triton
from .backends.rows import on_device_of
from .problem import FLOAT_DTYPES, MAX_HEAD_DIM

_TENSORS = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, bool interleaved"
_library = torch.library.Library("attnfuse", "FRAGMENT")
_library.define(f"qk_norm_rope(Tensor query, Tensor key, {_TENSORS}, ScalarType dtype) -> (Tensor, Tensor)")
_library.define(
    f"qk_norm_rope_backward(Tensor? grad_query, Tensor? grad_key, Tensor? query, Tensor? key, {_TENSORS}, "
    "ScalarType q_dtype, int[] q_order, ScalarType k_dtype, int[] k_order, bool[] needs) -> Tensor[]"
)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm each head of query and key, then rotate pairs of its elements by the token's position.

        n = x · weight / sqrt(mean(x²) + eps)
        y_a = n_a cos - n_b sin;  y_b = n_b cos + n_a sin

    a and b are the elements d and d + R/2 of a head (half-split: Llama, GPT-NeoX), or 2d and 2d + 1 (interleaved:
    GPT-J, FLUX), d = 0 .. R/2 - 1; elements from R on are not rotated. Rotation: Su et al., 2021, "RoFormer: Enhanced
    Transformer with Rotary Position Embedding"; norm: Zhang and Sennrich, 2019, "Root Mean Square Layer
    Normalization", on queries and keys as in Henry et al., 2020, "Query-Key Normalization for Transformers".

    Memory traffic of the Triton kernels: the forward reads query and key once and writes them once: 2 passes. The
    backward reads them (where there is a norm) and the arriving gradients once and writes theirs once: 3 passes.
    Beside that go the tables, the weights and at most about 2048 · D float32 of partial weight gradients. As separate
    torch operations, a fused RMSNorm takes 2 passes and `x * cos + cat((-x_b, x_a)) * sin` another 10 (negation 1,
    cat 2, two products 4, sum 3): 12 passes against 2, 6 times the bytes.

    Args:
        query: (B, Hq, N, D), key: (B, Hkv, N, D), D up to 256; one dtype, any strides, such as views of one packed
            projection. With a contiguous last dimension nothing is copied.
        q_weight, k_weight: (D,) float; None leaves out that norm.
        cos, sin: (N, R/2) or (B, N, R/2) float32, R up to D; both None leaves out the rotation. See
            `attnfuse.nn.rope.RotaryEmbedding`. They get no gradient.
        eps: added to the mean square.
        interleaved: which elements form a pair, see above.
        backend: "triton" or "reference"; None takes Triton on a GPU and the reference elsewhere. With
            TRITON_INTERPRET=1 "triton" runs on CPU tensors, as a proof.

    Returns:
        query and key in their own dtype (under autocast in its dtype) and their own order of dimensions in memory.
        All between is computed in float32; in float64 for float64 tensors, which only the reference serves.
        There is no mask: rows do not mix, but each counts in the gradient of the weights, so that padding must hold
        finite numbers.

    Raises:
        TypeError, ValueError: a bad argument, or cos or sin that require a gradient. RuntimeError: the named backend
        cannot serve the call.
    """
    dtype = _check_rows(query, key)
    _check_weight("q_weight", q_weight, query)
    _check_weight("k_weight", k_weight, query)
    _check_tables(cos, sin, query)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be True or False, got {interleaved!r}")
    name = _choose(query, backend)
    if q_weight is None and k_weight is None and cos is None:
        return query.to(dtype), key.to(dtype)
    if name == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return (
                norm_rope(query, q_weight, cos, sin, eps, interleaved, dtype),
                norm_rope(key, k_weight, cos, sin, eps, interleaved, dtype),
            )
    # Kernels read rows of D contiguous numbers; any other stride is theirs to follow.
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    arguments = (query, key, q_weight, k_weight, cos, sin, float(eps), interleaved, dtype)
    if torch.compiler.is_compiling():
        return torch.ops.attnfuse.qk_norm_rope(*arguments)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return QKNormRope.apply(*arguments)  # type: ignore[no-any-return]
    return _forward(*arguments)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The reference for one tensor x (B, H, N, D), differentiable as often as torch is."""
    # The dimensions stand in the order they have in memory while this computes, so that the result has it too.
    order = _memory_order(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.permute(order).to(wide)
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    if cos is not None and sin is not None:
        half = cos.shape[-1]
        c, s = (_four(table).permute(order).to(wide) for table in (cos, sin))
        pair, split = (-1, (half, 2)) if interleaved else (-2, (2, half))
        a, b = y[..., : 2 * half].unflatten(-1, split).unbind(pair)
        turned = torch.stack((a * c - b * s, b * c + a * s), pair).flatten(-2)
        y = turned if 2 * half == x.shape[3] else y.slice_scatter(turned, -1, 0, 2 * half)
    return y.to(dtype).contiguous().permute([order.index(d) for d in range(4)])


class QKNormRope(torch.autograd.Function):
    """(query, key, q_weight, k_weight, cos, sin, eps, interleaved, dtype) -> query, key by the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        _remember(ctx, arguments)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _differentiate(ctx, grads, _backward)


def _remember(ctx: Any, arguments: tuple[Any, ...]) -> None:
    """Keep what the backward needs of the forward's arguments."""
    query, key, q_weight, k_weight, cos, sin, eps, interleaved, _ = arguments
    ctx.set_materialize_grads(False)
    held = (None if q_weight is None else query, None if k_weight is None else key)
    ctx.save_for_backward(*held, q_weight, k_weight, cos, sin)
    ctx.rest = (eps, interleaved, query.dtype, _memory_order(query), key.dtype, _memory_order(key))


def _differentiate(ctx: Any, grads: Sequence[Tensor | None], backward: Any) -> Any:
    """The gradients of the forward's nine arguments; what never reached the loss has none."""
    needs = [need and grad is not None for need, grad in zip(ctx.needs_input_grad[:4], (*grads, *grads))]
    found = iter(backward(*grads, *ctx.saved_tensors, *ctx.rest, needs) if any(needs) else ())
    return *(next(found) if need else None for need in needs), *(None,) * 5


def _forward(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The forward kernel."""
    from .triton_kernels.qk_norm_rope import WARPS, qk_norm_rope_fwd

    out_query, out_key = _empty(query, dtype, _memory_order(query)), _empty(key, dtype, _memory_order(key))
    if query.numel() == 0:
        return out_query, out_key
    parts = [
        _part(x, y, None, _memory_order(x), weight, cos, sin)
        for x, y, weight in ((query, out_query, q_weight), (key, out_key, k_weight))
    ]
    programs = sum(part.programs for part in parts)
    with on_device_of(query):
        qk_norm_rope_fwd[(programs,)](*parts, eps, **_constants(parts, interleaved), num_warps=WARPS)
    return out_query, out_key


def _forward_fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = rest[-1]
    return _empty(query, dtype, _memory_order(query)), _empty(key, dtype, _memory_order(key))


def _backward(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    q_dtype: torch.dtype,
    q_order: list[int],
    k_dtype: torch.dtype,
    k_order: list[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward kernel: a gradient for each of query, key, q_weight and k_weight that `needs` asks for."""
    from .triton_kernels.qk_norm_rope import PROGRAMS, WARPS, qk_norm_rope_bwd

    parts: list[Any] = [None, None]
    for n, (grad, x, weight, dtype, order) in enumerate(
        ((grad_query, query, q_weight, q_dtype, q_order), (grad_key, key, k_weight, k_dtype, k_order))
    ):
        if needs[n] or needs[2 + n]:
            assert grad is not None
            grad = grad if grad.stride(3) == 1 else grad.contiguous()
            parts[n] = _part(x, grad, _empty(grad, dtype, order), order, weight, cos, sin)
    live = [part for part in parts if part is not None]
    # Where no weight's gradient is summed, nothing is gained by a program of more than one tile.
    tiles = sum(part.programs for part in live) if needs[2] or needs[3] else 0
    steps = max(1, -(-tiles // PROGRAMS))
    programs = 0
    for n, part in enumerate(parts):
        if part is not None:
            own = -(-part.programs // steps)
            partial = part.y.ptr.new_empty((own, part.y.ptr.shape[3]), dtype=torch.float32)
            parts[n] = part._replace(programs=own, partial=partial if needs[2 + n] else None)
            programs += own
    if programs:
        with on_device_of(live[0].y.ptr):
            asked = [part is not None for part in parts]
            qk_norm_rope_bwd[(programs,)](
                *parts, eps, steps, *asked, **_constants(live, interleaved), num_warps=WARPS
            )  # fmt: skip
    found = [part.grad_x.ptr for part, need in zip(parts, needs) if need]
    for part, weight, need in zip(parts, (q_weight, k_weight), needs[2:]):
        if need:
            assert weight is not None
            found.append(part.partial.sum(0).to(weight.dtype))
    return found


def _backward_fake(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    q_dtype, q_order, k_dtype, k_order, needs = rest[-5:]
    found = []
    for grad, dtype, order, need in ((grad_query, q_dtype, q_order, needs[0]), (grad_key, k_dtype, k_order, needs[1])):
        if need:
            assert grad is not None
            found.append(_empty(grad, dtype, order))
    return found + [torch.empty_like(x) for x, need in zip((q_weight, k_weight), needs[2:]) if need and x is not None]


def _memory_order(x: Tensor) -> list[int]:
    """x's dimensions as they lie in memory, the last one last."""
    strides = x.stride()
    return sorted(range(3), key=lambda d: -strides[d]) + [3]


def _empty(x: Tensor, dtype: torch.dtype, order: list[int]) -> Tensor:
    """An uninitialised tensor of x's shape, dense in memory in that order of dimensions."""
    return torch.empty_permuted(x.shape, order, dtype=dtype, device=x.device)


def _four(table: Tensor) -> Tensor:
    """(N, R/2) or (B, N, R/2) as (1 or B, 1, N, R/2)."""
    return table[None, None] if table.dim() == 2 else table[:, None]


def _part(
    x: Tensor | None,
    y: Tensor,
    grad_x: Tensor | None,
    order: list[int],
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Any:
    """The kernels' Part, one program to a tile; `order` is the dimensions' order in memory."""
    from .triton_kernels.qk_norm_rope import Part, Rows, blocks

    batch, _, _, dim = y.shape
    outer, inner = (d for d in order if d in (1, 2))

    def rows(given: Tensor | None) -> Any:
        if given is None:
            return None
        # A size of 1 is never stepped over, whatever its stride, and a table has one line for all heads and samples.
        batch, outer_step, inner_step = (0 if given.shape[d] == 1 else given.stride(d) for d in (0, outer, inner))
        return Rows(given, batch, outer_step, inner_step)

    half = 0 if cos is None else cos.shape[-1]
    block, _, _ = blocks(half, dim - 2 * half, y.element_size())
    count = y.shape[1] * y.shape[2]
    tiles = -(-count // block)
    weight = None if weight is None else weight.contiguous()
    cos, sin = (None if table is None else _four(table if table.stride(-1) == 1 else table.contiguous())
                for table in (cos, sin))  # fmt: skip
    return Part(
        rows(x), rows(y), rows(grad_x), weight, None, rows(cos), rows(sin), y.shape[inner], count, tiles,
        batch * tiles, batch * tiles,
    )  # fmt: skip


def _constants(parts: Sequence[Any], interleaved: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    from .triton_kernels.qk_norm_rope import blocks

    half = 0 if parts[0].cos is None else parts[0].cos.ptr.shape[-1]
    tail = parts[0].y.ptr.shape[3] - 2 * half
    block, half_pad, tail_pad = blocks(half, tail, parts[0].y.ptr.element_size())

    def common(rows: list[Any]) -> int:
        return math.gcd(16, *(step for held in rows if held is not None for step in held[1:]))

    return {
        "HALF": half, "HALF_PAD": half_pad, "TAIL": tail, "TAIL_PAD": tail_pad, "BLOCK": block,
        "ALIGN": common([rows for part in parts for rows in (part.x, part.y, part.grad_x)]),
        "TABLE_ALIGN": common([rows for part in parts for rows in (part.cos, part.sin)]), "INTERLEAVED": interleaved,
    }  # fmt: skip


def _choose(query: Tensor, backend: str | None) -> str:
    """"triton" or "reference"; a named backend that cannot serve the call raises RuntimeError with the reason."""
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend must be 'triton', 'reference' or None, got {backend!r}")
    if backend == "reference" or (backend is None and query.device.type == "cpu"):
        return "reference"
    reason = triton.available()
    if reason is None and query.dtype == torch.float64:
        reason = "the Triton kernels compute in float32: float64 is not served"
    if reason is None and query.device.type == "cpu" and not triton._interpreted():
        reason = "the tensors are on the CPU, and TRITON_INTERPRET=1 is not set"
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot serve this call: {reason}")
    return "reference"


def _check_rows(query: object, key: object) -> torch.dtype:
    """Check query and key, and return the dtype of the result."""
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-D (B, H, N, D), got shape {tuple(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.shape[1] < 1:
            raise ValueError(f"{name} must have at least one head, got shape {tuple(x.shape)}")
    assert isinstance(query, Tensor) and isinstance(key, Tensor)
    if not 1 <= query.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"query's head dim must be 1 to {MAX_HEAD_DIM}, got {query.shape[3]}")
    if (key.shape[0], *key.shape[2:]) != (query.shape[0], *query.shape[2:]):
        raise ValueError(
            f"key must have the query's batch, length and head dim, got {tuple(key.shape)} for {tuple(query.shape)}"
        )
    if key.device != query.device:
        raise ValueError(f"key must be on the query's device {query.device}, got {key.device}")
    device = query.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (query.dtype, key.dtype):
        return torch.get_autocast_dtype(device)
    if key.dtype != query.dtype:
        raise TypeError(f"key must have the query's dtype {query.dtype}, got {key.dtype}")
    return query.dtype


def _check_weight(name: str, weight: object, query: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(weight).__name__}")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {weight.dtype}")
    if tuple(weight.shape) != (query.shape[3],):
        raise ValueError(f"{name} must have shape ({query.shape[3]},), got {tuple(weight.shape)}")
    if weight.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {weight.device}")


def _check_tables(cos: object, sin: object, query: Tensor) -> None:
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise ValueError(f"{missing} must be given with the other table, or both left out, got None")
    if cos is None:
        return
    batch, _, rows, dim = query.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(table).__name__}")
        if table.dtype not in (torch.float32, torch.float64):
            # 16 bits leave an angle's cosine 2 or 3 digits.
            raise TypeError(f"{name} must be float32, got {table.dtype}")
        fits = table.dim() in (2, 3) and table.shape[-2] == rows and 1 <= table.shape[-1] <= dim // 2
        if not fits or (table.dim() == 3 and table.shape[0] not in (1, batch)):
            raise ValueError(
                f"{name} must have shape ({rows}, R/2) or ({batch}, {rows}, R/2) with R at most {dim}, "
                f"got {tuple(table.shape)}"
            )
        if table.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {table.device}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient: none is computed for it; pass {name}.detach()")
    assert isinstance(cos, Tensor) and isinstance(sin, Tensor)
    if cos.shape != sin.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _remember(ctx, inputs)


def _autograd(ctx: Any, *grads: Tensor | None) -> Any:
    return _differentiate(ctx, grads, torch.ops.attnfuse.qk_norm_rope_backward)


for _key in ("CPU", "CUDA"):
    _library.impl("qk_norm_rope", _forward, _key)
    _library.impl("qk_norm_rope_backward", _backward, _key)
torch.library.register_fake("attnfuse::qk_norm_rope", _forward_fake, lib=_library)
torch.library.register_fake("attnfuse::qk_norm_rope_backward", _backward_fake, lib=_library)
torch.library.register_autograd("attnfuse::qk_norm_rope", _autograd, setup_context=_setup_context, lib=_library)
