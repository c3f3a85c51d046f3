# ruff: noqa: E501
"""Faults of the asynchronous kind to plant in Hopper's two backward kernels, as hopper_faults.py does for the forward.

FAULTS are of the kernel over keys at a head dim of 64, where tiles are begun ahead and left operands are in registers;
MIDDLE_FAULTS at 128, WIDE_FAULTS at 256, where dS and dO share their place; QUERY_FAULTS of the kernel over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from faults import Fault
from hopper_faults import trials_of

from attnfuse.testing import Case, Result, SourceCase

_BWD, _DQ, _SUM = (f"sm90/{name}.cuh" for name in ("attn_bwd", "attn_bwd_dq", "dq_sum"))
_ROWS, _COPIES, _TILES, _LEFT, _STORE = (
    f"sm90/{name}.cuh" for name in ("row_copies", "column_copies", "tiles", "left_operand", "store_rows")
)

FAULTS = [
    # early reads
    Fault("K and V are read before they have landed", _BWD, "            mbarrier_wait(memory.keys_full(), 0);\n", ""),
    Fault("Q is read before it has landed", _BWD, "        mbarrier_wait(memory.query_full(queries.stage()), queries.parity());\n        told", "        told"),
    Fault("Q of the next tile is read before it has landed", _BWD, "        mbarrier_wait(memory.query_full(next.stage()), next.parity());\n", ""),
    Fault("dO is read before it has landed", _BWD, "        if (there) {\n            wait_for_grad();\n        }\n", ""),
    Fault("dead rows are cleared before they have landed", _ROWS, "            wait_together(memory.landed(), cleared % 2);\n", ""),
    Fault("dS is read before all of it is there", _BWD, "            named_barrier_sync(kThere, 256);\n", ""),
    Fault("unseen columns are read before all are cleared", _BWD, "        named_barrier_sync(kCleared, 256);\n", ""),
    # wrong phases
    Fault("the phase of Q does not change", _BWD, "mbarrier_wait(memory.query_full(next.stage()), next.parity());", "mbarrier_wait(memory.query_full(next.stage()), 0);"),
    Fault("the phase of dO is that of the tile before", _BWD, "mbarrier_wait(memory.grad_full(grads.stage()), grads.parity());", "mbarrier_wait(memory.grad_full(grads.stage()), 1 - grads.parity());"),
    Fault("the copying warp waits for the phase that it fills", _ROWS, "wait_together(memory.query_empty(query_stage), 1 - queries.parity());", "wait_together(memory.query_empty(query_stage), queries.parity());"),
    Fault("the phase of dead rows does not change", _ROWS, "wait_together(memory.landed(), cleared % 2);", "wait_together(memory.landed(), 0);"),
    Fault("one ring goes on and the other does not", _BWD, "        ++queries.count;\n        ++grads.count;", "        ++queries.count;"),
    Fault("dO of a tile after the last is waited for", _BWD, "        if (there) {\n            wait_for_grad();\n        }\n", "        wait_for_grad();\n"),
    # handed on too early
    Fault("Q is copied over before it was released", _ROWS, "        wait_together(memory.query_empty(query_stage), 1 - queries.parity());\n", ""),
    Fault("Q is released before dK's product is complete", _BWD, "            wgmma_wait<1>(dk, ds);\n        }\n        if (!FIRST && there) {", "        }\n        if (!FIRST && there) {"),
    Fault("the present tile is released with the one before", _BWD, "queries.before().stage()", "queries.stage()"),
    Fault("dS is overwritten while the other group reads it", _BWD, "            wait_free();\n            store", "            store"),
    Fault("dS is given free before dQ's product is complete", _BWD, "            named_barrier_sync(kThere, 256);\n            issue_query(dq);", "            named_barrier_sync(kThere, 256);\n            give_free();\n            issue_query(dq);"),
    Fault("dS is never given free", _BWD, "            } else {\n                give_free();\n            }\n            add_query(dq);", "            }\n            add_query(dq);"),
    Fault("nobody finds dS free at first", _BWD, "            give_free();  // the first tile finds dS free\n", ""),
    Fault("the staging of dQ is overwritten while it is added", _BWD, "        tma_wait_read();  // of the tile before\n", ""),
    Fault("one warp releases Q for all", _ROWS, "mbarrier_init(memory.query_empty(stage), 4 * Tile::kConsumers);", "mbarrier_init(memory.query_empty(stage), Tile::kConsumers);"),
    # transaction bytes
    Fault("lse is not counted", _ROWS, "kQueryBytes = Tile::kRowBytes + kStates * Tile::kStateBytes;", "kQueryBytes = Tile::kRowBytes;"),
    Fault("V is not counted", _ROWS, "(Tile::kKey ? 2 : 1) * Tile::kKeyBytes);", "Tile::kKeyBytes);"),
    Fault("too many bytes of dO are expected", _ROWS, "mbarrier_arrive_expecting(grad_full, Tile::kRowBytes);", "mbarrier_arrive_expecting(grad_full, Tile::kRowBytes + 16);"),
    Fault("delta is copied over lse", _ROWS, "                    memory.state(query_stage) + Tile::kStateBytes,\n", "                    memory.state(query_stage),\n"),
    # products and their registers
    Fault("dP^T is used a group too early", _BWD, "        uint32_t weights[kK][4];\n        ToldRows after;\n        wgmma_wait<0>(dz);", "        uint32_t weights[kK][4];\n        ToldRows after;\n        wgmma_wait<1>(dz);"),
    Fault("S^T is used a group too early", _BWD, "wgmma_wait<FIRST ? 0 : 1>(x);", "wgmma_wait<FIRST ? 1 : 2>(x);"),
    Fault("S^T of the next tile is used a group too early", _BWD, "wgmma_wait<FIRST ? 0 : 1>(x);", "wgmma_wait<FIRST ? 0 : 2>(x);"),
    Fault("dS is overwritten in registers while dK is made of it", _BWD, "            wgmma_wait<1>(dk, ds);\n", "            wgmma_wait<2>();\n"),
    Fault("dV is used a group too early", _BWD, "                wgmma_wait<1>(dv, weights);\n                after", "                wgmma_wait<2>(dv, weights);\n                after"),
    Fault("dQ^T is used a group too early", _BWD, "                wgmma_wait<2>(dq);", "                wgmma_wait<3>(dq);"),
    Fault("the fence leaves p out", _BWD, "wgmma_fence(acc, left);", "wgmma_fence(acc);"),
    Fault("no fence before dQ^T", _BWD, "            wgmma_fence(dq, kept_turned);\n", "            ;\n"),
    Fault("the fence leaves out what is kept of K", _LEFT, "        wgmma_fence(acc, kept);\n", "        wgmma_fence(acc);\n"),
    Fault("the fence leaves out what is kept of K^T", _BWD, "            wgmma_fence(dq, kept_turned);\n", "            wgmma_fence(dq);\n"),
    Fault("the products of dQ^T are not committed", _BWD, "further(keys, k * 2048), k != 0);\n            }\n        }\n        wgmma_commit();", "further(keys, k * 2048), k != 0);\n            }\n        }"),
    # proxies
    Fault("no proxy fence behind dS", _BWD, "            proxy_fence();\n            named_barrier_sync(kThere, 256);", "            named_barrier_sync(kThere, 256);"),
    Fault("no proxy fence behind the staging of dQ", _BWD, "        proxy_fence();\n        warp_sync();\n        if (lane_index() == 0 && wanted)", "        warp_sync();\n        if (lane_index() == 0 && wanted)"),
    Fault("the staging of dQ is added before all lanes have written", _BWD, "        proxy_fence();\n        warp_sync();\n        if (lane_index() == 0 && wanted)", "        proxy_fence();\n        if (lane_index() == 0 && wanted)"),
    Fault("no proxy fence behind cleared rows", _ROWS, "            proxy_fence();\n            warp_sync();\n            if (lane_index() == 0) {\n                mbarrier_arrive(memory.query_full", "            warp_sync();\n            if (lane_index() == 0) {\n                mbarrier_arrive(memory.query_full"),
    Fault("no proxy fence behind a gradient", _BWD, "        proxy_fence();\n        named_barrier_sync(kOwn + group, 128);  // all of it is there", "        named_barrier_sync(kOwn + group, 128);  // all of it is there"),
    Fault("the addition of dQ is not committed", _BWD, "            bulk_add(to, staging, Tile::kStagingBytes);\n            tma_commit();", "            bulk_add(to, staging, Tile::kStagingBytes);"),
    Fault("nobody waits for the gradients' store", _BWD, "        tma_wait_read();\n    }\n};", "    }\n};"),
    # layouts
    Fault("dS is not swizzled", _BWD, "matrix % 2 ^ r) * 16)", "matrix % 2) * 16)"),
    Fault("dS's halves change places", _BWD, "further(grad_scores, k / 4 * Tile::kRowBoxBytes + k % 4 * 32)", "further(grad_scores, (1 - k / 4) * Tile::kRowBoxBytes + k % 4 * 32)"),
    Fault("what is kept of K is not swizzled", _LEFT, "k / 4 * box_bytes + row * 128 + ((chunk ^ row % 8) * 16)", "k / 4 * box_bytes + row * 128 + chunk * 16"),
    Fault("what is kept of K are eight rows twice", _LEFT, "warp_index() % 4 * 16 + lane % 16;", "warp_index() % 4 * 16 + lane % 8;"),
    Fault("what is kept of K^T is not swizzled", _LEFT, "matrix + row * 128 + ((chunk ^ row % 8) * 16)", "matrix + row * 128 + chunk * 16"),
    Fault("what is kept of K^T are eight rows twice", _LEFT, "16 * k + lane / 16 * 8 + lane % 8", "16 * k + lane % 8"),
    Fault("dO's rows 8 at a time", _BWD, "further(b, k * 2048), true", "further(b, k * 1024), true"),
    Fault("both groups add the same rows of dQ", _BWD, "D == 64 ? Tile::kQueryWidth * group : 0; }", "0; }"),
    Fault("dQ is added where the next tile's belongs", _BWD, "            add_query(dq);\n        } else if", "            told = after;\n            add_query(dq);\n        } else if"),
    Fault("a gradient is not swizzled", _STORE, "((n % 8 ^ row % 8) * 16)", "(n % 8 * 16)"),
    # registers
    Fault("more registers are taken than were given", _ROWS, "kComputeRegisters = 240", "kComputeRegisters = 248"),
    # the stream of tiles
    Fault("dead rows are not cleared", _ROWS, "const bool clears = tile.brings_dead(p);", "const bool clears = false;"),
    Fault("a causal tile passes for full", _TILES, "start >= mine.first + COLUMNS - 1 - mine.offset - s.right &&", "start >= mine.first - mine.offset - s.right &&"),
    Fault("a tile passes for full where columns are not seen", _TILES, "return mine.all_seen && start", "return start"),
    Fault("unseen columns are not cleared", _BWD, "            clear_unseen();\n", ""),
    Fault("K of the first source for all", _ROWS, "p.key_maps[mine.source], memory.keys_full()", "p.key_maps[0], memory.keys_full()"),
    Fault("delta of the first source for all", _ROWS, "p.delta + stride_by(mine.source, p.delta_source) + at", "p.delta + at"),
    Fault("rows of the group's first head for all", _ROWS, "const int h = mine.key_head * p.shape.group + tile.head;", "const int h = mine.key_head * p.shape.group;"),
    Fault("there is no end", _ROWS, "ToldRows{ToldRows::kEnd, 0, 0.0f, 0, 0}", "ToldRows{0, 0, 0.0f, 0, 0}"),
]  # fmt: skip

# Of tiles one after another, which 128 and 256 have in common.
_STEP_FAULTS = [
    Fault("S^T is used a group too early", _BWD, "        wgmma_wait<1>(x);\n", "        wgmma_wait<2>(x);\n"),
    Fault("dP^T is used a group too early", _BWD, "        uint32_t weights[kK][4];\n        ToldRows after;\n        wgmma_wait<0>(dz);", "        uint32_t weights[kK][4];\n        ToldRows after;\n        wgmma_wait<1>(dz);"),
    Fault("dO is read before it has landed", _BWD, "        wait_for_grad();\n        issue_grad_scores", "        issue_grad_scores"),
    Fault("dS is written before the other group is done", _BWD, "            wait_free();\n            store", "            store"),
    Fault("dS is read before all of it is there", _BWD, "            named_barrier_sync(kThere, 256);\n", ""),
    Fault("no proxy fence behind dS", _BWD, "            proxy_fence();\n            named_barrier_sync(kThere, 256);", "            named_barrier_sync(kThere, 256);"),
    Fault("dS is not swizzled", _BWD, "matrix % 2 ^ r) * 16)", "matrix % 2) * 16)"),
    Fault("Q is released before dK's product is complete", _BWD, "            wgmma_wait<0>(dk, ds);\n", "            release(memory.query_empty(queries.stage()));\n            wgmma_wait<0>(dk, ds);\n"),
    Fault("the fence leaves dQ out", _BWD, "        } else {\n            wgmma_fence(dq);\n        }\n#pragma", "        }\n#pragma"),
    Fault("the groups' halves of K are one", _BWD, "D == 64 ? 0 : D / Tile::kConsumers * group; }", "0; }"),
]  # fmt: skip

MIDDLE_FAULTS = [
    *_STEP_FAULTS,
    Fault("K is overwritten while the other group reads it", _BWD, "            wait_free();  // likewise\n", ""),
    Fault("no proxy fence behind cleared columns", _BWD, "        proxy_fence();\n        named_barrier_sync(kCleared, 256);", "        named_barrier_sync(kCleared, 256);"),
    Fault("dead rows beyond the first 64 are never cleared", _TILES, "return live[0] != below(there) || live[1] != below(there - 64);", "return live[0] != below(there);"),
    Fault("dQ^T is used a group too early", _BWD, "                    wgmma_wait<1>(dv, weights, dq);", "                    wgmma_wait<2>(dv, weights, dq);"),
    Fault("dK is used a group too early", _BWD, "            wgmma_wait<0>(dk, ds);\n", "            wgmma_wait<1>(dk, ds);\n"),
    Fault("K's rows 8 at a time for dQ^T", _BWD, "wgmma_left_transposed<T>(dq, further(keys, k * 2048)", "wgmma_left_transposed<T>(dq, further(keys, k * 1024)"),
]  # fmt: skip

WIDE_FAULTS = [
    *_STEP_FAULTS,
    Fault("S^T is used a group too early for dV", _BWD, "        wgmma_wait<0>(x[0]);\n", "        wgmma_wait<1>(x[0]);\n"),
    Fault("dO is read before it has landed, for dV", _BWD, "        wait_for_grad();\n        wgmma_wait<0>(x[0]);\n", "        wgmma_wait<0>(x[0]);\n"),
    Fault("dO is given free before dP^T is complete", _BWD, "        wgmma_wait<0>(dz);\n        if constexpr (Tile::kShares) {\n            adds ? give_free() : release(memory.grad_empty(grads.stage()));\n        }\n", "        if constexpr (Tile::kShares) {\n            adds ? give_free() : release(memory.grad_empty(grads.stage()));\n        }\n        wgmma_wait<0>(dz);\n"),
    Fault("dO is copied over dS", _BWD, "            adds ? give_free() : release(memory.grad_empty(grads.stage()));\n", "            give_free();\n            release(memory.grad_empty(grads.stage()));\n"),
    Fault("dS is released before dQ's product is complete", _BWD, "            named_barrier_sync(kThere, 256);\n            issue_query(dq);", "            named_barrier_sync(kThere, 256);\n            release(memory.grad_empty(grads.stage()));\n            issue_query(dq);"),
    Fault("dO is copied over before it was released", _ROWS, "            wait_together(memory.grad_empty(grad_stage), 1 - grads.parity());\n", ""),
    Fault("K is overwritten while the other group reads it", _BWD, "            named_barrier_sync(kThere, 256);  // the other group reads K no more\n", "            ;\n"),
    Fault("dQ is used a group too early", _BWD, "                    wgmma_wait<1>(dq);", "                    wgmma_wait<2>(dq);"),
    Fault("Q is released before dV's product is complete", _BWD, "        wgmma_wait<0>(dv, weights);\n        warp_sync();  // all lanes have read lse\n        release(memory.query_empty(queries.stage()));\n", "        release(memory.query_empty(queries.stage()));\n        wgmma_wait<0>(dv, weights);\n        warp_sync();\n"),
    Fault("K's rows 8 at a time for dQ", _BWD, "wgmma_transposed<T>(dq, ds_k, further(keys, k * 2048), k != 0);", "wgmma_transposed<T>(dq, ds_k, further(keys, k * 1024), k != 0);"),
    Fault("warps add 8 rows apart", _BWD, "stride_by(warp_index() % 4, p.shape.dim_padded / 8)", "stride_by(warp_index() % 4, p.shape.dim_padded / 16)"),
    Fault("what is kept of K is of the first box", _LEFT, "ldmatrix_x4(kept[k], matrix + k / 4 * box_bytes + ", "ldmatrix_x4(kept[k], matrix + "),
    Fault("dQ leaves its fragments by columns", _SUM, "chunk(row + i % 2 * 8 + lane_index() / 4, d / 8 + i / 2)", "chunk(row + i / 2 * 8 + lane_index() / 4, d / 8 + i % 2)"),
]  # fmt: skip

QUERY_FAULTS = [
    # without dQ to add, nothing else brings the lanes of the kernel over keys together
    Fault("lse is released before all lanes have read it", _BWD, "            warp_sync();  // all lanes have read lse and delta of the tile before\n", ""),
    Fault("V is read before it has landed", _DQ, "        mbarrier_wait(memory.value_full(ring.stage()), ring.parity());\n        Kept<0> none;\n", "        Kept<0> none;\n"),
    Fault("K is read before it has landed", _DQ, "        mbarrier_wait(memory.key_full(ring.stage()), ring.parity());\n", ""),
    Fault("Q and dO are read before they have landed", _DQ, "            mbarrier_wait(memory.query_full(), items.round % 2);\n", ""),
    Fault("dO is not counted", _COPIES, "mbarrier_arrive_expecting(memory.query_full(), Tile::kRowTensors * Tile::kQueryBytes);", "mbarrier_arrive_expecting(memory.query_full(), Tile::kQueryBytes);"),
    Fault("K is released before dQ's product is complete", _DQ, "        wgmma_wait<0>(dq, ds);\n        warp_sync();  // all lanes have read the slot\n        release(memory.key_empty(ring.stage()));", "        warp_sync();\n        release(memory.key_empty(ring.stage()));\n        wgmma_wait<0>(dq, ds);"),
    Fault("the slot is released before all lanes have read it", _DQ, "        warp_sync();  // all lanes have read the slot\n", ""),
    Fault("dP is used a group too early", _DQ, "        wgmma_wait<0>(dz);", "        wgmma_wait<1>(dz);"),
    Fault("the fence leaves dS out", _DQ, "wgmma_fence(dq, ds);", "wgmma_fence(dq);"),
    Fault("K's rows 8 at a time", _DQ, "further(b, k * 2048)", "further(b, k * 1024)"),
    Fault("columns of K that nobody sees are not cleared", _COPIES, "kBackward && present.clears", "false"),
    Fault("Q is copied over while its rows hold dQ", _DQ, "                tma_wait_read();\n", ""),
    Fault("dQ overwrites a query that is read", _DQ, "        named_barrier_sync(kOwn + group, 128);  // no product of the warpgroup reads the query any more\n", ""),
    Fault("no proxy fence behind dQ", _DQ, "            proxy_fence();\n", ""),
    Fault("delta is kept where the source changes", _DQ, "((flags ^ before) & Told::kSource) != 0 || ", ""),
    Fault("dead rows get out", _DQ, "return lives(c / 2) ? dq[n][c] * p.shape.scale : 0.0f;", "return dq[n][c] * p.shape.scale;"),
    Fault("an item without a tile keeps its stage", _DQ, "                warp_sync();\n                release(memory.key_empty(ring.stage()));\n", ""),
]  # fmt: skip

# Blocks that walk six tiles of rows, of two heads; tiles that are full, causal, padded and with holes; dead rows at a
# tile's beginning and at another's end. Without bias and sinks, so that dQ is added by the kernel over keys.
ROWS = Case(
    "hopper", "rows",
    (SourceCase(90, causal=True, offset=-100, window=(20, -1)), SourceCase(200, causal=True, lengths=(0, 200)),
     SourceCase(130, holes=True, present=(False, True))),
    batch=2, heads=4, kv_heads=2, rows=300, dim=64, aux=True,
)  # fmt: skip


def backward_trials() -> Iterator[tuple[str, Callable[[], list[Result]]]]:
    return trials_of(ROWS, gradients=True)


def middle_trials() -> Iterator[tuple[str, Callable[[], list[Result]]]]:
    # Tiles of 80 rows, of which one has its dead rows beyond the first 64.
    first, *others = ROWS.sources
    return trials_of(replace(ROWS, dim=128, sources=(replace(first, offset=-120), *others)), gradients=True)


def wide_trials() -> Iterator[tuple[str, Callable[[], list[Result]]]]:
    return trials_of(replace(ROWS, dim=256), gradients=True)


def query_trials() -> Iterator[tuple[str, Callable[[], list[Result]]]]:
    """With a bias, whose gradient the kernel that owns rows makes."""
    first, *others = ROWS.sources
    return trials_of(replace(ROWS, sources=(replace(first, bias=True), *others)), gradients=True)
