"""Few queries and long keys in CUDA: the split forward and the query-stationary backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from few_faults import FAULTS, INSTANCES, trials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planting import verdicts_on
from torch.utils._python_dispatch import TorchDispatchMode

import attnfuse
from attnfuse import Source, build, testing
from attnfuse.backends import cuda, cuda_few, few
from attnfuse.problem import Problem, bind
from attnfuse.testing import Case, SourceCase

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = [c for c in testing.cases() if not (c.alibi or c.dropout_p or any(s.mask for s in c.sources))]
BY_NAME = {str(c): c for c in CASES}
DTYPES = [torch.bfloat16, torch.float16]
SMALL_CARD, USUAL_CARD = 99 * 1024, 163 * 1024  # bytes of shared memory a block may have

pytestmark = pytest.mark.skipif(
    not ON_GPU and build.why_no_emulation() is not None, reason=str(build.why_no_emulation())
)
emulated_only = pytest.mark.skipif(ON_GPU, reason="looks into the emulated machine")


class Forced:
    """The CUDA backend with the path forced: `splits` ways, 0 = plain; what it allocates holds NaN."""

    def __init__(self, patch: pytest.MonkeyPatch, splits: int) -> None:
        new_empty, empty_rows = torch.Tensor.new_empty, cuda.empty_rows

        def poisoned(x: torch.Tensor) -> torch.Tensor:
            return x.fill_(float("nan")) if x.is_floating_point() else x

        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
        patch.setattr(cuda, "empty_rows", lambda x: poisoned(empty_rows(x)))
        patch.setattr(cuda, "forward", partial(cuda.forward, splits=splits))
        patch.setattr(cuda, "backward", partial(cuda.backward, splits=splits))


@pytest.fixture(autouse=True)
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("ATTNFUSE_EMULATE", "1")


@pytest.fixture
def three_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    Forced(monkeypatch, 3)


@pytest.fixture
def machine() -> Iterator[Any]:
    """The emulated machine, its settings put back afterwards."""
    module = cuda.emulation()
    yield module
    module.set_seed(0)
    module.set_multiprocessors(2)
    module.set_shared_memory_limit(USUAL_CARD)


@pytest.fixture
def hundred(machine: Any) -> Any:
    """The emulated machine with an H100's 132 multiprocessors."""
    machine.set_multiprocessors(132)
    return machine


def check(one: Case, dtype: torch.dtype = torch.bfloat16) -> None:
    for result in testing.judge(one, "cuda", dtype, DEVICE):
        assert result.passed, f"{one} {result.quantity}: error {result.error:.3g} over {result.budget:.3g}"


@pytest.mark.parametrize("one,dtype", list(zip(CASES, DTYPES * len(CASES))), ids=str)
def test_every_case(one: Case, dtype: torch.dtype, three_splits: None) -> None:
    """The dtypes in turns: they share all of the source but a conversion and an instruction's name."""
    check(one, dtype)


# All rows in one tile of the backward, of each size; tiles, sources and splits crossed.
LONG = {c.name: c for c in CASES if c.family == "long"}
CROSSING = [
    *(replace(c, rows=30, name=f"{name}-30") for name, c in LONG.items()),
    replace(LONG["one-source"], rows=9, name="9"),
    replace(LONG["three-sources"], rows=100, dim=64, name="100"),
    replace(LONG["causal-window"], rows=75, heads=4, kv_heads=2, batch=2, dim=128, name="150-packed-refused"),
    replace(LONG["head-dim-128"], rows=100, batch=2, name="128-100"),
    replace(LONG["head-dim-128"], rows=14, name="128-14", sinks=True),
    replace(LONG["head-dim-256"], rows=12, name="256-12", softcap=3.0),
    Case("few", "gqa-window", (SourceCase(140, window=(10, 9), offset=70), SourceCase(100, causal=True, bias=True)),
         rows=9, aux=True, heads=6, kv_heads=2, sinks=True),
    Case("few", "gqa-16", (SourceCase(150, lengths=(150, 3)), SourceCase(70, holes=True)), rows=5, aux=True, heads=6,
         rows_first=True, dim=72),
    Case("few", "two-tiles", (SourceCase(150, causal=True, offset=100),), rows=40, heads=2, kv_heads=1),
    Case("few", "odd", (SourceCase(100, bias=True), SourceCase(30, present=(True, False))), rows=40, heads=2,
         kv_heads=1, dim=33, value_dim=50, aux=True),
]  # fmt: skip


@pytest.mark.parametrize("one", CROSSING, ids=str)
def test_tiles_sources_and_splits_are_crossed(one: Case, three_splits: None) -> None:
    problem = testing.build(one, torch.bfloat16, DEVICE)
    reason = cuda_few.refuses(cuda._module(problem), problem)
    assert (reason is not None) == one.name.endswith("refused")
    check(one)


def test_the_backward_refuses_only_what_it_says() -> None:
    """What it refuses falls to the plain kernels: a path that began to refuse would otherwise pass unseen."""
    refused = {}
    for one in CASES:
        problem = testing.build(one, torch.bfloat16, DEVICE)
        reason = cuda_few.refuses(cuda._module(problem), problem)
        if reason is not None:
            refused[str(one)] = reason.split(" ", 1)[1]
    told = "rows (queries times query heads per key head) are more than a tile's"
    assert refused == {
        str(one): f"{told} {64 if one.dim > 128 else 128}" for one in CASES if one.family == "long"
    }  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2, 4, 9, 40])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than tiles, too: some have nothing to do; four give a split nothing but columns that are masked."""
    Forced(monkeypatch, splits)
    check(BY_NAME["sinks-dead-rows"])
    check(replace(LONG["hole-tiles"], rows=20))
    check(replace(LONG["three-sources"], rows=20, batch=2, sources=tuple(
        replace(s, lengths=None, present=(True, False) if n == 1 else None)
        for n, s in enumerate(LONG["three-sources"].sources)
    )))  # fmt: skip


@emulated_only
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_another_order_of_threads(seed: int, machine: Any, three_splits: None) -> None:
    machine.set_seed(seed)
    for one in CROSSING[seed % 2 :: 2]:
        check(one, DTYPES[seed % 2])


@emulated_only
def test_ldmatrix_reads_without_bank_conflicts(machine: Any, three_splits: None) -> None:
    before = machine.bank_conflicts()
    for name in ("head-dim-128", "head-dim-256", "one-source"):
        for rows in (12, 30, 100):
            check(replace(LONG[name], rows=rows))
    assert machine.bank_conflicts() == before


@emulated_only
def test_cards_with_less_shared_memory(machine: Any, three_splits: None) -> None:
    """Where the widest tile does not fit, the backward takes fewer rows and leaves the rest to the plain kernels."""
    machine.set_shared_memory_limit(SMALL_CARD)
    assert [machine.attn_bwd_few_rows(dim, 0) for dim in (64, 96, 128, 256)] == [128, 64, 64, 16]
    for one in (LONG["one-source"], LONG["head-dim-128"], LONG["head-dim-256"]):
        check(replace(one, rows=64))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, int]:
    """Few rows, keys on both sides of every tile's edges, every feature the kernels serve, and any split."""
    batch = draw(st.integers(1, 2))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    side = st.sampled_from([-1, 0, 5, 40, 90])

    def source() -> SourceCase:
        length = draw(st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 128, 130, 200]))
        return SourceCase(
            length,
            lengths=draw(st.none() | st.tuples(*[st.integers(0, length)] * batch)),
            holes=length > 2 and draw(st.booleans()),
            present=draw(st.none() | st.tuples(*[st.booleans()] * batch)),
            bias=draw(st.booleans()),
            causal=draw(st.booleans()),
            offset=draw(st.sampled_from([0, 0, -70, -3, 20, 90])),
            window=draw(st.just((-1, -1)) | st.tuples(side, side)),
        )

    return Case(
        "drawn", str(draw(st.integers(0, 9))), tuple(source() for _ in range(draw(st.integers(1, 3)))),
        batch=batch, heads=heads, kv_heads=kv_heads,
        rows=draw(st.sampled_from([1, 4, 5, 8, 16, 17, 31, 32, 64, 65])),
        dim=draw(st.sampled_from([8, 20, 33, 64, 72, 96, 128, 160])),
        value_dim=draw(st.sampled_from([None, 16, 50, 64])),
        scale=draw(st.sampled_from([None, None, -0.1, 0.0, 0.3])),
        softcap=draw(st.sampled_from([0.0, 5.0])), sinks=draw(st.booleans()), aux=draw(st.booleans()),
        rows_first=draw(st.booleans()),
    ), draw(st.sampled_from([1, 2, 3, 5, 8]))  # fmt: skip


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(), st.sampled_from(DTYPES))
def test_any_problem_is_within_the_budget(drawn: tuple[Case, int], dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Forced(patch, drawn[1])
        check(drawn[0], dtype)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def few_rows(
    rows: int = 4, keys: int = 2048, batch: int = 1, heads: int = 1, kv_heads: int = 1, dim: int = 16, **options: Any
) -> Problem:
    key = some(batch, kv_heads, keys, dim, seed=1)
    return bind(some(batch, heads, rows, dim), [Source(key, key.clone(), **options)], enable_gqa=True)


NEEDS = [True, False, False, False, True, True] + [False] * 6  # query, key and value


def test_a_sample_alone_and_in_a_padded_batch_give_the_same_bits(three_splits: None) -> None:
    """A split's share is counted in the sample's own visible tiles, so that padding moves no boundary."""
    query, key, value = some(2, 2, 5, 16), some(2, 2, 400, 16, seed=1), some(2, 2, 400, 16, seed=2)
    lengths = torch.tensor([400, 217], device=DEVICE)
    together = attnfuse.attention(query, key, value, key_mask=lengths, backend="cuda")
    alone = attnfuse.attention(query[1:], key[1:, :, :217], value[1:, :, :217], backend="cuda")
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("name", ["long-three-sources-30", "few-gqa-window"])
def test_the_same_bits_every_time(name: str, three_splits: None, request: pytest.FixtureRequest) -> None:
    (one,) = [c for c in CROSSING if str(c) == name]
    results = []
    for seed in (1, 2):
        if not ON_GPU:
            request.getfixturevalue("machine").set_seed(seed)
        results.append(testing.run(one, "cuda", torch.bfloat16, DEVICE))
    for quantity, x in results[0].items():
        assert torch.equal(x, results[1][quantity]), quantity
    assert "add_global" not in (build.CSRC / "sm80" / "attn_bwd_few.cuh").read_text()


def test_without_queries_keys_have_zero_gradients(three_splits: None) -> None:
    problem = few_rows(rows=0, keys=40)
    out, lse, mass = cuda.forward(problem)
    found = cuda.backward(problem, out, lse, mass, out, None, None, NEEDS)
    key, value, _, _ = found.sources[0]
    assert key is not None and value is not None
    assert found.query is not None and found.query.shape == (1, 1, 0, 16) and not key.any() and not value.any()


def test_only_what_is_asked_for_is_computed(three_splits: None) -> None:
    problem = few_rows(rows=3, keys=190)
    out, lse, mass = cuda.forward(problem)
    whole = cuda.backward(problem, out, lse, mass, out, None, None, NEEDS).flat()
    for wanted in (0, 4, 5):
        needs = [n == wanted for n in range(12)]
        found = cuda.backward(problem, out, lse, mass, out, None, None, needs).flat()
        assert [x is not None for x in found] == needs
        one, same = found[wanted], whole[wanted]
        assert one is not None and same is not None and torch.equal(one, same)


def test_rows_that_begin_anywhere(three_splits: None) -> None:
    """Rows on 2 bytes and a head dim of 33: nothing takes 16 bytes at a time."""
    packed = some(2, 121, 3, 2, 40)
    q, k, v = (packed[:, : 21 if n == 0 else 121, n, :, 1:34].transpose(1, 2) for n in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attnfuse.attention(q, k, v, backend="cuda").double(), exact, rtol=0.02, atol=0.02)


# The choice


@emulated_only
def test_the_path_is_chosen_by_grid_and_lengths(hundred: Any) -> None:
    def ahead(**shape: Any) -> int:
        return cuda_few.plan_forward(hundred, few_rows(**shape)).splits

    def back(**shape: Any) -> int:
        return cuda_few.plan_backward(hundred, few_rows(**shape)).splits

    assert ahead() == 8  # 256 keys a split
    assert ahead(keys=65536) == 256
    assert ahead(keys=65536, heads=8, kv_heads=8) == 264 // 8
    assert ahead(keys=4096, rows=128) == 8  # 4 keys a row
    assert ahead(keys=500) == 0
    assert ahead(batch=33, heads=2, kv_heads=2) == 4
    assert ahead(batch=34, heads=2, kv_heads=2) == 0
    assert ahead(is_causal=True) == 0  # 4 queries see 4 keys
    assert ahead(window=(1, 0)) == 0
    # heads of a group read their keys once, also where the plain grid fills the chip and with one split
    assert ahead(batch=32, heads=8, kv_heads=2) == 4
    assert ahead(batch=132, heads=8, kv_heads=2) == 1
    assert ahead(batch=132, heads=8, kv_heads=2, keys=1023) == 0
    assert ahead(batch=32, heads=4, kv_heads=2, rows=100) == 0
    assert back() == 8
    assert back(batch=66, heads=2, kv_heads=2) == 2
    assert back(rows=129) == back(rows=33, heads=4) == back(rows=65, dim=160) == back(keys=1000) == 0


@emulated_only
def test_explain_tells_the_path_and_why(hundred: Any) -> None:
    query, key = some(1, 8, 64, 16), some(1, 8, 4096, 16)
    told = str(attnfuse.explain(query, key, key, backend="cuda"))
    assert "keys split 16 ways, 128 blocks on 132 multiprocessors: the plain kernel's 8 would leave 124 of" in told
    assert "attn_fwd_split 64x64, 4 warps, 72 KB" in told
    assert "query-stationary, 64 rows in a tile, keys split 16 ways, 128 blocks; tiles attn_bwd_few 64x64" in told
    told = str(attnfuse.explain(query, key[:, :, :70], key[:, :, :70], backend="cuda"))
    assert "plain, 70 visible keys are too few to be split" in told and "attn_fwd 128x64" in told
    assert "plain, 70 visible keys are not long for 64 rows" in told and "attn_bwd_dkdv" in told


@emulated_only
def test_long_keys_take_the_path_by_themselves(hundred: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("forward", "backward"):
        honest = getattr(cuda_few, name)
        monkeypatch.setattr(cuda_few, name, lambda *a, n=name, f=honest: taken.append((n, a[2])) or f(*a))
    check(Case("few", "by-itself", (SourceCase(700), SourceCase(400)), 1, 1, 1, rows=2, dim=8, aux=True))
    assert taken == [("forward", 4), ("backward", 4)]


class Allocated(TorchDispatchMode):
    """Bytes of what empty and new_empty return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            self.bytes += made.numel() * made.element_size()
        return made


@pytest.mark.parametrize("want_mass", [False, True])
def test_partials_take_what_the_formula_says(want_mass: bool) -> None:
    problem = few_rows(rows=6, keys=96, heads=2, batch=2)
    problem.want_mass = want_mass
    with Allocated() as made:
        out, lse, mass = cuda.forward(problem, splits=3)
    results = sum(x.numel() * x.element_size() for x in (out, lse, mass))
    assert made.bytes - results == 4 * 3 * (2 * 2 * 6) * (16 + 2)
    one, three = Allocated(), Allocated()
    with one:
        cuda.backward(problem, out, lse, mass, out, None, None, NEEDS, splits=1)
    with three:
        cuda.backward(problem, out, lse, mass, out, None, None, NEEDS, splits=3)
    assert three.bytes - one.bytes == 4 * 2 * (2 * 2 * 6) * 16


@emulated_only
def test_partials_are_bounded_whatever_the_lengths(hundred: Any) -> None:
    """512 and 1024 (Dv + 2 S) bytes a multiprocessor, as the plans say, for keys without end."""
    for rows in (1, 16, 64, 100, 128, 1000):
        for heads in (1, 7, 64):
            problem = few_rows(rows=rows, heads=heads, kv_heads=heads)
            problem.sources[0].key = problem.sources[0].key[:, :, :1].expand(1, heads, 2**20, 16)
            ahead, back = cuda_few.plan_forward(hundred, problem), cuda_few.plan_backward(hundred, problem)
            assert ahead.splits in (0, 1) or ahead.splits * heads * rows * 4 <= 512 * 132
            assert back.splits in (0, 1) or back.splits * heads * rows * 4 <= 1024 * 132


def test_one_rule_for_both_languages() -> None:
    assert few.split_count(8, 16384, 64, 132) == 33
    assert few.split_count(8, 16384, 64, 108) == 27
    assert few.split_count(1, 2**20, 1, 132) == few.MAX_SPLITS
    assert few.split_count(300, 2**20, 1, 132) == 1


# Planted faults

NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The verdict on each fault, and on the kernels without any under the name "". One folder for all such tests."""
    return verdicts_on(FAULTS, trials, INSTANCES, tmp_path_factory.getbasetemp() / "planted")


def test_every_fault_is_one_change() -> None:
    """A fault whose text is no longer in the kernels would be planted nowhere."""
    for fault in FAULTS:
        assert (build.CSRC / fault.file).read_text().count(fault.old) == 1, fault.name
    assert len(set(NAMES)) == len(FAULTS) >= 8


@emulated_only
def test_the_kernels_as_they_are_pass(verdicts: dict[str, str]) -> None:
    assert verdicts[""] == ""


@emulated_only
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_caught(name: str, verdicts: dict[str, str]) -> None:
    assert not verdicts[name].startswith("NOT BUILT"), verdicts[name]
    assert verdicts[name] != "", "every case passes with this fault"
