# ruff: noqa: E501
"""Faults of the asynchronous kind to plant in csrc/sm90: early reads, wrong phases, missing fences, wrong bytes.

As in faults.py, a fault replaces one piece of text in one file, and the cases under emulation must catch it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from faults import Fault

from attnfuse import testing
from attnfuse.backends import cuda
from attnfuse.testing import Case, SourceCase

_FWD, _COPIES, _RING, _TILES, _LEFT, _STORE = (
    f"sm90/{name}.cuh" for name in ("attn_fwd", "column_copies", "ring", "tiles", "left_operand", "store_rows")
)

FAULTS = [
    # early reads
    Fault("K is read before it has landed", _FWD,
          "        mbarrier_wait(memory.key_full(ring.stage()), ring.parity());\n        const uint32_t before", "        const uint32_t before"),
    Fault("V is read before it has landed", _FWD,
          "        mbarrier_wait(memory.value_full(before.stage()), before.parity());\n", ""),
    Fault("the last V is read before it has landed", _FWD,
          "        mbarrier_wait(memory.value_full(ring.stage()), ring.parity());\n        issue_out", "        issue_out"),
    Fault("the query is read before it has landed", _FWD,
          "            mbarrier_wait(memory.query_full(), items.round % 2);\n", ""),
    Fault("V is cleared before it has landed", _COPIES, "        wait_together(memory.landed(), cleared % 2);\n", ""),
    # wrong phases
    Fault("the phase of K does not change", _FWD,
          "mbarrier_wait(memory.key_full(ring.stage()), ring.parity());\n        const", "mbarrier_wait(memory.key_full(ring.stage()), 0);\n        const"),
    Fault("the phase of V is that of the next tile", _FWD,
          "mbarrier_wait(memory.value_full(before.stage()), before.parity());", "mbarrier_wait(memory.value_full(before.stage()), ring.parity());"),
    Fault("the phase of the query does not change", _FWD,
          "mbarrier_wait(memory.query_full(), items.round % 2);", "mbarrier_wait(memory.query_full(), 0);"),
    Fault("the copying warp waits for the phase that it fills", _COPIES,
          "wait_together(memory.key_empty(stage), 1 - keys.parity());", "wait_together(memory.key_empty(stage), keys.parity());"),
    Fault("the phase of cleared columns does not change", _COPIES,
          "wait_together(memory.landed(), cleared % 2);", "wait_together(memory.landed(), 0);"),
    Fault("one lane runs ahead of the others", _RING, "    mbarrier_wait(barrier, parity);\n    warp_sync();", "    mbarrier_wait(barrier, parity);"),
    Fault("a tile counts for two", _FWD, "            ++ring.count;\n            next_tile(h, b);", "            ring.count += 2;\n            next_tile(h, b);"),
    # handed on too early
    Fault("K is copied over before it was released", _COPIES,
          "        wait_together(memory.key_empty(stage), 1 - keys.parity());\n", ""),
    Fault("V is copied over before it was released", _COPIES,
          "        wait_together(memory.value_empty(stage), 1 - values.parity());\n", ""),
    Fault("the query is copied over before it was released", _COPIES,
          "        wait_together(memory.query_empty(), 1 - round % 2);\n", ""),
    Fault("K is released before its product is complete", _FWD,
          "        wgmma_wait<1>(scores);\n        release(memory.key_empty(ring.stage()));",
          "        release(memory.key_empty(ring.stage()));\n        wgmma_wait<1>(scores);"),
    Fault("V is released before its product is complete", _FWD,
          "        wgmma_wait<0>(out, weights);\n        release(memory.value_empty(stage));",
          "        release(memory.value_empty(stage));\n        wgmma_wait<0>(out, weights);"),
    Fault("the query is released before its store has read it", _FWD,
          "            tma_wait_read();\n            mbarrier_arrive(memory.query_empty());",
          "            mbarrier_arrive(memory.query_empty());\n            tma_wait_read();"),
    Fault("one warp releases K for all", _COPIES,
          "mbarrier_init(memory.key_empty(stage), 4 * Tile::kConsumers);", "mbarrier_init(memory.key_empty(stage), Tile::kConsumers);"),
    Fault("a warp too many is expected to release V", _COPIES,
          "mbarrier_init(memory.value_empty(stage), 4 * Tile::kConsumers);", "mbarrier_init(memory.value_empty(stage), 4 * Tile::kConsumers + 1);"),
    Fault("too few slots", _FWD, "kSlots = 2 * kStages;", "kSlots = 1;"),
    Fault("an item without a tile keeps its stage", _FWD,
          "            release(memory.value_empty(ring.stage()));\n            ++ring.count;", "            ++ring.count;"),
    # transaction bytes
    Fault("too few bytes of K are expected", _COPIES,
          "                mbarrier_arrive_expecting(full, Tile::kKeyBytes);\n                copy(memory.keys", "                mbarrier_arrive_expecting(full, Tile::kKeyBytes - 128);\n                copy(memory.keys"),
    Fault("too many bytes of V are expected", _COPIES,
          "                mbarrier_arrive_expecting(full, Tile::kKeyBytes);\n                copy(memory.values", "                mbarrier_arrive_expecting(full, Tile::kKeyBytes + 16);\n                copy(memory.values"),
    Fault("a box of the query is left out", _COPIES,
          "box < Tile::kConsumers * Tile::kBoxes; ++box", "box < Tile::kConsumers * Tile::kBoxes - 1; ++box"),
    # the launch
    Fault("tensor maps are made before a device is current", _FWD, "    make_current(shape.device);\n", ""),
    # products and their registers
    Fault("P V is used a group too early", _FWD, "        wgmma_wait<0>(out, weights);\n        release", "        wgmma_wait<1>(out, weights);\n        release"),
    Fault("the scores are used a group too early", _FWD, "wgmma_wait<1>(scores);", "wgmma_wait<2>(scores);"),
    Fault("no fence before the scores' product", _LEFT, "        wgmma_fence(acc);\n", ""),
    Fault("no fence before P V", _FWD, "        wgmma_fence(out, weights);\n", ""),
    Fault("the fence leaves out the weights", _FWD, "wgmma_fence(out, weights);", "wgmma_fence(out);"),
    Fault("the wait leaves out the output", _FWD, "        wgmma_wait<0>(out, weights);\n        release", "        wgmma_wait<0>(weights);\n        release"),
    Fault("the weights are overwritten while P V reads them", _FWD,
          "        weigh<FULL>(scores, softmax, outputs);\n        // Most", "        weigh<FULL>(scores, softmax, outputs);\n        pack_fragment<T>(weights, scores);\n        // Most"),
    Fault("the output is rescaled while P V adds to it", _FWD,
          "        weigh<FULL>(scores, softmax, outputs);\n        // Most", "        weigh<FULL>(scores, softmax, outputs);\n        out[0][0] *= shrink[0];\n        // Most"),
    Fault("the products of a tile are not committed", _LEFT, "    wgmma_commit();\n", ""),
    # proxies
    Fault("no proxy fence behind cleared columns", _COPIES, "        proxy_fence();\n        warp_sync();", "        warp_sync();"),
    Fault("cleared columns are handed on by the first lane alone", _COPIES, "        proxy_fence();\n        warp_sync();", "        proxy_fence();"),
    Fault("no proxy fence behind the output", _FWD, "        proxy_fence();\n        named_barrier_sync", "        named_barrier_sync"),
    Fault("no proxy fence behind the mbarriers", _COPIES, "        proxy_fence();\n    }\n    barrier();", "    }\n    barrier();"),
    Fault("no barrier behind the mbarriers", _COPIES, "    }\n    barrier();\n}", "    }\n}"),
    Fault("the output is stored before all of it is there", _FWD,
          "        named_barrier_sync(kOwn + group, 128);  // all of it is there\n", ""),
    Fault("the output overwrites a query that is read", _FWD,
          "        named_barrier_sync(kOwn + group, 128);  // no product of the warpgroup reads the query any more\n", ""),
    Fault("nobody waits for the store", _FWD, "            tma_wait_read();\n", ""),
    # layouts
    Fault("the output is not swizzled", _STORE, "((n % 8 ^ row % 8) * 16)", "(n % 8 * 16)"),
    Fault("V's rows 8 at a time", _FWD, "further(values, k * 2048)", "further(values, k * 1024)"),
    Fault("K's columns 8 at a time", _LEFT, "at = k % 4 * 32;", "at = k % 4 * 16;"),
    Fault("K without its swizzle's stride", _LEFT, "matrix_descriptor(right, 0, 1024)", "matrix_descriptor(right, 0, 512)"),
    Fault("every warpgroup takes the first one's rows", _COPIES, "first + box / Tile::kBoxes * 64, h, b);", "first, h, b);"),
    # turns and registers
    Fault("the turn is not handed on", _FWD, "        give_turn();\n        wgmma_wait<1>", "        wgmma_wait<1>"),
    Fault("nobody has the first turn", _FWD, "if (group == Tile::kConsumers - 1) {\n            give_turn();", "if (false) {\n            give_turn();"),
    Fault("more registers are taken than were given", _FWD, "kComputeRegisters = D == 64 ? 152", "kComputeRegisters = D == 64 ? 160"),
    # the stream of tiles
    Fault("columns that nobody sees are not cleared", _COPIES, "next.start, next.brings_unseen(p)};", "next.start, false};"),
    Fault("columns beyond the first 64 are never cleared", _TILES, "seen[0] != below(there) || seen[1] != below(there - 64)", "seen[0] != below(there)"),
    Fault("a tile passes for full where its last columns are not seen", _TILES, "seen[1] == below(COLUMNS - 64) &&", "true &&"),
    Fault("a causal tile passes for full", _TILES, "first + upper >= COLUMNS;", "last + upper >= COLUMNS;"),
    Fault("a source's end is not told", _COPIES, "(next.source != present.source ? Told::kEndsSource : 0)", "0"),
    Fault("K of the first source for all", _COPIES, "p.key_maps[told.flags & Told::kSource]", "p.key_maps[0]"),
    Fault("a block takes another's item", _TILES, "block_count() - 1 - block_index();", "block_count() - block_index();"),
]  # fmt: skip

# Sixteen items of two tiles of rows for two blocks; tiles that are full, causal, padded and with holes; one without any.
ITEMS = Case(
    "hopper", "items",
    (SourceCase(200, causal=True, offset=-10, present=(True, False)), SourceCase(200, lengths=(200, 0), bias=True),
     SourceCase(130, holes=True, present=(True, False))),
    batch=2, heads=4, kv_heads=2, rows=200, dim=64, aux=True,
)  # fmt: skip


def forward_trials() -> Iterator[tuple[str, Callable[[], list[testing.Result]]]]:
    return trials_of(ITEMS, gradients=False)


def trials_of(case: Case, gradients: bool) -> Iterator[tuple[str, Callable[[], list[testing.Result]]]]:
    """One case, under two orders of threads and copies."""
    os.environ["ATTNFUSE_EMULATE_ARCH"] = "90"
    machine = cuda.emulation()
    for seed, blocks in ((0, 2), (1, 1)):
        machine.set_seed(seed)
        machine.set_multiprocessors(blocks)
        yield f"seed {seed}", partial(testing.judge, case, "cuda", torch.bfloat16, gradients=gradients)
