"""The Triton backend's backward in one pass: dq added up by atomics beside dk and dv."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnfuse
from attnfuse import Source, dispatch, testing
from attnfuse.backends import reference, triton
from attnfuse.bench import peers
from attnfuse.bench.workloads import make_inputs, parse_shape
from attnfuse.problem import BoundSource, bind
from attnfuse.testing import SourceCase
from attnfuse.triton_kernels import tuning

pytest.importorskip("triton")

CASES = testing.cases()
BY_NAME = {str(case): case for case in CASES}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = Path(triton.__file__).parents[1] / "triton_kernels"
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter's own hooks")


class Forced:
    """The Triton backend's plain backward in one pass, over a forward of the reference's: only the backward is judged.

    Bias, sinks, slopes and float masks want sums over rows, which one pass does not serve: their own gradients are left
    out here, so that a case with them is served in the rest. What is allocated uninitialised holds NaN.
    """

    def __init__(self, patch):
        self.taken = 0
        empty_rows, plan, backward = triton.empty_rows, triton.plan_passes, triton.backward

        def planned(*given):
            found = plan(*given)
            self.taken += found[0]
            return found

        def without_sums(problem, *given):
            *given, needs = given
            kept = [True, False, False, False, *[True, True, *[False] * 6] * len(problem.sources)]
            needs = [need and keep for need, keep in zip(needs, kept)]
            return backward(problem, *given, needs, splits=0, one_pass=True)

        patch.setattr(triton, "empty_rows", lambda x: empty_rows(x).fill_(float("nan")))
        patch.setattr(triton, "plan_passes", planned)
        patch.setattr(triton, "forward", reference.forward)
        patch.setattr(triton, "backward", without_sums)


@pytest.fixture
def one_pass(monkeypatch):
    return Forced(monkeypatch)


def judge(case, dtype):
    wanted = ("dquery", "dkey", "dvalue")
    return [result for result in testing.judge(case, "triton", dtype, DEVICE) if result.quantity.startswith(wanted)]


def check(case, dtype, one_pass):
    results = judge(case, dtype)
    assert len(results) == 1 + 2 * len(case.sources)
    for result in results:
        assert result.passed, f"{result.quantity}: error {result.error:.3g} over the budget {result.budget:.3g}"
    assert one_pass.taken == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, one_pass):
    check(case, torch.float32, one_pass)


@pytest.mark.parametrize("case", CASES[1::3], ids=str)
def test_cases_in_bfloat16(case, one_pass):
    check(case, torch.bfloat16, one_pass)


# Dispatch


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem_of(rows=20, keys=40, heads=2, kv_heads=1, sources=1, **options):
    """What one pass serves, whatever stands in `options`."""
    query = some(1, heads, rows, 16)
    given = [Source(some(1, kv_heads, keys, 16, seed=s), some(1, kv_heads, keys, 16, seed=s + 9), **options)
             for s in range(sources)]  # fmt: skip
    return bind(query, given, enable_gqa=True)


def needs_of(problem, *names):
    """`needs` for gradients by name, such as "query", "sinks" or "key0"."""
    fields = [*("query", "alibi_slopes", "sinks", "seed"), *(
        f"{name}{s}" for s in range(len(problem.sources)) for name in BoundSource.TENSORS
    )]  # fmt: skip
    assert set(names) <= set(fields)
    return [field in names for field in fields]


EVERY = ("query", "key0", "value0")


def test_two_passes_are_what_is_taken_unasked():
    """Nothing was timed: no architecture is entered, so that the same bits come every time."""
    problem = problem_of()
    assert not tuning.ONE_PASS
    assert triton.plan_passes(problem, needs_of(problem, *EVERY)) == (
        False, "two passes, on this GPU one has not been seen to be faster",
    )  # fmt: skip


def test_an_entry_in_tuning_turns_it_on(monkeypatch):
    monkeypatch.setattr(tuning, "ONE_PASS", frozenset({(90, 64), (90, 128), (0, 64)}))
    for arch, dtype, dim, heavy, expected in (
        (90, torch.bfloat16, 40, False, True), (90, torch.float16, 96, False, True),
        (90, torch.bfloat16, 129, False, False), (80, torch.bfloat16, 64, False, False),
        (90, torch.float32, 64, False, False), (90, torch.bfloat16, 64, True, False),
    ):  # fmt: skip
        assert tuning.one_pass(arch, dtype, dim, heavy) == expected


@interpreted
def test_what_is_entered_is_taken_and_told(monkeypatch):
    monkeypatch.setattr(tuning, "ONE_PASS", frozenset({(tuning.INTERPRETER, 64)}))
    monkeypatch.setattr(triton, "_dq", None)
    query, key = (x.bfloat16().requires_grad_() for x in (some(1, 2, 20, 16), some(1, 2, 40, 16)))
    told = str(attnfuse.explain(query, key, key, backend="triton"))
    assert (
        "plain, 40 visible keys are not long for 20 rows, one pass, dq is added up by atomics; tiles dkdv1 32x32"
        in told
    )
    attnfuse.attention(query, key, key, backend="triton").float().sum().backward()
    assert query.grad.any() and key.grad.any()


def test_one_pass_is_refused_where_it_says(monkeypatch):
    problem = problem_of(sources=2)

    def why(*names):
        return triton.plan_passes(problem, needs_of(problem, *names), True)

    every = ("query", "key0", "value0", "key1", "value1")
    assert why(*every) == (True, "one pass, dq is added up by atomics")
    assert why("query", "key0", "value1")[0]
    for summed in ("alibi_slopes", "sinks", "attn_mask0", "bias1"):
        assert why(*every, summed) == (
            False, "two passes, the gradients of slopes, sinks, biases and float masks need sums over whole rows",
        )  # fmt: skip
    for some_of_them in (("query", "key0", "value0"), ("key0", "key1"), ("query",)):
        assert why(*some_of_them) == (
            False, "two passes, not both the query's and every source's gradients are asked for",
        )  # fmt: skip
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert why(*every) == (False, "two passes, torch asks for deterministic algorithms")


def test_refused_gradients_are_those_of_two_passes():
    """Forced where it may not be: sinks want their gradient."""
    problem = testing.build(BY_NAME["sinks-sinks"], torch.float32, DEVICE, poison=False)
    needs = needs_of(problem, "sinks", *EVERY)
    out, lse, mass = reference.forward(problem)
    two, forced = (
        triton.backward(problem, out, lse, mass, out, None, None, needs, splits=0, one_pass=asked).flat()
        for asked in (False, True)
    )
    assert all(torch.equal(x, y) for x, y in zip(two, forced) if x is not None)


def test_deterministic_algorithms_keep_two_passes(monkeypatch):
    problem = problem_of()
    out, lse, mass = reference.forward(problem)
    needs, honest, asked = needs_of(problem, *EVERY), triton._dq, []
    monkeypatch.setattr(triton, "_dq", lambda *given: asked.append(1) or honest(*given))
    for is_deterministic in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda x=is_deterministic: x)
        triton.backward(problem, out, lse, mass, out, None, None, needs, splits=0, one_pass=True)
        assert len(asked) == is_deterministic


def test_the_gradient_is_laid_out_as_the_query(one_pass):
    problem = testing.build(BY_NAME["sources-rows-first"], torch.bfloat16, DEVICE, poison=False)
    out, lse, mass = reference.forward(problem)
    needs = needs_of(problem, "query", "key0", "key1")
    found = triton.backward(problem, out, lse, mass, out, None, None, needs)
    assert found.query.dtype == torch.bfloat16 and found.query.stride() == problem.query.stride()


@pytest.mark.parametrize("rows, keys", [(0, 40), (20, 0)])
def test_nothing_on_one_side_gives_zeros(rows, keys, one_pass):
    problem = problem_of(rows=rows, keys=keys)
    out, lse, mass = reference.forward(problem)
    found = triton.backward(problem, out, lse, mass, out, None, None, needs_of(problem, *EVERY))
    key, value, _, _ = found.sources[0]
    assert one_pass.taken == 1 and found.query.shape == problem.query.shape
    assert not found.query.any() and not key.any() and not value.any()


@interpreted
def test_bench_offers_it_as_a_peer(monkeypatch):
    """By the reference's gradients, and without the dq pass."""
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    monkeypatch.setattr(triton, "_dq", None)
    inputs = make_inputs(parse_shape("b=1,h=2,q=20,k=30,d=16"), torch.float32, DEVICE)
    (out,) = peers.peers()[peers.ONE_PASS].prepare(inputs)()
    tensors = [inputs.queries[0], inputs.keys[0], inputs.values[0]]
    expected = attnfuse.attention(*tensors, backend="reference")
    pairs = zip(*(torch.autograd.grad(x.sin().sum(), tensors) for x in (out, expected)))
    for found, right in pairs:
        torch.testing.assert_close(found, right)
    assert peers.ONE_PASS not in peers.default_peers("cuda", False)


# Planted faults: file, the text that stands there exactly once, what takes its place, the case that sees it.

FAULTS = {
    "dq of the wrong rows": ("attn_bwd", "add_rows(base(dq_sum, b, h), start,", "add_rows(base(dq_sum, b, h), 0,",
                             "long-one-source"),
    "dq is stored instead of added": ("attn_bwd", 'tl.atomic_add(at, x, sem="relaxed")', "tl.store(at, x)",
                                      "sources-two"),
    "the wrong head's dq": ("attn_bwd", "add_rows(base(dq_sum, b, h)", "add_rows(base(dq_sum, b, h // shared.group)",
                            "gqa-gqa"),
    "the wrong sample's dq": ("attn_bwd", "add_rows(base(dq_sum, b, h)", "add_rows(base(dq_sum, 0, h)", "plain-cross"),
    "dq of p instead of ds": ("attn_bwd", "dot(tl.trans(k), ds, None", "dot(tl.trans(k), p.to(k.dtype), None",
                              "plain-cross"),
    "a NaN key behind the causal edge reaches dq": (
        "attn_bwd", "end = tl.minimum(end, shared.rows + offset + source.right)", "pass", "causal-wide"),
    "a NaN key before the window reaches dq": ("attn_bwd", "begin = offset - source.left", "pass", "window-left-late"),
    "a NaN key that no mask shows reaches dq": (
        "attn_bwd", "k = tl.where((tl.max(seen.to(tl.int32), 1) != 0)[:, None], k, 0.0)", "pass", "masks-bool-full"),
    "the last source overwrites": ("triton", "grad_mass, need_pairs, dq_sum)\n",
                                   "grad_mass, need_pairs, None if dq_sum is None else dq_sum.zero_())\n",
                                   "sources-two"),
    "the sum is not cleared": ("triton", "dq_sum = lse.new_zeros(", "dq_sum = lse.new_ones(", "plain-square"),
    "the scale is missing": ("triton", "problem.scale, out=query", "1.0, out=query", "plain-scale"),
}  # fmt: skip
LATE = replace(BY_NAME["window-left"], name="left-late", sources=(SourceCase(60, window=(5, -1), offset=20),))


@interpreted
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_planted_fault_is_caught(fault, monkeypatch, tmp_path):
    """A copy of the kernels or of the backend, changed, in the place of the real one."""
    where, old, new, name = FAULTS.get(fault, ("", "", "", "sources-two-aux"))
    if where == "triton":
        path, module = Path(triton.__file__), "attnfuse.backends.triton_changed"
    else:
        path, module = KERNELS / "attn_bwd.py", "attnfuse.triton_kernels.attn_bwd"
    text = path.read_text()
    assert not fault or text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    changed = tmp_path / path.name
    changed.write_text(text.replace(old, new) if fault else text)
    spec = importlib.util.spec_from_file_location(module, changed)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, loaded)
    spec.loader.exec_module(loaded)
    if where == "triton":
        monkeypatch.setattr(triton, "backward", loaded.backward)
    Forced(monkeypatch)
    results = judge(LATE if name == "window-left-late" else BY_NAME[name], torch.float32)
    assert all(result.passed for result in results) == (fault == "")
