"""Every fault of hopper_faults.py, planted in a copy of csrc and run under emulation, is caught.

Caught is what test_faults.py calls so. One instance, of head dim 64 in bfloat16, is built for each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hopper_faults import FAULTS, judge_all
from planting import verdicts_on

from attnfuse import build

pytestmark = pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation()))

NAMES = [fault.name for fault in FAULTS]
INSTANCE = "attn_fwd_d64_sm90"


def one_dtype(csrc: Path) -> None:
    """Compiling is most of what a fault costs: without the instance in float16."""
    file = csrc / "instances" / f"{INSTANCE}.cu"
    lines = [line for line in file.read_text().splitlines(keepends=True) if "fp16" not in line]
    file.write_text("".join(lines))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The verdict on each fault, and on the kernel as it is under the name ""."""
    return verdicts_on(FAULTS, judge_all, [INSTANCE], tmp_path_factory.mktemp("faults"), one_dtype)


def test_every_fault_is_one_change() -> None:
    """A fault whose text is no longer in the kernel would be planted nowhere."""
    for fault in FAULTS:
        assert (build.CSRC / fault.file).read_text().count(fault.old) == 1, fault.name
    assert len(set(NAMES)) == len(FAULTS) >= 25


def test_the_kernel_as_it_is_passes(verdicts: dict[str, str]) -> None:
    assert verdicts[""] == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_caught(name: str, verdicts: dict[str, str]) -> None:
    assert not verdicts[name].startswith("NOT BUILT"), verdicts[name]
    assert verdicts[name] != "", "the case passes with this fault"
