"""What a call costs before its kernel: arguments are checked once a signature, and the price is bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnfuse
from attnfuse import Source, problem

ROOT = Path(__file__).parent.parent


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 5), (2, 7), (2, 7)))
    return q, k, v


def several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = attnfuse.multi_source_attention(q, [Source(k, v), Source(k, v)], enable_gqa=True)
    return out


def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = attnfuse.attention(q, k, v, enable_gqa=True)
    return out


@pytest.mark.parametrize("call", [single, several])
def test_a_call_like_one_before_is_not_checked_again(
    call: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "_PASSED", set())
    checked = []
    check = problem._check_key_value
    monkeypatch.setattr(problem, "_check_key_value", lambda *given: (checked.append(1), check(*given)))
    first, again = call(*tensors()), call(*tensors())
    assert len(checked) == 1
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    q, k, v = tensors()
    call(q[:, :, :3], k, v)  # another length
    call(q.double(), k.double(), v.double())
    assert len(checked) == 3


BAD: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[object, object, object]]] = {
    "query's dtype": lambda q, k, v: (q.double(), k, v),
    "key's dtype": lambda q, k, v: (q, k.double(), v),
    "value's dtype": lambda q, k, v: (q, k, v.double()),
    "key's batch": lambda q, k, v: (q, k.repeat(2, 1, 1, 1)[:3], v),
    "key's head dim": lambda q, k, v: (q, k[..., :4], v),
    "value's length": lambda q, k, v: (q, k, v[:, :, :3]),
    "value's heads": lambda q, k, v: (q, k, v.repeat(1, 2, 1, 1)[:, :3]),
    "key's heads": lambda q, k, v: (q, k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3]),
    "key's device": lambda q, k, v: (q, k.to("meta"), v),
    "no tensor": lambda q, k, v: (q, k.numpy(), v),
    "int": lambda q, k, v: (q.int(), k.int(), v.int()),
}


@pytest.mark.parametrize("call", [single, several])
@pytest.mark.parametrize("name", BAD)
def test_a_good_call_before_hides_no_bad_one(call: Callable[..., Tensor], name: str) -> None:
    call(*tensors())
    for _ in range(2):  # and a bad call is not remembered as a good one
        # Our sentence, with torch's type and words beside it where torch refuses too; no kernel's complaint.
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"must (be|have) |must be a multiple of"):
            call(*BAD[name](*tensors()))


def test_sources_that_are_good_alone_must_still_fit_the_first() -> None:
    q, k, v = tensors()
    more, wide = k.repeat(1, 2, 1, 1), torch.cat([v, v], -1)
    for key, value in ((more, more), (k, wide)):
        attnfuse.multi_source_attention(q, [Source(key, value)], enable_gqa=True)
        attnfuse.multi_source_attention(q, [Source(k, v)], enable_gqa=True)
        with pytest.raises(ValueError, match=r"sources\[1\]\.(key|value) must have the"):
            attnfuse.multi_source_attention(q, [Source(k, v), Source(key, value)], enable_gqa=True)


def test_shared_key_heads_need_to_be_allowed_each_time() -> None:
    q, k, v = tensors()
    attnfuse.multi_source_attention(q, [Source(k, v)], enable_gqa=True)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        attnfuse.multi_source_attention(q, [Source(k, v)])


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_PASSED", set())
    monkeypatch.setattr(problem, "_MOST_PASSED", 5)
    q, k, v = tensors()
    for n in range(1, 6):
        for m in range(1, 6):
            single(q[:, :, :n], k[:, :, :m], v[:, :, :m])
            assert len(problem._PASSED) <= 5


def test_the_host_path_is_measured_up_to_every_backend_and_within_its_bounds() -> None:
    # A process of its own: Triton's launcher is what is measured, not its interpreter.
    command = [sys.executable, str(ROOT / "bench" / "host_path.py"), "--calls", "2", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = {(row["case"], row["backend"], row["stage"]): row for row in json.loads(done.stdout)}
    for case in ("one source", "three sources"):
        for backend in ("aten", "cuda", "triton"):
            for stage in ("dispatch", "launcher"):
                assert rows[case, backend, stage]["bytecodes"] > 50 and rows[case, backend, stage]["us"] > 0
    # Calls of Python and C functions: 48 when this was written, 60 before signatures were remembered. Bytecodes differ
    # from one Python to the next.
    whole = rows["one source", "aten", "whole"]
    assert whole["python_calls"] + whole["c_calls"] <= 50
