// The online softmax over the tiles of all sources (Milakov and Gimelshein, arXiv:1805.02867), and what of it goes to
// memory: lse, and the mass of each source.
//
// `Outputs` says where: row(m, r) is the row of the query that row r of fragment m holds, head() which of the B Hq,
// owns(m, r, s) whether this thread writes the mass of source s there, at(m, r) and mass(m, r, s) are the places, and p
// the params.
#pragma once

#include "fragment.cuh"
#include "global.h"
#include "logits.cuh"

namespace attnfuse {

// The running softmax of a thread's rows: row r of fragment m is 16 m + lane / 4 + 8 r of its warp's.
template <int M>
struct OnlineSoftmax {
    float largest[M][2];  // of all sources so far
    float sum[M][2];      // of this source, this thread's columns only
    // The finished sources' sum relative to their largest; lane 2 m + r of the four that share a row holds it.
    float finished_sum = 0.0f;
    float finished_largest = -infinity();

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                largest[m][r] = -infinity();
                sum[m][r] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ static bool holds(int m, int r) { return lane_index() % 4 == 2 * m + r; }

    // Fragment m of one tile from x to p, unnormalised. rescale(r, shrink) is called for each row, with what brings its
    // part of `out` to the new maximum. bias: one for all rows, or that of rows r = 0 and 1.
    template <int N, typename Rescale>
    __device__ __forceinline__ void add_tile(int m, float (&x)[N][4], float unit, float bias, Rescale rescale) {
        const float both[2] = {bias, bias};
        add_tile(m, x, unit, both, rescale);
    }
    template <int N, typename Rescale>
    __device__ __forceinline__ void add_tile(
        int m, float (&x)[N][4], float unit, const float (&bias)[2], Rescale rescale) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = -infinity();
#pragma unroll
            for (int n = 0; n < N; ++n) {
                highest = maximum(highest, maximum(x[n][2 * r], x[n][2 * r + 1]));
            }
            const float now = maximum(largest[m][r], multiply_add(row_maximum(highest), unit, bias[r]));
            // A row that has seen nothing yet: e^(-inf - 0) = 0 rather than e^(-inf + inf).
            const float from = now == -infinity() ? 0.0f : now;
            const float shrink = exp2_approx(largest[m][r] - from);
            largest[m][r] = now;
            sum[m][r] *= shrink;
            rescale(r, shrink);
            const float shift = bias[r] - from;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 2 * r; c < 2 * r + 2; ++c) {
                    x[n][c] = exp2_approx(multiply_add(x[n][c], unit, shift));
                    sum[m][r] += x[n][c];
                }
            }
        }
    }

    // The source has been walked: returns its own sum in row (m, r), in all columns.
    __device__ __forceinline__ float finish_source(int m, int r) {
        const float own = row_sum(sum[m][r]);
        sum[m][r] = 0.0f;
        if (holds(m, r) && own > 0.0f) {
            finished_sum = multiply_add(finished_sum, exp2_approx(finished_largest - largest[m][r]), own);
            finished_largest = largest[m][r];
        }
        return own;
    }

    // The sum over all sources, relative to the largest: whichever source raised it has finished since.
    __device__ __forceinline__ float total(int m, int r) const { return row_sum(holds(m, r) ? finished_sum : 0.0f); }
};

// Every source's place in mass to lse_s = -inf, for those that will not be visited.
template <int M, typename Outputs>
__device__ __forceinline__ void clear_mass(const Outputs& to) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            for (int s = 0; s < to.p.shape.source_count; ++s) {
                if (to.owns(m, r, s)) {
                    store_global(to.mass(m, r, s), -infinity());
                }
            }
        }
    }
}

// Source s has been walked: lse_s, in log2 units, waits in mass's place until lse is known.
template <int M, typename Outputs>
__device__ __forceinline__ void finish_source(OnlineSoftmax<M>& softmax, const Outputs& to, int s) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = softmax.finish_source(m, r);
            if (to.owns(m, r, s)) {
                store_global(to.mass(m, r, s), sum == 0.0f ? -infinity() : softmax.largest[m][r] + log2_exact(sum));
            }
        }
    }
}

// lse, mass, and `out` divided by the sum of its row: 0 in rows that saw nothing.
template <int M, int N, typename Outputs>
__device__ __forceinline__ void finish_rows(const OnlineSoftmax<M>& softmax, float (&out)[M][N][4], const Outputs& to) {
    const ForwardParams& p = to.p;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = softmax.largest[m][r], sum = softmax.total(m, r), shrink = 1.0f;
            const bool lives = sum > 0.0f;
            if (p.sinks != nullptr && lives) {
                const float sink = load_global(p.sinks + to.head() % p.shape.heads) * kLog2e;
                const float now = maximum(largest, sink);
                shrink = exp2_approx(largest - now);
                sum = multiply_add(sum, shrink, exp2_approx(sink - now));
                largest = now;
            }
            const float lse = lives ? largest + log2_exact(sum) : -infinity();
            const float factor = lives ? shrink / sum : 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                out[m][n][2 * r] *= factor;
                out[m][n][2 * r + 1] *= factor;
            }
            if (to.row(m, r) < p.shape.rows && lane_index() % 4 == 0) {
                store_global(p.lse + to.at(m, r), lse * kLn2);
            }
            for (int s = 0; s < p.shape.source_count; ++s) {
                if (to.owns(m, r, s)) {
                    const float part = load_global(static_cast<const float*>(to.mass(m, r, s)));
                    store_global(to.mass(m, r, s), lives ? exp2_approx(part - lse) : 0.0f);
                }
            }
        }
    }
}

}  // namespace attnfuse
