"""Reading machine code without a GPU: what ptxas made of a kernel, and what its loops hold.

    python -m attnfuse.machine            every CUDA kernel in build/cuda, as a table
    python -m attnfuse.machine --write    the same into docs/cuda_machine_code.md

Objects are compiled there by setup.py; each holds machine code for the architectures of attnfuse/build.py.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import build
from .cli import table

ROOT = build.CSRC.parent
DOCUMENT = ROOT / "docs" / "cuda_machine_code.md"
WIDE_PRODUCT = "HMMA.16816"

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")


class Loop(NamedTuple):
    """The instructions between the target of a backward branch and the branch."""

    begin: int
    end: int
    names: Counter[str]  # with their modifiers

    @property
    def instructions(self) -> int:
        return sum(self.names.values())

    @property
    def local(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL") + self.count("STL")

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.names.items() if name.startswith(prefix))

    def encloses(self, other: Loop) -> bool:
        return self != other and self.begin <= other.begin and other.end <= self.end


class Kernel(NamedTuple):
    """What one architecture's machine code of one kernel takes."""

    name: str  # as in csrc, such as attn_fwd_kernel<bf16, 64>
    arch: str
    registers: int
    local: int  # bytes of local memory of a thread
    loops: list[Loop]

    @property
    def main_loop(self) -> Loop | None:
        """The longest loop with matrix products."""
        return max((x for x in self.loops if x.count("HMMA")), key=lambda x: x.instructions, default=None)

    @property
    def loop_local(self) -> int:
        """Local-memory instructions in the loop that has most of them."""
        return max((x.local for x in self.loops), default=0)


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


def loops(sass: str) -> list[Loop]:
    """Every loop of a disassembled function, outer ones with what they enclose."""
    code = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(sass)]
    found = []
    for at, name, rest in code:
        if name.startswith("BRA"):
            target = re.findall(r"0x([0-9a-f]+)", rest)
            # A branch to itself is the padding behind the last instruction.
            if target and int(target[-1], 16) < at:
                begin = int(target[-1], 16)
                names = Counter(inner for where, inner, _ in code if begin <= where <= at)
                found.append(Loop(begin, at, names))
    return found


def kernels(object_file: Path) -> list[Kernel]:
    """The kernels in an object file or a cubin, of every architecture it has machine code for."""
    dump = cuobjdump()
    usage = _printed(dump, "-res-usage", str(object_file))
    listing = _printed(dump, "-sass", str(object_file))
    found = []
    taken: dict[tuple[str, str], tuple[int, int]] = {}
    for arch, part in _by_architecture(usage):
        for name, line in re.findall(r"Function (\S+?):\s*\n?\s*(REG:[^\n]*)", part):
            fields = dict(re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line))
            taken[arch, name] = (int(fields["REG"]), max(int(fields["STACK"]), int(fields["LOCAL"])))
    for arch, part in _by_architecture(listing):
        for function in re.split(r"\n\s*Function : ", part)[1:]:
            name, _, sass = function.partition("\n")
            registers, local = taken[arch, name.strip()]
            found.append(Kernel(_demangled(name.strip()), arch, registers, local, loops(sass)))
    return sorted(found, key=lambda k: (k.arch, k.name))


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _by_architecture(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"\n(?:arch = |Fatbin elf code)", "\n" + text)
    found = []
    for part in parts:
        arch = re.search(r"sm_\w+", part)
        if arch is not None and ("Function" in part):
            found.append((arch[0], part))
    return found


def _demangled(name: str) -> str:
    """The template and its arguments, without namespaces and parameters."""
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    plain = _printed(filt, name).strip().replace("attnfuse::", "").replace("sm80::", "")
    return plain.removeprefix("void ").split("(", 1)[0] + _wanted(plain)


def _wanted(plain: str) -> str:
    # An enumerator is demangled as a cast, which the cut at the first parenthesis has taken away.
    found = re.search(r"\(Wanted\)(\d)", plain)
    return f"{('both', 'key', 'value')[int(found[1])]}>" if found else ""


def read_build(folder: Path = ROOT / "build" / "cuda") -> list[Kernel]:
    """Every kernel of the objects that setup.py has compiled. Raises FileNotFoundError if there are none."""
    objects = [o for o in sorted((folder / "instances").glob("*.o")) if not o.stem.endswith(build.HOPPER_SUFFIX)]
    if not objects:
        raise FileNotFoundError(f"{folder} holds no compiled kernels: install attnfuse where there is an nvcc")
    return [kernel for path in objects for kernel in kernels(path)]


COLUMNS = ("kernel", "arch", "registers", "local bytes", "loop", "HMMA", "LDSM", "MUFU", "local in loops")


def row(kernel: Kernel) -> tuple[str, ...]:
    """A kernel's line of the table."""
    loop = kernel.main_loop
    inside = ("-",) * 4 if loop is None else (loop.instructions, *(loop.count(x) for x in ("HMMA", "LDSM", "MUFU")))
    return tuple(map(str, (kernel.name, kernel.arch, kernel.registers, kernel.local, *inside, kernel.loop_local)))


def shared_rows() -> list[tuple[str, ...]]:
    """Tile and shared memory of every pass, as the built extension tells them."""
    from attnfuse import _cuda  # type: ignore[attr-defined]

    found: list[tuple[str, ...]] = []
    for dim in (64, 96, 128, 256):
        for name, rows, columns, threads, shared in _cuda.tile_shapes(dim):
            found.append((name, str(dim), f"{rows} x {columns}", str(threads), f"{shared / 1024:.1f} KB"))
    return found


def document(found: Sequence[Kernel]) -> str:
    """The text of docs/cuda_machine_code.md."""
    compiler = _printed(str(build.cuda_home() / "bin" / "nvcc"), "--version").split("release ")[-1].split(",")[0]  # type: ignore[operator]
    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"Compiled by nvcc {compiler}, read by `python -m attnfuse.machine --write`. Nothing here was timed: these are "
        "properties of the code.",
        "",
        "`loop` is the main loop's instructions with every branch of it: the softcap, masks and unaligned copies that "
        "a plain call jumps over are included. HMMA, LDSM and MUFU (exponentials, tanh) are counted in it. Every "
        f"product is the wide {WIDE_PRODUCT}.",
        "",
        *_markdown(COLUMNS, [row(kernel) for kernel in found]),
        "",
        "## Tiles",
        "",
        "A block's rows and columns, threads and shared memory. Where a pass has two, the first is for cards whose "
        "blocks may have 163 KB and the second for those with 99 KB (head dim 128), or they are two launches, dV and "
        "then dK with dQ (head dim 256).",
        "",
        *_markdown(("pass", "head dim", "tile", "threads", "shared memory"), shared_rows()),
    ]
    return "\n".join(lines) + "\n"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    given = parser.parse_args(argv)
    try:
        found = read_build()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    if given.write:
        DOCUMENT.write_text(document(found))
    else:
        table.show(COLUMNS, [row(kernel) for kernel in found])
    return int(any(kernel.loop_local for kernel in found))


if __name__ == "__main__":
    raise SystemExit(main())
