"""The calls under torch.func's transforms and forward-mode AD: the autograd Functions that have a rule for each.

    grad, vjp    Backward is a Function too, so that vmap over grad finds a rule for it
    vmap         the mapped dimension joins the batch; one kernel call serves all of it
    jvp          refused with one sentence: no kernel carries tangents, backend="reference" does

Eager calls take attnfuse.autograd instead, which costs less per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .problem import BoundSource, Problem

SINKS, SEED = 2, 3  # where Problem.tensors() holds what has no batch dimension
FIRST_SOURCE = 4
NO_TANGENTS = "backend {!r} has no forward-mode AD (jvp, jacfwd): pass backend='reference'"
NO_SECOND = "backend {!r} has no second derivative: pass backend='reference'"


class Attention(torch.autograd.Function):
    """(backend, rest, *problem.tensors()) -> out, lse, mass; rest is what `Problem.rebuilt` takes beside tensors."""

    @staticmethod
    def forward(backend: str, rest: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return ops.call_forward(Problem.rebuilt(tensors, *rest), backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.backend, ctx.rest, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        if not _wants_mass(ctx.rest):
            ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: Tensor | None) -> Any:
        *tensors, out, lse, mass = ctx.saved_tensors
        needs = tuple(need and x is not None for need, x in zip(ctx.needs_input_grad[2:], tensors))
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        found = iter(
            Backward.apply(ctx.backend, ctx.rest, needs, out, lse, mass, grad_out, grad_lse, grad_mass, *tensors)
        )
        return None, None, *(next(found) if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_TANGENTS.format(ctx.backend))

    @staticmethod
    def vmap(info: Any, in_dims: Any, backend: str, rest: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        size, dims = info.batch_size, in_dims[2:]
        mass_dim = 0 if _wants_mass(rest) else None
        if tensors[SEED] is not None or dims[SINKS] is not None:
            # Dropout is keyed by the sample's index and sinks have no batch: such calls are made one by one.
            calls = [Attention.apply(backend, rest, *_element(tensors, dims, i)) for i in range(size)]
            outs, lses, masses = ([call[n] for call in calls] for n in range(3))
            mass = torch.stack(masses) if mass_dim == 0 else masses[0]
            return (torch.stack(outs), torch.stack(lses), mass), (0, 0, mass_dim)
        batch = _rows(tensors[0], dims[0])
        folded = _fold_tensors(tensors, dims, size, batch, spread=False)
        out, lse, mass = Attention.apply(backend, rest, *folded)
        mass = mass.unflatten(0, (size, batch)) if mass_dim == 0 else mass
        return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch)), mass), (0, 0, mass_dim)


class Backward(torch.autograd.Function):
    """(backend, rest, needs, out, lse, mass, grads, *problem.tensors()) -> a gradient for each needed tensor."""

    @staticmethod
    def forward(
        backend: str,
        rest: tuple[Any, ...],
        needs: tuple[bool, ...],
        out: Tensor,
        lse: Tensor,
        mass: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        grad_mass: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        problem = Problem.rebuilt(tensors, *rest)
        return tuple(ops.call_backward(problem, backend, out, lse, mass, grad_out, grad_lse, grad_mass, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(NO_SECOND.format(ctx.backend))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_TANGENTS.format(ctx.backend))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, backend: str, rest: tuple[Any, ...], needs: tuple[bool, ...], *given: Tensor | None
    ) -> Any:
        size, dims = info.batch_size, in_dims[3:]
        results, tensors = given[:6], given[6:]
        if tensors[SEED] is not None or tensors[SINKS] is not None:
            # The gradient of a sink is a sum over the batch, and each call's own is asked for.
            calls = [Backward.apply(backend, rest, needs, *_element(given, dims, i)) for i in range(size)]
            return tuple(torch.stack(grads) for grads in zip(*calls)), (0,) * sum(needs)
        batch = _rows(tensors[0], dims[6])
        folded_results = [_fold(x, dim, size) for x, dim in zip(results, dims)]
        if not _wants_mass(rest):
            folded_results[2] = results[2]
        folded = _fold_tensors(tensors, dims[6:], size, batch, spread=True)
        grads = Backward.apply(backend, rest, needs, *folded_results, *folded)
        rows = [_rows(x, dim) for x, dim, need in zip(tensors, dims[6:], needs) if need]
        unfolded = (grad.unflatten(0, (size, batch)) for grad in grads)
        return tuple(x if n == batch else x.sum(1, keepdim=True) for x, n in zip(unfolded, rows)), (0,) * sum(needs)


def _wants_mass(rest: tuple[Any, ...]) -> bool:
    return bool(rest[-1])


def _element(given: Sequence[Tensor | None], dims: Sequence[int | None], index: int) -> list[Tensor | None]:
    """One element of the mapped dimension."""
    return [x if x is None or dim is None else x.select(dim, index) for x, dim in zip(given, dims)]


def _rows(x: Tensor | None, dim: int | None) -> int:
    """The size of the dimension that is a mapped tensor's own first."""
    assert x is not None
    return x.shape[1] if dim == 0 else x.shape[0]


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, ...) with a mapped dimension somewhere, or none, as (size B, ...)."""
    if x is None:
        return None
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _fold_tensors(
    tensors: Sequence[Tensor | None], dims: Sequence[int | None], size: int, batch: int, *, spread: bool
) -> list[Tensor | None]:
    """Each of Problem.tensors() with the mapped dimension folded into its batch.

    spread: a mask that all elements share is repeated too, so that each element's own gradient of it comes back.
    """
    attn_mask = BoundSource.TENSORS.index("attn_mask")
    folded: list[Tensor | None] = []
    for n, (x, dim) in enumerate(zip(tensors, dims)):
        if n in (SINKS, SEED) or x is None:
            folded.append(x)
            continue
        is_mask = n >= FIRST_SOURCE and (n - FIRST_SOURCE) % len(BoundSource.TENSORS) == attn_mask
        if is_mask and _rows(x, dim) == 1 < batch:
            if dim is None and not spread:
                folded.append(x)  # broadcasts as before
                continue
            x = x[None] if dim is None else x.movedim(dim, 0)
            x, dim = x.expand(size, batch, *x.shape[2:]), 0
        folded.append(_fold(x, dim, size))
    return folded
