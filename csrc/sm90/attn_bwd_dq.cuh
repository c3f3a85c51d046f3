// Backward on Hopper, query-stationary: grad_query, and the sums of dz over each row that the gradients of bias and
// sinks need, as sm80/attn_bwd_dq.cuh has them, with tensor copies and wgmma.
//
//     p = e^(z - lse),  dz = p (dout . v - delta_s),  ds = dz (1 - tanh^2),  dq = scale sum_s sum_j ds k
//
// Grid and copies are the forward's (column_copies.cuh): a block walks its share of the items of 128 rows of one head,
// with 64 rows of Q and dO for each of its two computing warpgroups. ds leaves the registers of one product as the left
// operand of the next. A block alone writes what it writes: the bits are the same every time, which is what this kernel
// is for where the other one, which adds dQ up in no order (attn_bwd.cuh), will not do.
#pragma once

#include "../core/logits.cuh"
#include "../core/row_sums.cuh"
#include "column_copies.cuh"
#include "left_operand.cuh"
#include "launch.h"
#include "maps.h"
#include "store_rows.cuh"
#include "warpgroup.h"
#include "wgmma.h"

namespace attnfuse::sm90 {

template <int D>
struct QueryTile {
    static_assert(D == 64 || D == 128 || D == 256);
    static constexpr int kConsumers = 2;
    static constexpr int kRows = 64 * kConsumers;
    static constexpr int kRowTensors = 2;
    static constexpr int kColumns = D == 64 ? 128 : D == 128 ? 96 : 48;
    static constexpr int kStages = 2;
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Of a thread: what the copying warpgroup gives, the others take.
    static constexpr int kCopyRegisters = 56;
    static constexpr int kComputeRegisters = 224;
    // Steps of 16 along d of Q that a warp keeps in registers: as many as there are registers for where shared memory
    // is what binds.
    static constexpr int kKept = D == 256 ? 2 : 0;
    // A tile holds D / 64 boxes of 64 columns; a row of a box is 128 bytes.
    static constexpr int kBoxes = D / 64;
    static constexpr int kQueryBoxBytes = 64 * 128;
    static constexpr int kGroupBytes = kBoxes * kQueryBoxBytes;
    static constexpr int kQueryBytes = kConsumers * kGroupBytes;
    static constexpr int kKeyBoxBytes = kColumns * 128;
    static constexpr int kKeyBytes = kBoxes * kKeyBoxBytes;
    // A slot is overwritten when the tile of the same stage is released.
    static constexpr int kSlots = kStages;
    static constexpr int kBarriers = 3 + 4 * kStages;
    // The first KB is lost to where memory begins: atoms lie on 1024 bytes.
    static constexpr int kSharedBytes =
        1024 + kRowTensors * kQueryBytes + 2 * kStages * kKeyBytes + kSlots * Told::kBytes + kBarriers * 8;
};

// A computing warpgroup: 64 rows of the item.
template <typename T, int D>
struct QueryConsumer {
    using Tile = QueryTile<D>;
    static constexpr int kN = Tile::kColumns / 8, kDN = D / 8, kK = Tile::kColumns / 16;
    static constexpr int kOwn = 1;  // named barrier kOwn + group: the group's 128 threads

    const BackwardArguments& p;
    const ColumnMemory<Tile> memory;
    const int group;
    Ring<Tile::kStages> ring;
    int first;       // the group's first row of the item
    uint32_t flags;  // of the present tile, Told's
    float bias;
    float lse[2], delta[2];  // of the lane's rows
    RowSums sums;
    Kept<Tile::kKept> kept;  // of Q

    // The lane's first row; the other one is 8 below.
    __device__ __forceinline__ int row() const { return first + warp_index() % 4 * 16 + lane_index() / 4; }
    __device__ __forceinline__ bool lives(int r) const { return lse[r] != infinity(); }

    // acc (64, kColumns) = A B^T: the group's rows of Q or dO by the columns of a stage
    template <int KEPT>
    __device__ __forceinline__ static void issue_scores(
        float (&acc)[kN][4], Kept<KEPT>& kept, SharedAddress left, SharedAddress right) {
        forget(acc);
        issue_over_d<T, D, KEPT>(acc, kept, left, Tile::kQueryBoxBytes, right, Tile::kKeyBoxBytes);
    }

    // Waits for K of the tile, and learns what tile it is.
    __device__ __forceinline__ void next_tile(int head, int row) {
        mbarrier_wait(memory.key_full(ring.stage()), ring.parity());
        const uint32_t before = flags;
        flags = uniform(static_cast<int>(Told::load_flags(memory.slot(ring.count))));
        if (!(flags & Told::kEmpty) && (((flags ^ before) & Told::kSource) != 0 || (before & Told::kEndsItem) != 0)) {
            const int s = static_cast<int>(flags & Told::kSource);
            bias = source_bias(p.sources[s], head / p.shape.heads, head % p.shape.heads);
            const float* of_source = p.delta + stride_by(s, p.delta_source) + stride_by(head, p.rows_padded) + row;
            delta[0] = load_global(of_source);
            delta[1] = load_global(of_source + 8);
        }
    }

    // From q . k in x and dout . v in dz, once that is complete, to ds, packed. CAPPED: x is something else than q . k.
    template <bool CAPPED>
    __device__ __forceinline__ void differentiate(
        uint32_t (&ds)[kK][4], float (&dz)[kN][4], float (&x)[kN][4], bool wants_sums) {
        wgmma_wait<0>(dz);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float logit[1][4], grad[1][4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                logit[0][c] = x[n][c];
            }
            if constexpr (CAPPED) {
                prepare(logit, p.shape.logits);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if constexpr (CAPPED) {
                    logit[0][c] = x[n][c] == -infinity() ? -infinity() : logit[0][c];  // masked
                    x[n][c] = weight(logit[0][c], c / 2);
                }
                dz[n][c] = x[n][c] * (dz[n][c] - delta[c / 2]);
                grad[0][c] = dz[n][c];
            }
            if constexpr (CAPPED) {
                through_cap(grad, logit, p.shape.logits);
            }
            ds[n / 2][n % 2 * 2] = pack<T>(grad[0][0], grad[0][1]);
            ds[n / 2][n % 2 * 2 + 1] = pack<T>(grad[0][2], grad[0][3]);
        }
        if (wants_sums) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    sums.p[c / 2] += x[n][c];
                    sums.dz[c / 2] += dz[n][c];
                }
            }
        }
    }

    // p of a logit in the lane's row r.
    __device__ __forceinline__ float weight(float x, int r) const {
        return exp2_approx(multiply_add(x, p.shape.logits.unit, bias - lse[r]));
    }

    template <bool CAPPED>
    __device__ __forceinline__ void step(float (&dq)[kDN][4]) {
        const SharedAddress keys = memory.keys(ring.stage()), values = memory.values(ring.stage());
        const int own = group * Tile::kGroupBytes;
        float x[kN][4], dz[kN][4];
        uint32_t ds[kK][4];
        issue_scores<Tile::kKept>(x, kept, memory.query + own, keys);
        mbarrier_wait(memory.value_full(ring.stage()), ring.parity());
        Kept<0> none;
        issue_scores<0>(dz, none, memory.grad_out() + own, values);
        wgmma_wait<1>(x);
        if (!(flags & Told::kFull)) {
            Told told;
            told.load_columns(memory.slot(ring.count));
            const int upper = row(), lower = upper + 8;
            mask_fragment<0>(x, told.seen_by(upper, 0), told.seen_by(lower, 0));
            if constexpr (kN > 8) {
                mask_fragment<8>(x, told.seen_by(upper, 1), told.seen_by(lower, 1));
            }
        }
        if constexpr (!CAPPED) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    x[n][c] = weight(x[n][c], c / 2);
                }
            }
        }
        // The wait for dP stands in both branches, so that the exponentials stay before it: they are what its time is
        // spent with.
        if (p.sums != nullptr) {
            differentiate<CAPPED>(ds, dz, x, true);
        } else {
            differentiate<CAPPED>(ds, dz, x, false);
        }
        // dq (64, D) += dS K
        const MatrixDescriptor b = matrix_descriptor(keys, Tile::kKeyBoxBytes, 1024);
        wgmma_fence(dq, ds);
#pragma unroll
        for (int k = 0; k < kK; ++k) {
            wgmma_transposed<T>(dq, ds[k], further(b, k * 2048), true);
        }
        wgmma_commit();
        wgmma_wait<0>(dq, ds);
        warp_sync();  // all lanes have read the slot
        release(memory.key_empty(ring.stage()));
    }

    // The source has been walked. What a dead row holds may be no number, and it may not get out.
    __device__ __forceinline__ void end_source(int head) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sums.dz[r] = lives(r) ? sums.dz[r] : 0.0f;
            sums.p[r] = lives(r) ? sums.p[r] : 0.0f;
        }
        sums.store(p, head, row(), static_cast<int>(flags & Told::kSource));
    }

    // The item's tiles.
    template <bool CAPPED>
    __device__ __forceinline__ void walk(float (&dq)[kDN][4], int head) {
        do {
            next_tile(head, row());
            if (flags & Told::kEmpty) {
                mbarrier_wait(memory.value_full(ring.stage()), ring.parity());
                warp_sync();
                release(memory.key_empty(ring.stage()));
            } else {
                step<CAPPED>(dq);
                if (p.sums != nullptr && (flags & Told::kEndsSource)) {
                    end_source(head);
                }
            }
            ++ring.count;
        } while (!(flags & Told::kEndsItem));
    }

    // grad_query to its tensor, by way of where the rows of the query were.
    __device__ __forceinline__ void store(const float (&dq)[kDN][4], int h, int b) const {
        named_barrier_sync(kOwn + group, 128);  // no product of the warpgroup reads the query any more
        const bool leads = warp_index() % 4 == 0 && lane_index() == 0;
        if (p.grad_query.data != nullptr) {
            const SharedAddress own = memory.query + group * Tile::kGroupBytes;
            lay_down<T, kDN>(own, Tile::kQueryBoxBytes, [&](int n, int c) {
                return lives(c / 2) ? dq[n][c] * p.shape.scale : 0.0f;
            });
            proxy_fence();
            named_barrier_sync(kOwn + group, 128);  // all of it is there
            if (leads) {
                store_boxes<Tile::kBoxes>(own, Tile::kQueryBoxBytes, p.grad_query_map, first, h, b);
                tma_wait_read();
            }
        }
        if (leads) {
            mbarrier_arrive(memory.query_empty());
        }
    }

    __device__ __forceinline__ void run() {
        flags = Told::kEndsItem;
        for (Items items; items.valid(p); ++items.round) {
            const Item item = items.template item<Tile::kRows>(p);
            const int h = item.head % p.shape.heads, b = item.head / p.shape.heads;
            first = item.first + 64 * group;
            // Of rows past the last there is lse too, and it is +inf, as that of dead rows.
            const float* lse2 = p.lse2 + stride_by(item.head, p.rows_padded) + row();
            lse[0] = load_global(lse2);
            lse[1] = load_global(lse2 + 8);
            if (p.sums != nullptr) {
                for (int s = 0; s < p.shape.source_count; ++s) {
                    sums.store(p, item.head, row(), s);
                }
            }
            float dq[1][kDN][4];
            clear(dq);
            mbarrier_wait(memory.query_full(), items.round % 2);
            keep<Tile::kKept>(kept, memory.query + group * Tile::kGroupBytes, Tile::kQueryBoxBytes);
            if (p.shape.logits.prepared) {
                walk<true>(dq[0], item.head);
            } else {
                walk<false>(dq[0], item.head);
            }
            store(dq[0], h, b);
        }
    }
};

template <typename T, int D>
__global__ void __launch_bounds__(QueryTile<D>::kThreads, 1)
    attn_bwd_dq_kernel(const __grid_constant__ BackwardArguments p) {
    using Tile = QueryTile<D>;
    const ColumnMemory<Tile> memory;
    make_barriers(memory);
    if (uniform(warp_index()) < 4) {
        give_registers<Tile::kCopyRegisters>();
        if (warp_index() == 0) {
            ColumnCopies<Tile, BackwardArguments>{p, memory}.run();
        }
    } else {
        take_registers<Tile::kComputeRegisters>();
        QueryConsumer<T, D>{p, memory, uniform(warp_index() / 4) - 1}.run();
    }
}

template <typename T, int D>
void attn_bwd_dq(const BackwardParams& given, void* stream) {
    using Tile = QueryTile<D>;
    BackwardArguments p{given};
    const Shape& shape = p.shape;
    make_current(shape.device);
    p.query_map = map_of(p.query, shape.dim, shape.rows, shape.heads, shape.batch, 64);
    p.grad_out_map = map_of(p.grad_out, shape.value_dim, shape.rows, shape.heads, shape.batch, 64);
    if (p.grad_query.data != nullptr) {
        p.grad_query_map = map_of(p.grad_query, shape.dim, shape.rows, shape.heads, shape.batch, 64);
    }
    const int64_t columns = map_sources<Tile::kColumns>(p);
    p.tiles = (shape.rows + Tile::kRows - 1) / Tile::kRows;
    p.section = section_of(shape, columns);
    const int64_t items = int64_t{p.tiles} * shape.heads * shape.batch, blocks = multiprocessors(shape.device);
    launch(attn_bwd_dq_kernel<T, D>, items < blocks ? items : blocks, Tile::kThreads, Tile::kSharedBytes, stream, p);
}

template <int D>
std::vector<TileShape> attn_bwd_dq_tiles() {
    using Tile = QueryTile<D>;
    return {
        {"attn_bwd_dq", Tile::kRows, Tile::kColumns, Tile::kThreads, Tile::kSharedBytes,
         "wgmma and tensor copies, a persistent block a multiprocessor"}};
}

}  // namespace attnfuse::sm90
