// Backward on Hopper, key-stationary: grad_key and grad_value of every source in one launch, and dQ if it is wanted
// here too, as sm80/attn_bwd_dkdv.cuh has them, with tensor copies and wgmma (Shah et al., FlashAttention-3,
// arXiv:2407.08608, section 3 and appendix).
//
//     p = e^(z - lse),  dz = p (dout . v - delta_s),  ds = dz (1 - tanh^2)
//     dv = sum_i p dout,  dk = scale sum_i ds q,  dq_sum += sum_j ds k      over all query heads of the key head
//
// Grid: one axis of tiles * Hkv * B (core/key_tiles.cuh). A block owns 128 columns of one source, each of its two
// computing warpgroups 64 of them, and the first warp plans and copies the rows that see them. Scores are transposed,
// (columns, rows), so that p and ds leave the registers of one product as the left operand of the next:
//
//     S^T = K Q^T     dP^T = V dO^T     dV += P^T dO     dK += dS^T Q        a warpgroup's 64 columns
//     dQ^T = K^T dS^T                                                        over all 128; shared out by d, or by rows
//
// Only dS goes through shared memory. A warp lays its part of dQ^T down in fragments, and a bulk copy adds it to
// dq_sum, in no order. At a head dim of 256 dk and dv together do not fit the registers: each has a launch of its own,
// and shared memory has no room for dQ, which is added from the registers.
//
//     barrier        completed by                             waited for by
//     keys_full      the copies of K and V                    consumers
//     query_full     the copies of Q, lse and delta           consumers       (a stage each, as are the next three)
//     query_empty    a lane of each consumer warp             the copying warp
//     grad_full      the copies of dO                         consumers
//     grad_empty     likewise, where dO has fewer stages than Q; else it is released with Q
//     landed         the copies of rows some of which are dead: the copying warp
//
//     named barrier  arrived at                               waited at
//     kCleared       by all consumers: unseen columns are cleared
//     kThere         by all consumers: dS is there
//     kFree + group  by the other group: it is done with dS   by the group that is about to overwrite its half
#pragma once

#include "../core/fragment.cuh"
#include "../core/key_tiles.cuh"
#include "../core/logits.cuh"
#include "global.h"
#include "launch.h"
#include "ldmatrix.h"
#include "maps.h"
#include "ring.cuh"
#include "tiles.cuh"
#include "warpgroup.h"
#include "wgmma.h"

namespace attnfuse::sm90 {

template <int D, Wanted WANTED>
struct BackwardTile {
    static_assert(D == 64 || D == 128 || D == 256);
    static constexpr bool kKey = WANTED != Wanted::kValue, kValue = WANTED != Wanted::kKey;
    static constexpr int kConsumers = 2;
    static constexpr int kColumns = 64 * kConsumers;
    static constexpr int kRows = D == 64 ? 128 : D == 128 ? 80 : kKey ? 48 : 64;
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Of a thread: what the copying warpgroup gives, the others take.
    static constexpr int kCopyRegisters = 24;
    static constexpr int kComputeRegisters = 240;
    static constexpr int kQueryStages = 2;
    // At 256 K, V and two stages of Q leave room for one of dO, which is needed for dP alone.
    static constexpr int kGradStages = kValue ? 2 : 1;
    static constexpr bool kReleasesApart = kGradStages != kQueryStages;
    // Whether dQ is laid down in shared memory for a bulk copy.
    static constexpr bool kStaged = D < 256;
    // A tile holds D / 64 boxes of 64 columns; a row of a box is 128 bytes.
    static constexpr int kBoxes = D / 64;
    static constexpr int kKeyBoxBytes = kColumns * 128;
    static constexpr int kKeyBytes = kBoxes * kKeyBoxBytes;
    static constexpr int kRowBoxBytes = kRows * 128;
    static constexpr int kRowBytes = kBoxes * kRowBoxBytes;
    // dS (rows, columns): a box for the 64 columns of each group.
    static constexpr int kGradScoresBytes = kKey ? kConsumers * kRowBoxBytes : 0;
    // Of dQ^T a warp holds 16 d of each part, and this many rows. At 64 the groups share rows out, else d.
    static constexpr int kQueryParts = D == 256 ? 2 : 1;
    static constexpr int kQueryRows = D == 64 ? 64 : kRows;
    static constexpr int kStagingBytes = kKey && kStaged ? 16 * kQueryRows * 4 : 0;
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
    SharedAddress keys = (shared_base() + 1023) & ~1023u;                          // (kColumns, D), later grad_key
    SharedAddress values = Tile::kKey ? keys + Tile::kKeyBytes : keys;             // (kColumns, D), later grad_value
    SharedAddress queries = values + Tile::kKeyBytes;                              // stages of (kRows, D)
    SharedAddress grad_outs = queries + Tile::kQueryStages * Tile::kRowBytes;      // stages of (kRows, D)
    SharedAddress grad_scores = grad_outs + Tile::kGradStages * Tile::kRowBytes;   // (kRows, kColumns)
    SharedAddress stagings = grad_scores + Tile::kGradScoresBytes;                 // of each consumer warp
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

// dq_sum in fragments (16 d, 8 rows), element c of a lane side by side: what a warp holds of a tile's dQ^T is one
// piece.
//
//     ((head * D_pad / 16 + d / 16) * rows_padded / 8 + row / 8) * 128 + lane * 4 + c
__device__ __forceinline__ int64_t fragment_of(const BackwardParams& p, int head, int d, int row) {
    return stride_by(stride_by(head, p.shape.dim_padded / 16) + d / 16, p.rows_padded / 8) + row / 8;
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
            static_cast<uint32_t>(fragment_of(p, mine.first_head(p) + tile.head, 0, tile.start)),
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
        if constexpr (Tile::kReleasesApart) {
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

// A computing warpgroup: 64 columns.
template <typename T, int D, Wanted WANTED>
struct KeyConsumer {
    using Tile = BackwardTile<D, WANTED>;
    static constexpr bool kKey = Tile::kKey, kValue = Tile::kValue;
    static constexpr int kN = Tile::kRows / 8, kDN = D / 8, kK = Tile::kRows / 16;
    static constexpr int kQueryN = Tile::kQueryRows / 8, kParts = Tile::kQueryParts;
    static constexpr int kCleared = 1, kThere = 2, kFree = 3, kOwn = kFree + Tile::kConsumers;

    const BackwardArguments& p;
    const BackwardMemory<Tile> memory;
    const int group;
    Ring<Tile::kQueryStages> queries;
    Ring<Tile::kGradStages> grads;
    ToldRows told;  // the present tile

    __device__ __forceinline__ int column() const { return group * 64 + warp_index() % 4 * 16 + lane_index() / 4; }

    __device__ __forceinline__ void wait_free() const { named_barrier_sync(kFree + group, 256); }
    __device__ __forceinline__ void give_free() const {
        named_barrier_arrive(kFree + (group + 1) % Tile::kConsumers, 256);
    }

    // acc (64, kRows) = A B^T: the group's 64 rows of K or V by the rows of a stage
    __device__ __forceinline__ static void issue_scores(float (&acc)[kN][4], SharedAddress left, SharedAddress right) {
        const MatrixDescriptor a = matrix_descriptor(recomputed(left), 0, 1024);
        const MatrixDescriptor b = matrix_descriptor(right, 0, 1024);
        wgmma_fence(acc);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const int box = k / 4, at = k % 4 * 32;
            wgmma<T>(acc, further(a, box * Tile::kKeyBoxBytes + at), further(b, box * Tile::kRowBoxBytes + at), k != 0);
        }
        wgmma_commit();
    }

    // acc (64, D) += A B: p or ds by the rows of a stage
    __device__ __forceinline__ static void issue_grad(
        float (&acc)[kDN][4], uint32_t (&left)[kK][4], SharedAddress right) {
        const MatrixDescriptor b = matrix_descriptor(right, Tile::kRowBoxBytes, 1024);
        wgmma_fence(acc, left);
#pragma unroll
        for (int k = 0; k < kK; ++k) {
            wgmma_transposed<T>(acc, left[k], further(b, k * 2048), true);
        }
        wgmma_commit();
    }

    // d and the row of the tile that part `part` of the group's dQ^T begins with.
    __device__ __forceinline__ int query_d(int part) const { return D == 64 ? 0 : 64 * (kParts * group + part); }
    __device__ __forceinline__ int query_row() const { return D == 64 ? 64 * group : 0; }

    // dq (64, kQueryRows) = K^T dS^T over all columns of the block
    __device__ __forceinline__ void issue_query(float (&dq)[kParts][kQueryN][4]) const {
        if constexpr (kParts == 1) {
            wgmma_fence(dq[0]);
        } else {
            wgmma_fence(dq[0], dq[1]);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const SharedAddress keys = memory.keys + query_d(part) / 64 * Tile::kKeyBoxBytes;
            const MatrixDescriptor a = matrix_descriptor(recomputed(keys), 0, 1024);
            const MatrixDescriptor b = matrix_descriptor(memory.grad_scores + query_row() * 128, 0, 1024);
#pragma unroll
            for (int k = 0; k < Tile::kColumns / 16; ++k) {
                wgmma_left_transposed<T>(
                    dq[part], further(a, k * 2048), further(b, k / 4 * Tile::kRowBoxBytes + k % 4 * 32), k != 0);
            }
        }
        wgmma_commit();
    }

    // Where in dq_sum the group's rows of the tile begin at d.
    __device__ __forceinline__ float* fragment_at(int d) const {
        const int64_t fragment = told.fragment + stride_by(d / 16, p.rows_padded / 8) + query_row() / 8;
        return p.dq_sum + fragment * 128;
    }

    // This warp's part of dq to dq_sum.
    __device__ __forceinline__ void add_query(const float (&dq)[kParts][kQueryN][4]) const {
        if constexpr (Tile::kStaged) {
            const int d = query_d(0) + warp_index() % 4 * 16;
            // Made anew, as all addresses in the loop are: there are no registers to keep them in.
            const int thread = recomputed(thread_index()), warp = thread / 32 - 4;
            const SharedAddress staging = memory.stagings + warp * Tile::kStagingBytes;
            tma_wait_read();  // of the tile before
            warp_sync();
#pragma unroll
            for (int n = 0; n < kQueryN; ++n) {
                Words4 words;
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    words.word[c] = bits_of(dq[0][n][c]);
                }
                store_shared_128(staging + n * 512 + thread % 32 * 16, words);
            }
            proxy_fence();
            warp_sync();
            if (lane_index() == 0 && d < p.shape.dim) {
                bulk_add(fragment_at(d), staging, Tile::kStagingBytes);
                tma_commit();
            }
        } else {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int d = query_d(part) + warp_index() % 4 * 16;
                float* const to = fragment_at(d) + lane_index() * 4;
                if (d < p.shape.dim) {
#pragma unroll
                    for (int n = 0; n < kQueryN; ++n) {
                        add_global_128(to + n * 128, dq[part][n]);
                    }
                }
            }
        }
    }

    // Whether some row sees column j of the block.
    __device__ __forceinline__ bool is_seen(int j) const {
        const SharedAddress word = memory.seen + j / 16 * 2;
        return load_shared_16(word) >> (j % 16) & 1;
    }

    // -inf where the row of the tile does not see the column.
    __device__ __forceinline__ void mask(float (&x)[kN][4]) const {
        ToldRows limits;
        limits.load_limits(memory.slot(queries.stage()));
        const int j = column();
        const bool upper = is_seen(j), lower = is_seen(j + 8);
        mask_fragment<0>(x, upper ? limits.seeing(j, 0) : 0, lower ? limits.seeing(j + 8, 0) : 0);
        if constexpr (kN > 8) {
            mask_fragment<8>(x, upper ? limits.seeing(j, 1) : 0, lower ? limits.seeing(j + 8, 1) : 0);
        }
    }

    // What stands at `state`, this lane's part of it, of the rows that x[n] has in this thread.
    __device__ __forceinline__ static void load_pair(float (&of_row)[2], SharedAddress state, int n) {
        load_shared_pair(of_row[0], of_row[1], state + n * 32);
    }

    __device__ __forceinline__ float weight(float x, float lse) const {
        return exp2_approx(multiply_add(x, p.shape.logits.unit, told.bias - lse));
    }

    // x to p.
    __device__ __forceinline__ void weigh(float (&x)[kN][4], SharedAddress state) const {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float lse[2];
            load_pair(lse, state, n);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                x[n][c] = weight(x[n][c], lse[c % 2]);
            }
        }
    }

    // dz = p (dz - delta), and p, packed. Side by side, so that the registers of both halve as they are packed.
    __device__ __forceinline__ static void differentiate(
        uint32_t (&weights)[kK][4], uint32_t (&ds)[kK][4], float (&dz)[kN][4], const float (&p)[kN][4],
        SharedAddress state) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float delta[2];
            load_pair(delta, state + Tile::kStateBytes, n);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                dz[n][c] = p[n][c] * (dz[n][c] - delta[c % 2]);
            }
            pack_pairs(weights[n / 2], n % 2, p[n]);
            pack_pairs(ds[n / 2], n % 2, dz[n]);
        }
    }

    // Half of a fragment of the left operand.
    __device__ __forceinline__ static void pack_pairs(uint32_t (&to)[4], int half, const float (&x)[4]) {
        to[2 * half] = pack<T>(x[0], x[1]);
        to[2 * half + 1] = pack<T>(x[2], x[3]);
    }

    // The same from x = q . k where the logit is something else, eight rows at a time: p is made here too.
    __device__ __forceinline__ void differentiate_capped(
        uint32_t (&weights)[kK][4], uint32_t (&ds)[kK][4], float (&dz)[kN][4], const float (&x)[kN][4],
        SharedAddress state) const {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float lse[2], delta[2], logit[1][4], grad[1][4], w[4];
            load_pair(lse, state, n);
            load_pair(delta, state + Tile::kStateBytes, n);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                logit[0][c] = x[n][c];
            }
            prepare(logit, p.shape.logits);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                logit[0][c] = x[n][c] == -infinity() ? -infinity() : logit[0][c];  // masked
                w[c] = weight(logit[0][c], lse[c % 2]);
                grad[0][c] = w[c] * (dz[n][c] - delta[c % 2]);
            }
            through_cap(grad, logit, p.shape.logits);
            pack_pairs(weights[n / 2], n % 2, w);
            pack_pairs(ds[n / 2], n % 2, grad[0]);
        }
    }

    // ds, packed, to the group's half of dS.
    __device__ __forceinline__ void store_grad_scores(const uint32_t (&ds)[kK][4]) const {
        // Of the four matrices of 8 rows and 8 columns, this lane's: which rows, and which columns.
        const int thread = recomputed(thread_index()), matrix = thread / 8 % 4, r = thread % 8;
        const SharedAddress to = memory.grad_scores + group * Tile::kRowBoxBytes + (matrix / 2 * 8 + r) * 128 +
                                 ((2 * (thread / 32 % 4) + matrix % 2 ^ r) * 16);
#pragma unroll
        for (int k = 0; k < kK; ++k) {
            stmatrix_x4_trans(to + k * 2048, ds[k]);
        }
    }

    // What follows the scores' product and, unless CAPPED, their exponentials: from dP^T to the gradients, dQ if
    // `adds`.
    template <bool CAPPED>
    __device__ __forceinline__ void finish_step(
        float (&dk)[kDN][4], float (&dv)[kDN][4], const float (&x)[kN][4], float (&dz)[kN][4], SharedAddress query,
        SharedAddress grad_out, SharedAddress state, bool adds) const {
        uint32_t weights[kK][4], ds[kK][4];
        wgmma_wait<0>(dz);
        if constexpr (Tile::kReleasesApart) {
            release(memory.grad_empty(grads.stage()));
        }
        if constexpr (CAPPED) {
            differentiate_capped(weights, ds, dz, x, state);
        } else {
            differentiate(weights, ds, dz, x, state);
        }
        if constexpr (kValue) {
            issue_grad(dv, weights, grad_out);
        }
        if (adds) {
            float dq[kParts][kQueryN][4];
            clear(dq);
            wait_free();
            store_grad_scores(ds);
            proxy_fence();
            named_barrier_sync(kThere, 256);
            issue_query(dq);
            issue_grad(dk, ds, query);
            if constexpr (kValue) {
                wgmma_wait<1>(dv, weights, dq[0]);
            } else {
                wgmma_wait<1>(dq[0], dq[kParts - 1]);
            }
            give_free();
            add_query(dq);
        } else {
            issue_grad(dk, ds, query);
            if constexpr (kValue) {
                wgmma_wait<1>(dv, weights);
            }
        }
        wgmma_wait<0>(dk, ds);
    }

    // A tile of rows. CAPPED: x is something else than q . k, and ds takes its derivative.
    template <bool CAPPED>
    __device__ __forceinline__ void step(float (&dk)[kDN][4], float (&dv)[kDN][4]) {
        const SharedAddress query = memory.query(queries.stage()), grad_out = memory.grad_out(grads.stage());
        const SharedAddress state = memory.state(queries.stage()) + recomputed(lane_index()) % 4 * 8;
        const int own = group * 64 * 128;
        // From zeros, which no instruction makes: the first product does not add. Else what the registers held in the
        // tile before would have to live until here.
        float products[2][kN][4];
        clear(products);
        auto &x = products[0], &dz = products[1];
        issue_scores(x, memory.keys + own, query);
        mbarrier_wait(memory.grad_full(grads.stage()), grads.parity());
        if constexpr (kKey) {
            issue_scores(dz, memory.values + own, grad_out);
            wgmma_wait<1>(x);
            if (!(told.flags & ToldRows::kFull)) {
                mask(x);
            }
            if constexpr (!CAPPED) {
                weigh(x, state);
            }
            const bool adds = p.dq_sum != nullptr;
            // The wait for dP^T stands in both branches, so that the exponentials stay before it: they are what its
            // time is spent with. At 128 that takes more registers than there are.
            if (D == 128 || adds) {
                finish_step<CAPPED>(dk, dv, x, dz, query, grad_out, state, adds);
            } else {
                finish_step<CAPPED>(dk, dv, x, dz, query, grad_out, state, false);
            }
        } else {
            uint32_t weights[kK][4];
            wgmma_wait<0>(x);
            if constexpr (CAPPED) {
                prepare(x, p.shape.logits);
            }
            if (!(told.flags & ToldRows::kFull)) {
                mask(x);
            }
            weigh(x, state);
            pack_fragment<T>(weights, x);
            issue_grad(dv, weights, grad_out);
            wgmma_wait<0>(dv, weights);
        }
        warp_sync();  // all lanes have read lse and delta
        release(memory.query_empty(queries.stage()));
        ++queries.count;
        ++grads.count;
    }

    // Waits for the rows of a tile, and learns what tile it is; false if there is none.
    __device__ __forceinline__ bool next_tile() {
        mbarrier_wait(memory.query_full(queries.stage()), queries.parity());
        told.load(memory.slot(queries.stage()));
        return !(told.flags & ToldRows::kEnd);
    }

    template <bool CAPPED>
    __device__ __forceinline__ void walk(float (&dk)[kDN][4], float (&dv)[kDN][4]) {
        do {
            step<CAPPED>(dk, dv);
        } while (next_tile());
    }

    // Zeros in the group's columns that nobody sees: what they hold may be no number.
    __device__ __forceinline__ void clear_unseen() const {
        const Words4 seen = load_shared_128(memory.seen);
        if ((seen.word[0] & seen.word[1] & seen.word[2] & seen.word[3]) == ~uint32_t{0}) {
            return;
        }
        const int first = group * 64 + warp_index() % 4 * 16;
#pragma unroll 1
        for (int row = first + lane_index() / 8; row < first + 16; row += 4) {
            if (!is_seen(row)) {
#pragma unroll
                for (int box = 0; box < Tile::kBoxes; ++box) {
                    const int at = box * Tile::kKeyBoxBytes + row * 128 + lane_index() % 8 * 16;
                    store_shared_128(memory.keys + at, {});
                    if constexpr (kKey) {
                        store_shared_128(memory.values + at, {});
                    }
                }
            }
        }
        proxy_fence();
        named_barrier_sync(kCleared, 256);
    }

    // A gradient to its tensor, by way of where the group's rows of K or V were.
    __device__ __forceinline__ void store(
        const float (&grad)[kDN][4], float scale, SharedAddress tile, const TensorMap& map,
        const OwnedKeys<Tile::kColumns>& mine) const {
        const int row = warp_index() % 4 * 16 + lane_index() / 4;
        const SharedAddress own = tile + group * 64 * 128;
#pragma unroll
        for (int n = 0; n < kDN; ++n) {
            const SharedAddress to =
                own + n / 8 * Tile::kKeyBoxBytes + row * 128 + ((n % 8 ^ row % 8) * 16) + lane_index() % 4 * 4;
            store_shared_32(to, pack<T>(grad[n][0] * scale, grad[n][1] * scale));
            store_shared_32(to + 8 * 128, pack<T>(grad[n][2] * scale, grad[n][3] * scale));
        }
        proxy_fence();
        named_barrier_sync(kOwn + group, 128);  // all of it is there
        if (warp_index() % 4 == 0 && lane_index() == 0) {
#pragma unroll 1
            for (int box = 0; box < Tile::kBoxes; ++box) {
                tma_store(
                    own + box * Tile::kKeyBoxBytes, map, 64 * box, mine.first + 64 * group, mine.key_head, mine.b);
            }
            tma_commit();
        }
    }

    __device__ __forceinline__ void run() {
        float dk[1][kDN][4], dv[1][kDN][4];
        clear(dk);
        clear(dv);
        const bool adds = kKey && p.dq_sum != nullptr;
        if (adds) {
            give_free();  // the first tile finds dS free
        }
        if (next_tile()) {
            mbarrier_wait(memory.keys_full(), 0);
            clear_unseen();
            if (p.shape.logits.prepared) {
                walk<true>(dk[0], dv[0]);
            } else {
                walk<false>(dk[0], dv[0]);
            }
        }
        if (adds) {
            wait_free();  // the other group reads K no more
        }
        named_barrier_sync(kOwn + group, 128);  // and nor do the group's own warps
        const auto mine = OwnedKeys<Tile::kColumns>::template own<WANTED>(p);
        const BackwardSource& source = p.sources[mine.source];
        if (kKey && source.grad_key.data != nullptr) {
            store(dk[0], p.shape.scale, memory.keys, p.grad_key_maps[mine.source], mine);
        }
        if (kValue && source.grad_value.data != nullptr) {
            store(dv[0], 1.0f, memory.values, p.grad_value_maps[mine.source], mine);
        }
        tma_wait_read();
    }
};

template <typename T, int D, Wanted WANTED>
__global__ void __launch_bounds__(BackwardTile<D, WANTED>::kThreads, 1)
    attn_bwd_dkdv_kernel(const __grid_constant__ BackwardArguments p) {
    using Tile = BackwardTile<D, WANTED>;
    const BackwardMemory<Tile> memory;
    make_barriers(memory);
    if (uniform(warp_index()) < 4) {
        give_registers<Tile::kCopyRegisters>();
        if (warp_index() == 0) {
            RowCopies<D, WANTED>{p, memory}.run();
        }
    } else {
        take_registers<Tile::kComputeRegisters>();
        KeyConsumer<T, D, WANTED>{p, memory, uniform(warp_index() / 4) - 1}.run();
    }
}

template <typename T, int D, Wanted WANTED>
void launch_dkdv(const BackwardArguments& p, void* stream) {
    using Tile = BackwardTile<D, WANTED>;
    const int64_t tiles = all_key_tiles<Tile::kColumns, WANTED>(p);
    BackwardArguments with_maps = p;
    with_maps.query_map = map_of(p.query, p.shape.dim, p.shape.rows, p.shape.heads, p.shape.batch, Tile::kRows);
    with_maps.grad_out_map =
        map_of(p.grad_out, p.shape.value_dim, p.shape.rows, p.shape.heads, p.shape.batch, Tile::kRows);
    launch(
        attn_bwd_dkdv_kernel<T, D, WANTED>, tiles * p.shape.key_heads * p.shape.batch, Tile::kThreads,
        Tile::kSharedBytes, stream, with_maps);
}

template <typename T, int D>
void attn_bwd_dkdv(const BackwardParams& given, void* stream) {
    BackwardArguments p{given};
    const Shape& shape = p.shape;
    make_current(shape.device);
    map_sources<BackwardTile<D, Wanted::kKey>::kColumns>(p);
    for (int s = 0; s < shape.source_count; ++s) {
        const BackwardSource& source = p.sources[s];
        if (source.columns > 0 && source.grad_key.data != nullptr) {
            p.grad_key_maps[s] = map_of(source.grad_key, shape.dim, source.columns, shape.key_heads, shape.batch, 64);
        }
        if (source.columns > 0 && source.grad_value.data != nullptr) {
            p.grad_value_maps[s] =
                map_of(source.grad_value, shape.value_dim, source.columns, shape.key_heads, shape.batch, 64);
        }
    }
    if constexpr (D == 256) {
        launch_dkdv<T, D, Wanted::kValue>(p, stream);
        launch_dkdv<T, D, Wanted::kKey>(p, stream);
    } else {
        launch_dkdv<T, D, Wanted::kBoth>(p, stream);
    }
}

constexpr int kConvertThreads = 128;
constexpr int kConvertRows = 64;

// grad_query = scale dq_sum, out of its fragments. A block owns 64 rows of one head; a warp takes 16 d of 16 rows at a
// time, and turns them around on their way to shared memory.
template <typename T, int D>
__global__ void __launch_bounds__(kConvertThreads) attn_bwd_convert_kernel(const __grid_constant__ BackwardParams p) {
    constexpr int kRowBytes = D * 2;
    const int words = p.rows_padded / kConvertRows;
    const int first = block_index() % words * kConvertRows;
    const int head = block_index() / words;    // of B Hq
    const SharedAddress tile = shared_base();  // (kConvertRows, D), chunk c of row r at c ^ r % 8
    const auto chunk = [&](int row, int c) { return tile + row * kRowBytes + ((c ^ row % 8) * 16); };
    const int matrix = lane_index() / 8, r = lane_index() % 8;
    for (int at = warp_index(); at < D / 16 * (kConvertRows / 16); at += kConvertThreads / 32) {
        const int d = at / (kConvertRows / 16) * 16, row = at % (kConvertRows / 16) * 16;
        if (d >= p.shape.dim) {
            break;
        }
        uint32_t packed[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float* from = p.dq_sum + fragment_of(p, head, d, first + row + 8 * n) * 128 + lane_index() * 4;
            const Words4 x = load_global(reinterpret_cast<const Words4*>(from));
            const auto scaled = [&](int c) { return float_of(x.word[c]) * p.shape.scale; };
            packed[2 * n] = pack<T>(scaled(0), scaled(1));
            packed[2 * n + 1] = pack<T>(scaled(2), scaled(3));
        }
        stmatrix_x4_trans(chunk(row + matrix / 2 * 8 + r, d / 8 + matrix % 2), packed);
    }
    barrier();
    T* const out = static_cast<T*>(p.grad_query.data) + stride_by(head / p.shape.heads, p.grad_query.batch) +
                   stride_by(head % p.shape.heads, p.grad_query.head);
    for (int at = thread_index(); at < kConvertRows * (D / 8); at += kConvertThreads) {
        const int row = at / (D / 8), c = at % (D / 8);
        if (first + row < p.shape.rows && c * 8 < p.shape.dim) {
            store_global_128(out + stride_by(first + row, p.grad_query.row) + c * 8, load_shared_128(chunk(row, c)));
        }
    }
}

template <typename T, int D>
void attn_bwd_convert(const BackwardParams& p, void* stream) {
    const int64_t blocks = int64_t{p.shape.batch} * p.shape.heads * (p.rows_padded / kConvertRows);
    launch(attn_bwd_convert_kernel<T, D>, blocks, kConvertThreads, kConvertRows * D * 2, stream, p);
}

template <int D, Wanted WANTED>
TileShape backward_tile_shape() {
    using Tile = BackwardTile<D, WANTED>;
    return {
        "attn_bwd_dkdv",
        Tile::kRows,
        Tile::kColumns,
        Tile::kThreads,
        Tile::kSharedBytes,
        Tile::kStaged ? "wgmma and tensor copies, dQ added by bulk copies"
                      : "wgmma and tensor copies, dQ added by atomics"};
}

// In the order of launch.
template <int D>
std::vector<TileShape> attn_bwd_dkdv_tiles() {
    if constexpr (D == 256) {
        return {backward_tile_shape<D, Wanted::kValue>(), backward_tile_shape<D, Wanted::kKey>()};
    } else {
        return {backward_tile_shape<D, Wanted::kBoth>()};
    }
}

}  // namespace attnfuse::sm90
