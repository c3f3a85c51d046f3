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
//     dQ^T = K^T dS^T, or dQ = dS K                                          over all 128; shared out by rows, or by d
//
// Only dS goes through shared memory, whose bandwidth is what bounds these products: a left operand there is read 64 x
// 16 at a time, however narrow the product. So the left operands that stay the same for all tiles are kept in registers
// as far as there are any; at 64 that is all of K, V and K^T.
//
//     head dim   rows   in registers    dQ
//     64         64     K, V, K^T       dQ^T, 32 rows a group; laid down in shared memory, and added by bulk copies
//     128        80                     dQ^T, 64 of d a group; added from the registers
//     256, dV    64     half of K
//     256, dK    64                     dQ, 128 of d a group: half as many left operands; added from the registers
//
// At 256 dk and dv together do not fit the registers: each has a launch of its own.
// dQ is added to dq_sum in fragments, as it leaves the product, in no order.
//
//     barrier        completed by                             waited for by
//     keys_full      the copies of K and V                    consumers
//     query_full     the copies of Q, lse and delta           consumers       (a stage each, as are the next three)
//     query_empty    a lane of each consumer warp             the copying warp
//     grad_full      the copies of dO                         consumers
//     grad_empty     likewise, where dO has one stage, which dS shares; else it is released with Q
//     landed         the copies of rows some of which are dead: the copying warp
//
//     named barrier  arrived at                               waited at
//     kCleared       by all consumers: unseen columns are cleared
//     kThere         by all consumers: dS is there
//     kFree + group  by the other group: it is done with      by the group that is about to overwrite its half of dS
//                    dS, or with dO where dS shares its stage
#pragma once

#include "../core/fragment.cuh"
#include "../core/key_tiles.cuh"
#include "../core/logits.cuh"
#include "global.h"
#include "launch.h"
#include "ldmatrix.h"
#include "left_operand.cuh"
#include "maps.h"
#include "ring.cuh"
#include "row_copies.cuh"
#include "store_rows.cuh"
#include "warpgroup.h"
#include "wgmma.h"

namespace attnfuse::sm90 {

// A computing warpgroup: 64 columns.
template <typename T, int D, Wanted WANTED>
struct KeyConsumer {
    using Tile = BackwardTile<D, WANTED>;
    static constexpr bool kKey = Tile::kKey, kValue = Tile::kValue;
    static constexpr int kN = Tile::kRows / 8, kDN = D / 8, kK = Tile::kRows / 16;
    static constexpr int kQueryN = Tile::kQueryWidth / 8;
    static constexpr int kOwnBytes = 64 * 128;  // of a box, the group's rows
    static constexpr int kCleared = 1, kThere = 2, kFree = 3, kOwn = kFree + Tile::kConsumers;

    const BackwardArguments& p;
    const BackwardMemory<Tile> memory;
    const int group;
    Ring<Tile::kQueryStages> queries;
    Ring<Tile::kGradStages> grads;
    ToldRows told;  // the present tile
    Kept<Tile::kKeptKeys> kept_keys;
    Kept<Tile::kKeptValues> kept_values;
    Kept<Tile::kKeptTurned> kept_turned;

    __device__ __forceinline__ int column() const { return group * 64 + warp_index() % 4 * 16 + lane_index() / 4; }

    __device__ __forceinline__ void wait_free() const { named_barrier_sync(kFree + group, 256); }
    __device__ __forceinline__ void give_free() const {
        named_barrier_arrive(kFree + (group + 1) % Tile::kConsumers, 256);
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

    // d and the row of the tile that the group's part of dQ begins with.
    __device__ __forceinline__ int query_d() const { return D == 64 ? 0 : D / Tile::kConsumers * group; }
    __device__ __forceinline__ int query_row() const { return D == 64 ? Tile::kQueryWidth * group : 0; }

    // dq (64, kQueryWidth) = K^T dS^T, or dS K, over all columns of the block
    __device__ __forceinline__ void issue_query(float (&dq)[kQueryN][4]) {
        const MatrixDescriptor keys =
            matrix_descriptor(recomputed(memory.keys + query_d() / 64 * Tile::kKeyBoxBytes), Tile::kKeyBoxBytes, 1024);
        const MatrixDescriptor grad_scores = matrix_descriptor(memory.grad_scores + query_row() * 128, 0, 1024);
        if constexpr (Tile::kKeptTurned > 0) {
            wgmma_fence(dq, kept_turned);
        } else {
            wgmma_fence(dq);
        }
#pragma unroll
        for (int k = 0; k < Tile::kColumns / 16; ++k) {
            const MatrixDescriptor ds_k = further(grad_scores, k / 4 * Tile::kRowBoxBytes + k % 4 * 32);
            if constexpr (Tile::kKeptTurned > 0) {
                wgmma<T>(dq, kept_turned[k], ds_k, k != 0);
            } else if constexpr (kQueryTurned<D>) {
                wgmma_left_transposed<T>(dq, further(keys, k * 2048), ds_k, k != 0);
            } else {
                wgmma_transposed<T>(dq, ds_k, further(keys, k * 2048), k != 0);
            }
        }
        wgmma_commit();
    }

    // This warp's part of dq to dq_sum.
    __device__ __forceinline__ void add_query(const float (&dq)[kQueryN][4]) const {
        if constexpr (kQueryTurned<D>) {
            const int d = query_d() + warp_index() % 4 * 16;
            const int64_t fragment = told.fragment + stride_by(d / 16, p.rows_padded / 8) + query_row() / 8;
            if constexpr (Tile::kStaged) {
                add_staged(dq, p.dq_sum + fragment * 128, d < p.shape.dim);
            } else if (d < p.shape.dim) {
                add_fragments<kQueryN>(dq, fragment);
            }
        } else {
            const int64_t fragment = told.fragment + stride_by(warp_index() % 4, p.shape.dim_padded / 8);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int d = query_d() + 64 * half;
                if (d < p.shape.dim) {
                    add_fragments<8>(&dq[8 * half], fragment + d / 8);
                }
            }
        }
    }
    template <int N>
    __device__ __forceinline__ void add_fragments(const float (*dq)[4], int64_t fragment) const {
        float* const to = p.dq_sum + fragment * 128 + lane_index() * 4;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            add_global_128(to + n * 128, dq[n]);
        }
    }
    // By way of shared memory, and a bulk copy.
    __device__ __forceinline__ void add_staged(const float (&dq)[kQueryN][4], float* to, bool wanted) const {
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
                words.word[c] = bits_of(dq[n][c]);
            }
            store_shared_128(staging + n * 512 + thread % 32 * 16, words);
        }
        proxy_fence();
        warp_sync();
        if (lane_index() == 0 && wanted) {
            bulk_add(to, staging, Tile::kStagingBytes);
            tma_commit();
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

    // lse and delta of the present tile, as load_pair takes them.
    __device__ __forceinline__ SharedAddress state() const {
        return memory.state(queries.stage()) + recomputed(lane_index()) % 4 * 8;
    }

    // What stands at `state`, this lane's part of it, of the rows that x[n] has in this thread.
    __device__ __forceinline__ static void load_pair(float (&of_row)[2], SharedAddress state, int n) {
        load_shared_pair(of_row[0], of_row[1], state + n * 32);
    }

    __device__ __forceinline__ float weight(float x, float lse) const {
        return exp2_approx(multiply_add(x, p.shape.logits.unit, told.bias - lse));
    }

    // x to p.
    template <int BEGIN, int END>
    __device__ __forceinline__ void weigh(float (&x)[kN][4], SharedAddress from) const {
#pragma unroll
        for (int n = BEGIN; n < END; ++n) {
            float lse[2];
            load_pair(lse, from, n);
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

    // x = K Q^T, of the rows at `query`, and dz = V dO^T.
    __device__ __forceinline__ void issue_scores(float (&x)[kN][4], SharedAddress query) {
        forget(x);
        issue_over_d<T, D, Tile::kKeptKeys>(
            x, kept_keys, memory.keys + kOwnBytes * group, Tile::kKeyBoxBytes, query, Tile::kRowBoxBytes);
    }
    __device__ __forceinline__ void issue_grad_scores(float (&dz)[kN][4], SharedAddress grad_out) {
        forget(dz);
        issue_over_d<T, D, Tile::kKeptValues>(
            dz, kept_values, memory.values + kOwnBytes * group, Tile::kKeyBoxBytes, grad_out, Tile::kRowBoxBytes);
    }
    __device__ __forceinline__ void wait_for_grad() const {
        mbarrier_wait(memory.grad_full(grads.stage()), grads.parity());
    }
    __device__ __forceinline__ void advance() {
        ++queries.count;
        ++grads.count;
    }

    // S^T of the tile after the present one, and what that tile is. Behind the last one, of whatever stands there: a
    // product that may have been issued is waited for at once.
    __device__ __forceinline__ ToldRows issue_next(float (&x)[kN][4]) {
        const auto next = queries.after();
        mbarrier_wait(memory.query_full(next.stage()), next.parity());
        ToldRows after;
        after.load(memory.slot(next.stage()));
        issue_scores(x, memory.query(next.stage()));
        return after;
    }

    // From dP^T, which is under way, to the gradients, dQ if `adds`. Where the next tile's scores are issued ahead,
    // `told` is that tile then, and dK's product still under way.
    template <bool CAPPED>
    __device__ __forceinline__ void finish_step(
        float (&dk)[kDN][4], float (&dv)[kDN][4], float (&x)[kN][4], float (&dz)[kN][4], uint32_t (&ds)[kK][4],
        SharedAddress from, bool adds) {
        const SharedAddress query = memory.query(queries.stage());
        uint32_t weights[kK][4];
        ToldRows after;
        wgmma_wait<0>(dz);
        if constexpr (Tile::kShares) {
            adds ? give_free() : release(memory.grad_empty(grads.stage()));
        }
        if constexpr (CAPPED) {
            differentiate_capped(weights, ds, dz, x, from);
        } else {
            differentiate(weights, ds, dz, x, from);
        }
        if constexpr (kValue) {
            issue_grad(dv, weights, memory.grad_out(grads.stage()));
        }
        if (adds) {
            float dq[kQueryN][4];
            forget(dq);
            wait_free();
            store_grad_scores(ds);
            proxy_fence();
            named_barrier_sync(kThere, 256);
            issue_query(dq);
            if constexpr (Tile::kAhead) {
                wgmma_wait<1>(dv, weights);
                after = issue_next(x);
                issue_grad(dk, ds, query);
                wgmma_wait<2>(dq);
            } else {
                issue_grad(dk, ds, query);
                if constexpr (kValue) {
                    wgmma_wait<1>(dv, weights, dq);
                } else {
                    wgmma_wait<1>(dq);
                }
            }
            if constexpr (Tile::kShares) {
                release(memory.grad_empty(grads.stage()));
            } else {
                give_free();
            }
            add_query(dq);
        } else if constexpr (Tile::kAhead) {
            after = issue_next(x);
            issue_grad(dk, ds, query);
            wgmma_wait<2>(dv, weights);
        } else {
            issue_grad(dk, ds, query);
            if constexpr (kValue) {
                wgmma_wait<1>(dv, weights);
            }
        }
        if constexpr (Tile::kAhead) {
            told = after;
            advance();
        } else {
            wgmma_wait<0>(dk, ds);
        }
    }

    // A tile of rows.
    template <bool CAPPED>
    __device__ __forceinline__ void step(float (&dk)[kDN][4], float (&dv)[kDN][4]) {
        float x[kN][4], dz[kN][4];
        uint32_t ds[kK][4];
        const SharedAddress from = state();
        issue_scores(x, memory.query(queries.stage()));
        wait_for_grad();
        issue_grad_scores(dz, memory.grad_out(grads.stage()));
        wgmma_wait<1>(x);
        if (!(told.flags & ToldRows::kFull)) {
            mask(x);
        }
        if constexpr (!CAPPED) {
            weigh<0, kN>(x, from);
        }
        const bool adds = p.dq_sum != nullptr;
        // The wait for dP^T stands in both branches, so that the exponentials stay before it: they are what its time is
        // spent with. At 128 that takes more registers than there are.
        if (D == 128 || adds) {
            finish_step<CAPPED>(dk, dv, x, dz, ds, from, adds);
        } else {
            finish_step<CAPPED>(dk, dv, x, dz, ds, from, false);
        }
        warp_sync();  // all lanes have read lse and delta
        release(memory.query_empty(queries.stage()));
        advance();
    }

    // A tile of rows for dV alone.
    template <bool CAPPED>
    __device__ __forceinline__ void step_value(float (&dv)[kDN][4]) {
        float x[1][kN][4];
        uint32_t weights[kK][4];
        issue_scores(x[0], memory.query(queries.stage()));
        wait_for_grad();
        wgmma_wait<0>(x[0]);
        if constexpr (CAPPED) {
            prepare(x[0], p.shape.logits);
        }
        if (!(told.flags & ToldRows::kFull)) {
            mask(x[0]);
        }
        weigh<0, kN>(x[0], state());
        pack_fragment<T>(weights, x[0]);
        issue_grad(dv, weights, memory.grad_out(grads.stage()));
        wgmma_wait<0>(dv, weights);
        warp_sync();  // all lanes have read lse
        release(memory.query_empty(queries.stage()));
        advance();
    }

    // Waits for the rows of a tile, and learns what tile it is; false if there is none.
    __device__ __forceinline__ bool next_tile() {
        mbarrier_wait(memory.query_full(queries.stage()), queries.parity());
        told.load(memory.slot(queries.stage()));
        return !(told.flags & ToldRows::kEnd);
    }

    // The tiles one after another, of which there is one.
    template <bool CAPPED>
    __device__ __forceinline__ void walk(float (&dk)[kDN][4], float (&dv)[kDN][4]) {
        do {
            if constexpr (kKey) {
                step<CAPPED>(dk, dv);
            } else {
                step_value<CAPPED>(dv);
            }
        } while (next_tile());
    }

    // Of a tile whose scores' product has been issued, ahead of dK's of the tile before unless it is the FIRST: dP^T,
    // and, unless CAPPED, the exponentials meanwhile: half of them before dP^T is issued, the others once dK is
    // complete, whose dS leaves them its registers.
    template <bool CAPPED, bool FIRST>
    __device__ __forceinline__ void begin_step(
        float (&dk)[kDN][4], float (&x)[kN][4], float (&dz)[kN][4], uint32_t (&ds)[kK][4]) {
        const bool there = FIRST || !(told.flags & ToldRows::kEnd);
        wgmma_wait<FIRST ? 0 : 1>(x);
        if (!(told.flags & ToldRows::kFull)) {
            mask(x);
        }
        if constexpr (!CAPPED) {
            weigh<0, kN / 2>(x, state());
        }
        if (there) {
            wait_for_grad();
        }
        issue_grad_scores(dz, memory.grad_out(grads.stage()));
        if constexpr (!FIRST) {
            wgmma_wait<1>(dk, ds);
        }
        if (!FIRST && there) {
            warp_sync();  // all lanes have read lse and delta of the tile before
            release(memory.query_empty(queries.before().stage()));
        }
        if constexpr (!CAPPED) {
            weigh<kN / 2, kN>(x, state());
        }
    }

    // The tiles, each begun in the one before: the products are issued in the order
    //
    //     dV  dQ^T  S^T of the next  dK  dP^T of the next
    //
    // and the exponentials of the next tile are made while dK and dP^T are. ptxas serialises all products where one is
    // under way at a branch that the first tile does not take too: behind the last tile, it is begun again for nothing.
    template <bool CAPPED, bool ADDS>
    __device__ __forceinline__ void walk_ahead(float (&dk)[kDN][4], float (&dv)[kDN][4]) {
        float x[kN][4], dz[kN][4];
        uint32_t ds[kK][4];
        issue_scores(x, memory.query(queries.stage()));
        begin_step<CAPPED, true>(dk, x, dz, ds);
        do {
            finish_step<CAPPED>(dk, dv, x, dz, ds, state(), ADDS);
            begin_step<CAPPED, false>(dk, x, dz, ds);
        } while (!(told.flags & ToldRows::kEnd));
        wgmma_wait<0>(dz);
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
        const SharedAddress own = tile + kOwnBytes * group;
        lay_down<T, kDN>(own, Tile::kKeyBoxBytes, [&](int n, int c) { return grad[n][c] * scale; });
        proxy_fence();
        named_barrier_sync(kOwn + group, 128);  // all of it is there
        if (warp_index() % 4 == 0 && lane_index() == 0) {
            store_boxes<Tile::kBoxes>(own, Tile::kKeyBoxBytes, map, mine.first + 64 * group, mine.key_head, mine.b);
        }
    }

    __device__ __forceinline__ void run() {
        float dk[1][kDN][4], dv[1][kDN][4];
        clear(dk);
        clear(dv);
        const bool adds = kKey && p.dq_sum != nullptr;
        if (adds && !Tile::kShares) {
            give_free();  // the first tile finds dS free
        }
        if (next_tile()) {
            mbarrier_wait(memory.keys_full(), 0);
            clear_unseen();
            keep<Tile::kKeptKeys>(kept_keys, memory.keys + kOwnBytes * group, Tile::kKeyBoxBytes);
            keep<Tile::kKeptValues>(kept_values, memory.values + kOwnBytes * group, Tile::kKeyBoxBytes);
            if (adds) {
                keep_turned<Tile::kKeptTurned>(kept_turned, memory.keys);
            }
            const bool capped = p.shape.logits.prepared;
            if constexpr (Tile::kAhead) {
                if (capped) {
                    adds ? walk_ahead<true, true>(dk[0], dv[0]) : walk_ahead<true, false>(dk[0], dv[0]);
                } else {
                    adds ? walk_ahead<false, true>(dk[0], dv[0]) : walk_ahead<false, false>(dk[0], dv[0]);
                }
            } else {
                capped ? walk<true>(dk[0], dv[0]) : walk<false>(dk[0], dv[0]);
            }
        }
        if (Tile::kShares) {
            named_barrier_sync(kThere, 256);  // the other group reads K no more
        } else if (adds) {
            wait_free();  // likewise
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

template <int D, Wanted WANTED>
TileShape backward_tile_shape() {
    using Tile = BackwardTile<D, WANTED>;
    return {
        "attn_bwd_dkdv",
        Tile::kRows,
        Tile::kColumns,
        Tile::kThreads,
        Tile::kSharedBytes,
        Tile::kStaged ? "wgmma and tensor copies; dQ added by bulk copies, or made by attn_bwd_dq"
                      : "wgmma and tensor copies; dQ added by atomics, or made by attn_bwd_dq"};
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
