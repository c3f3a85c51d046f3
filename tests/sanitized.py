"""The emulation with sanitizers, which also counts the lines that are run: one build for all that is run with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import csrc_copy

from attnfuse import build

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "emulation-sanitized"
SANITIZERS = "address,undefined"
# Of the kernels for few queries and of Hopper's what the tests run: building the rest takes longer than running it.
INSTANCES = [
    path.stem
    for path in sorted((build.CSRC / "instances").glob("*.cu"))
    if not ("_few_" in path.stem or "_split_" in path.stem or "_d256_sm90" in path.stem)
    or path.stem.endswith(("_d64", "_merge"))
]


def run(program: str, *arguments: str, counts: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program that finds this build in place of the emulation; any report of a sanitizer ends it.

    counts: the folder in which it leaves how often each line was run, below the name of the object's own folder.
    """
    sources = csrc_copy.write(FOLDER / "csrc", csrc_copy.texts())
    module = build.build_emulation(
        FOLDER, sanitize=SANITIZERS, coverage=True, only=INSTANCES, sources_dir=sources, quiet=True
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "ATTNFUSE_EMULATE": "1", "ATTNFUSE_EMULATE_MODULE": str(module),
             "LD_PRELOAD": build.sanitizer_preload(SANITIZERS), "ASAN_OPTIONS": "detect_leaks=0",
             "GCOV_PREFIX": str(counts), **environment},
    )  # fmt: skip
