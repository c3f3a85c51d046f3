"""The same calls as library operators, with fake implementations: what torch.compile and torch.export record.

    attnfuse::forward(tensors, given, layout, ...) -> out, lse, mass
    attnfuse::backward(tensors, given, layout, ..., out, lse, mass, grads) -> one gradient per needed tensor

tensors are those of Problem.tensors() that are there, given tells which those are, layout is Problem.layout().

Eager calls take attnfuse.autograd instead, which costs less per call; those under a dispatch mode (fake tensors,
FlopCounterMode, selective checkpointing) come here, so that the mode sees one operator whatever the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, flops
from .problem import Problem, empty_output

_SCALARS = "bool[] given, SymInt[] layout, float scale, float softcap, float dropout_p, bool want_mass, str backend"
_library = torch.library.Library("attnfuse", "DEF")
_library.define(f"forward(Tensor[] tensors, {_SCALARS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward(Tensor[] tensors, {_SCALARS}, Tensor out, Tensor lse, Tensor mass, "
    "Tensor grad_out, Tensor? grad_lse, Tensor? grad_mass, bool[] needs) -> Tensor[]"
)


def _spread(tensors: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    remaining = iter(tensors)
    return [next(remaining) if here else None for here in given]


def call_forward(problem: Problem, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator on `problem`."""
    if not torch.compiler.is_compiling():
        flops.register_if_counting(torch.ops.attnfuse.forward, torch.ops.attnfuse.backward)
    tensors = problem.tensors()
    return torch.ops.attnfuse.forward(  # type: ignore[no-any-return]
        [x for x in tensors if x is not None], [x is not None for x in tensors], problem.layout(),
        problem.scale, problem.softcap, problem.dropout_p, problem.want_mass, backend,
    )  # fmt: skip


def call_backward(
    problem: Problem,
    backend: str,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward operator on `problem`; `needs` is aligned with `problem.tensors()`."""
    tensors = problem.tensors()
    return torch.ops.attnfuse.backward(  # type: ignore[no-any-return]
        [x for x in tensors if x is not None], [x is not None for x in tensors], problem.layout(),
        problem.scale, problem.softcap, problem.dropout_p, problem.want_mass, backend,
        out, lse, mass, grad_out, grad_lse, grad_mass, [n for n, x in zip(needs, tensors) if x is not None],
    )  # fmt: skip


def _forward(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    layout: Sequence[int],
    scale: float,
    softcap: float,
    dropout_p: float,
    want_mass: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.rebuilt(_spread(tensors, given), layout, scale, softcap, dropout_p, want_mass)
    out, lse, mass = dispatch.load(backend).forward(problem)
    # Compiled code was promised these layouts by _forward_fake.
    return _like(out, empty_output(problem)), lse.contiguous(), mass.contiguous()


def _like(given: Tensor, model: Tensor) -> Tensor:
    return given if given.stride() == model.stride() else model.copy_(given)


def _forward_fake(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    layout: Sequence[int],
    scale: float,
    softcap: float,
    dropout_p: float,
    want_mass: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.rebuilt(_spread(tensors, given), layout, scale, softcap, dropout_p, want_mass)
    query = problem.query
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=wide)
    shape = (*query.shape[:3], len(problem.sources)) if want_mass else (0,)
    return empty_output(problem), lse, query.new_empty(shape, dtype=wide)


def _backward(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    layout: Sequence[int],
    scale: float,
    softcap: float,
    dropout_p: float,
    want_mass: bool,
    backend: str,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    problem = Problem.rebuilt(_spread(tensors, given), layout, scale, softcap, dropout_p, want_mass)
    needed = iter(needs)
    spread_needs = [here and next(needed) for here in given]
    gradients = dispatch.load(backend).backward(
        problem, out, lse, mass, grad_out, grad_lse, grad_mass, spread_needs
    )
    found = []
    for x, grad, need in zip(problem.tensors(), gradients.flat(), spread_needs):
        if need:
            assert x is not None and grad is not None
            found.append(_like(grad.to(x.dtype), torch.empty_like(x)))
    return found


def _backward_fake(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(tensors, rest[-1]) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: Tensor | None) -> Any:
    *tensors, out, lse, mass = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[0])
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if mass.numel() == 0:  # mass was not wanted: its gradient says nothing
        grad_mass = None
    found = iter(
        torch.ops.attnfuse.backward(tensors, *ctx.rest, out, lse, mass, grad_out, grad_lse, grad_mass, needs)
    )
    return [next(found) if need else None for need in needs], *(None for _ in ctx.rest)


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("attnfuse::forward", _forward_fake, lib=_library)
torch.library.register_fake("attnfuse::backward", _backward_fake, lib=_library)
torch.library.register_autograd("attnfuse::forward", _autograd, setup_context=_setup_context, lib=_library)
