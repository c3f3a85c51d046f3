"""interpreter.py changes how long interpreted kernels take, and no bit of what they compute."""

from __future__ import annotations

import pytest
import torch

from attnfuse import testing

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled")


def test_the_language_is_patched_once_a_launch_and_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):
        pytest.skip("this Triton patches its language in another way")
    by_names = {str(case): case for case in testing.cases()}
    launches = 0
    execute = interpreter.GridExecutor.__call__

    def counted(*given: object, **named: object) -> object:
        nonlocal launches
        launches += 1
        return execute(*given, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    original = interpreter._patch_lang.__wrapped__
    patches = 0

    def counting(function: object) -> object:
        nonlocal patches
        patches += 1
        return original(function)

    for name, dtype in (("plain-square", torch.float32), ("bias-source-bias", torch.bfloat16)):
        here = testing.run(by_names[name], "triton", dtype)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_patch_lang", counting)
            launches = patches = 0
            there = testing.run(by_names[name], "triton", dtype)
            assert patches > 10 * launches > 0  # else nothing is gained: interpreter.py can go
        assert here.keys() == there.keys() and all(torch.equal(x, there[key]) for key, x in here.items())
