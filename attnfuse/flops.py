"""What an attention costs, for torch.utils.flop_counter.FlopCounterMode: 2 flops a multiply-add, masks not discounted.

    forward    2 B Hq Nq Ns (D + Dv)        a source: q k and p v
    backward   2 B Hq Nq Ns (3 D + 2 Dv)    a source: q k again, dout v, p dout, dz k, dz q

As torch counts its own attention, causal or not. The formulas are registered when a counter is first seen: importing
torch's module takes longer than importing this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .problem import BoundSource

SOURCE_START = 4  # Problem.tensors() holds query, alibi_slopes, sinks and seed before the sources'
Shape = Sequence[int]


def forward_flops(tensors: Sequence[Shape], given: Sequence[bool], *rest: Any, **kwargs: Any) -> int:
    return sum(2 * pairs * (dim + value_dim) for pairs, dim, value_dim in _sources(tensors, given))


def backward_flops(tensors: Sequence[Shape], given: Sequence[bool], *rest: Any, **kwargs: Any) -> int:
    return sum(2 * pairs * (3 * dim + 2 * value_dim) for pairs, dim, value_dim in _sources(tensors, given))


def _sources(tensors: Sequence[Shape], given: Sequence[bool]) -> list[tuple[int, int, int]]:
    """(B Hq Nq Ns, D, Dv) of each source."""
    remaining = iter(tensors)
    shapes = [next(remaining) if here else () for here in given]
    batch, heads, rows, dim = shapes[0]
    width = len(BoundSource.TENSORS)
    return [
        (batch * heads * rows * shapes[n][2], dim, shapes[n + 1][3]) for n in range(SOURCE_START, len(shapes), width)
    ]


def register_if_counting(forward: Any, backward: Any) -> None:
    """Give the operators their formulas, and to every counter that is counting already."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None or forward in module.flop_registry:
        return
    module.register_flop_formula(forward)(forward_flops)
    module.register_flop_formula(backward)(backward_flops)
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)  # FlopCounterMode enters a mode of its own that holds it
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry.update({op: module.flop_registry[op] for op in (forward, backward)})
