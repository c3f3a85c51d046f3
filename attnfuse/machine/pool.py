"""Both languages at once: one pool of processes for the readings, the CUDA compilers beside it, and what is left to do.

Work is counted in seconds of one core, roughly known beforehand (`effort`), so that the share that is done tells the
time that is left although a kernel with every feature takes three times as long as a plain one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from . import cuda_code, triton_code
from .reading import Reading

# Seconds of one core: to compile what nvcc or g++ is given, and to read an object.
COMPILE, READ = 4.0, 1.0
# Configurations that are compiled and then disassembled together take about this long. Shorter ones would pay for
# more disassemblers, longer ones would leave the last processes waiting for each other.
TOGETHER = 10.0


def seconds(config: triton_code.Config) -> float:
    """About how long one core compiles and reads a configuration."""
    if config.pass_ in ("combine", "reduce"):
        return 0.6
    return {"everything": 3.0, "several": 4.5}.get(config.variant, 1.5)


class Task(NamedTuple):
    """What one process does in one go."""

    name: str
    effort: float
    run: Callable[[], list[Reading]]


class Build(NamedTuple):
    """What a compiler driver does beside the pool, and what follows from it."""

    name: str
    effort: float  # of each command it runs
    commands: int
    run: Callable[[Callable[[str], None]], Path]  # calls its argument with the name of each command that has ended
    then: Callable[[Path], list[Task]]
    then_effort: float  # of all of them


class Step(NamedTuple):
    """What has just been done."""

    name: str
    effort: float
    readings: list[Reading]


def triton_tasks(wanted: Sequence[triton_code.Config], workers: int | None = None) -> list[Task]:
    """Tasks that compile and read `wanted`, the longest first, so that none is left running alone."""
    at_most = min(TOGETHER, sum(map(seconds, wanted)) / (4 * (workers or os.cpu_count() or 1)))
    groups: list[list[triton_code.Config]] = []
    room = 0.0
    for config in sorted(wanted, key=lambda c: (c.arch, -seconds(c), -c.head_dim)):
        if seconds(config) > room or groups[-1][-1].arch != config.arch:
            groups.append([])
            room = max(at_most, seconds(config))
        groups[-1].append(config)
        room -= seconds(config)
    groups.sort(key=lambda group: -seconds(group[0]))
    return [
        Task(f"triton sm_{group[-1].arch} {group[-1].kernel}", sum(map(seconds, group)),
             partial(triton_code.read, group))
        for group in groups
    ]  # fmt: skip


def cuda_build(arch: int, head_dims: Sequence[int], passes: Sequence[str], workers: int | None = None) -> Build:
    """What compiles csrc/instances for `arch`, and then the tasks that read the objects. Raises BuildError."""
    plan, instances = cuda_code.plan(arch), cuda_code.instances(arch)

    def then(folder: Path) -> list[Task]:
        return [
            Task(f"cuda sm_{arch} {instance}", READ,
                 partial(cuda_code.read_object, folder, arch, head_dims, passes, instance))
            for instance in instances
        ]  # fmt: skip

    return Build(
        f"sm_{arch}", COMPILE, len(plan.missing), partial(cuda_code.compiled, plan, workers or os.cpu_count()), then,
        READ * len(instances),
    )  # fmt: skip


def effort(tasks: Sequence[Task], builds: Sequence[Build]) -> float:
    """Of all of it."""
    return sum(task.effort for task in tasks) + sum(b.effort * b.commands + b.then_effort for b in builds)


def done(
    tasks: Sequence[Task],
    builds: Sequence[Build],
    workers: int | None = None,
    told: Callable[[Step], None] = lambda step: None,
) -> Iterator[Reading]:
    """The readings as they come. told: called after every task and every command, whose efforts add up to `effort`."""
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool, ThreadPoolExecutor(1) as beside:
        pool.submit(os.getpid)  # the pool's processes are forked here, before there is a second thread
        reading: dict[Future[list[Reading]], Task] = {pool.submit(task.run): task for task in tasks}
        building: dict[Future[Path], Build] = {beside.submit(_build, build, told): build for build in builds}
        try:
            while reading or building:
                futures: list[Future[Any]] = [*reading, *building]
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    if future in building:
                        for task in building.pop(future).then(future.result()):
                            reading[pool.submit(task.run)] = task
                    else:
                        task, found = reading.pop(future), future.result()
                        told(Step(task.name, task.effort, found))
                        yield from found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build(build: Build, told: Callable[[Step], None]) -> Path:
    left = build.commands

    def ended(command: str) -> None:
        nonlocal left
        if left:  # linking is not counted
            left -= 1
            told(Step(f"{command} {build.name}", build.effort, []))

    folder = build.run(ended)
    if left:  # somebody else has compiled them meanwhile
        told(Step(build.name, left * build.effort, []))
    return folder
