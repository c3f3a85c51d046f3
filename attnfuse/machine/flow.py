"""The control flow of a disassembled kernel: basic blocks, dominators, natural loops, and the way through a loop.

A loop is found by what control can do, not by where its lines stand: an edge u -> h whose target h dominates u is a
back edge, and its loop holds every block that reaches u without passing h (Aho, Lam, Sethi and Ullman, Compilers, 9.6).

    BRA          a branch; conditional if it has a guard or a predicate operand
    BSSY, BSYNC  threads that parted meet: BSYNC continues where the BSSY of the same barrier register says
    BRA.DIV      taken only by a warp whose threads have parted, which these kernels' warps never have at a shuffle:
                 its fallback, one thread group at a time, is not followed
    CALL         falls through; the callee is a root of its own
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from .sass import Instruction

# Instructions that multiply tiles, that bring one into shared memory, and that add one to global memory.
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "DMMA", "QGMMA")
BULK_COPIES = ("UTMALDG", "UBLKCP")
COPIES = ("LDGSTS", *BULK_COPIES)
BULK_REDUCTIONS = ("UBLKRED", "UTMAREDG")
REDUCTIONS = ("RED", "REDG", *BULK_REDUCTIONS)
LOCAL = ("LDL", "STL")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_BARRIER = re.compile(r"\bB\d+\b")


class Loop:
    """A natural loop. `code` is every instruction of its body, `path` those of one iteration (see `_least_path`)."""

    def __init__(self, begin: int, code: list[Instruction], own: list[Instruction], path: list[Instruction]) -> None:
        self.begin = begin  # address of the header
        self.code = code
        self.own = own  # of `code`, what lies in no loop inside this one
        self.path = path
        self.depth = 0
        self.parent: Loop | None = None

    @cached_property
    def names(self) -> Counter[str]:
        """How often each instruction, with its modifiers, stands in the body."""
        return Counter(x.name for x in self.code)

    @property
    def instructions(self) -> int:
        return len(self.code)

    @property
    def local(self) -> int:
        """Loads and stores of local memory anywhere in the body."""
        return sum(x.opcode in LOCAL for x in self.code)

    @property
    def step_local(self) -> int:
        """Of these, the ones on `path`."""
        return sum(x.opcode in LOCAL for x in self.path)

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies tiles itself, rather than in a loop inside it."""
        return any(x.opcode in PRODUCTS for x in self.own)

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.names.items() if name.startswith(prefix))


class Flow:
    """The graph of a function's blocks; block n is `blocks[n]`, a run of instructions entered only at its head."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        code = list(code)
        at = {x.address: n for n, x in enumerate(code)}
        meets = _meeting_points(code)
        leaders, roots = {0}, {0}
        targets: dict[int, list[int]] = {}  # of an instruction that may jump; None in it never occurs
        falls: dict[int, bool] = {}
        for n, x in enumerate(code):
            jumps = _jumps(x, meets)
            if jumps is None:
                if x.opcode == "CALL" and (to := _TARGET.findall(x.operands)) and int(to[-1], 16) in at:
                    roots.add(at[int(to[-1], 16)])
                    leaders.add(at[int(to[-1], 16)])
                continue
            to_all, falls[n] = jumps
            targets[n] = [at[to] for to in to_all if to in at]
            leaders.update(targets[n])
            if n + 1 < len(code):
                leaders.add(n + 1)
        heads = sorted(leaders) if code else []
        self.blocks = [code[b:e] for b, e in zip(heads, [*heads[1:], len(code)])]
        number = {head: n for n, head in enumerate(heads)}
        self.next: list[list[int]] = []
        for n, (head, block) in enumerate(zip(heads, self.blocks)):
            end = head + len(block) - 1
            following = [number[t] for t in targets.get(end, [])]
            if falls.get(end, True) and n + 1 < len(self.blocks):
                following.append(n + 1)
            self.next.append(list(dict.fromkeys(following)))
        self.roots = [number[r] for r in sorted(roots)] if code else []

    @cached_property
    def order(self) -> list[int]:
        """Reachable blocks in reverse postorder."""
        seen: set[int] = set()
        order: list[int] = []
        for root in self.roots:
            if root in seen:
                continue
            seen.add(root)
            stack = [(root, iter(self.next[root]))]
            while stack:
                block, rest = stack[-1]
                for to in rest:
                    if to not in seen:
                        seen.add(to)
                        stack.append((to, iter(self.next[to])))
                        break
                else:
                    order.append(block)
                    stack.pop()
        return order[::-1]

    @cached_property
    def previous(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for to in self.next[b]:
                found[to].append(b)
        return found

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """For each reachable block, the blocks that every way to it passes, itself included."""
        everything = set(self.order)
        found = {b: {b} if b in self.roots else everything for b in self.order}
        changed = True
        while changed:
            changed = False
            for b in self.order:
                if b in self.roots:
                    continue
                now = set.intersection(*(found[p] for p in self.previous[b])) | {b}
                if now != found[b]:
                    found[b], changed = now, True
        return found

    def loops(self) -> list[Loop]:
        """Every natural loop, outer ones before what they enclose; back edges to one header make one loop."""
        latches: dict[int, list[int]] = {}
        for b in self.order:
            for to in self.next[b]:
                if to in self.dominators[b]:
                    latches.setdefault(to, []).append(b)
        bodies = {header: self._body(header, ends) for header, ends in latches.items()}
        back = {(end, header) for header, ends in latches.items() for end in ends}
        found = []
        for header, body in bodies.items():
            # The padding behind the last instruction is a branch to itself.
            if len(body) == 1 and len(self.blocks[header]) == 1:
                continue
            inside = {b for h, other in bodies.items() if h != header and other < body for b in other}
            found.append((header, body, inside))
        loops = {
            header: Loop(
                self.blocks[header][0].address,
                self._code(body),
                self._code(body - inside),
                self._least_path(header, body, latches[header], back),
            )
            for header, body, inside in found
        }
        for header, body, _ in found:
            around = [h for h, other, _ in found if h != header and body < other]
            loops[header].depth = len(around)
            if around:
                loops[header].parent = loops[min(around, key=lambda h: len(bodies[h]))]
        return sorted(loops.values(), key=lambda x: (x.begin, x.depth))

    def _body(self, header: int, latches: list[int]) -> set[int]:
        body, stack = {header}, [b for b in latches if b != header]
        while stack:
            b = stack.pop()
            if b not in body:
                body.add(b)
                stack.extend(self.previous[b])
        return body

    def _code(self, body: set[int]) -> list[Instruction]:
        return [x for b in sorted(body) for x in self.blocks[b]]

    def _least_path(
        self, header: int, body: set[int], latches: list[int], back: set[tuple[int, int]]
    ) -> list[Instruction]:
        """One iteration that does a tile's products, copies and reductions and as little beside as the code allows.

        That is the iteration of an ordinary tile: masks, softcap, unaligned rows and rescaling, where they are
        branched around, are not on it; what is added of dQ is, although a branch asks for each part whether the head
        dim has it. Loops inside are passed once.
        """
        tensor = any(x.opcode in PRODUCTS for b in body for x in self.blocks[b])
        products = PRODUCTS if tensor else ("FFMA",)  # float32 tiles are multiplied without tensor cores
        best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
        for b in self.order:
            if b not in body:
                continue
            ways = [(best[p][0], p) for p in self.previous[b] if p in best and (p, b) not in back]
            before, way = max(ways, default=((0, 0, 0), None)) if b != header else ((0, 0, 0), None)
            block = self.blocks[b]
            moved = sum(x.opcode in COPIES or x.opcode in REDUCTIONS for x in block)
            gain = (sum(x.opcode in products for x in block), moved, -len(block))
            best[b] = (before[0] + gain[0], before[1] + gain[1], before[2] + gain[2]), way
        end: int | None = max(latches, key=lambda b: best[b][0])
        path: list[int] = []
        while end is not None:
            path.append(end)
            end = best[end][1]
        return [x for b in reversed(path) for x in self.blocks[b]]


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Every loop of a function, outer ones before what they enclose."""
    return Flow(code).loops()


def _meeting_points(code: Sequence[Instruction]) -> dict[int, int]:
    """Address of each BSYNC -> where it continues."""
    last: dict[str, int] = {}
    found = {}
    for x in code:
        barrier = _BARRIER.search(x.operands)
        if barrier is None:
            continue
        if x.opcode == "BSSY":
            last[barrier[0]] = int(_TARGET.findall(x.operands)[-1], 16)
        elif x.opcode == "BSYNC" and barrier[0] in last:
            found[x.address] = last[barrier[0]]
    return found


def _jumps(x: Instruction, meets: dict[int, int]) -> tuple[list[int], bool] | None:
    """(addresses it may jump to, whether it may also fall through); None if it ends no block."""
    if x.name.startswith("BRA.DIV"):
        return None
    if x.opcode in ("BRX", "JMX", "BRXU", "JMXU"):
        raise ValueError(f"{x.name} at {x.address:#x} jumps to a computed address: its loops cannot be read")
    if x.opcode in ("BRA", "JMP"):
        addresses = _TARGET.findall(x.operands)
        before = x.operands.split("0x")[0]
        conditional = bool(x.guard) or bool(re.search(r"!?U?P\d", before))
        return [int(addresses[-1], 16)] if addresses else [], conditional
    if x.opcode == "BSYNC" and x.address in meets:
        return [meets[x.address]], bool(x.guard)
    if x.opcode in ("EXIT", "RET", "KILL"):
        return [], bool(x.guard)
    return None
