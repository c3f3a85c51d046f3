"""A dispatch mode that looks inside this package's operators: to any other mode each of them is one opaque call."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnfuse import ops

BODIES = {torch.ops.attnfuse.forward.default: ops._forward, torch.ops.attnfuse.backward.default: ops._backward}


class Inside(TorchDispatchMode):
    """Calls `saw` after each of torch's operators."""

    def saw(self, function: Any, args: tuple[Any, ...], made: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in BODIES:
            with self:
                return BODIES[function](*args, **(kwargs or {}))
        made = function(*args, **(kwargs or {}))
        self.saw(function, args, made)
        return made
