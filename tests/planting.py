"""Planting faults in a copy of csrc, built for the emulation, and judging each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import csrc_copy
import torch
from faults import Fault
from planted_source import ENVIRONMENT, HEADER, HEADER_TEXT, plant

from attnfuse import build
from attnfuse.testing import Result

WORKERS = 2
TIMEOUT_S = 240
# What torch imports when it is first told to be deterministic, or first differentiates: a second for each process.
SLOW_TO_IMPORT = ("torch._inductor.config",)
# What may catch a fault, in turn: what it is called, and the call that compares results or raises RuntimeError.
Trials = Callable[[], Iterator[tuple[str, Callable[[], list[Result]]]]]


def verdicts_on(faults: Sequence[Fault], trials: Trials, only: Sequence[str], root: Path) -> dict[str, str]:
    """Why each fault is caught, an empty text if it is not; and of the kernels with none chosen, under the name "".

    One build holds all faults that can be chosen when it runs; the others, and such as do not compile like this, of
    which a warning tells, get a build each.

    trials: what runs in a process of its own for each fault, bfloat16 throughout: csrc is built without float16.
    only: the instances that they need. What another call has left in root is built upon.
    """
    numbered = dict(enumerate(faults, 1))
    copy = _Copy(root, only)
    found: dict[str, Future[str] | str] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        together, alone = copy.build_together(numbered)
        for number, fault in {0: Fault("", "", "", ""), **numbered}.items():
            if number not in alone:
                found[fault.name] = pool.submit(verdict_on, together, number, trials)
        for number in alone:
            try:
                module = copy.build_alone(number, numbered[number])
            except build.BuildError as error:
                found[numbered[number].name] = f"NOT BUILT: {error}"
            else:
                found[numbered[number].name] = pool.submit(verdict_on, module, 0, trials)
    return {name: verdict if isinstance(verdict, str) else verdict.result() for name, verdict in found.items()}


def verdict_on(module: Path, number: int, trials: Trials) -> str:
    """Why the emulated kernels in `module`, with the fault of this number chosen, are caught; empty if they are not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnfuse.testing", *SLOW_TO_IMPORT])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(str(module), number, trials, there), daemon=True)
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


def _judge(module: str, number: int, trials: Trials, verdict: Connection) -> None:
    """Send the first thing that is wrong, or an empty text."""
    os.environ["ATTNFUSE_EMULATE"] = "1"
    os.environ["ATTNFUSE_EMULATE_MODULE"] = module
    os.environ[ENVIRONMENT] = str(number)
    torch.set_num_threads(1)
    for name, trial in trials():
        try:
            results = trial()
        except RuntimeError as error:
            verdict.send(f"{name}: {error}")
            return
        for result in results:
            if not result.passed:
                verdict.send(f"{name}: {result.quantity} is off by {result.error:.3g}, budget {result.budget:.3g}")
                return
    verdict.send("")


class _Copy:
    """csrc in root/csrc with texts replaced, its objects in root/build: a file that stays as it is, is built once."""

    def __init__(self, root: Path, only: Sequence[str]) -> None:
        self.root = root.resolve()
        self.only = only
        self.csrc = self.root / "csrc"
        self.texts = csrc_copy.texts()
        self.planted: dict[str, str] = {}

    def build_together(self, faults: dict[int, Fault]) -> tuple[Path, list[int]]:
        """The module in which a fault is chosen by its number, and the numbers of those that it cannot hold."""
        alone: list[int] = []
        while True:
            self.planted = {HEADER: HEADER_TEXT}
            lines = {}
            of_file: dict[str, dict[int, Fault]] = defaultdict(dict)
            for number, fault in faults.items():
                if number not in alone:
                    of_file[fault.file][number] = fault
            for file, planted_there in of_file.items():
                planted = plant(self.texts[file], planted_there)
                self.planted[file], lines[file] = planted.text, planted.lines
                alone += planted.alone
            try:
                return self._build("together", self.planted), alone
            except build.BuildError as error:
                blamed = {}
                for file, line, message in re.findall(r"^(\S+?):(\d+):\d+: (?:fatal )?error: (.*)$", str(error), re.M):
                    for where, numbers in lines.get(self._name(file), []):
                        if int(line) - 1 in where:
                            blamed.update(dict.fromkeys(numbers, message))
                if not blamed:
                    raise
                for number, message in blamed.items():
                    warnings.warn(
                        f"the fault {faults[number].name!r} has a build of its own: with others it does not compile, "
                        f"{message}",
                        stacklevel=2,
                    )
                alone += blamed

    def build_alone(self, number: int, fault: Fault) -> Path:
        """The module with this fault; those of other files may be in it too, and are not chosen."""
        whole = self.texts[fault.file]
        return self._build(str(number), {**self.planted, fault.file: whole.replace(fault.old, fault.new)})

    def _build(self, name: str, changed: dict[str, str]) -> Path:
        csrc_copy.write(self.csrc, {**self.texts, **changed})
        built = build.build_emulation(self.root / "build", only=self.only, sources_dir=self.csrc, quiet=True)
        kept = self.root / "modules" / name / built.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        # A new file: a process may still have the last one of this name in its memory.
        kept.unlink(missing_ok=True)
        return Path(shutil.copy(built, kept))

    def _name(self, path: str) -> str:
        """Of a file in a compiler's message: its name in csrc."""
        resolved = Path(path).resolve()
        return str(resolved.relative_to(self.csrc)) if resolved.is_relative_to(self.csrc) else ""
