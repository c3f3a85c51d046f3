// The copying warp of blocks that own rows: it alone knows that there is more than one source.
//
//     barrier        completed by                             waited for by
//     query_full     the copies of an item's rows             consumers
//     query_empty    a thread of each consumer warpgroup      the copying warp
//     key_full       the copies of a tile                     consumers       (a stage each, as are the next three)
//     key_empty      a lane of each consumer warp             the copying warp
//     value_full, value_empty                                 likewise; the backward releases V with K
//     landed         the copies of tiles with columns to clear: the copying warp
#pragma once

#include "ring.cuh"
#include "tiles.cuh"
#include "warpgroup.h"

namespace attnfuse::sm90 {

// Where everything is in shared memory.
template <typename Tile>
struct ColumnMemory {
    SharedAddress query = (shared_base() + 1023) & ~1023u;  // (kRows, D), later what is computed of them

    __device__ __forceinline__ SharedAddress grad_out() const { return query + Tile::kQueryBytes; }  // (kRows, D)
    __device__ __forceinline__ SharedAddress keys(int stage) const {
        return query + Tile::kRowTensors * Tile::kQueryBytes + stage * Tile::kKeyBytes;
    }
    __device__ __forceinline__ SharedAddress values(int stage) const { return keys(Tile::kStages + stage); }
    __device__ __forceinline__ SharedAddress slot(int tile) const {
        return keys(2 * Tile::kStages) + static_cast<uint32_t>(tile) % Tile::kSlots * Told::kBytes;
    }
    __device__ __forceinline__ SharedAddress barrier(int number) const {
        return keys(2 * Tile::kStages) + Tile::kSlots * Told::kBytes + 8 * number;
    }
    __device__ __forceinline__ SharedAddress query_full() const { return barrier(0); }
    __device__ __forceinline__ SharedAddress query_empty() const { return barrier(1); }
    __device__ __forceinline__ SharedAddress landed() const { return barrier(2); }
    __device__ __forceinline__ SharedAddress key_full(int stage) const { return barrier(3 + stage); }
    __device__ __forceinline__ SharedAddress key_empty(int stage) const { return barrier(3 + Tile::kStages + stage); }
    __device__ __forceinline__ SharedAddress value_full(int stage) const {
        return barrier(3 + 2 * Tile::kStages + stage);
    }
    __device__ __forceinline__ SharedAddress value_empty(int stage) const {
        return barrier(3 + 3 * Tile::kStages + stage);
    }
};

// By the whole block, before anyone uses a barrier.
template <typename Tile>
__device__ __forceinline__ void make_barriers(const ColumnMemory<Tile>& memory) {
    if (thread_index() == 0) {
        mbarrier_init(memory.query_full(), 1);
        mbarrier_init(memory.query_empty(), Tile::kConsumers);
        mbarrier_init(memory.landed(), 1);
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            mbarrier_init(memory.key_full(stage), 1);
            mbarrier_init(memory.key_empty(stage), 4 * Tile::kConsumers);
            mbarrier_init(memory.value_full(stage), 1);
            mbarrier_init(memory.value_empty(stage), 4 * Tile::kConsumers);
        }
        proxy_fence();
    }
    barrier();
}

// The copying warp.
template <typename Tile, typename Arguments>
struct ColumnCopies {
    // Both Q and dO are rows, and of K too products take columns that nobody sees.
    static constexpr bool kBackward = Tile::kRowTensors == 2;
    using Tiles = WideColumnTiles<Tile::kColumns>;
    const Arguments& p;
    const ColumnMemory<Tile> memory;
    Ring<Tile::kStages> keys, values;
    int cleared = 0;  // tiles of which columns were cleared

    // A tile whose K is on its way, and V is not.
    struct Owed {
        int source;  // source_count: the item has no tile
        int start;
        bool clears;
    };

    // One box of K or V after another, by one lane.
    __device__ __forceinline__ void copy(
        SharedAddress to, const TensorMap& map, SharedAddress barrier, int start, int key_head, int b) const {
#pragma unroll 1
        for (int box = 0; box < Tile::kBoxes; ++box) {
            tma_load(to + box * Tile::kKeyBoxBytes, map, barrier, 64 * box, start, key_head, b);
        }
    }

    // Of an item, if it has a tile at all; else only the phase goes by.
    __device__ __forceinline__ void load_query(int round, bool has_tile, int first, int h, int b) const {
        wait_together(memory.query_empty(), 1 - round % 2);
        if (lane_index() != 0) {
            return;
        }
        if (!has_tile) {
            mbarrier_arrive(memory.query_full());
            return;
        }
        mbarrier_arrive_expecting(memory.query_full(), Tile::kRowTensors * Tile::kQueryBytes);
        load_rows(memory.query, p.query_map, first, h, b);
        if constexpr (kBackward) {
            load_rows(memory.grad_out(), p.grad_out_map, first, h, b);
        }
    }

    __device__ __forceinline__ void load_rows(SharedAddress to, const TensorMap& map, int first, int h, int b) const {
#pragma unroll 1
        for (int box = 0; box < Tile::kConsumers * Tile::kBoxes; ++box) {
            tma_load(
                to + box * Tile::kQueryBoxBytes, map, memory.query_full(), box % Tile::kBoxes * 64,
                first + box / Tile::kBoxes * 64, h, b);
        }
    }

    // K of a tile, and what it is; without a tile, that there is none.
    __device__ __forceinline__ void load_keys(
        const Told& told, bool has_tile, bool clears, int start, int key_head, int b) {
        const int stage = keys.stage();
        wait_together(memory.key_empty(stage), 1 - keys.parity());
        const SharedAddress full = clears ? memory.landed() : memory.key_full(stage);
        if (lane_index() == 0) {
            told.store(memory.slot(keys.count));
            if (has_tile) {
                mbarrier_arrive_expecting(full, Tile::kKeyBytes);
                copy(memory.keys(stage), p.key_maps[told.flags & Told::kSource], full, start, key_head, b);
            } else {
                mbarrier_arrive(full);
            }
        }
        if (clears) {
            clear(memory.keys(stage), told, memory.key_full(stage));
        }
        ++keys.count;
    }

    // V of a tile.
    __device__ __forceinline__ void load_values(const Owed& owed, int key_head, int b) {
        const int stage = values.stage();
        if constexpr (!kBackward) {
            wait_together(memory.value_empty(stage), 1 - values.parity());
        }
        const SharedAddress full = owed.clears ? memory.landed() : memory.value_full(stage);
        if (lane_index() == 0) {
            if (owed.source < p.shape.source_count) {
                mbarrier_arrive_expecting(full, Tile::kKeyBytes);
                copy(memory.values(stage), p.value_maps[owed.source], full, owed.start, key_head, b);
            } else {
                mbarrier_arrive(full);
            }
        }
        if (owed.clears) {
            Told told;
            told.load_seen(memory.slot(values.count));
            clear(memory.values(stage), told, memory.value_full(stage));
        }
        ++values.count;
    }

    // Where a copy brings columns along that nobody sees, they are cleared before the tile counts as full: what they
    // hold may be no number, and a weight of 0 would not hide it.
    __device__ __forceinline__ void clear(SharedAddress tile, const Told& told, SharedAddress full) {
        wait_together(memory.landed(), cleared % 2);
        ++cleared;
        clear_rows<Tile::kColumns, Tile::kBoxes>(tile, told.seen);
        proxy_fence();
        warp_sync();
        if (lane_index() == 0) {
            mbarrier_arrive(full);
        }
    }

    // Every tile of every item of the block. The first K of an item is on its way before its rows, whose memory the
    // item before may still be leaving by. Forwards, K of the next tile is on its way before V of the present one,
    // whose product comes a tile later; the backward takes both at once.
    __device__ __forceinline__ void run() {
        for (Items items; items.valid(p); ++items.round) {
            const Item item = items.template item<Tile::kRows>(p);
            const int first = item.first, last = least(first + Tile::kRows, p.shape.rows) - 1;
            const int h = item.head % p.shape.heads, b = item.head / p.shape.heads, key_head = h / p.shape.group;
            Tiles next;
            next.advance(p, b, first, last);
            const bool has_tile = next.valid(p);
            if (!has_tile) {
                load_query(items.round, false, first, h, b);
                load_keys({Told::kEmpty | Told::kEndsItem, 0, 0, {0, 0}}, false, false, 0, key_head, b);
            }
            Owed owed{next.source, 0, false};
            bool begun = false;  // whether something is owed
            while (next.valid(p)) {
                Told told = next.told(p, b, first, last);
                const Owed present{next.source, next.start, next.brings_unseen(p)};
                next.advance(p, b, first, last);
                told.flags |=
                    (next.source != present.source ? Told::kEndsSource : 0) | (next.valid(p) ? 0 : Told::kEndsItem);
                load_keys(told, true, kBackward && present.clears, present.start, key_head, b);
                if (!begun) {
                    load_query(items.round, true, first, h, b);
                }
                if (kBackward) {
                    load_values(present, key_head, b);
                } else if (begun) {
                    load_values(owed, key_head, b);
                }
                begun = true;
                owed = present;
            }
            if (!kBackward || !has_tile) {
                load_values(owed, key_head, b);
            }
        }
    }
};

}  // namespace attnfuse::sm90
