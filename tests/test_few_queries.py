"""Few queries and long keys: the split forward and the query-stationary backward of the Triton backend."""

import importlib.util
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from test_properties import hold, quiet, random_cases, settings
from torch.utils._python_dispatch import TorchDispatchMode

import attnfuse
from attnfuse import AuxRequest, Source, dispatch, testing
from attnfuse.backends import triton
from attnfuse.problem import bind
from attnfuse.testing import Case, SourceCase

pytest.importorskip("triton")

CASES = testing.cases()
BY_NAME = {str(case): case for case in CASES}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = Path(triton.__file__).parents[1] / "triton_kernels"
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter's own hooks")


class Forced:
    """The Triton backend with the path forced: `splits` ways, 0 = plain; what it allocates holds NaN."""

    def __init__(self, patch, splits):
        new_empty, empty_rows = torch.Tensor.new_empty, triton.empty_rows

        def poisoned(x):
            return x.fill_(float("nan")) if x.is_floating_point() else x

        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
        patch.setattr(triton, "empty_rows", lambda x: poisoned(empty_rows(x)))
        patch.setattr(triton, "forward", partial(triton.forward, splits=splits))
        patch.setattr(triton, "backward", partial(triton.backward, splits=splits))


@pytest.fixture
def three_splits(monkeypatch):
    return Forced(monkeypatch, 3)


def check(case, dtype):
    for result in testing.judge(case, "triton", dtype, DEVICE):
        assert result.passed, f"{result.quantity}: error {result.error:.3g} over the budget {result.budget:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, three_splits):
    check(case, torch.float32)


@pytest.mark.parametrize("case,dtype", list(zip(CASES[::3], [torch.bfloat16, torch.float16] * len(CASES))), ids=str)
def test_cases_in_16_bits(case, dtype, three_splits):
    """A third of them, the dtypes in turns: what differs from float32 are the casts of steps that all cases share."""
    check(case, dtype)


def test_the_backward_refuses_only_what_it_says():
    """What it refuses falls to the plain kernels: a path that began to refuse would otherwise pass unseen."""
    refused = {}
    for case in CASES:
        problem = testing.build(case, torch.float32)
        masks = [source.attn_mask for source in problem.sources if source.attn_mask is not None]
        reason = triton.few_refuses(problem, any(mask.is_floating_point() for mask in masks))
        if reason is not None:
            refused.setdefault(reason.split(" ", 1)[1], set()).add(str(case))
    assert refused == {
        "rows (queries times query heads per key head) are more than a tile's 128": {
            str(case) for case in CASES if case.family == "long"
        },
        "gradient of a float mask needs delta before the keys are read": {
            "masks-float-full", "masks-float-pairs", "masks-float-keys", "masks-float-rows", "masks-float-gqa",
            "everything-together",
        },
    }  # fmt: skip


# What the refused cases would have shown: tiles and sources crossed in the backward, and everything but a float mask.
CROSSING = [
    *(replace(case, rows=30, name=f"{case.name}-few") for case in CASES if case.family == "long"),
    replace(BY_NAME["everything-together"], name="few", sources=(
        *BY_NAME["everything-together"].sources[:2], SourceCase(17, mask="bool bhij", bias=True),
    )),
    Case("few", "window-of-its-own", (SourceCase(140, window=(10, 9), offset=70), SourceCase(100, causal=True)), rows=9,
         aux=True, heads=4),
]  # fmt: skip


@pytest.mark.parametrize("case", CROSSING, ids=str)
def test_the_backward_crosses_tiles(case, three_splits):
    assert triton.few_refuses(testing.build(case, torch.float32), False) is None
    check(case, torch.float32)


@settings(quiet, max_examples=6)
@given(random_cases(everything=True))
def test_random_problems(case):
    with pytest.MonkeyPatch.context() as patch:
        Forced(patch, 2)
        hold(case, "triton")


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def few(rows=4, keys=2048, batch=1, heads=1, kv_heads=1, dim=16, **options):
    key = some(batch, kv_heads, keys, dim, seed=1)
    return bind(some(batch, heads, rows, dim), [Source(key, key.clone(), **options)], enable_gqa=True)


def test_a_sample_alone_and_in_a_padded_batch_give_the_same_bits(three_splits):
    """A split's share is counted in the sample's own visible tiles, so that padding moves no boundary."""
    query, key, value = some(2, 2, 5, 16), some(2, 2, 200, 16, seed=1), some(2, 2, 200, 16, seed=2)
    lengths = torch.tensor([200, 117], device=DEVICE)
    together = attnfuse.attention(query, key, value, key_mask=lengths, backend="triton")
    alone = attnfuse.attention(query[1:], key[1:, :, :117], value[1:, :, :117], backend="triton")
    assert torch.equal(together[1:], alone)


def test_the_same_bits_every_time(three_splits):
    problem = few(rows=9, keys=300, heads=4, kv_heads=2, batch=2)
    out, lse, mass = triton.forward(problem)
    needs = [True, False, False, False, True, True] + [False] * 6
    first, second = (triton.backward(problem, out, lse, mass, out, lse, None, needs) for _ in range(2))
    for a, b in zip(first.flat(), second.flat()):
        assert (a is None and b is None) or torch.equal(a, b)
    assert "atomic" not in (KERNELS / "attn_bwd_few.py").read_text().replace("with atomics", "")


def test_without_queries_keys_have_zero_gradients(three_splits):
    problem = few(rows=0, keys=40)
    out, lse, mass = triton.forward(problem)
    needs = [True, False, False, False, True, True] + [False] * 6
    found = triton.backward(problem, out, lse, mass, out, None, None, needs)
    key, value, _, _ = found.sources[0]
    assert found.query.shape == (1, 1, 0, 16) and not key.any() and not value.any()


def test_only_what_is_asked_for_is_computed(three_splits):
    problem = few(rows=3, keys=90)
    out, lse, mass = triton.forward(problem)
    needs = [True, False, False, False, True, True] + [False] * 6
    whole = triton.backward(problem, out, lse, mass, out, None, None, needs)
    for wanted in (0, 4, 5):
        needs = [n == wanted for n in range(12)]
        found = triton.backward(problem, out, lse, mass, out, None, None, needs).flat()
        assert [x is not None for x in found] == needs
        assert torch.equal(found[wanted], whole.flat()[wanted])


# Dispatch


@interpreted
def test_the_path_is_chosen_by_grid_and_lengths():
    """132 multiprocessors are what the interpreter stands for."""
    assert triton.plan_forward(few()).splits == 8  # 256 keys a split
    assert triton.plan_forward(few(keys=65536)).splits == 256
    assert triton.plan_forward(few(keys=65536, heads=8, kv_heads=8)).splits == 264 // 8
    assert triton.plan_forward(few(keys=4096, rows=128)).splits == 8  # 4 keys a row
    assert triton.plan_forward(few(keys=500)).splits == 0
    assert triton.plan_forward(few(keys=2048, batch=33, heads=2, kv_heads=2)).splits == 4
    assert triton.plan_forward(few(keys=2048, batch=34, heads=2, kv_heads=2)).splits == 0
    assert triton.plan_forward(few(keys=2048, is_causal=True)).splits == 0  # 4 queries see 4 keys
    assert triton.plan_forward(few(keys=2048, window=(1, 0))).splits == 0
    assert triton.plan_backward(few(), False).splits == 8
    assert triton.plan_backward(few(keys=2048, batch=66, heads=2, kv_heads=2), False).splits == 2
    assert triton.plan_backward(few(), True).splits == 0
    assert triton.plan_backward(few(rows=129), False).splits == 0
    assert triton.plan_backward(few(rows=33, heads=4), False).splits == 0
    assert triton.plan_backward(few(keys=1000), False).splits == 0


@interpreted
def test_explain_tells_the_path_and_why():
    query, key = some(1, 8, 64, 16), some(1, 8, 4096, 16)
    told = str(attnfuse.explain(query, key, key, backend="triton"))
    assert "keys split 16 ways, 256 programs, where the plain kernel's 16 would leave 116 of 132" in told
    assert "query-stationary, 64 rows in a tile, keys split 16 ways, 128 programs" in told
    told = str(attnfuse.explain(query, key[:, :, :70], key[:, :, :70], backend="triton"))
    assert "plain, 70 visible keys are too few to be split" in told
    assert "plain, 70 visible keys are not long for 64 rows" in told
    bias = some(1, 8, 64, 4096).requires_grad_()
    assert "a float mask needs delta" in str(attnfuse.explain(query, key, key, bias, backend="triton"))


@interpreted
def test_long_keys_take_the_path_by_themselves(monkeypatch):
    taken = []
    for name in ("_forward_split", "_few"):
        honest = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, n=name, f=honest: taken.append((n, a[1])) or f(*a))
    check(Case("few", "by-itself", (SourceCase(700), SourceCase(400)), 1, 1, 1, rows=2, dim=8, aux=True), torch.float32)
    assert taken == [("_forward_split", 4), ("_few", 4)]


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_any_number_of_splits(splits, monkeypatch):
    """More splits than tiles, too: some have nothing to do."""
    Forced(monkeypatch, splits)
    check(BY_NAME["sinks-dead-rows"], torch.float32)


# Bytes and memory


@interpreted
def test_keys_are_read_once_and_their_gradients_written_once(three_splits, monkeypatch):
    """4 query heads a key head, keys over 3 splits: every address exactly once in each pass."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads, stores = [], []

    def spied(name, log):
        honest = getattr(InterpreterBuilder, name)

        def spy(self, ptrs, first, second, *rest):
            mask = first if log is loads else second
            log.append((ptrs.data[mask.data.astype(bool)]).ravel())
            return honest(self, ptrs, first, second, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, spy)

    def times(log, x):
        """How often each element of x was touched: the set of counts."""
        at = np.concatenate(log).astype(np.int64) - x.data_ptr()
        at = at[(at >= 0) & (at < x.numel() * x.element_size())]
        return set(np.bincount(at // x.element_size(), minlength=x.numel()).tolist())

    spied("create_masked_load", loads)
    spied("create_masked_store", stores)
    query = some(2, 8, 5, 16)
    sources = [Source(some(2, 2, n, 16, seed=n), some(2, 2, n, 24, seed=n + 1)) for n in (75, 40)]
    problem = bind(query, sources, enable_gqa=True, return_aux=AuxRequest(source_mass=True))
    out, lse, mass = triton.forward(problem)
    for source in problem.sources:
        assert times(loads, source.key) == {1} and times(loads, source.value) == {1}
    assert times(stores, out) == {1} and times(stores, lse) == {1} and times(stores, mass) == {1}
    loads.clear(), stores.clear()
    needs = [True, False, False, False, True, True, *[False] * 6, True, True, *[False] * 6]
    found = triton.backward(problem, out, lse, mass, some(*out.shape), None, mass, needs)
    for source, (key, value, _, _) in zip(problem.sources, found.sources):
        assert times(loads, source.key) == {1} and times(loads, source.value) == {1}
        assert times(stores, key) == {1} and times(stores, value) == {1}
    assert times(stores, found.query) == {1}


def test_few_queries_change_no_order(monkeypatch):
    """Both languages have kernels for them: what decides elsewhere decides here."""
    monkeypatch.setitem(dispatch.ORDER, "cpu", dispatch.ORDER["cuda"])
    assert dispatch.order(few(rows=32, keys=1024, heads=2, kv_heads=2)) == dispatch.ORDER["cuda"]
    assert dispatch.ORDER["cuda"][:2] == ("cuda", "triton")


class Allocated(TorchDispatchMode):
    """Bytes of what empty and new_empty return."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            self.bytes += made.numel() * made.element_size()
        return made


@pytest.mark.parametrize("want_mass", [False, True])
def test_partials_take_what_the_formula_says(want_mass):
    problem = few(rows=6, keys=96, heads=2, batch=2)
    problem.want_mass = want_mass
    with Allocated() as made:
        out, lse, mass = triton.forward(problem, splits=3)
    results = sum(x.numel() * x.element_size() for x in (out, lse, mass))
    assert made.bytes - results == 4 * 3 * (2 * 2 * 6) * (16 + 1 + 1)
    needs = [True, False, False, False, True, True] + [False] * 6
    plain, split = Allocated(), Allocated()
    with plain:
        triton.backward(problem, out, lse, mass, out, None, None, needs, splits=1)
    with split:
        triton.backward(problem, out, lse, mass, out, None, None, needs, splits=3)
    assert split.bytes - plain.bytes == 4 * 3 * (2 * 2 * 6) * 16


@interpreted
def test_partials_are_bounded_whatever_the_lengths():
    """1024 (Dv + 1 + S) bytes a multiprocessor, as plan_forward says, for keys without end."""
    for rows in (1, 16, 100, 128, 1000):
        for heads in (1, 7, 64):
            problem = few(rows=rows, heads=heads, kv_heads=heads)
            problem.sources[0].key = problem.sources[0].key[:, :, :1].expand(1, heads, 2**20, 16)
            for plan in (triton.plan_forward(problem), triton.plan_backward(problem, False)):
                elements = plan.splits * heads * rows
                assert elements * 4 <= 1024 * 132 or plan.splits in (0, 1)


# Planted faults: file, the text that stands there exactly once, what takes its place, the case that sees it.

FAULTS = {
    "a split loses its last tile":
        ("packed", "tl.maximum(end - before, 0)", "tl.maximum(end - 1 - before, 0)", "sources-two"),
    "a source is counted a tile too long":
        ("packed", "return start, stop, before + count", "return start, stop, before + count + 1", "sources-two"),
    "a group's heads read the first head's rows":
        ("packed", "hkv * shared.group + tl.minimum(r // shared.rows, shared.group - 1)",
         "hkv * shared.group + r * 0", "gqa-gqa"),
    "queries of a tile over two heads span one head's":
        ("packed", "tl.where(over, shared.rows - 1, end % shared.rows)", "end % shared.rows", "gqa-mqa"),
    "a split's sum of values is not rescaled":
        ("attn_fwd_split", "x * power(some_m - top[:, None], shared)[:, :, None]", "x", "plain-cross"),
    "a split's denominator is not rescaled": ("attn_fwd_split", "weights * tl.load(", "tl.load(", "plain-cross"),
    "mass of the wrong source": ("attn_fwd_split", "parts[s] / l", "parts[SUMS - 1 - s] / l", "sources-two-aux"),
    "a source's sum keeps the maximum it ended with":
        ("attn_fwd_split", "sums[s] * power(maxima[s] - m_safe, shared)", "sums[s]", "sources-three-aux"),
    "the sink is counted in every split":
        ("attn_fwd_split", "l += power(sink - top, shared)",
         "l += splits * power(sink - top, shared)", "sinks-sinks"),
    "a row dead in every split gives NaN":
        ("attn_fwd_split", "top = tl.where(live, top, 0.0)", "", "lengths-zero-length"),
    "what an empty split never wrote is read":
        ("attn_fwd_split", 'saw = (some_m != float("-inf"))', "saw = some_there", "plain-one-query"),
    "a source's bias is not taken back": ("attn_fwd_split", "m += bias", "pass", "bias-source-bias"),
    "splits write over each other":
        ("attn_fwd_split", "row += tl.cast(split, tl.int64) * all_rows",
         "row += tl.cast(split, tl.int64) * 0", "sources-two"),
    "a partial dq is lost": ("attn_bwd_few", "range(0, splits, CHUNK)", "range(CHUNK, splits, CHUNK)", "sources-two"),
    "delta of the wrong source":
        ("attn_bwd_few", "grad_mass + row * SOURCES + s", "grad_mass + row * SOURCES", "sources-two-aux"),
    "dk is not scaled": ("attn_bwd_few", "source.columns, dk * scale)", "source.columns, dk)", "plain-scale"),
    "keys that no row sees keep what was there":
        ("attn_bwd_few", "range(zero_from + split, tl", "range(zero_from + split + 1, tl", "presence-absent"),
    "a NaN key that no row sees reaches dq":
        ("attn_bwd_few", "k = tl.where((tl.max(seen.to(tl.int32), 1) != 0)[:, None], k, 0.0)",
         "pass", "masks-bool-full"),
    "dropout of the first head for all":
        ("attn_bwd_few", "kept(shared, source, b, h, i[None, :]",
         "kept(shared, source, b, h * 0, i[None, :]", "dropout-plain"),
    "no gradient through the softcap": ("attn_bwd_few", "ds = dz * slack", "ds = dz", "softcap-softcap"),
    "row sums of one source run on into the next":
        ("attn_bwd_few", "sums + (to * SOURCES + s) * 2, dz_sum",
         "sums + (to * SOURCES) * 2, dz_sum", "bias-source-bias"),
}  # fmt: skip
MODULES = ("packed", "attn_fwd_split", "attn_bwd_few")


@interpreted
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_planted_fault_is_caught(fault, monkeypatch, tmp_path, three_splits):
    """Copies of the three files, one of them changed, in the place of the real ones."""
    where, old, new, name = FAULTS.get(fault, ("", "", "", "sources-two-aux"))
    for module in MODULES:
        text = (KERNELS / f"{module}.py").read_text()
        if module == where:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module}.py"
            text = text.replace(old, new)
        path = tmp_path / f"{module}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"attnfuse.triton_kernels.{module}", path)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
    results = testing.judge(BY_NAME[name], "triton", torch.float32)
    assert all(result.passed for result in results) == (fault == "")
