"""Every conformance case on every backend this machine can run, against the error budget."""

import pytest
import torch

from attnfuse import reference, testing
from attnfuse.backends import aten
from attnfuse.problem import UNBOUNDED

CASES = testing.cases()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(case, backend, dtype, device="cpu"):
    reason = testing.serves(case, backend, dtype, device)
    if reason is not None:
        pytest.skip(reason)
    for result in testing.judge(case, backend, dtype, device):
        assert result.passed, f"{result.quantity}: error {result.error:.3g} over the budget {result.budget:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, dtype):
    check(case, "reference", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if testing.serves(c, "aten", torch.float32) is None], ids=str)
@pytest.mark.parametrize("call_cost", [0.0, 1e12], ids=["a-call-a-run", "one-masked-call"])
def test_aten(case, dtype, call_cost, monkeypatch):
    monkeypatch.setattr(aten, "CALL_COST", call_cost)
    check(case, "aten", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, dtype):
    check(case, "triton", dtype, "cuda" if torch.cuda.is_available() else "cpu")


def test_aten_serves_what_it_should():
    """A backend that began to refuse would otherwise pass by skipping."""
    refused = {c.family for c in CASES if testing.serves(c, "aten", torch.float32) is not None}
    assert refused == {"softcap", "alibi", "dropout", "window", "causal", "long", "everything"}
    assert sum(testing.serves(c, "aten", torch.float32) is None for c in CASES) >= 42


def bias_ignored(problem):
    for source in problem.sources:
        source.bias = None


def causal_off_by_one(problem):
    for source in problem.sources:
        if source.causal:
            source.causal, source.window_right = False, 1


def presence_ignored(problem):
    for source in problem.sources:
        source.present = None


def last_key_lost(problem):
    for source in problem.sources:
        source.key, source.value = source.key[:, :, :-1], source.value[:, :, :-1]


def window_too_wide(problem):
    for source in problem.sources:
        if source.window_left != UNBOUNDED:
            source.window_left += 1


PROBLEM_FAULTS = {
    "bias ignored": ("bias-source-bias", bias_ignored),
    "causal off by one": ("causal-square", causal_off_by_one),
    "presence ignored": ("presence-absent", presence_ignored),
    "last key lost": ("plain-square", last_key_lost),
    "window too wide": ("window-both", window_too_wide),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", PROBLEM_FAULTS)
def test_a_planted_fault_fails(fault, dtype, monkeypatch):
    """The budget must be tight enough to see each of these, in 16 bits too."""
    name, plant = PROBLEM_FAULTS[fault]
    (case,) = [c for c in CASES if str(c) == name]
    honest = testing.functional._run

    def faulty(problem, backend):
        if problem.query.dtype == dtype:  # the oracle runs in float64 and stays honest
            plant(problem)
        return honest(problem, backend)

    monkeypatch.setattr(testing.functional, "_run", faulty)
    with pytest.raises(AssertionError):
        check(case, "reference", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fault_in_the_aten_merge_fails(dtype, monkeypatch):
    honest = aten._merge

    def faulty(problem, parts, weights, wide):
        return honest(problem, parts, weights.flip(0), wide)

    monkeypatch.setattr(aten, "_merge", faulty)
    (case,) = [c for c in CASES if str(c) == "sources-two"]
    with pytest.raises(AssertionError):
        check(case, "aten", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sources-two-aux", "sinks-sinks"])
def test_a_fault_in_the_aten_mass_gradient_fails(dtype, name, monkeypatch):
    monkeypatch.setattr(aten, "_row_constants", lambda *rest: None)
    (case,) = [c for c in CASES if str(c) == name]
    with pytest.raises(AssertionError):
        check(case, "aten", dtype)


def test_a_nan_result_never_passes():
    case = CASES[0]
    assert not testing.Result(case, "out", float("nan"), 1.0).passed
    assert testing.difference(torch.tensor([float("nan")]), torch.zeros(1)) != 0.0


def test_the_oracle_equals_plain_attention():
    """The reference itself against torch's own math, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    from attnfuse.problem import Source, bind

    out, lse, _ = reference.forward(bind(q, [Source(k, v)]))
    z = q @ k.transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(out, z.softmax(-1) @ v)
    torch.testing.assert_close(lse, z.logsumexp(-1))


@pytest.mark.parametrize("splits", [0, 3], ids=["plain", "few-queries"])
def test_a_backward_may_be_handed_an_lse_laid_out_anew(splits):
    """Ring attention kept it as (B, Nq, Hq): its rows were counted as they lay, and gradients were wrong."""
    triton = testing.dispatch.load("triton")
    problem = testing.build(next(c for c in CASES if str(c) == "sources-two-aux"), torch.float32, poison=False)
    out, lse, mass = triton.forward(problem)
    moved = lse.transpose(1, 2).contiguous().transpose(1, 2)
    needs = [x is not None and x.is_floating_point() for x in problem.tensors()]
    given = (torch.ones_like(out), torch.ones_like(lse), torch.ones_like(mass), needs)
    one, other = (triton.backward(problem, out, x, mass, *given, splits=splits).flat() for x in (lse, moved))
    assert all(torch.equal(x, y) for x, y in zip(one, other) if x is not None)
