"""Sources that hold many faults, of which one is chosen when they run: compiled once, and not once a fault.

Where a fault changes statements, they become

    if (planted_fault == 17) { the statements with the fault } else { the statements as they are }

and where it changes a declaration, or the head of an if or a loop, the smallest expression around the change becomes

    (planted_fault == 17 ? (the expression with the fault) : (the expression as it is))

Either way what runs with 17 chosen is, letter by letter, the file with that fault's text replaced. What a program
cannot choose when it runs, such as a constant that a type is made of, needs a build of its own.

csrc is laid out by clang-format: lines and their indentation tell where statements begin and end.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from faults import Fault

ENVIRONMENT = "ATTNFUSE_PLANTED_FAULT"
HEADER = "planted_fault.h"
HEADER_TEXT = f"""// The number of the fault that is chosen, 0 for none.
#pragma once
#include <cstdlib>

inline const int planted_fault = [] {{
    const char* const number = std::getenv("{ENVIRONMENT}");
    return number == nullptr ? 0 : std::atoi(number);
}}();
"""

# More lines than these are not worth being compiled twice.
MOST_LINES = 40

_NO_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:[^\"\\\n]|\\.)*\"|^[ \t]*#[^\n]*", re.DOTALL | re.MULTILINE)
_DECLARES = re.compile(
    r"\s*(?!(?:return|throw|case|goto|else|delete)\b)"
    r"(?:(?:const|static|constexpr|using|auto|struct|template)\b|[\w:]+(?:<[^;=]*>)?[\s&*]+\w)"
)
_SCOPE = re.compile(r"\b(?:struct|class|namespace|enum|union)\b")
_CONSTANT = re.compile(r"(?<!if )\bconstexpr\b|\bstatic_assert\b|\busing\b")
_OPENING, _CLOSING = "([{", ")]}"


class Planted(NamedTuple):
    """A file with many faults in it.

    lines: of which lines of `text`, counted from 0, the faults of which numbers have written something.
    alone: the numbers of the faults that cannot be chosen when it runs.
    """

    text: str
    lines: list[tuple[range, list[int]]]
    alone: list[int]


def plant(text: str, faults: Mapping[int, Fault]) -> Planted:
    """The file with all those of the faults, each under a number that is not 0, that can be chosen when it runs.

    Faults that overlap share a place. Where no place holds them all, the later one is left out.
    """
    source = _Source(text)
    places: list[tuple[_Place, list[int]]] = []
    alone = []
    for number in faults:
        joined, apart = [number], places
        while (place := source.place({n: faults[n] for n in joined})) is not None:
            met = [one for one in apart if place.touches(one[0])]
            if not met:
                break
            joined = sorted({*joined, *(n for _, numbers in met for n in numbers)})
            apart = [one for one in apart if one not in met]
        if place is None:
            alone.append(number)
        else:
            places = [*apart, (place, joined)]
    written, at, lines = f'#include "{HEADER}"\n', 0, []
    for place, numbers in sorted(places):
        written += text[at : place.start]
        first = written.count("\n")
        written += place.text
        lines.append((range(first, written.count("\n") + 1), numbers))
        at = place.end
    return Planted(written + text[at:], lines, alone)


class _Place(NamedTuple):
    """What stands from one character of a file to another is replaced by a text."""

    start: int
    end: int
    text: str

    def touches(self, other: _Place) -> bool:
        return self.start < other.end and other.start < self.end


class _Change(NamedTuple):
    """A fault as it differs from the file: what stands from one character to another becomes `new`."""

    start: int
    end: int
    new: str

    def within(self, text: str, start: int, end: int) -> str:
        """That part of the text with the fault."""
        return text[start : self.start] + self.new + text[self.end : end]


class _Source:
    def __init__(self, text: str) -> None:
        self.text = text
        self.code = _code(text)
        self.lines = self.code.splitlines(keepends=True)
        self.starts = [0, *accumulate(map(len, self.lines))]

    def place(self, faults: Mapping[int, Fault]) -> _Place | None:
        """Where all these faults can be chosen at once; None if there is no such place."""
        statements, expression = self._statements(faults), self._expression(faults)
        # An expression in the head of a loop is less than all that the loop repeats.
        if statements is None or (expression is not None and "{\n" in self.code[statements.start : statements.end]):
            return expression
        return statements

    def _is_constant(self, at: int) -> bool:
        """Whether the compiler must know what stands there: its statement says so, or the function around it."""
        return any(map(_CONSTANT.search, [self._statement(at), *self._headers(self._line(at))]))

    def _statement(self, at: int) -> str:
        return re.split(r"[;{}]", self.code[:at])[-1] + re.split(r"[;{}]", self.code[at:])[0]

    # Statements

    def _statements(self, faults: Mapping[int, Fault]) -> _Place | None:
        """The fewest lines that are statements, with every fault and without, and declare nothing for what follows."""
        changes = {number: self._lines_changed(fault) for number, fault in faults.items()}
        first = self._line(min(change.start for change in changes.values()))
        last = self._line(max(change.end for change in changes.values()))
        if any(change.end > change.start and self._is_constant(change.start) for change in changes.values()):
            return None
        for size in range(max(last - first, 1), MOST_LINES):
            for begin in range(max(last - size, 0), min(first, len(self.lines) - size) + 1):
                start, end = self.starts[begin], self.starts[begin + size]
                if not self._may_be_cut(begin, begin + size):
                    continue
                texts = {n: change.within(self.text, start, end) for n, change in changes.items()}
                ends_block = self._code_after(begin + size).startswith("}")
                if all(_are_statements(_code(t), ends_block) for t in (*texts.values(), self.text[start:end])):
                    pieces = [f"if (planted_fault == {n}) {{\n{text}}} else " for n, text in texts.items()]
                    pieces.append(f"{{\n{self.text[start:end]}}}\n")
                    return _Place(start, end, "".join(pieces))
        return None

    def _lines_changed(self, fault: Fault) -> _Change:
        """Whole lines of the file, none if there are only new ones."""
        at = self.text.index(fault.old)
        begin, end = self._line(at), self._line(at + len(fault.old) - 1) + 1
        start, stop = self.starts[begin], self.starts[end]
        old = self.text[start:stop].splitlines(keepends=True)
        new = _Change(at, at + len(fault.old), fault.new).within(self.text, start, stop).splitlines(keepends=True)
        before = _common(old, new)
        behind = _common(old[before:][::-1], new[before:][::-1])
        first, last = self.starts[begin + before], self.starts[end - behind]
        return _Change(first, last, "".join(new[before : len(new) - behind]))

    def _line(self, at: int) -> int:
        """The line that the character is in."""
        return bisect_right(self.starts, at) - 1

    def _may_be_cut(self, begin: int, end: int) -> bool:
        """Whether statements of a function may begin with one line and end before another."""
        before = "".join(self.lines[max(begin - MOST_LINES, 0) : begin]).rstrip()
        if not before.endswith((";", "{", "}")) or self._code_after(end).startswith("else"):
            return False
        headers = list(self._headers(begin))
        return bool(headers) and not _SCOPE.search(headers[0])

    def _code_after(self, line: int) -> str:
        return "".join(self.lines[line : line + MOST_LINES]).lstrip()

    def _headers(self, line: int) -> Iterator[str]:
        """The last lines of what opened each block that the line is in, the innermost first."""
        inside = _indentation(self.lines[line]) if self.lines[line].strip() else 10**6
        for above in reversed(self.lines[:line]):
            if above.rstrip().endswith("{") and _indentation(above) < inside:
                inside = _indentation(above)
                yield above

    # Expressions

    def _expression(self, faults: Mapping[int, Fault]) -> _Place | None:
        """The smallest expression that all faults change, and nothing else."""
        changes = {number: self._characters_changed(fault) for number, fault in faults.items()}
        start = min(change.start for change in changes.values())
        end = max(change.end for change in changes.values())
        while True:
            start, end = self._slot(start, end)
            texts = {n: change.within(self.text, start, end) for n, change in changes.items()}
            if all(_is_expression(_code(text)) for text in (*texts.values(), self.text[start:end])):
                break
            # What the next brackets enclose, and they; not beyond the statement.
            if start == 0 or end == len(self.code) or self.code[start - 1] not in "([," or self.code[end] not in ")],":
                return None
            start, end = start - 1, end + 1
        if self._is_constant(start) or "if constexpr" in self._statement(start):
            return None
        pieces = [f"planted_fault == {n} ? ({_closed(text)}) : " for n, text in texts.items()]
        text = f"({''.join(pieces)}({_closed(self.text[start:end])}))"
        return _Place(start, end, text)

    def _characters_changed(self, fault: Fault) -> _Change:
        """From the first character that differs to the last, and what of a word, a number or a sign is around them."""
        at = self.text.index(fault.old)
        before = _common(fault.old, fault.new)
        behind = _common(fault.old[before:][::-1], fault.new[before:][::-1])
        return _Change(at + before, at + len(fault.old) - behind, fault.new[before : len(fault.new) - behind])

    def _slot(self, start: int, end: int) -> tuple[int, int]:
        """From behind the bracket, comma, assignment or return before, to before the bracket, comma or end behind."""
        depth = 0
        while start > 0:
            character = self.code[start - 1]
            if depth == 0 and (character in _OPENING + ",;" or re.search(r"( = |\breturn )$", self.code[:start][-8:])):
                break
            depth += (character in _CLOSING) - (character in _OPENING)
            start -= 1
        depth = 0
        while end < len(self.code):
            character = self.code[end]
            if depth == 0 and character in _CLOSING + ",;":
                break
            depth += (character in _OPENING) - (character in _CLOSING)
            end += 1
        blank = len(self.code[start:end]) - len(self.code[start:end].lstrip())
        return start + blank, end


def _code(text: str) -> str:
    """The text with blanks for comments, strings and directives."""
    return _NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def _is_balanced(code: str) -> bool:
    open_brackets = []
    for character in code:
        if character in _OPENING:
            open_brackets.append(character)
        elif character in _CLOSING and (
            not open_brackets or _OPENING.index(open_brackets.pop()) != _CLOSING.index(character)
        ):
            return False
    return not open_brackets


def _are_statements(code: str, may_declare: bool) -> bool:
    """Whether lines are whole statements, maybe none, and declare nothing unless that goes out of scope with them."""
    if code.strip() and not (code.rstrip().endswith((";", "}")) and _is_balanced(code)):
        return False
    if may_declare:
        return True
    lines = [line for line in code.splitlines() if line.strip()]
    outermost = min(map(_indentation, lines), default=0)
    return not any(_indentation(line) == outermost and _DECLARES.match(line) for line in lines)


def _is_expression(code: str) -> bool:
    """Whether it may stand in brackets: something, in one piece, and no comma outside brackets."""
    depth = 0
    for character in code:
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and character in ",;":
            return False
    return bool(code.strip()) and _is_balanced(code)


def _closed(text: str) -> str:
    """What may be followed by a bracket: a comment ends."""
    return text + "\n" * ("//" in text)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _common(one: str | list[str], other: str | list[str]) -> int:
    """How much of two beginnings is the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
