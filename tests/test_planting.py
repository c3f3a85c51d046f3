"""Sources that hold many faults say with each of them what the source with that fault alone says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import few_faults
import hopper_backward_faults
import hopper_faults
import planting
import pytest
from faults import FAULTS, Fault
from planted_source import ENVIRONMENT, HEADER, HEADER_TEXT, plant

from attnfuse import build

PROGRAM = """#include <cstdio>

constexpr int kRows = 3;

template <int N>
struct Tile {
    static constexpr int kColumns = 2 * N;
    int first = 6;

    int last() const { return first + N; }
    int row(int n, int by) const {
        return n * by +
               first;
    }
};

constexpr int twice(int n) {
    return 2 * n;
}

void add(int& to, int by) {
    to = 2 * to + by;  // not in any order; {
}

template <typename T>
int compute(T tile) {
    int sum = 0;
    const auto scaled = [&](int n) { return n * tile.last(); };
    for (int n = 0; n < kRows; ++n) {
        const int at = tile.row(n, 3), far = tile.row(n, 9);
        if (at % 2 == 0 && n > 0) {
            add(sum, at);
        } else {
            add(sum, far);
            add(sum, 1);
        }
        if constexpr (T::kColumns > 4) {
            sum += scaled(n);
        }
    }
#pragma GCC unroll 2
    for (int n = 0; n < T::kColumns; ++n) {
        sum = 3 * sum % 1009;
    }
    return sum;
}

int main() {
    std::printf("%d %d\\n", compute(Tile<2>{}), compute(Tile<3>{}) + twice(2));
}
"""
CHOSEN = {
    "a deleted statement": ("            add(sum, far);\n            add(sum, 1);", "            add(sum, 1);"),
    "the same deleted in other words": ("            add(sum, far);\n", ""),
    "the order of two": ("add(sum, far);\n            add(sum, 1);", "add(sum, 1);\n            add(sum, far);"),
    "an argument": ("add(sum, at);", "add(sum, at + 1);"),
    "another of two on the line": ("tile.row(n, 9)", "tile.row(n, 8)"),
    "one of two on the line": ("tile.row(n, 3)", "tile.row(n + 1, 3)"),
    "a condition": ("at % 2 == 0 && n > 0", "n > 0"),
    "another condition there": ("at % 2 == 0 && n > 0", "at % 2 == 0"),
    "a loop's end": ("n < kRows;", "n < kRows - 1;"),
    "a loop's beginning": ("for (int n = 0; n < T", "for (int n = 1; n < T"),
    "behind a directive": ("sum = 3 * sum % 1009;", "sum = 3 * sum % 1013;"),
    "a lambda": ("return n * tile.last();", "return n * tile.first;"),
    "a function of one line": ("return first + N;", "return first - N;"),
    "a return of two lines": ("n * by +\n               first;", "n +\n               first;"),
    "a default": ("int first = 6;", "int first = 7;"),
    "a comment's bracket": ("to = 2 * to + by;  // not", "to = 2 * to - by;  // not"),
    "under if constexpr": ("            sum += scaled(n);\n", ""),
    "what if constexpr asks": ("T::kColumns > 4", "T::kColumns > 3"),
    "added lines": ("    return sum;", "    ++sum;\n    ++sum;\n    return sum;"),
}
ALONE = {
    "a constant": ("kRows = 3;", "kRows = 4;"),
    "a class's constant": ("kColumns = 2 * N;", "kColumns = 3 * N;"),
    "a constant function": ("return 2 * n;", "return 3 * n;"),
}
NUMBERED = {n: Fault(name, "p.cpp", old, new) for n, (name, (old, new)) in enumerate((CHOSEN | ALONE).items(), 1)}
EVERY_FAULT = [
    *FAULTS, *few_faults.FAULTS, *hopper_faults.FAULTS, *hopper_backward_faults.FAULTS,
    *hopper_backward_faults.MIDDLE_FAULTS, *hopper_backward_faults.WIDE_FAULTS, *hopper_backward_faults.QUERY_FAULTS,
]  # fmt: skip

needs_compiler = pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation()))


def said(folder: Path, name: str, text: str, chosen: int = 0) -> str:
    """What the program of this text prints."""
    program = folder / name
    if not program.exists():
        source = folder / f"{name}.cpp"
        source.write_text(text)
        compiler = os.environ.get("CXX") or "g++"
        subprocess.run([compiler, "-std=c++20", "-O0", f"-I{folder}", str(source), "-o", str(program)], check=True)
    return subprocess.run(
        [str(program)], env={**os.environ, ENVIRONMENT: str(chosen)}, capture_output=True, text=True, check=True
    ).stdout


@needs_compiler
def test_each_chosen_fault_is_that_fault(tmp_path: Path) -> None:
    assert all(PROGRAM.count(fault.old) == 1 for fault in NUMBERED.values())
    planted = plant(PROGRAM, NUMBERED)
    assert {NUMBERED[n].name for n in planted.alone} == set(ALONE)
    (tmp_path / HEADER).write_text(HEADER_TEXT)
    whole = said(tmp_path, "without", PROGRAM)
    assert said(tmp_path, "together", planted.text) == whole
    for n, fault in NUMBERED.items():
        if n not in planted.alone:
            alone = said(tmp_path, f"alone{n}", PROGRAM.replace(fault.old, fault.new))
            assert alone != whole, fault.name
            assert said(tmp_path, "together", planted.text, n) == alone, fault.name


def test_lines_tell_whose_they_are() -> None:
    planted = plant(PROGRAM, NUMBERED)
    lines = planted.text.splitlines()
    for where, numbers in planted.lines:
        written = "\n".join(lines[where.start : where.stop])
        assert all(f"planted_fault == {n}" in written for n in numbers), written
    assert sorted([*planted.alone, *(n for _, numbers in planted.lines for n in numbers)]) == list(NUMBERED)


def test_nearly_all_faults_share_a_build() -> None:
    """One that needs its own takes seconds, the others none."""
    alone = 0
    for file in {fault.file for fault in EVERY_FAULT}:
        there = {n: fault for n, fault in enumerate(EVERY_FAULT, 1) if fault.file == file}
        alone += len(plant((build.CSRC / file).read_text(), there).alone)
    assert alone <= len(EVERY_FAULT) / 20


def test_what_does_not_compile_with_others_is_built_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {1: FAULTS[0], 2: FAULTS[1]}
    file = tmp_path / "csrc" / FAULTS[0].file
    tried = []

    def built(folder: Path, **options: object) -> Path:
        lines = file.read_text().splitlines()
        tried.append([n for n in faults if f"planted_fault == {n}" in file.read_text()])
        if 1 in tried[-1]:
            at = next(n for n, line in enumerate(lines, 1) if "planted_fault == 1" in line)
            raise build.BuildError(f"FAILED:\n{file}:{at + 1}:9: error: no such thing\n")
        module = tmp_path / "module.so"
        module.write_text("")
        return module

    monkeypatch.setattr(build, "build_emulation", built)
    with pytest.warns(UserWarning, match=f"{FAULTS[0].name!r} has a build of its own: .* no such thing"):
        _, alone = planting._Copy(tmp_path, ["*"]).build_together(faults)
    assert alone == [1] and tried == [[1, 2], [2]]


def test_an_error_of_no_fault_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(folder: Path, **options: object) -> Path:
        raise build.BuildError(f"FAILED:\n{tmp_path}/csrc/attention.h:1:1: error: no such thing\n")

    monkeypatch.setattr(build, "build_emulation", built)
    with pytest.raises(build.BuildError, match="no such thing"):
        planting._Copy(tmp_path, ["*"]).build_together({1: FAULTS[0]})
