"""Few queries and long keys in the CUDA backend: when csrc/few.h's kernels run, and the memory they work in.

Forward: the keys of all sources are split over blocks, and a second kernel merges what these leave. Backward: all rows
of a key head stay on a multiprocessor while its keys pass by once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..problem import Problem
from .few import MIN_KEYS, Plan, long_for, split_count, visible_keys

PLAIN_ROWS = 128  # of a tile of the plain forward: it has 64 to 192
FEW_ROWS = 128  # the most packed rows of the kernels' regime


class Tile(NamedTuple):
    """csrc/attention.h's TileShape."""

    name: str
    rows: int
    columns: int
    threads: int
    shared_bytes: int


def plan_forward(module: Any, problem: Problem) -> Plan:
    """The keys are split where the plain grid, a block for each row tile and head, leaves half the chip idle.

    Above that, what is left to gain is about what a second launch and the partials cost (bench/few_queries.py). Where
    fewer row tiles than query heads read a key head's keys, the kernel for it is taken even with one split.

    Partials take 4 splits B Hq Nq (Dv + 2 S) bytes, Dv rounded up to 8 (S = 1 where mass is not wanted). Splits are so
    many that at most 2 blocks for each multiprocessor run, of at most 64 rows each: whatever the lengths, that is no
    more than 512 (Dv + 2 S) bytes for each multiprocessor, 9 MB on an H100 at Dv 128 with one source; with one split it
    is twice the size of a 16-bit `out` and the states.
    """
    keys = visible_keys(problem)
    if keys < 2 * MIN_KEYS:
        return Plan(0, f"plain, {keys} visible keys are too few to be split")
    batch, heads, rows, _ = problem.query.shape
    packed, row_tiles = problem.group * rows, -(-rows // PLAIN_ROWS)
    plain, multiprocessors = batch * heads * row_tiles, _multiprocessors(module, problem)
    tiles = -(-packed // tile(module, problem, "attn_fwd_split").rows)
    is_shared = packed <= FEW_ROWS and keys >= long_for(packed) and tiles < problem.group * row_tiles
    if 2 * plain > multiprocessors and not is_shared:
        return Plan(0, f"plain, its {plain} blocks occupy more than half of {multiprocessors} multiprocessors")
    blocks = batch * problem.sources[0].key.shape[1] * tiles
    found = split_count(blocks, keys, packed, multiprocessors)
    if found == 1 and not is_shared:
        return Plan(0, f"plain, {keys} visible keys are too few to be split for {packed} rows")
    if is_shared:
        why = f"keys are read once for {problem.group} heads"
    else:
        why = f"the plain kernel's {plain} would leave {multiprocessors - plain} of {multiprocessors} idle"
    return Plan(found, f"keys split {found} ways, {blocks * found} blocks on {multiprocessors} multiprocessors: {why}")


def plan_backward(module: Any, problem: Problem) -> Plan:
    """Query-stationary where the packed rows fit one tile and keys are long.

    Partials take 4 splits B Hq Nq D bytes, D rounded up to 8, where the query's gradient is wanted, and the row sums
    that the gradients of biases and sinks need 8 splits B Hq Nq S more for each of at most 4 parts of a tile's keys.
    Splits are bounded as in `plan_forward`, blocks have at most 128 rows: no more than 1024 (D + 2 S) bytes for each
    multiprocessor, or with one split 4 bytes for each element of the query's gradient. Also where the plain grid fills
    the chip: K and V are read once instead of twice.
    """
    packed, keys = problem.group * problem.query.shape[2], visible_keys(problem)
    if keys < long_for(packed):
        return Plan(0, f"plain, {keys} visible keys are not long for {packed} rows")
    reason = refuses(module, problem)
    if reason is not None:
        return Plan(0, f"plain, {reason}")
    blocks = problem.query.shape[0] * problem.sources[0].key.shape[1]
    found = split_count(blocks, keys, packed, _multiprocessors(module, problem))
    told = f"query-stationary, {packed} rows in a tile, keys split {found} ways, {blocks * found} blocks"
    return Plan(found, told)


def refuses(module: Any, problem: Problem) -> str | None:
    """Why the query-stationary backward cannot serve the problem at all; None if it can."""
    packed = problem.group * problem.query.shape[2]
    if packed <= 16:  # every device has a tile for these
        return None
    most = module.attn_bwd_few_rows(_dim(problem), _device(problem))
    if packed > most:
        return f"{packed} rows (queries times query heads per key head) are more than a tile's {most}"
    return None


def forward(module: Any, problem: Problem, splits: int, given: tuple[Any, ...], lse: Tensor, stream: int) -> None:
    """Fill out, lse and mass. given: as ForwardParams takes it."""
    states = len(problem.sources) if problem.want_mass else 1
    partial = lse.new_empty((splits, *lse.shape, _width(problem.value_dim)))
    state = lse.new_empty((splits, *lse.shape, states, 2))
    params = module.SplitParams(*given, (splits, partial.data_ptr(), state.data_ptr()))
    module.attn_fwd_split(params, stream)


def empty_sums(module: Any, problem: Problem, splits: int, lse: Tensor) -> Tensor:
    """What `backward` leaves the row sums in, to be added up over the first dimension."""
    parts = splits * module.attn_bwd_few_parts(_dim(problem), problem.group * problem.query.shape[2])
    return lse.new_empty((parts, *lse.shape, len(problem.sources), 2))


def backward(
    module: Any, problem: Problem, splits: int, given: tuple[Any, ...], lse: Tensor, need_query: bool, stream: int
) -> None:
    """Fill grad_query, the gradients of keys and values, and the row sums; after attn_bwd_delta.

    given: as BackwardParams takes it, the sums those of `empty_sums`.
    """
    partial = lse.new_empty((splits, *lse.shape, _width(problem.query.shape[3]))) if need_query else None
    params = module.FewParams(*given, (splits, 0 if partial is None else partial.data_ptr()))
    module.attn_bwd_few(params, stream)


def tile(module: Any, problem: Problem, name: str) -> Tile:
    """The tile of "attn_fwd_split" or "attn_bwd_few" for the problem's packed rows."""
    return Tile(*module.few_tile(name, _dim(problem), problem.group * problem.query.shape[2]))


def _dim(problem: Problem) -> int:
    return max(problem.query.shape[3], problem.value_dim)


def _device(problem: Problem) -> int:
    return problem.query.device.index or 0


def _multiprocessors(module: Any, problem: Problem) -> int:
    return module.multiprocessor_count(_device(problem))


def _width(dim: int) -> int:
    """Floats of a row of a partial."""
    return -(-dim // 8) * 8
