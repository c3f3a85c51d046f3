"""Planting faults: a copy of csrc with one piece of text replaced, built for the emulation and judged in a process."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from faults import Fault

from attnfuse import build

WORKERS = 2
TIMEOUT_S = 240
Judge = Callable[[str, Connection], None]


def verdict_on(module: Path, judge: Judge) -> str:
    """Why the emulated kernels in `module` are caught; empty if they are not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnfuse.testing"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=judge, args=(str(module), there), daemon=True)
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


def verdicts_on(
    faults: list[Fault], judge: Judge, only: Sequence[str], root: Path, prepare: Callable[[Path], None] | None = None
) -> dict[str, str]:
    """The verdict on each fault, and on the kernels as they are under the name "".

    only: the instances that `judge` needs. prepare is called with each copy of csrc before it is built. What another
    call has left in root, is built upon.
    """
    folders = [root / str(n) for n in range(WORKERS)]
    for folder in folders:
        if folder.exists():
            continue
        shutil.copytree(build.CSRC, folder / "csrc")
        if prepare is not None:
            prepare(folder / "csrc")
    shares = [[Fault("", "attention.h", "", "")] * (n == 0) + faults[n::WORKERS] for n in range(WORKERS)]

    def one_share(n: int) -> dict[str, str]:
        found = {}
        for fault in shares[n]:
            file = folders[n] / "csrc" / fault.file
            whole = file.read_text()
            file.write_text(whole.replace(fault.old, fault.new) if fault.old else whole)
            try:
                module = build.build_emulation(
                    folders[n] / "build", only=only, sources_dir=folders[n] / "csrc", quiet=True
                )
                found[fault.name] = verdict_on(module, judge)
            except build.BuildError as error:
                found[fault.name] = f"NOT BUILT: {error}"
            file.write_text(whole)
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        return {name: verdict for share in pool.map(one_share, range(WORKERS)) for name, verdict in share.items()}
