"""Every fault of faults.py, planted in a copy of csrc and run under emulation, is caught by the conformance cases.

Caught is: a quantity over its budget, a report of the emulator (a race, a deadlock, a copy read before it landed), or
a process that dies. Only the instances of one head dim are built.
"""

from __future__ import annotations

import pytest
from faults import FAULTS, trials
from planting import verdicts_on

from attnfuse import build

pytestmark = pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation()))

NAMES = [fault.name for fault in FAULTS]
INSTANCES = ["attn_fwd_d64", "attn_bwd_dq_d64", "attn_bwd_dkdv_d64", "*_rows"]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The verdict on each fault, and on the kernels without any under the name "". One folder for all such tests."""
    return verdicts_on(FAULTS, trials, INSTANCES, tmp_path_factory.getbasetemp() / "planted")


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
