// From the bare products q . k to logits in log2 units, so that the softmax is one exp2 a score:
//
//     z log2(e) = x unit + bias log2(e),   x = q . k                                unit = scale log2(e)
//                                    or    x = log2(e) softcap tanh(q . k scale / softcap),   unit = 1
#pragma once

#include "logit_units.h"
#include "masks.cuh"
#include "global.h"
#include "numbers.h"

namespace attnfuse {

constexpr float kLn2 = 0.6931471805599453f;

// tanh to float32 rounding, also near 0, where 1 - 2 / (e^2x + 1) would cancel. The polynomial for |x| < 0.625 is that
// of tanhf in Cephes (S. L. Moshier, netlib.org/cephes, single/tanhf.c).
__device__ __forceinline__ float tanh_exact(float x) {
    const float a = absolute(x), y = x * x;
    float sum = multiply_add(-5.70498872745e-3f, y, 2.06390887954e-2f);
    sum = multiply_add(sum, y, -5.37397155531e-2f);
    sum = multiply_add(sum, y, 1.33314422036e-1f);
    sum = multiply_add(sum, y, -3.33332819422e-1f);
    const float small = multiply_add(sum * y, x, x);
    const float large = 1.0f - 2.0f * reciprocal(exp2_approx(a * (2.0f * kLog2e)) + 1.0f);
    return a < 0.625f ? small : x < 0.0f ? -large : large;
}

// q . k to x, where that is not the same.
template <int N>
__device__ __forceinline__ void prepare(float (&x)[N][4], const LogitUnits& units) {
    if (!units.prepared) {
        return;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            x[n][c] *= units.to_cap;
        }
    }
    if (units.from_cap != 0.0f) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                x[n][c] = units.from_cap * tanh_exact(x[n][c]);
            }
        }
    }
}

// dx to d(q . k) / scale: times 1 - tanh^2, which is 0 where a masked x is -inf.
template <int N>
__device__ __forceinline__ void through_cap(float (&dx)[N][4], const float (&x)[N][4], const LogitUnits& units) {
    if (units.from_cap == 0.0f) {
        return;
    }
    const float per_cap = 1.0f / units.from_cap;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float t = x[n][c] * per_cap;
            dx[n][c] = x[n][c] == -infinity() ? 0.0f : dx[n][c] * multiply_add(-t, t, 1.0f);
        }
    }
}

// The source's bias for (b, h) in log2 units.
__device__ __forceinline__ float source_bias(const SourceParams& source, int b, int h) {
    if (source.bias == nullptr) {
        return 0.0f;
    }
    return load_global(source.bias + stride_by(b, source.bias_batch) + stride_by(h, source.bias_head)) * kLog2e;
}

}  // namespace attnfuse
