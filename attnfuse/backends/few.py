"""Few queries and long keys: when the kernels for them are taken, and how many ways they split the keys.

Rows are packed ones here: the query heads of a key head stand below each other, group Nq of them, and read its keys
once. Bytes alone decide, so that the rule is the same for the kernels of every language.
"""

from __future__ import annotations

from typing import NamedTuple

from ..problem import UNBOUNDED, Problem

# A split costs a partial of 4 Dv bytes a row, written and read once; its keys cost (D + Dv) times 2 or 4 bytes. From
# 4 rows keys on, the partials are at most half of the keys' bytes, and they stay in the second-level cache.
MIN_KEYS = 256  # that a split must have
LONG_KEYS = 1024  # from here on the backward is query-stationary, be it with one split
KEYS_PER_ROW = 4
WAVES = 2  # programs for each multiprocessor that splitting aims at
MAX_SPLITS = 256


class Plan(NamedTuple):
    """Which kernels a pass takes: the plain ones (splits 0), or those for few queries with the keys split."""

    splits: int
    why: str


def split_count(programs: int, keys: int, rows: int, multiprocessors: int) -> int:
    """How many ways `keys` visible columns are split where `programs` times that many programs would run."""
    by_keys = keys // max(MIN_KEYS, KEYS_PER_ROW * rows)
    by_programs = WAVES * multiprocessors // max(programs, 1)
    return max(1, min(by_keys, by_programs, MAX_SPLITS))


def long_for(rows: int) -> int:
    """From how many visible columns on the kernels for few queries pay for so many rows."""
    return max(LONG_KEYS, KEYS_PER_ROW * rows)


def visible_keys(problem: Problem) -> int:
    """How many columns some row may see, by the sources' sizes and bands; lengths and masks are on the device."""
    rows, keys = problem.query.shape[2], 0
    for source in problem.sources:
        lo, hi = 0, source.key.shape[2]
        right = 0 if source.causal else source.window_right
        if source.offsets is None:
            if right != UNBOUNDED:
                hi = min(hi, rows + source.offset + right)
            if source.window_left != UNBOUNDED:
                lo = max(0, source.offset - source.window_left)
        keys += max(0, hi - lo)
    return keys
