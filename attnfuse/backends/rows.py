"""What the backends with kernels of their own share: how tensors are laid out, and the algebra of whole rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..problem import Problem, empty_output

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result by the mark it sets: it would import torch._dynamo, and that triton.

    Triton decides on import whether it interprets; a caller may set TRITON_INTERPRET after importing this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def on_device_of(x: Tensor) -> torch.cuda.device:
    """The device a kernel is launched on; -1 leaves it as it is."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def empty_results(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised out (B, Hq, Nq, Dv), lse (B, Hq, Nq) and mass (B, Hq, Nq, S), or (0,) if it is not wanted."""
    query = problem.query
    mass_shape = (*query.shape[:3], len(problem.sources)) if problem.want_mass else (0,)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return empty_output(problem), lse, torch.empty(mass_shape, dtype=torch.float32, device=query.device)


def empty_rows(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape and order of dimensions in memory, the last one contiguous."""
    strides = x.stride()
    order = sorted(range(3), key=lambda d: -strides[d]) + [3]
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)


def exact_delta(lse: Tensor, delta: Tensor, grad_lse: Tensor | None, sums: Tensor) -> tuple[Tensor, Tensor]:
    """delta as the row sums imply it, free of the rounding of `out`, and how far the given one was off.

    dz sums to grad_lse over all of a row's columns (the sink's, -p delta, included), so
    delta = sum dz + delta sum p - grad_lse.
    """
    better = sums[..., 0].sum(-1) + delta * sums[..., 1].sum(-1)
    if grad_lse is not None:
        better = better - grad_lse
    better = torch.where(lse == float("-inf"), 0.0, better)
    return better, better - delta


def sinks_gradient(problem: Problem, lse: Tensor, delta: Tensor) -> Tensor:
    """(Hq,): a sink is a column of mass e^(sink - lse) without a value, a mass gradient or a source."""
    assert problem.sinks is not None
    share = torch.where(lse == float("-inf"), 0.0, torch.exp(problem.sinks[:, None] - lse))
    return -(share * delta).sum((0, 2))
