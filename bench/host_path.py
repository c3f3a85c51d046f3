"""What one call costs from Python to the launch of its kernel, stage by stage, on any machine.

    python bench/host_path.py [--json] [--calls 300] [--repeats 30]

validation  arguments to Problem              launcher  the backend's forward, up to the kernel
dispatch    which backend serves it           autograd  what recording the call for a backward adds
whole       the public function, as a user calls it

Tensors are tiny and on the CPU, so that there is hardly a kernel to wait for. `aten` runs torch's own; for `cuda` and
`triton` a stand-in takes the launch at the last moment: the params struct is filled, Triton binds its arguments, looks
up its cache and picks the kernel, and then nothing is launched. Each stage is given in microseconds, the least mean of
`repeats` rounds (what other processes take from the machine only ever adds), and in executed Python bytecodes and calls
of Python and C functions, which no other process can disturb.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported: what is measured is its launcher

import torch
import torch.nn.functional as F
from torch import Tensor

import attnfuse
from attnfuse import Source, dispatch
from attnfuse.autograd import Attention
from attnfuse.backends import aten, cuda, triton
from attnfuse.cli import table
from attnfuse.problem import bind

Call = Callable[[], Any]


def count(call: Call) -> dict[str, int]:
    """Bytecodes, and calls of Python and of C functions, that one `call` executes."""
    found = {"bytecodes": 0, "python_calls": 0, "c_calls": 0}

    def traced(frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes = True
        found["bytecodes"] += event == "opcode"
        return traced

    def profiled(frame: FrameType, event: str, arg: Any) -> None:
        found["python_calls"] += event == "call"
        found["c_calls"] += event == "c_call"

    call()  # caches
    before = sys.gettrace(), sys.getprofile()
    try:
        sys.settrace(traced)
        call()
        sys.settrace(None)
        sys.setprofile(profiled)
        call()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return found


def microseconds(calls: dict[str, Call], number: int, repeats: int) -> dict[str, float]:
    """The least mean of `number` calls over `repeats` rounds, in which all take turns."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(number):
                call()
            least[name] = min(least[name], (time.perf_counter() - started) / number * 1e6)
    return least


@contextmanager
def no_launches() -> Iterator[None]:
    """CUDA and Triton up to the launch: a module that takes the params and a kernel that is never compiled."""
    module = SimpleNamespace(
        ForwardParams=lambda *params: params,
        attn_fwd=lambda params, stream: None,
        few_tile=lambda name, dim, rows: (name, 16, 64, 128, 0),
        multiprocessor_count=lambda device: 132,
    )
    held = cuda._module
    cuda._module = lambda problem: module  # type: ignore[assignment]
    try:
        with _triton_stand_in():
            yield
    finally:
        cuda._module = held


@contextmanager
def _triton_stand_in() -> Iterator[None]:
    """A driver for an sm_90 card that is not there, and kernels that launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    card = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    kernel = SimpleNamespace(
        launch_metadata=lambda *given: None, run=lambda *given: None, function=None, packed_metadata=None
    )

    def compiled(function: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        function.device_caches[device][0][key] = kernel
        return kernel

    held, arch, active = JITFunction._do_compile, triton._arch, driver._active
    JITFunction._do_compile = compiled
    triton._arch = lambda device: 90  # type: ignore[assignment]
    driver.set_active(card)
    try:
        yield
    finally:
        JITFunction._do_compile = held
        triton._arch = arch
        driver._active = active


def cases() -> dict[str, tuple[Tensor, list[Source]]]:
    """A query and its sources: a single plain one, and three, of which two are padded."""
    query = torch.randn(2, 4, 2, 64, dtype=torch.bfloat16)
    kv = [torch.randn(2, 4, n, 64, dtype=torch.bfloat16) for n in (2, 3, 4)]
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    return {
        "one source": (query, [Source(kv[0], kv[0])]),
        "three sources": (query, [Source(kv[0], kv[0]), *(Source(x, x, mask=lengths) for x in kv[1:])]),
    }


def stages(query: Tensor, sources: list[Source]) -> dict[tuple[str, str], Call]:
    """{(backend or "", stage): the call}."""
    problem = bind(query, sources)
    recorded = bind(query.clone().requires_grad_(), sources)
    tensors = recorded.tensors()
    one = sources[0] if len(sources) == 1 else None

    def chosen(names: tuple[str, ...]) -> Call:
        def call() -> None:
            for name in names:
                module = dispatch.load(name)
                module.available()
                module.rejects(problem)

        return call

    def whole(query: Tensor) -> Call:
        if one is None:
            return lambda: attnfuse.multi_source_attention(query, sources)
        return lambda: attnfuse.attention(query, one.key, one.value)

    def validated(query: Tensor) -> Call:
        if one is None:
            return lambda: bind(query, sources)
        given = (None, 0.0, False, None, False, None, None, None, None, None, None)
        return lambda: attnfuse.functional._attention_problem(query, one.key, one.value, *given)

    found: dict[tuple[str, str], Call] = {("", "validation"): validated(query)}
    found |= {
        ("aten", "dispatch"): lambda: dispatch.choose(problem, None),
        ("aten", "launcher"): lambda: aten.forward(problem),
        ("aten", "launcher + autograd"): lambda: Attention.apply("aten", recorded, *tensors),
        ("aten", "whole"): whole(query),
        ("aten", "whole + autograd"): whole(recorded.query),
        ("cuda", "dispatch"): chosen(("cuda",)),
        ("cuda", "launcher"): lambda: cuda.forward(problem),
        ("triton", "dispatch"): chosen(("cuda", "triton")),
        ("triton", "launcher"): lambda: triton.forward(problem),
    }
    if one is not None:
        found["torch", "whole"] = lambda: F.scaled_dot_product_attention(query, one.key, one.value)
        found["torch", "whole + autograd"] = lambda: F.scaled_dot_product_attention(
            recorded.query, one.key, one.value
        )
    return found


def measure(calls: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each case, backend and stage."""
    rows = []
    with no_launches():
        for case, (query, sources) in cases().items():
            found = stages(query, sources)
            counted: dict[tuple[str, str], dict[str, int]] = {}
            timed: dict[str, float] = {}
            for grad in (False, True):
                part = {key: call for key, call in found.items() if ("autograd" in key[1]) == grad}
                with torch.set_grad_enabled(grad):
                    counted |= {key: count(call) for key, call in part.items()}
                    named = {"|".join(key): call for key, call in part.items()}
                    timed |= microseconds(named, calls, repeats)
            rows += [
                {"case": case, "backend": key[0] or "any", "stage": key[1], "us": timed["|".join(key)], **counted[key]}
                for key in found
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call costs from Python to the launch of its kernel.")
    parser.add_argument("--calls", type=int, default=300, help="calls a round")
    parser.add_argument("--repeats", type=int, default=30, help="rounds, of which the fastest counts")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.calls, args.repeats)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    columns = ("case", "backend", "stage", "us", "bytecodes", "python calls", "C calls")
    table.show(columns, [tuple(f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()) for row in rows])


if __name__ == "__main__":
    main()
