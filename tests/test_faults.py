"""Every fault of faults.py, planted in a copy of csrc and run under emulation, is caught by the conformance cases.

Caught is: a quantity over its budget, a report of the emulator (a race, a deadlock, a copy read before it landed), or
a process that dies. Faults are built two at a time, with the instances of one head dim only.
"""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import FAULTS, Fault, judge_all

from attnfuse import build

pytestmark = pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation()))

WORKERS = 2
TIMEOUT_S = 240
NAMES = [fault.name for fault in FAULTS]


def verdict_on(module: Path) -> str:
    """Why the emulated kernels in `module` are caught; empty if they are not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnfuse.testing"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=judge_all, args=(str(module), there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(TIMEOUT_S):
            return "it does not end"
        return str(here.recv())
    except EOFError:
        process.join()
        return f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The verdict on each fault, and on the kernels as they are under the name ""."""
    root = tmp_path_factory.mktemp("faults")
    folders = [root / str(n) for n in range(WORKERS)]
    for folder in folders:
        shutil.copytree(build.CSRC, folder / "csrc")
    shares = [[Fault("", "attention.h", "", "")] * (n == 0) + FAULTS[n::WORKERS] for n in range(WORKERS)]

    def one_share(n: int) -> dict[str, str]:
        found = {}
        for fault in shares[n]:
            file = folders[n] / "csrc" / fault.file
            whole = file.read_text()
            file.write_text(whole.replace(fault.old, fault.new) if fault.old else whole)
            try:
                module = build.build_emulation(
                    folders[n] / "build", only=["*_d64", "*_rows"], sources_dir=folders[n] / "csrc", quiet=True
                )
                found[fault.name] = verdict_on(module)
            except build.BuildError as error:
                found[fault.name] = f"NOT BUILT: {error}"
            file.write_text(whole)
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        return {name: verdict for share in pool.map(one_share, range(WORKERS)) for name, verdict in share.items()}


def test_every_fault_is_one_change() -> None:
    """A fault whose text is no longer in the kernels would be planted nowhere."""
    for fault in FAULTS:
        assert (build.CSRC / fault.file).read_text().count(fault.old) == 1, fault.name
    assert len(set(NAMES)) == len(FAULTS) >= 25


def test_the_kernels_as_they_are_pass(verdicts: dict[str, str]) -> None:
    assert verdicts[""] == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_caught(name: str, verdicts: dict[str, str]) -> None:
    assert not verdicts[name].startswith("NOT BUILT"), verdicts[name]
    assert verdicts[name] != "", "every case passes with this fault"
