"""Disassembly: what ptxas made of a kernel, instruction by instruction, read by `cuobjdump` without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .. import build

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_USAGE = re.compile(r"Function (\S+?):\s*\n?\s*(REG:[^\n]*)")


class Instruction(NamedTuple):
    """One machine instruction, such as `@P0 HMMA.16816.F32 R4, R8, R12, R4`."""

    address: int
    guard: str  # "@P0", "@!UP1", or "" where it is always executed
    name: str  # with its modifiers
    operands: str

    @property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.split(".", 1)[0]


class Function(NamedTuple):
    """One kernel's machine code for one architecture."""

    name: str  # as in csrc, such as attn_fwd_kernel<bf16, 64>; a Triton kernel's own name
    arch: str  # "sm_90", "sm_90a", ...
    registers: int
    local: int  # bytes of local memory of a thread: spills and arrays
    static_shared: int  # bytes
    code: list[Instruction]


def cuobjdump() -> str:
    """The disassembler: beside nvcc, or in the triton package. Raises FileNotFoundError."""
    home = build.cuda_home()
    folders = [] if home is None else [home / "bin"]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    for folder in folders:
        found = shutil.which("cuobjdump", path=str(folder))
        if found is not None:
            return found
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump was not found: it comes with a CUDA toolkit and with the triton package")
    return found


def instructions(listing: str) -> list[Instruction]:
    """The instructions of one disassembled function."""
    found = _INSTRUCTION.findall(listing)
    return [Instruction(int(at, 16), guard, name, rest.strip()) for at, guard, name, rest in found]


def functions(source: Path | bytes) -> list[Function]:
    """The kernels in an object, a library or a cubin, for every architecture it has machine code for."""
    if isinstance(source, bytes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(source)
            return functions(path)
    dump = cuobjdump()
    usage = printed(dump, "-res-usage", str(source))
    listing = printed(dump, "-sass", str(source))
    taken: dict[tuple[str, str], dict[str, int]] = {}
    # A cubin is of one architecture, and its usage does not say which.
    for arch, part in _by_architecture(usage) or [("", usage)]:
        for name, line in _USAGE.findall(part):
            fields = re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)
            taken[arch.rstrip("af"), name] = {key: int(value) for key, value in fields}
    found = []
    for arch, part in _by_architecture(listing):
        for function in re.split(r"\n\s*Function : ", part)[1:]:
            name, _, text = function.partition("\n")
            use = taken.get(("", name.strip())) or taken[arch.rstrip("af"), name.strip()]
            local = max(use["STACK"], use["LOCAL"])
            code = instructions(text)
            found.append(Function(demangled(name.strip()), arch, use["REG"], local, use.get("SHARED", 0), code))
    return sorted(found, key=lambda f: (f.arch, f.name))


def printed(*command: str) -> str:
    """What a command prints; raises subprocess.CalledProcessError where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _by_architecture(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"\n(?:arch = |Fatbin elf code|\s*code for (?=sm_))", "\n" + text)
    found = []
    for part in parts:
        arch = re.search(r"sm_\w+", part)
        if arch is not None and "Function" in part:
            found.append((arch[0], part))
    return found


@cache
def demangled(name: str) -> str:
    """The template and its arguments, without parameters, and without the namespaces that most kernels are in."""
    filt = shutil.which("c++filt")
    if filt is None or not name.startswith("_Z"):
        return name
    plain = re.sub(r"\battnfuse::(?:sm80::)?", "", printed(filt, name).strip())
    # An enumerator is demangled as a cast, which the cut at the first parenthesis would take away.
    plain = re.sub(r"\(Wanted\)(\d)", lambda m: ("both", "key", "value")[int(m[1])], plain)
    return plain.removeprefix("void ").split("(", 1)[0]
