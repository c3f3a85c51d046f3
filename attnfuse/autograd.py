"""The autograd Function around a backend's forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .problem import Problem


class Attention(torch.autograd.Function):
    """(backend, problem, *problem.tensors()) -> out, lse, mass.

    The tensors come beside the problem so that autograd sees them; they are the ones saved, not the problem.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, problem: Problem, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, mass = dispatch.load(backend).forward(problem)
        ctx.backend = backend
        ctx.rest = (problem.layout(), problem.scale, problem.softcap, problem.dropout_p, problem.want_mass)
        ctx.save_for_backward(*tensors, out, lse, mass)
        ctx.set_materialize_grads(False)
        if not problem.want_mass:
            ctx.mark_non_differentiable(mass)
        return out, lse, mass

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: Tensor | None) -> Any:
        *tensors, out, lse, mass = ctx.saved_tensors
        if grad_out is None and grad_lse is None and grad_mass is None:
            return (None,) * (2 + len(tensors))
        problem = Problem.rebuilt(tensors, *ctx.rest)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = list(ctx.needs_input_grad[2:])
        gradients = dispatch.load(ctx.backend).backward(
            problem, out, lse, mass, grad_out, grad_lse, grad_mass, needs
        )
        return None, None, *(g if need else None for g, need in zip(gradients.flat(), needs))
