"""`attnfuse info`: hardware, versions, and what each backend says of this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnfuse.cli import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    found = gather()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [(name, _text(held)) for name, held in found.items() if name not in ("backends", "gpus")]
    rows += [(f"gpu {n}", _text(gpu)) for n, gpu in enumerate(found["gpus"])] or [("gpu", "none")]
    rows += [(f"backend {name}", reason or "available") for name, reason in found["backends"].items()]
    table.show(("what", "here"), rows)
    return 0


def gather() -> dict[str, Any]:
    """What `info` prints and `check --json` heads its report with."""
    import torch

    from attnfuse import __version__, dispatch

    return {
        "attnfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton") or "not installed",
        "cuda": torch.version.cuda or "not in this build of torch",
        "cuda_extension": _extension(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpus": [_gpu(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "backends": {name: module.available() for name, module in dispatch.BACKENDS.items()},
    }


def device() -> str:
    """The GPU that backends run on, or the CPU, with how Triton and CUDA kernels run on it."""
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and installed("triton") is not None
    emulated = ", CUDA emulated" if os.environ.get("ATTNFUSE_EMULATE") == "1" else ""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name() + emulated
    return _cpu_name() + (", Triton interpreted" if interpreted else "") + emulated


def installed(package: str) -> str | None:
    """The package's version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extension() -> str:
    """The cards attnfuse._cuda has machine code (sm) or PTX (compute) for, or why it is not there."""
    from attnfuse.backends import cuda

    return cuda.missing_extension() or f"built for {', '.join(cuda.extension().ARCHITECTURES.split())}"


def _gpu(index: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "capability": f"sm_{found.major}{found.minor}",
        "memory_gb": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _text(held: Any) -> str:
    if isinstance(held, dict):
        return ", ".join(f"{name} {value}" if name != "name" else str(value) for name, value in held.items())
    return "unknown" if held is None else str(held)
