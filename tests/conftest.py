"""Set up before any test module is imported: where Triton kernels run, and how many threads torch takes."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch
from hypothesis import settings
from interpreter import patch_the_language_once

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Triton reads this once, when it is imported; torch does not import it.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py could ask for its interpreter"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        patch_the_language_once()

# Small tensors: threads only wait for each other, and on a busy machine for a long time.
torch.set_num_threads(1)

# An interpreted kernel has no honest deadline. In CI the examples are the same every time.
settings.register_profile("attnfuse", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("attnfuse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-cuda", action="store_true", help="no GPU is an error, not a reason to skip")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-cuda") and not HAS_GPU:
        raise pytest.UsageError("--require-cuda was given and torch sees no GPU")


def pytest_report_header(config: pytest.Config) -> str:
    where = torch.cuda.get_device_name() if HAS_GPU else "CPU, Triton kernels interpreted"
    return f"attnfuse on: {where}; torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: not tested on this machine"))
