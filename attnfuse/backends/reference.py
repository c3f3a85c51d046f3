"""The einsum oracle as a backend: torch's own autograd differentiates it, so it has no backward of its own."""

from __future__ import annotations

from ..problem import Problem
from ..reference import forward as forward


def available() -> str | None:
    return None


def rejects(problem: Problem) -> str | None:
    return None


def describe(problem: Problem) -> str:
    return "plain einsum, O(Nq Ns) memory"
