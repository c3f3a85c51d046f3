// How rows come to the block of attn_bwd.cuh that owns columns: its tile and its shared memory, and the warp that plans
// the tiles of rows and copies them.
#pragma once

#include "../core/key_tiles.cuh"
#include "dq_sum.cuh"
#include "mbarrier.h"
#include "ring.cuh"
#include "tiles.cuh"
#include "tma.h"
#include "warpgroup.h"

namespace attnfuse::sm90 {

template <int D, Wanted WANTED>
struct BackwardTile {
    static_assert(D == 64 || D == 128 || D == 256);
    static constexpr bool kKey = WANTED != Wanted::kValue, kValue = WANTED != Wanted::kKey;
    static constexpr int kConsumers = 2;
    static constexpr int kColumns = 64 * kConsumers;
    static constexpr int kRows = D == 128 ? 80 : 64;
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Of a thread: what the copying warpgroup gives, the others take.
    static constexpr int kCopyRegisters = 24;
    static constexpr int kComputeRegisters = 240;
    static constexpr int kQueryStages = D == 64 ? 4 : 2;
    // At 256 K, V and two stages of Q leave room for one of dO, and none for dS, which takes its place once all have
    // dP^T: it is released when dQ is complete.
    static constexpr bool kShares = !kValue;
    static constexpr int kGradStages = kShares ? 1 : kQueryStages;
    // Steps of 16 along the product's K, of K, of V, and of K^T for dQ^T, that a warp keeps in registers.
    static constexpr int kKeptKeys = D == 64 ? 4 : kKey ? 0 : 8;
    static constexpr int kKeptValues = D == 64 ? 4 : 0, kKeptTurned = D == 64 ? 8 : 0;
    // Whether S^T of a tile is issued in the tile before, so that exponentials do not wait for it: walk_ahead.
    static constexpr bool kAhead = D == 64;
    // Whether dQ is laid down in shared memory for a bulk copy.
    static constexpr bool kStaged = D == 64;
    // A tile holds D / 64 boxes of 64 columns; a row of a box is 128 bytes.
    static constexpr int kBoxes = D / 64;
    static constexpr int kKeyBoxBytes = kColumns * 128;
    static constexpr int kKeyBytes = kBoxes * kKeyBoxBytes;
    static constexpr int kRowBoxBytes = kRows * 128;
    static constexpr int kRowBytes = kBoxes * kRowBoxBytes;
    // dS (rows, columns): a box for the 64 columns of each group.
    static constexpr int kGradScoresBytes = kKey && !kShares ? kConsumers * kRowBoxBytes : 0;
    // Of dQ^T (64 of d) a group's product is this many rows wide: at 64 the groups share rows out, at 128 d. At 256 it
    // is of dQ (64 rows) and 128 of d wide: K is read half as often.
    static constexpr int kQueryWidth = D == 64 ? 32 : D == 128 ? kRows : 128;
    static constexpr int kStagingBytes = kKey && kStaged ? 16 * kQueryWidth * 4 : 0;
    static constexpr int kStateBytes = kRows * 4;
    static constexpr int kSlotBytes = 16;
    static constexpr int kBarriers = 2 + 2 * (kQueryStages + kGradStages);
    // The first KB is lost to where memory begins: atoms lie on 1024 bytes.
    static constexpr int kSharedBytes = 1024 + (kKey ? 2 : 1) * kKeyBytes + (kQueryStages + kGradStages) * kRowBytes +
                                        kGradScoresBytes + 4 * kConsumers * kStagingBytes +
                                        kQueryStages * (2 * kStateBytes + kSlotBytes) + 16 + kBarriers * 8;
};

// Where everything is in shared memory.
template <typename Tile>
struct BackwardMemory {
    SharedAddress keys = (shared_base() + 1023) & ~1023u;                      // (kColumns, D), later grad_key
    SharedAddress values = Tile::kKey ? keys + Tile::kKeyBytes : keys;         // (kColumns, D), later grad_value
    SharedAddress queries = values + Tile::kKeyBytes;                          // stages of (kRows, D)
    SharedAddress grad_outs = queries + Tile::kQueryStages * Tile::kRowBytes;  // stages of (kRows, D)
    SharedAddress after = grad_outs + Tile::kGradStages * Tile::kRowBytes;
    SharedAddress grad_scores = Tile::kShares ? grad_outs : after;                 // (kRows, kColumns)
    SharedAddress stagings = after + Tile::kGradScoresBytes;                       // of each consumer warp
    SharedAddress states = stagings + 4 * Tile::kConsumers * Tile::kStagingBytes;  // stages of lse2, delta (kRows)
    SharedAddress slots = states + Tile::kQueryStages * 2 * Tile::kStateBytes;     // stages of what the tile is
    SharedAddress seen = slots + Tile::kQueryStages * Tile::kSlotBytes;            // a bit for each column
    SharedAddress barriers = seen + 16;

    __device__ __forceinline__ SharedAddress query(int stage) const { return queries + stage * Tile::kRowBytes; }
    __device__ __forceinline__ SharedAddress grad_out(int stage) const { return grad_outs + stage * Tile::kRowBytes; }
    __device__ __forceinline__ SharedAddress state(int stage) const { return states + stage * 2 * Tile::kStateBytes; }
    __device__ __forceinline__ SharedAddress slot(int stage) const { return slots + stage * Tile::kSlotBytes; }

    __device__ __forceinline__ SharedAddress keys_full() const { return barriers; }
    __device__ __forceinline__ SharedAddress landed() const { return barriers + 8; }
    __device__ __forceinline__ SharedAddress query_full(int stage) const { return barriers + 8 * (2 + stage); }
    __device__ __forceinline__ SharedAddress query_empty(int stage) const {
        return query_full(Tile::kQueryStages + stage);
    }
    __device__ __forceinline__ SharedAddress grad_full(int stage) const {
        return query_full(2 * Tile::kQueryStages + stage);
    }
    __device__ __forceinline__ SharedAddress grad_empty(int stage) const {
        return grad_full(Tile::kGradStages + stage);
    }
};

// By the whole block, before anyone uses a barrier.
template <typename Tile>
__device__ __forceinline__ void make_barriers(const BackwardMemory<Tile>& memory) {
    if (thread_index() == 0) {
        mbarrier_init(memory.keys_full(), 1);
        mbarrier_init(memory.landed(), 1);
        for (int stage = 0; stage < Tile::kQueryStages; ++stage) {
            mbarrier_init(memory.query_full(stage), 1);
            mbarrier_init(memory.query_empty(stage), 4 * Tile::kConsumers);
        }
        for (int stage = 0; stage < Tile::kGradStages; ++stage) {
            mbarrier_init(memory.grad_full(stage), 1);
            mbarrier_init(memory.grad_empty(stage), 4 * Tile::kConsumers);
        }
        proxy_fence();
    }
    barrier();
}

// A tile of rows as it is told to the computing warps, so that they keep nothing of the problem in registers: 16 bytes
// of shared memory.
struct ToldRows {
    static constexpr uint32_t kFull = 1, kEnd = 2;

    uint32_t flags;
    uint32_t fragment;  // the tile's first in dq_sum, less than 2^30: that many are 512 GB
    float bias;         // of the source, in log2 units
    int lower, upper;   // column j of the block is seen by the rows from j + lower to j + upper - 1 of the tile

    __device__ __forceinline__ void store(SharedAddress to) const {
        store_shared_128(
            to, {fragment << 2 | flags, bits_of(bias), static_cast<uint32_t>(lower), static_cast<uint32_t>(upper)});
    }
    __device__ __forceinline__ void load(SharedAddress from) {
        float word;
        load_shared_pair(word, bias, from);
        const auto both = static_cast<uint32_t>(uniform(static_cast<int>(bits_of(word))));
        flags = both & 3;
        fragment = both >> 2;
    }
    // What only tiles that are not full need.
    __device__ __forceinline__ void load_limits(SharedAddress from) {
        lower = static_cast<int>(load_shared_32(from + 8));
        upper = static_cast<int>(load_shared_32(from + 12));
    }
    // Of rows 64 part .. + 64 of the tile, those that see column j.
    __device__ __forceinline__ Word seeing(int j, int part) const {
        return between(j + lower - 64 * part, j + upper - 64 * part);
    }
};

// The copying warp.
template <int D, Wanted WANTED>
struct RowCopies {
    using Tile = BackwardTile<D, WANTED>;
    using Tiles = WideRowTiles<Tile::kRows>;
    const BackwardArguments& p;
    const BackwardMemory<Tile> memory;
    Ring<Tile::kQueryStages> queries;
    Ring<Tile::kGradStages> grads;
    int cleared = 0;  // tiles with dead rows

    __device__ __forceinline__ void load_keys(const OwnedKeys<Tile::kColumns>& mine) const {
        mbarrier_arrive_expecting(memory.keys_full(), (Tile::kKey ? 2 : 1) * Tile::kKeyBytes);
#pragma unroll 1
        for (int box = 0; box < Tile::kBoxes; ++box) {
            const int to = box * Tile::kKeyBoxBytes;
            tma_load(
                memory.keys + to, p.key_maps[mine.source], memory.keys_full(), 64 * box, mine.first, mine.key_head,
                mine.b);
            if constexpr (Tile::kKey) {
                tma_load(
                    memory.values + to, p.value_maps[mine.source], memory.keys_full(), 64 * box, mine.first,
                    mine.key_head, mine.b);
            }
        }
    }

    __device__ __forceinline__ void load_boxes(
        SharedAddress to, const TensorMap& map, SharedAddress barrier, int start, int h, int b) const {
#pragma unroll 1
        for (int box = 0; box < Tile::kBoxes; ++box) {
            tma_load(to + box * Tile::kRowBoxBytes, map, barrier, 64 * box, start, h, b);
        }
    }

    __device__ __forceinline__ ToldRows tell(const Tiles& tile, const OwnedKeys<Tile::kColumns>& mine) const {
        const BackwardSource& source = p.sources[mine.source];
        const int own = mine.first - mine.offset - tile.start;
        return {
            tile.full(p, mine) ? ToldRows::kFull : 0,
            static_cast<uint32_t>(fragment_of<D>(p, mine.first_head(p) + tile.head, 0, tile.start)),
            source_bias(source, mine.b, mine.key_head * p.shape.group + tile.head), own - source.right,
            own + source.left + 1};
    }

    // Rows of a tile, and what it is. Where it brings dead rows along, they are cleared before it counts as full: what
    // they hold may be no number, and a weight of 0 would not hide it.
    __device__ __forceinline__ void load_rows(const Tiles& tile, const OwnedKeys<Tile::kColumns>& mine) {
        const int query_stage = queries.stage(), grad_stage = grads.stage();
        const int h = mine.key_head * p.shape.group + tile.head;
        const bool clears = tile.brings_dead(p);
        const SharedAddress query_full = clears ? memory.landed() : memory.query_full(query_stage);
        const SharedAddress grad_full = clears ? memory.landed() : memory.grad_full(grad_stage);
        constexpr int kStates = Tile::kKey ? 2 : 1, kQueryBytes = Tile::kRowBytes + kStates * Tile::kStateBytes;
        wait_together(memory.query_empty(query_stage), 1 - queries.parity());
        if (lane_index() == 0) {
            tell(tile, mine).store(memory.slot(query_stage));
            mbarrier_arrive_expecting(query_full, clears ? kQueryBytes + Tile::kRowBytes : kQueryBytes);
            load_boxes(memory.query(query_stage), p.query_map, query_full, tile.start, h, mine.b);
            const int64_t at = stride_by(mine.first_head(p) + tile.head, p.rows_padded) + tile.start;
            bulk_load(memory.state(query_stage), p.lse2 + at, Tile::kStateBytes, query_full);
            if constexpr (Tile::kKey) {
                bulk_load(
                    memory.state(query_stage) + Tile::kStateBytes,
                    p.delta + stride_by(mine.source, p.delta_source) + at, Tile::kStateBytes, query_full);
            }
        }
        if constexpr (Tile::kShares) {
            wait_together(memory.grad_empty(grad_stage), 1 - grads.parity());
        }
        if (lane_index() == 0) {
            if (!clears) {
                mbarrier_arrive_expecting(grad_full, Tile::kRowBytes);
            }
            load_boxes(memory.grad_out(grad_stage), p.grad_out_map, grad_full, tile.start, h, mine.b);
        }
        if (clears) {
            wait_together(memory.landed(), cleared % 2);
            ++cleared;
            clear_rows<Tile::kRows, Tile::kBoxes>(memory.query(query_stage), tile.live);
            clear_rows<Tile::kRows, Tile::kBoxes>(memory.grad_out(grad_stage), tile.live);
            proxy_fence();
            warp_sync();
            if (lane_index() == 0) {
                mbarrier_arrive(memory.query_full(query_stage));
                mbarrier_arrive(memory.grad_full(grad_stage));
            }
        }
        ++queries.count;
        ++grads.count;
    }

    __device__ __forceinline__ void run() {
        const auto mine = OwnedKeys<Tile::kColumns>::template own<WANTED>(p);
        Tiles tile;
        tile.advance(p, mine.first_head(p), mine.row_begin, mine.row_end);
        if (tile.valid(p) && lane_index() == 0) {
            store_shared_128(
                memory.seen, {static_cast<uint32_t>(mine.seen[0]), static_cast<uint32_t>(mine.seen[0] >> 32),
                              static_cast<uint32_t>(mine.seen[1]), static_cast<uint32_t>(mine.seen[1] >> 32)});
            load_keys(mine);
        }
        while (tile.valid(p)) {
            load_rows(tile, mine);
            tile.advance(p, mine.first_head(p), mine.row_begin, mine.row_end);
        }
        wait_together(memory.query_empty(queries.stage()), 1 - queries.parity());
        if (lane_index() == 0) {
            ToldRows{ToldRows::kEnd, 0, 0.0f, 0, 0}.store(memory.slot(queries.stage()));
            mbarrier_arrive(memory.query_full(queries.stage()));
        }
    }
};

}  // namespace attnfuse::sm90
