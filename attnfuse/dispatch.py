"""Which backend serves a problem, and why not the others."""

from __future__ import annotations

from typing import Any

from .backends import aten, cuda, reference, triton
from .problem import Problem

BACKENDS = {"cuda": cuda, "triton": triton, "aten": aten, "reference": reference}
# In the order they are tried, by the type of the query's device.
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("aten", "reference")}


def load(name: str) -> Any:
    """The backend module of that name."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    return BACKENDS[name]


def order(problem: Problem) -> tuple[str, ...]:
    """The backends in the order they are tried.

    The same for every problem: CUDA and Triton both have kernels for few queries and long keys, which wait for the same
    bytes, and the CUDA launch takes a third of the time of Triton's on the host (bench/notes.md).
    """
    return ORDER.get(problem.query.device.type, ("reference",))


def choose(problem: Problem, backend: str | None) -> str:
    """The name of the backend that runs `problem`; a named backend that cannot raises RuntimeError with its reason."""
    if backend is not None:
        module = load(backend)
        reason = module.available() or module.rejects(problem)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot serve this call: {reason}")
        return backend
    reasons = []
    for name in order(problem):
        module = load(name)
        reason = module.available() or module.rejects(problem)
        if reason is None:
            return name
        reasons.append(reason)
    raise RuntimeError(f"no backend can serve this call: {'; '.join(reasons)}")


def reasons(problem: Problem) -> dict[str, str | None]:
    """For each backend why it would say no, or None."""
    found: dict[str, str | None] = {}
    for name, module in BACKENDS.items():
        found[name] = module.available() or module.rejects(problem)
    return found
