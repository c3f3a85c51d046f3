"""Copies of csrc for tests that run in bfloat16 alone: most of a build is the kernels, and half of those is float16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attnfuse import build


def texts() -> dict[str, str]:
    """Every file of csrc under its name there, without the instances in float16."""
    found = {
        path.relative_to(build.CSRC).as_posix(): path.read_text()
        for path in sorted(build.CSRC.rglob("*"))
        if path.suffix in (".cu", ".cuh", ".cpp", ".h")
    }
    for name, text in found.items():
        if name.startswith("instances/"):
            found[name] = "".join(line for line in text.splitlines(keepends=True) if "fp16" not in line)
    return found


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """The folder, with these files and no others in it. What is as it should be is left, and not built anew."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder
