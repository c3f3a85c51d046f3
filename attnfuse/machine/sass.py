"""Disassembly: what ptxas made of a kernel, instruction by instruction, read without a GPU.

    functions     by cuobjdump: an object, a library or a cubin, whatever it holds
    of_cubins     by nvdisasm: many cubins at once, since the disassembler takes longer to start than to read a kernel

Both list the same instructions.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
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
    """Reads objects: beside nvcc, or in the triton package. Raises FileNotFoundError."""
    return _tool("cuobjdump")


def _tool(name: str) -> str:
    home = build.cuda_home()
    folders = [] if home is None else [home / "bin"]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    for folder in folders:
        found = shutil.which(name, path=str(folder))
        if found is not None:
            return found
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} was not found: it comes with a CUDA toolkit and with the triton package")
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
        for name, use in _used(part).items():
            taken[arch.rstrip("af"), name] = use
    found = []
    for arch, part in _by_architecture(listing):
        for function in re.split(r"\n\s*Function : ", part)[1:]:
            name, _, text = function.partition("\n")
            use = taken.get(("", name.strip())) or taken[arch.rstrip("af"), name.strip()]
            found.append(_function(name.strip(), arch, use, instructions(text)))
    return sorted(found, key=lambda f: (f.arch, f.name))


def of_cubins(cubins: Sequence[bytes], arch: int) -> list[Function]:
    """The kernel of each cubin, all of one architecture (80, 90, ...), and each holding one kernel and nothing else.

    Their code is put one behind the other and disassembled as one run, so addresses count on through all of them.
    """
    if not cubins:
        return []
    found, ends, end = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        raw, one = Path(folder) / "code", Path(folder) / "kernel.cubin"
        with open(raw, "wb") as out:
            for cubin in cubins:
                one.write_bytes(cubin)
                ((name, use),) = _used(printed(cuobjdump(), "-res-usage", str(one))).items()
                code = _section(cubin, f".text.{name}")
                out.write(code)
                end += len(code)
                ends.append(end)
                found.append((name, use))
        # What only one architecture has, such as wgmma, is code of sm_90a.
        full_name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        listed = instructions(printed(_tool("nvdisasm"), "-b", full_name.replace("sm_", "SM"), str(raw)))
    at = [x.address for x in listed]
    cuts = [0, *(bisect_left(at, end) for end in ends)]
    return [
        _function(name, full_name, use, listed[begin:end])
        for (name, use), begin, end in zip(found, cuts, cuts[1:])
    ]  # fmt: skip


def _used(usage: str) -> dict[str, dict[str, int]]:
    """Of each function, what `cuobjdump -res-usage` says it takes."""
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
        for name, line in _USAGE.findall(usage)
    }


def _function(name: str, arch: str, use: dict[str, int], code: list[Instruction]) -> Function:
    local = max(use["STACK"], use["LOCAL"])
    return Function(demangled(name), arch, use["REG"], local, use.get("SHARED", 0), code)


def _section(elf: bytes, name: str) -> bytes:
    """A section's contents in a 64-bit little-endian ELF file, which a cubin is (System V ABI, object files)."""
    (headers,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, headers + n * size) for n in range(count)]
    strings = sections[names][4]
    for title, _, _, _, offset, length in sections:
        begin = strings + title
        if elf[begin : elf.index(b"\0", begin)].decode() == name:
            return elf[offset : offset + length]
    raise ValueError(f"the cubin has no section {name}")


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
