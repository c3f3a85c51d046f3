"""bench/gpu_session.sh on a CPU: every stage, what it leaves behind, and that a late or failed stage loses nothing."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnfuse import build

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_session.sh"
STAGES = [
    "build", "info", "check_cuda", "check_triton", "check_others", "bench_few_query", "bench_models", "bench_self",
    "sanitizer", "plots", "summary",
]  # fmt: skip


def session(out: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    return subprocess.run(
        ["bash", str(SCRIPT), *args, str(out)], env=clean | {"PYTHON": sys.executable} | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def stages(out: Path) -> dict[str, dict[str, str]]:
    with (out / "stages.csv").open(newline="") as file:
        return {row["stage"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation()))
def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    done = session(tmp_path, "--dry-run")
    log = (tmp_path / "session.log").read_text()
    assert done.returncode == 0, done.stdout + log
    found = stages(tmp_path)
    assert list(found) == STAGES
    assert {row["exit_code"] for row in found.values()} == {"0"}, found
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "session.log", "stages.csv", "info.json", "check.txt", "summary.txt", "attnfuse_bench.csv",
        "attnfuse_bench_ratios.png", "attnfuse_bench_ceilings.png",
    }  # fmt: skip
    assert len(names) <= 8 and sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**20
    assert json.loads((tmp_path / "info.json").read_text())["attnfuse"]
    with (tmp_path / "attnfuse_bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Three stages added to one file.
    assert {row["workload"] for row in rows} == {"mbt-4k", "absent-half", "self-d64-512"}
    checked = re.findall(r"^-- (\w+) \w+, exit code 0$", (tmp_path / "check.txt").read_text(), re.MULTILINE)
    assert checked == ["cuda", "triton", "reference", "aten"]
    summary = (tmp_path / "summary.txt").read_text()
    assert "bench_self" in summary and "absent-half" in summary and "attnfuse ms" in summary


def test_a_failed_stage_costs_only_itself(tmp_path: Path) -> None:
    # A Python that cannot do anything: every stage fails, each is written down, and so does the whole.
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no python here >&2\nexit 3\n")
    broken.chmod(0o755)
    out = tmp_path / "out"
    assert session(out, "--dry-run", PYTHON=str(broken)).returncode == 1
    found = stages(out)
    assert list(found) == STAGES
    # xargs says 123 for a child's failure; the summary is a shell's own.
    expected = dict.fromkeys(STAGES, "3") | {"check_cuda": "123", "check_triton": "123", "summary": "0"}
    assert {name: row["exit_code"] for name, row in found.items()} == expected
    assert "no python here" in (out / "session.log").read_text()
    assert "no row was measured" in (out / "summary.txt").read_text()


def test_the_limits_of_a_gpu_run_add_up_to_less_than_ten_minutes() -> None:
    limits = re.findall(r"^[^#\n]*\bstage (\w+) (\d+) (?:required|optional)", SCRIPT.read_text(), re.MULTILINE)
    assert {name for name, _ in limits} == {*STAGES, "bench_flex"}
    assert sum(int(limit) for _, limit in limits) <= 590
    # A bench stage stops beginning workloads early enough to end by itself.
    for limit, own in re.findall(r"stage bench_\w+ (\d+) \w+ bench (\d+)", SCRIPT.read_text()):
        assert int(own) <= int(limit) - 15


def ninja_lite(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "build.ninja").write_text(text)
    command = [sys.executable, str(ROOT / "bench" / "ninja_lite.py"), "-C", str(folder), "-j", "2", "all"]
    return subprocess.run(command, capture_output=True, text=True)


def test_ninja_lite_builds_what_depends_last_and_stops_at_a_failure(tmp_path: Path) -> None:
    (tmp_path / "with space.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    rules = (
        "rule copy\n  command = cp \"$in\" $out && echo $$note $name > $log\n"
        "rule join\n  command = cat $in > $out\n"
    )
    edges = (
        "build all: join objects/a.o objects/b.o\n"  # named first, needed last
        "build objects/a.o: copy with$ space.txt\n  name = first\n  log = a.log\n"
        "build objects/b.o: copy b.txt\n  name = second\n  log = b.log\n"
    )
    done = ninja_lite(tmp_path, rules + edges)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all").read_text() == "ab"
    assert (tmp_path / "a.log").read_text().split() == ["first"]
    done = ninja_lite(tmp_path, rules.replace("cp ", "false ") + edges)
    assert done.returncode != 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
def test_ninja_lite_reads_what_build_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return ONE; }\n')
    monkeypatch.setattr(build, "_ninja", lambda: tmp_path / "ninja")
    (tmp_path / "ninja").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/bench/ninja_lite.py" "$@"\n')
    (tmp_path / "ninja").chmod(0o755)
    ninja = build._NinjaFile(tmp_path / "out")
    ninja.rule("cxx", "g++ -DONE=1 -fPIC -MMD -MF $out.d -c $in -o $out", "g++ $name")
    ninja.link([ninja.compile("cxx", tmp_path / "one.cpp", tmp_path)], tmp_path / "one.so", [])
    assert ninja.run(tmp_path / "one.so", quiet=True).read_bytes().startswith(b"\x7fELF")
