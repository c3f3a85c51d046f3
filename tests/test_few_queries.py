"""Few queries and long keys: the split forward and the query-stationary backward of the Triton backend."""

from functools import partial

import pytest
import torch

from attnfuse import testing
from attnfuse.backends import triton

CASES = testing.cases()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def split(monkeypatch):
    """Force the path: `split(n)` splits the keys n ways in both passes, wherever the backward serves the problem."""

    def force(n):
        monkeypatch.setattr(triton, "forward", partial(triton.forward, splits=n))
        monkeypatch.setattr(triton, "backward", partial(triton.backward, splits=n))

    return force


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, dtype, split):
    split(3)
    for result in testing.judge(case, "triton", dtype, DEVICE):
        assert result.passed, f"{result.quantity}: error {result.error:.3g} over the budget {result.budget:.3g}"
