"""`attnfuse bench`: no row without a right result, and the oracle, the counts and the rule for smaller machines."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnfuse.bench import checks, measure, peers, runner, workloads
from attnfuse.bench.peers import Call, Peer
from attnfuse.bench.workloads import Inputs, Workload, make_inputs, parse_shape, scaled
from attnfuse.cli.main import main

TINY = "b=2,h=2,q=24,k=40+16,d=16"
SHAPES = (
    "b=2,h=2,q=24,d=16", "b=1,h=2,q=40,k=40,d=8,causal", "b=1,h=2,q=24,k=40,d=8,causal", "b=5,h=2,q=8,k=40,d=8,fill=25",
    "b=4,h=4,kv=2,q=9,k=30+7,d=16,absent", "b=4,h=2,q=9,k=30+7,d=16,absent,fill=50", "b=2,h=4,kv=1,q=11+30,d=16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large product and a large copy take a second each time."""
    monkeypatch.setattr(measure, "ceilings", lambda *given: measure.Ceilings(0.1, 10.0, "not measured"))


def bench(out: Path, *args: str) -> int:
    return main(["bench", "--seconds", "0.01", "--out", str(out), "--no-plots", *args])


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "attnfuse_bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_every_pass_and_peer_with_everything_to_judge_it(tmp_path: Path) -> None:
    code = main(["bench", "--seconds", "0.01", "--out", str(tmp_path), "--shape", TINY,
                 "--against", "torch", "--against", "torch-math"])  # fmt: skip
    assert code == 0
    rows = rows_of(tmp_path)
    assert {(row["peer"], row["pass_"]) for row in rows} == {
        (peer, pass_) for peer in ("attnfuse", "torch", "torch-math") for pass_ in runner.PASSES
    }
    assert len(rows) == 9
    for row in rows:
        assert all(row.values()), row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert 0 < float(row["worst_error_over_budget"]) <= 1
        assert row["checked"] == "4 of 4 heads"
        assert row["torch"] == torch.__version__ and row["command"].startswith("attnfuse ")
        if row["peer"] == "torch":
            assert float(row["ratio"]) == 1
    for name in ("ratios", "ceilings"):
        assert (tmp_path / f"attnfuse_bench_{name}.png").read_bytes().startswith(b"\x89PNG")
    # The second source is copied by concatenating, and by nothing else.
    peak = {row["peer"]: float(row["peak_mb"]) for row in rows if row["pass_"] == "forward"}
    assert peak["attnfuse"] < peak["torch"]


def spoilt(fault: Callable[[Inputs, list[Tensor]], list[Tensor]]) -> Callable[[Inputs], Call]:
    """torch's attention, with `fault` done to its outs."""
    right = peers.peers()["torch"].prepare

    def prepare(inputs: Inputs) -> Call:
        call = right(inputs)
        return lambda: fault(inputs, call())

    return prepare


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient 2 % too large."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.02


def not_finite_at_the_end(inputs: Inputs, outs: list[Tensor]) -> list[Tensor]:
    last = torch.zeros_like(outs[0])
    last[-1, -1, -1, -1] = float("nan")
    return [outs[0] + last]


FAULTS: dict[str, tuple[Callable[[Inputs, list[Tensor]], list[Tensor]], str]] = {
    "too large": (lambda inputs, outs: [out * 1.02 for out in outs], "out0 is off"),
    "the other way round": (lambda inputs, outs: [out.flip(0) for out in outs], "out0 is off"),
    "not finite": (not_finite_at_the_end, "out0 is not finite"),
    "a wrong shape": (lambda inputs, outs: [out.transpose(1, 2) for out in outs], "out has shapes"),
    "a wrong gradient": (lambda inputs, outs: [WrongGradient.apply(out) for out in outs], "dquery0 is off"),  # type: ignore[no-untyped-call]
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_peer_gives_no_row_and_exit_1(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = FAULTS[fault]
    known = peers.peers()
    wrong = Peer("torch", "torch", lambda workload, device: None, spoilt(change))
    monkeypatch.setattr(peers, "peers", lambda: known | {"torch": wrong})
    monkeypatch.setattr(runner, "peers", peers.peers)
    assert bench(tmp_path, "--shape", TINY, "--against", "torch") == 1
    assert {row["peer"] for row in rows_of(tmp_path)} == {"attnfuse"}
    said = capsys.readouterr().out
    assert "FAILED" in said and words in said


def test_attnfuse_raising_is_a_failure_and_a_peer_that_does_not_serve_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(tmp_path, "--shape", TINY, "--against", "torch", "--against", "torch-cudnn") == 0
    assert "no row for torch-cudnn, 1 case(s): torch's cudnn path runs on a GPU only" in capsys.readouterr().out

    def raising(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(peers.attnfuse, "multi_source_attention", raising)
    assert bench(tmp_path, "--shape", TINY, "--against", "torch") == 1
    assert "FAILED" in (said := capsys.readouterr().out) and "out of luck" in said


def test_cpu_time_is_that_of_the_call_alone(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert bench(tmp_path, "--shape", TINY, "--against", "torch", "--cpu-time") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert {row["clock"] for row in rows_of(tmp_path)} == {"cpu"}

    def asleep(watch: measure.Stopwatch) -> None:
        watch.mark()
        time.sleep(0.05)
        watch.mark()

    laps = {name: measure.race({"x": asleep}, "cpu", 0.01, clock)["x"] for name, clock in (
        ("wall", time.perf_counter), ("cpu", time.thread_time),
    )}  # fmt: skip
    assert min(laps["wall"])[0] > 49 and min(laps["cpu"])[0] < 25


def test_nobody_comes_first_in_every_round() -> None:
    told: list[str] = []

    def teller(name: str) -> measure.Contestant:
        def run(watch: measure.Stopwatch) -> None:
            told.append(name)
            watch.mark()
            watch.mark()

        return run

    laps = measure.race({name: teller(name) for name in "abc"}, "cpu", 0.0, most=3)
    assert ["".join(told[n : n + 3]) for n in range(0, len(told), 3)] == ["abc", "bca", "cab", "abc"]
    assert {len(rounds) for rounds in laps.values()} == {3}  # the first round only warms up


def test_json_and_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ("--shape", TINY, "--shape", "b=1,h=1,q=8,d=8", "--dtype", "float32", "--dtype", "bfloat16")
    assert bench(tmp_path, *shapes, "--pass", "forward", "--against", "torch", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and len(report["rows"]) == 8 and not report["unmeasured"]
    assert bench(tmp_path, *shapes, "--against", "torch", "--json", "--time-limit", "1e-9") == 1  # nothing was measured
    report = json.loads(capsys.readouterr().out)
    assert not report["rows"] and len(report["unmeasured"]) == 4


@pytest.mark.parametrize("text", SHAPES)
def test_the_oracle_agrees_with_torch_in_float64(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of a few rows, so that their joints are seen.
    monkeypatch.setattr(checks, "CHUNK", 300)
    inputs = make_inputs(parse_shape(text), torch.float64, "cpu")
    oracle = checks.Oracle(inputs, 1e9)
    outs = peers.peers()["torch-math"].prepare(inputs)()
    grads = torch.autograd.grad(outs, inputs.tensors(), inputs.grads)
    found = dict(zip([f"out{n}" for n in range(len(outs))], outs))
    found |= dict(zip([f"d{name}" for name in inputs.names()], grads))
    assert found.keys() == oracle.exact.keys()
    for name, x in found.items():
        torch.testing.assert_close(oracle.exact[name], oracle._chosen(name, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("text", SHAPES)
def test_attnfuse_passes_where_only_some_heads_are_checked(text: str) -> None:
    inputs = make_inputs(parse_shape(text), torch.bfloat16, "cpu")
    oracle = checks.Oracle(inputs, 1)
    assert len(oracle.heads) == 1
    outs = peers.peers()["attnfuse"].prepare(inputs)()
    grads = torch.autograd.grad(outs, inputs.tensors(), inputs.grads)
    assert oracle.judge(outs, grads).failures == []
    assert oracle.judge([out * 1.05 for out in outs], grads).failures


@pytest.mark.parametrize("text", SHAPES)
def test_pairs_are_those_that_are_seen(text: str) -> None:
    w = parse_shape(text)
    inputs = make_inputs(w, torch.float32, "cpu")
    seen = inputs.seen()
    visible = torch.ones(w.batch, sum(w.queries), sum(w.keys), dtype=torch.bool)
    if seen is not None:
        visible &= seen[:, None]
    if w.causal:
        visible = visible.tril()
    assert w.pairs() == int(visible.sum()) * w.heads
    assert w.flops("forward") == 4 * w.pairs() * w.dim
    assert w.flops("both") == w.flops("forward") + w.flops("backward") == 3.5 * w.flops("forward")
    columns = w.batch * sum(w.keys) if seen is None else int(seen.sum())
    rows = w.batch * w.heads * sum(w.queries)
    assert w.bytes("forward", 2) == 2 * w.dim * (2 * rows + 2 * w.kv_heads * columns)


def test_every_workload_is_named_once_cites_its_source_and_can_be_made_smaller() -> None:
    found = workloads.workloads()
    assert len({w.name for w in found}) == len(found)
    assert sum(w.quick for w in found) >= 15
    for w in found:
        assert len(w.source) > 20 and w.scale == "1"
        small = scaled(w, 0.5)
        assert small.flops("forward") <= 0.5e9 and small.bytes("forward", 4) <= 0.5e9 / 8, small
        kept = ("name", "dim", "causal", "fill", "absent", "source")
        assert all(getattr(small, field) == getattr(w, field) for field in kept)
        assert small.heads * w.kv_heads == small.kv_heads * w.heads
        if w.unequal:
            assert small.batch >= workloads.UNEQUAL_SAMPLES
        said = dict(part.split(" 1/") for part in small.scale.split(", ")) if small.scale != "1" else {}
        assert w.heads == small.heads * int(said.get("heads", 1))
        assert w.batch == small.batch * int(said.get("batch", 1))
        assert -(-max(w.keys) // int(said.get("lengths over 128", 1))) == max(small.keys)
        assert scaled(w, 1e9) == w


@pytest.mark.parametrize("fill", [25, 50, 75])
def test_padding_has_the_mean_it_claims(fill: int) -> None:
    w = dataclasses.replace(parse_shape("b=64,h=1,q=4,k=1000,d=8"), fill=fill / 100)
    assert max(w.lengths()) == 1000
    assert sum(w.lengths()) / 64000 == pytest.approx(fill / 100, abs=0.02)
    assert w.lengths() != sorted(w.lengths())


@pytest.mark.parametrize(("text", "words"), [
    ("b=1,h=1,q=8", "without d"), ("b=1,h=1,q=8,d=x", "got 'd=x'"), ("b=1+2,h=1,q=8,d=8", "several for b"),
    ("b=1,h=3,kv=2,q=8,d=8", "h=3 and kv=2"), ("b=1,h=1,q=8,d=8,causal,fill=50", "causal goes with"),
    ("b=1,h=1,q=8,d=8,absent", "absent needs"), ("b=1,h=1,q=8+9,k=7,d=8", "joint attention"),
    ("b=1,h=1,q=8,d=8,fill=200", "got 200"),
])  # fmt: skip
def test_a_bad_shape_is_told_so(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", text]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("args", "words"), [
    (["--workload", "nothing"], "few-query"), (["--against", "nobody"], "torch-flash"), (["--gflop", "-1"], "--gflop"),
    (["--plot", "nowhere.csv"], "nowhere.csv"),
])  # fmt: skip
def test_a_bad_argument_is_told_so(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    assert words in capsys.readouterr().err


def test_list_names_every_workload_and_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(w.name in said and w.source in said for w in workloads.workloads())
    assert all(name in said for name in peers.peers())


def test_peak_memory_is_what_is_held_at_once() -> None:
    def run() -> None:
        a = torch.empty(1000, dtype=torch.float32)
        del a
        b, c = torch.empty(500, dtype=torch.float32), torch.empty(2000, dtype=torch.float32)
        del b, c

    assert measure.peak_bytes(run, "cpu") == 10000


def test_the_shapes_of_models_are_those_of_their_configurations() -> None:
    by_name: dict[str, Workload] = {w.name: w for w in workloads.workloads()}
    shapes = {name: by_name[name].shape for name in ("flux-1024px", "llama-vision", "perceiver-4k", "padded-50")}
    assert shapes == {
        "flux-1024px": "B1 H24 Q512+4096 K512+4096 D128", "llama-vision": "B2 H32/8 Q512 K6404 D128",
        "perceiver-4k": "B4 H16/4 Q64 K4096+64 D96", "padded-50": "B8 H16 Q2048 K2048 D64 fill 50%",
    }  # fmt: skip
