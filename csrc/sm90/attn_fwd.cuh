// Forward on Hopper: out, lse and mass as sm80/attn_fwd.cuh has them, with tensor copies and wgmma (Shah et al.,
// FlashAttention-3, arXiv:2407.08608).
//
//     p = e^(z - lse),  out = sum_s sum_j p v,  mass_s = sum_{j in s} p = e^(lse_s - lse)
//
// Grid: as many blocks as multiprocessors; each walks its share of the items of kRows rows of one head (tiles.cuh). The
// first warp of a block copies: K and V tiles of kColumns columns into two stages each, and what the tile is into a
// slot. kConsumers warpgroups of 64 rows each compute, and know one stream of tiles:
//
//     rows     source 0      source 1
//      |     # # # # # .     # # .        # full     . masked: a step of its own     blank: not visited
//      v     # # # # # .     # # .
//
// Q K^T of a tile and P V of the one before are issued together; the softmax of the tile runs while P V still does, and
// while the other warpgroups' products do: they take turns in issuing (ping-pong).
#pragma once

#include "../core/logits.cuh"
#include "../core/softmax.cuh"
#include "column_copies.cuh"
#include "launch.h"
#include "left_operand.cuh"
#include "maps.h"
#include "store_rows.cuh"
#include "warpgroup.h"
#include "wgmma.h"

namespace attnfuse::sm90 {

template <int D>
struct ForwardTile {
    static_assert(D == 64 || D == 128 || D == 256);
    static constexpr int kConsumers = D == 64 ? 3 : 2;
    static constexpr int kRows = 64 * kConsumers;
    static constexpr int kRowTensors = 1;
    // At 64 three warpgroups share the registers: 128 columns would leave the copying warp too few.
    static constexpr int kColumns = D == 64 ? 112 : D == 128 ? 128 : 80;
    static constexpr int kStages = 2;
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Of a thread: what the copying warpgroup gives, the others take.
    static constexpr int kCopyRegisters = 56;
    static constexpr int kComputeRegisters = D == 64 ? 152 : 224;
    // A tile holds D / 64 boxes of 64 columns; a row of a box is 128 bytes.
    static constexpr int kBoxes = D / 64;
    static constexpr int kQueryBoxBytes = 64 * 128;
    static constexpr int kGroupBytes = kBoxes * kQueryBoxBytes;
    static constexpr int kQueryBytes = kConsumers * kGroupBytes;
    static constexpr int kKeyBoxBytes = kColumns * 128;
    static constexpr int kKeyBytes = kBoxes * kKeyBoxBytes;
    // A slot is overwritten when the tile three later is released: what it says is read until the next softmax.
    static constexpr int kSlots = 2 * kStages;
    static constexpr int kBarriers = 3 + 4 * kStages;
    // The first KB is lost to where memory begins: atoms lie on 1024 bytes.
    static constexpr int kSharedBytes =
        1024 + kQueryBytes + 2 * kStages * kKeyBytes + kSlots * Told::kBytes + kBarriers * 8;
};

// Where a consumer's rows and their results are.
struct RowOutputs {
    const ForwardArguments& p;
    int item_head;
    int first;  // the warpgroup's first row

    __device__ __forceinline__ int head() const { return item_head; }
    __device__ __forceinline__ int row(int /*m*/, int r) const {
        return first + warp_index() % 4 * 16 + r * 8 + lane_index() / 4;
    }
    // Source s belongs to one of the four lanes that share a row; it alone writes and reads it.
    __device__ __forceinline__ bool owns(int m, int r, int s) const {
        return p.mass != nullptr && row(m, r) < p.shape.rows && lane_index() % 4 == s % 4;
    }
    __device__ __forceinline__ int64_t at(int m, int r) const { return stride_by(head(), p.shape.rows) + row(m, r); }
    __device__ __forceinline__ float* mass(int m, int r, int s) const {
        return p.mass + at(m, r) * p.shape.source_count + s;
    }
};

// A consumer warpgroup: 64 rows of the item.
template <typename T, int D>
struct Consumer {
    using Tile = ForwardTile<D>;
    static constexpr int kN = Tile::kColumns / 8, kDN = D / 8, kK = Tile::kColumns / 16;
    // Named barriers: 1 + group is a warpgroup's turn to issue products, 1 + kConsumers + group its own 128 threads.
    static constexpr int kTurn = 1, kOwn = 1 + Tile::kConsumers;
    // At 256 the products leave no registers for a second tile's scores: taking turns gains nothing.
    static constexpr bool kTakesTurns = D < 256;

    const ForwardArguments& p;
    const ColumnMemory<Tile> memory;
    const int group;
    Ring<Tile::kStages> ring;
    uint32_t flags;  // of the present tile, Told's
    float bias;
    float shrink[2];

    __device__ __forceinline__ SharedAddress query() const { return memory.query + group * Tile::kGroupBytes; }

    __device__ __forceinline__ void wait_turn() const {
        if constexpr (kTakesTurns) {
            named_barrier_sync(kTurn + group, 256);
        }
    }
    __device__ __forceinline__ void give_turn() const {
        if constexpr (kTakesTurns) {
            named_barrier_arrive(kTurn + (group + 1) % Tile::kConsumers, 256);
        }
    }

    // scores (64, kColumns) = Q K^T
    __device__ __forceinline__ void issue_scores(float (&scores)[kN][4]) const {
        Kept<0> none;
        issue_over_d<T, D, 0>(
            scores, none, query(), Tile::kQueryBoxBytes, memory.keys(ring.stage()), Tile::kKeyBoxBytes);
    }
    // out (64, D) += P V of the stage
    __device__ __forceinline__ void issue_out(float (&out)[kDN][4], uint32_t (&weights)[kK][4], int stage) const {
        const MatrixDescriptor values = matrix_descriptor(memory.values(stage), Tile::kKeyBoxBytes, 1024);
        wgmma_fence(out, weights);
#pragma unroll
        for (int k = 0; k < kK; ++k) {
            wgmma_transposed<T>(out, weights[k], further(values, k * 2048), true);
        }
        wgmma_commit();
    }

    // P V of the stage is complete.
    __device__ __forceinline__ void finish_out(float (&out)[kDN][4], uint32_t (&weights)[kK][4], int stage) const {
        wgmma_wait<0>(out, weights);
        release(memory.value_empty(stage));
    }

    // Waits for K of the tile, and learns what tile it is.
    __device__ __forceinline__ void next_tile(int h, int b) {
        mbarrier_wait(memory.key_full(ring.stage()), ring.parity());
        const uint32_t before = flags;
        flags = uniform(static_cast<int>(Told::load_flags(memory.slot(ring.count))));
        if constexpr (!kTakesTurns) {
            warp_sync();  // the first lane releases for all: none is still about to read an earlier slot
        }
        if (((flags ^ before) & Told::kSource) != 0 || (before & Told::kEndsItem) != 0) {
            bias = source_bias(p.sources[flags & Told::kSource], b, h);
        }
    }

    // From q . k to p, unnormalised; `shrink` is what brings `out` to the new maximum.
    template <bool FULL>
    __device__ __forceinline__ void weigh(
        float (&scores)[kN][4], OnlineSoftmax<1>& softmax, const RowOutputs& outputs) {
        if constexpr (!FULL) {
            prepare(scores, p.shape.logits);
            Told told;
            told.load_columns(memory.slot(ring.count));
            const int upper = outputs.row(0, 0), lower = outputs.row(0, 1);
            mask_fragment<0>(scores, told.seen_by(upper, 0), told.seen_by(lower, 0));
            mask_fragment<8>(scores, told.seen_by(upper, 1), told.seen_by(lower, 1));
        }
        softmax.add_tile(0, scores, p.shape.logits.unit, bias, [&](int r, float by) { shrink[r] = by; });
    }

    // A tile after the first: its scores and softmax, and P V of the tile before.
    template <bool FULL>
    __device__ __forceinline__ void step(
        float (&out)[kDN][4], float (&scores)[kN][4], uint32_t (&weights)[kK][4], OnlineSoftmax<1>& softmax,
        const RowOutputs& outputs) {
        const Ring<Tile::kStages> before{ring.count - 1};
        wait_turn();
        issue_scores(scores);
        mbarrier_wait(memory.value_full(before.stage()), before.parity());
        issue_out(out, weights, before.stage());
        give_turn();
        wgmma_wait<1>(scores);
        release(memory.key_empty(ring.stage()));
        weigh<FULL>(scores, softmax, outputs);
        // Most tiles raise no row's maximum. The wait stands in both branches, so that the exponentials stay before it:
        // they are what P V's time is spent with.
        if (ballot(shrink[0] != 1.0f || shrink[1] != 1.0f) != 0) {
            finish_out(out, weights, before.stage());
#pragma unroll
            for (int n = 0; n < kDN; ++n) {
                out[n][0] *= shrink[0];
                out[n][1] *= shrink[0];
                out[n][2] *= shrink[1];
                out[n][3] *= shrink[1];
            }
        } else {
            finish_out(out, weights, before.stage());
        }
        pack_fragment<T>(weights, scores);
    }

    // What follows a tile's softmax where it is its source's last.
    __device__ __forceinline__ void end_source(OnlineSoftmax<1>& softmax, const RowOutputs& outputs) const {
        if (flags & Told::kEndsSource) {
            finish_source(softmax, outputs, static_cast<int>(flags & Told::kSource));
        }
    }

    // The item's tiles.
    __device__ __forceinline__ void walk(
        float (&out)[kDN][4], OnlineSoftmax<1>& softmax, const RowOutputs& outputs, int h, int b) {
        float scores[kN][4];
        uint32_t weights[kK][4];
        next_tile(h, b);
        if (flags & Told::kEmpty) {
            release(memory.key_empty(ring.stage()));
            mbarrier_wait(memory.value_full(ring.stage()), ring.parity());
            release(memory.value_empty(ring.stage()));
            ++ring.count;
            return;
        }
        issue_scores(scores);
        wgmma_wait<0>(scores);
        release(memory.key_empty(ring.stage()));
        if (flags & Told::kFull) {
            weigh<true>(scores, softmax, outputs);
        } else {
            weigh<false>(scores, softmax, outputs);
        }
        pack_fragment<T>(weights, scores);
        end_source(softmax, outputs);
        while (!(flags & Told::kEndsItem)) {
            ++ring.count;
            next_tile(h, b);
            if (flags & Told::kFull) {
                step<true>(out, scores, weights, softmax, outputs);
            } else {
                step<false>(out, scores, weights, softmax, outputs);
            }
            end_source(softmax, outputs);
        }
        ring.count = recomputed(ring.count);  // rather than keep through the loop what is made of it
        mbarrier_wait(memory.value_full(ring.stage()), ring.parity());
        issue_out(out, weights, ring.stage());
        finish_out(out, weights, ring.stage());
        ++ring.count;
    }

    // `out` to its tensor, by way of where the rows of the query were.
    __device__ __forceinline__ void store(const float (&out)[kDN][4], int first, int h, int b) const {
        named_barrier_sync(kOwn + group, 128);  // no product of the warpgroup reads the query any more
        lay_down<T, kDN>(query(), Tile::kQueryBoxBytes, [&](int n, int c) { return out[n][c]; });
        proxy_fence();
        named_barrier_sync(kOwn + group, 128);  // all of it is there
        if (warp_index() % 4 == 0 && lane_index() == 0) {
            store_boxes<Tile::kBoxes>(query(), Tile::kQueryBoxBytes, p.out_map, first, h, b);
            tma_wait_read();
            mbarrier_arrive(memory.query_empty());
        }
    }

    __device__ __forceinline__ void run() {
        flags = Told::kEndsItem;
        if (group == Tile::kConsumers - 1) {
            give_turn();  // the first turn is the first warpgroup's
        }
        for (Items items; items.valid(p); ++items.round) {
            const Item item = items.template item<Tile::kRows>(p);
            const int h = item.head % p.shape.heads, b = item.head / p.shape.heads;
            const RowOutputs outputs{p, item.head, item.first + 64 * group};
            float out[1][kDN][4];
            clear(out);
            OnlineSoftmax<1> softmax;
            clear_mass<1>(outputs);
            mbarrier_wait(memory.query_full(), items.round % 2);
            walk(out[0], softmax, outputs, h, b);
            finish_rows(softmax, out, outputs);
            store(out[0], outputs.first, h, b);
        }
        if (group == 0) {
            wait_turn();  // nobody is left waiting, and no arrival over
        }
    }
};

template <typename T, int D>
__global__ void __launch_bounds__(ForwardTile<D>::kThreads, 1)
    attn_fwd_kernel(const __grid_constant__ ForwardArguments p) {
    using Tile = ForwardTile<D>;
    const ColumnMemory<Tile> memory;
    make_barriers(memory);
    if (uniform(warp_index()) < 4) {
        give_registers<Tile::kCopyRegisters>();
        if (warp_index() == 0) {
            ColumnCopies<Tile, ForwardArguments>{p, memory}.run();
        }
    } else {
        take_registers<Tile::kComputeRegisters>();
        Consumer<T, D>{p, memory, uniform(warp_index() / 4) - 1}.run();
    }
}

template <typename T, int D>
void attn_fwd(const ForwardParams& given, void* stream) {
    using Tile = ForwardTile<D>;
    ForwardArguments p{given};
    const Shape& shape = p.shape;
    make_current(shape.device);
    p.query_map = map_of(p.query, shape.dim, shape.rows, shape.heads, shape.batch, 64);
    p.out_map = map_of(p.out, shape.value_dim, shape.rows, shape.heads, shape.batch, 64);
    const int64_t columns = map_sources<Tile::kColumns>(p);
    p.tiles = (shape.rows + Tile::kRows - 1) / Tile::kRows;
    p.section = section_of(shape, columns);
    const int64_t items = int64_t{p.tiles} * shape.heads * shape.batch, blocks = multiprocessors(shape.device);
    launch(attn_fwd_kernel<T, D>, items < blocks ? items : blocks, Tile::kThreads, Tile::kSharedBytes, stream, p);
}

template <int D>
std::vector<TileShape> attn_fwd_tiles() {
    using Tile = ForwardTile<D>;
    return {
        {"attn_fwd", Tile::kRows, Tile::kColumns, Tile::kThreads, Tile::kSharedBytes,
         "wgmma and tensor copies, a persistent block a multiprocessor"}};
}

}  // namespace attnfuse::sm90
