"""The Triton kernels compile for GPUs that are not here, and their machine code keeps its promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Compiling needs a process of its own: the tests around this one may run with TRITON_INTERPRET=1, which is read once.
SCRIPT = """
import json
from attnfuse.triton_kernels import machine

if __name__ == "__main__":
    wanted = machine.configs((80, 90, 100, 120), ("bf16",), (64, 128), ("fwd",), ("plain", "causal"))
    wanted += machine.configs((80, 90), ("bf16",), (128,), ("dq", "dkdv"), ("causal",))
    wanted += machine.configs((80,), ("bf16",), (64,), machine.PASSES, ("everything",))
    wanted += machine.configs((90,), ("bf16",), (96, 256), ("fwd",), ("causal",))
    wanted += machine.configs((120,), ("bf16",), (256,), ("dkdv",), ("plain",))
    wanted += machine.configs((80,), ("fp32",), (64,), ("dkdv",), ("plain",))
    wanted += machine.configs((80, 90, 100, 120), ("bf16",), (64, 128), ("split", "few"), ("plain",))
    wanted += machine.configs((90,), ("bf16",), (128,), ("split16", "few16"), ("plain",))
    wanted += machine.configs((80,), ("bf16",), (64,), ("few", "combine", "reduce"), ("everything",))
    rows = [[str(r.config), r.over_shared(), r.loop_local, r.registers, r.error] for r in machine.read_all(wanted)]
    print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bool, int, int, str]]:
    script = tmp_path_factory.mktemp("machine") / "read_machine.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_every_configuration_compiles(readings: list[tuple[str, bool, int, int, str]]) -> None:
    assert [f"{name}: {error}" for name, _, _, _, error in readings if error] == []
    assert all(registers > 0 for _, _, _, registers, _ in readings)


def test_shared_memory_fits(readings: list[tuple[str, bool, int, int, str]]) -> None:
    assert [name for name, over, _, _, _ in readings if over] == []


def test_forward_keeps_its_loops_in_registers(readings: list[tuple[str, bool, int, int, str]]) -> None:
    promised = [r for r in readings if " fwd " in r[0] and "bf16" in r[0] and r[0].split()[2] in ("d64", "d128")]
    promised = [r for r in promised if not r[0].endswith("everything")]
    assert len(promised) == 16
    assert [f"{name}: {local} local-memory instructions" for name, _, local, _, _ in promised if local] == []


def test_few_queries_keep_their_loops_in_registers(readings: list[tuple[str, bool, int, int, str]]) -> None:
    """Forward and backward, at the most rows a tile takes and at 16; what adds the partials up, too."""
    passes = {"split", "split16", "few", "few16", "combine", "reduce"}
    promised = [r for r in readings if r[0].split()[3] in passes]
    promised = [r for r in promised if r[0].endswith("plain") or r[0].split()[3] in ("combine", "reduce")]
    assert len(promised) == 20
    assert [f"{name}: {local} local-memory instructions" for name, _, local, _, _ in promised if local] == []


def test_loops_are_found_in_a_listing() -> None:
    from attnfuse.machine import loops

    listing = """
        /*0000*/ STL [R1], R2 ;
        /*0010*/ LDL.LU R3, [R1] ;
        /*0020*/ @P0 BRA 0x10 ;
        /*0030*/ LDL R4, [R1+0x4] ;
        /*0040*/ EXIT ;
        /*0050*/ BRA 0x50;
    """
    (loop,) = loops(listing)
    assert (loop.local, loop.instructions) == (1, 2)
