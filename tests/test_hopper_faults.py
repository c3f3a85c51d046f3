"""Every fault of hopper_faults.py and hopper_backward_faults.py, planted in a copy of csrc, is caught under emulation.

Caught is what test_faults.py calls so. Of each pass only the instances of its head dim are built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import hopper_backward_faults
import hopper_faults
import pytest
from faults import Fault
from planting import verdicts_on

from attnfuse import build

pytestmark = pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation()))

FORWARD, KEYS, ROWS = "attn_fwd_d64_sm90", "attn_bwd_d64_sm90", "attn_bwd_dq_d64_sm90"
MIDDLE = ["attn_fwd_d128_sm90", "attn_bwd_d128_sm90"]
WIDE = ["attn_fwd_d256_sm90", "attn_bwd_d256_sm90"]
PASSES = {
    "forward": hopper_faults.FAULTS,
    "backward over keys": hopper_backward_faults.FAULTS,
    "backward over keys, 128": hopper_backward_faults.MIDDLE_FAULTS,
    "backward over keys, 256": hopper_backward_faults.WIDE_FAULTS,
    "backward over rows": hopper_backward_faults.QUERY_FAULTS,
}
EACH = [(name, fault.name) for name, faults in PASSES.items() for fault in faults]


# The forward asks what a split would take before it goes without one.
TRIALS = {
    "forward": (hopper_faults.forward_trials, [FORWARD, "attn_fwd_split_d64"]),
    "backward over keys": (hopper_backward_faults.backward_trials, [FORWARD, KEYS, "attn_bwd_rows"]),
    "backward over keys, 128": (hopper_backward_faults.middle_trials, [*MIDDLE, "attn_bwd_rows"]),
    "backward over keys, 256": (hopper_backward_faults.wide_trials, [*WIDE, "attn_bwd_rows"]),
    "backward over rows": (hopper_backward_faults.query_trials, [FORWARD, KEYS, ROWS, "attn_bwd_rows"]),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Of a pass: the verdict on each fault, and on the kernels without any under the name ""."""

    @cache
    def of(name: str) -> dict[str, str]:
        trials, instances = TRIALS[name]
        return verdicts_on(PASSES[name], trials, instances, tmp_path_factory.getbasetemp() / "planted")

    return of


@pytest.mark.parametrize("faults", PASSES.values(), ids=PASSES)
def test_every_fault_is_one_change(faults: list[Fault]) -> None:
    """A fault whose text is no longer in the kernel would be planted nowhere."""
    for fault in faults:
        assert (build.CSRC / fault.file).read_text().count(fault.old) == 1, fault.name
    assert len({fault.name for fault in faults}) == len(faults) >= 15


def test_there_are_faults_enough() -> None:
    assert len(EACH) >= 100


@pytest.mark.parametrize("name", PASSES)
def test_the_kernel_as_it_is_passes(name: str, verdicts: Callable[[str], dict[str, str]]) -> None:
    assert verdicts(name)[""] == ""


@pytest.mark.parametrize("name, fault", EACH)
def test_a_fault_is_caught(name: str, fault: str, verdicts: Callable[[str], dict[str, str]]) -> None:
    verdict = verdicts(name)[fault]
    assert not verdict.startswith("NOT BUILT"), verdict
    assert verdict != "", "the case passes with this fault"
