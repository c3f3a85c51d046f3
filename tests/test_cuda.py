"""The CUDA kernels' own source, run on the CPU by csrc/emulation, and on a GPU where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sanitized
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnfuse
from attnfuse import Source, build, dispatch, testing
from attnfuse.backends import cuda

ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = [c for c in testing.cases() if not (c.alibi or c.dropout_p or any(s.mask for s in c.sources))]
DTYPES = [torch.bfloat16, torch.float16]
SMALL_CARD = 99 * 1024  # bytes of shared memory a block may have on sm_86, sm_89 and sm_120

pytestmark = pytest.mark.skipif(
    not ON_GPU and build.why_no_emulation() is not None, reason=str(build.why_no_emulation())
)
emulated_only = pytest.mark.skipif(ON_GPU, reason="looks into the emulated machine")


@pytest.fixture(autouse=True)
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("ATTNFUSE_EMULATE", "1")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Every run gives the same bits; torch fills what is not initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def machine() -> Iterator[Any]:
    """The emulated machine, its settings put back afterwards."""
    module = cuda.emulation()
    yield module
    module.set_seed(0)
    module.set_shared_memory_limit(163 * 1024)


def case(name: str) -> testing.Case:
    (found,) = [c for c in testing.cases() if str(c) == name]
    return found


def check(one: testing.Case, dtype: torch.dtype) -> None:
    for result in testing.judge(one, "cuda", dtype, DEVICE):
        assert result.passed, f"{one} {result.quantity}: error {result.error:.3g} over {result.budget:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one", CASES, ids=str)
def test_conformance(one: testing.Case, dtype: torch.dtype) -> None:
    assert testing.serves(one, "cuda", dtype, DEVICE) is None
    check(one, dtype)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_conformance_when_deterministic(one: testing.Case, deterministic: None) -> None:
    check(one, torch.bfloat16)


@emulated_only
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_conformance_in_another_order_of_threads(seed: int, machine: Any) -> None:
    machine.set_seed(seed)
    for one in CASES:
        check(one, DTYPES[seed % 2])


@emulated_only
@pytest.mark.parametrize("name", ["plain-square", "long-head-dim-128", "long-head-dim-256", "head_dim-96"])
def test_cards_with_less_shared_memory(name: str, machine: Any) -> None:
    """Every kernel has a tile that fits, or the launch fails."""
    machine.set_shared_memory_limit(SMALL_CARD)
    check(case(name), torch.bfloat16)


@emulated_only
def test_ldmatrix_reads_without_bank_conflicts(machine: Any, deterministic: None) -> None:
    before = machine.bank_conflicts()
    for name in ("long-one-source", "head_dim-96", "long-head-dim-128", "long-head-dim-256"):
        check(case(name), torch.bfloat16)
        torch.use_deterministic_algorithms(False)
        check(case(name), torch.bfloat16)
    assert machine.bank_conflicts() == before


@pytest.mark.parametrize("name", ["long-three-sources", "gqa-gqa", "sinks-sinks", "bias-source-bias"])
def test_deterministic_means_the_same_bits(name: str, deterministic: None, request: pytest.FixtureRequest) -> None:
    results = []
    for seed in (1, 2):
        if not ON_GPU:
            request.getfixturevalue("machine").set_seed(seed)
        results.append(testing.run(case(name), "cuda", torch.bfloat16, DEVICE))
    for quantity, x in results[0].items():
        assert torch.equal(x, results[1][quantity]), quantity


@st.composite
def problems(draw: st.DrawFn) -> testing.Case:
    """Sizes on both sides of every tile's edges, and every feature the kernels serve."""
    batch = draw(st.integers(1, 2))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    side = st.sampled_from([-1, 0, 5, 40, 90])

    def source() -> testing.SourceCase:
        length = draw(st.sampled_from([0, 1, 30, 47, 48, 49, 64, 65, 128, 130, 200]))
        return testing.SourceCase(
            length,
            lengths=draw(st.none() | st.tuples(*[st.integers(0, length)] * batch)),
            holes=length > 2 and draw(st.booleans()),
            present=draw(st.none() | st.tuples(*[st.booleans()] * batch)),
            bias=draw(st.booleans()),
            causal=draw(st.booleans()),
            offset=draw(st.sampled_from([0, 0, -70, -3, 20, 90])),
            window=draw(st.just((-1, -1)) | st.tuples(side, side)),
        )

    return testing.Case(
        "drawn", str(draw(st.integers(0, 9))), tuple(source() for _ in range(draw(st.integers(1, 3)))),
        batch=batch, heads=heads, kv_heads=kv_heads,
        rows=draw(st.sampled_from([1, 5, 64, 65, 129, 150])),
        dim=draw(st.sampled_from([8, 20, 33, 64, 72, 96, 100, 128, 160])),
        value_dim=draw(st.sampled_from([None, 16, 50, 64])),
        scale=draw(st.sampled_from([None, None, -0.1, 0.0, 0.3])),
        softcap=draw(st.sampled_from([0.0, 5.0])), sinks=draw(st.booleans()), aux=draw(st.booleans()),
        rows_first=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(), st.sampled_from(DTYPES), st.booleans())
def test_any_problem_is_within_the_budget(drawn: testing.Case, dtype: torch.dtype, is_deterministic: bool) -> None:
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        check(drawn, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_refused_and_why() -> None:
    refused = {c.family: testing.serves(c, "cuda", torch.bfloat16, DEVICE) for c in testing.cases() if c not in CASES}
    assert set(refused) == {"masks", "alibi", "dropout", "everything"}
    assert "(i, j) mask" in str(refused["masks"])
    assert "alibi_slopes" in str(refused["alibi"])
    assert "dropout" in str(refused["dropout"])
    assert "torch.float32" in str(testing.serves(case("plain-square"), "cuda", torch.float32, DEVICE))


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def test_nine_sources_are_too_many() -> None:
    sources = [Source(some(1, 1, 3, 8), some(1, 1, 3, 8)) for _ in range(9)]
    with pytest.raises(RuntimeError, match="at most 8 sources, got 9"):
        attnfuse.multi_source_attention(some(1, 1, 4, 8), sources, backend="cuda")
    attnfuse.multi_source_attention(some(1, 1, 4, 8), sources[:8], backend="cuda")


def test_a_cpu_tensor_without_emulation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNFUSE_EMULATE", raising=False)
    q = torch.randn(1, 1, 4, 8).bfloat16()
    with pytest.raises(RuntimeError, match="cannot serve this call"):
        attnfuse.attention(q, q, q, backend="cuda")
    # unasked, the CPU is served as always
    attnfuse.attention(q, q, q)


def test_explain_tells_the_tiles() -> None:
    told = str(attnfuse.explain(some(1, 2, 9, 100), [Source(some(1, 2, 5, 100), some(1, 2, 5, 100))], backend="cuda"))
    assert "head dim 128" in told and "attn_fwd 128x48" in told


@pytest.mark.parametrize("rows, columns, batch", [(0, 5, 2), (4, 0, 2), (0, 0, 1), (3, 4, 0)])
def test_nothing_to_compute(rows: int, columns: int, batch: int) -> None:
    q = some(batch, 2, rows, 8).requires_grad_()
    k, v = (some(batch, 2, columns, 8).requires_grad_() for _ in range(2))
    out = attnfuse.attention(q, k, v, backend="cuda")
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
def test_each_gradient_alone_is_the_same(wanted: str) -> None:
    """What is not asked for is not computed: dq has a kernel of its own where no key or value wants a gradient."""
    made = {name: some(2, 2, 30, 256) for name in "qkv"}
    upstream = some(2, 2, 30, 256)
    grads = []
    for names in ("qkv", wanted):
        inputs = {name: x.clone().requires_grad_(name in names) for name, x in made.items()}
        attnfuse.attention(**dict(zip(("query", "key", "value"), inputs.values())), backend="cuda").backward(upstream)
        grads.append({name: inputs[name].grad for name in wanted})
    for name in wanted:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0.02, atol=0.02)


def test_views_and_odd_strides() -> None:
    """Rows that begin on 2 bytes, a (B, N, H, D) view and a slice of a packed qkv."""
    packed = some(2, 21, 3, 2, 40)
    q, k, v = (packed[:, :, n, :, 1:34].transpose(1, 2) for n in range(3))
    out = attnfuse.attention(q, k, v, backend="cuda")
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
    assert out.stride() == torch.empty(2, 21, 2, 33).transpose(1, 2).stride()


def test_dispatch_prefers_it_on_a_gpu() -> None:
    assert dispatch.ORDER["cuda"][0] == "cuda" and "cuda" not in dispatch.ORDER["cpu"]


EVERY_CASE = """
from dataclasses import replace
from functools import partial
import torch
from attnfuse import testing
from attnfuse.backends import cuda

torch.set_num_threads(1)
checks = 0

def judge(case):
    global checks
    for result in testing.judge(case, "cuda", torch.bfloat16):
        checks += 1
        assert result.passed, (str(case), result.quantity)

served = [case for case in testing.cases() if testing.serves(case, "cuda", torch.bfloat16) is None]
for case in served:
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        judge(case)

# The kernels for few queries, which are built for head dims up to 64 here; all rows of a case in one tile.
cuda.forward, cuda.backward = partial(cuda.forward, splits=3), partial(cuda.backward, splits=3)
for case in served:
    if max(case.dim, case.value_dim or 0) <= 64:
        judge(replace(case, rows=min(case.rows, 60)))
print(checks)
"""


@pytest.fixture(scope="module")
def every_case(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """EVERY_CASE with sanitizers, and the folder with the counts of lines."""
    counts = tmp_path_factory.mktemp("counts")
    return sanitized.run(EVERY_CASE, counts=counts), counts


@emulated_only
@pytest.mark.slow
def test_sanitizers_have_nothing_to_say(every_case: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Every case under address and undefined-behaviour sanitizers; any report ends the process."""
    done, _ = every_case
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(done.stdout) > 500


@emulated_only
@pytest.mark.slow
def test_the_sanitizers_would_have_spoken(tmp_path: Path) -> None:
    """The kernel is told that a source has more columns than were allocated."""
    program = """
import torch
from attnfuse.backends import cuda
from attnfuse.problem import BoundSource, Problem

q, k = (torch.randn(1, 1, 64, 64).bfloat16() for _ in range(2))
honest, columns = cuda._source, 14
cuda._source = lambda *given: (*(told := honest(*given))[:columns], 6400, *told[columns + 1 :])
cuda.forward(Problem(q, [BoundSource(k, k)], 0.125))
"""
    done = sanitized.run(program, counts=tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr and "attn_fwd.cuh" in done.stderr


@emulated_only
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["-O2"], ["-O1", f"-fsanitize={sanitized.SANITIZERS}", "-fno-sanitize-recover=all"]],
    ids=["plain", "sanitized"],
)
def test_the_emulated_machine_itself(flags: list[str], tmp_path: Path) -> None:
    """csrc/emulation/selftest*.cpp: layouts against plain loops, and every report it can make."""
    folder = ROOT / "csrc" / "emulation"
    program = tmp_path / "selftest"
    sources = sorted(folder.glob("*.cpp"))
    compiler = os.environ.get("CXX") or "g++"
    compile_one = [compiler, "-std=c++20", *flags, f"-I{folder}", "-c"]
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        jobs = [[*compile_one, str(source), "-o", to] for source, to in zip(sources, objects)]
        list(pool.map(partial(subprocess.run, check=True), jobs))
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and done.stdout.count("ok") >= 57


@emulated_only
@pytest.mark.slow
def test_coverage(every_case: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path) -> None:
    """The cases run at least 95 % of the lines of csrc/sm80 and csrc/core."""
    done, counts = every_case
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines: dict[tuple[str, int], bool] = {}
    for data in sorted(counts.rglob("instances/*.gcda")):
        notes = shutil.copy(sanitized.FOLDER / "instances" / f"{data.stem}.gcno", data.parent)
        text = subprocess.run(["gcov", "-t", notes], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        name = ""
        for line in text.splitlines():
            count, number, rest = (part.strip() for part in (line.split(":", 2) + ["", ""])[:3])
            if rest.startswith("Source:"):
                name = rest.removeprefix("Source:")
            elif number.isdigit() and number != "0" and count != "-" and ("/sm80/" in name or "/core/" in name):
                at = (name.rsplit("/", 1)[1], int(number))
                lines[at] = lines.get(at, False) or count[0].isdigit()
    missed = sorted(at for at, run in lines.items() if not run)
    share = 1 - len(missed) / len(lines)
    print(f"{share:.1%} of {len(lines)} lines; missed: {missed}")
    assert len(lines) > 300 and share >= 0.95, missed
