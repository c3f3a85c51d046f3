// What Python hands to the kernels: raw pointers with a shape beside each, strides in elements, and the launchers.
// No torch, no Python and no CUDA headers: one build serves every version of them.
#pragma once

#include <cstdint>
#include <vector>

namespace attnfuse {

constexpr int kMaxSources = 8;
// Wider than any sequence, and far from where int32 sums of positions would wrap.
constexpr int32_t kUnbounded = 1 << 29;

enum class Dtype : int32_t { bfloat16 = 0, float16 = 1 };

// A (B, H, N, D) tensor whose last dimension is contiguous. data is null where there is no such tensor.
struct Rows {
    void* data = nullptr;
    int64_t batch = 0;
    int64_t head = 0;
    int64_t row = 0;
    // Whether every row begins on 16 bytes and D is a multiple of 8: what a 16-byte copy takes.
    int32_t aligned = 0;
};

// One source, as attnfuse/problem.py's BoundSource has it; causal is right = 0.
struct SourceParams {
    Rows key;                           // (B, Hkv, Ns, D)
    Rows value;                         // (B, Hkv, Ns, Dv)
    const int32_t* lengths = nullptr;   // (B,), clamped to [0, Ns]; null = Ns
    const uint8_t* present = nullptr;   // (B,)
    const uint8_t* key_mask = nullptr;  // (B, Ns) by the two strides that follow
    int64_t key_mask_batch = 0;
    int64_t key_mask_column = 0;
    const float* bias = nullptr;  // (B, Hq) natural units, by the two strides that follow
    int64_t bias_batch = 0;
    int64_t bias_head = 0;
    const int32_t* offsets = nullptr;  // (B,) in place of offset
    int32_t offset = 0;                // row i stands at column i + offset
    int32_t columns = 0;               // Ns
    int32_t left = kUnbounded;         // columns seen behind the row's own
    int32_t right = kUnbounded;        // columns seen ahead of it
};

// Apart from what the forward needs too: a kernel takes no more than 4096 bytes of params before CUDA 12.1.
struct BackwardSource : SourceParams {
    Rows grad_key;    // (B, Hkv, Ns, D); null = not wanted
    Rows grad_value;  // (B, Hkv, Ns, Dv); null = not wanted
};

// How the kernels write z in log2 units: z log2(e) = x unit + bias log2(e), with x = q . k and unit = scale log2(e), or
// with x = from_cap tanh(q . k to_cap) and unit = 1. Here, so that they stand in the constant bank and not in
// registers.
struct LogitUnits {
    float unit = 0.0f;
    float to_cap = 0.0f;
    float from_cap = 0.0f;  // 0 = no softcap
    int32_t prepared = 0;   // whether x is something else than q . k
};

// What both passes read.
struct Shape {
    Dtype dtype = Dtype::bfloat16;
    int32_t device = 0;        // the CUDA device that everything lies on
    int32_t batch = 0;         // B
    int32_t heads = 0;         // Hq
    int32_t key_heads = 0;     // Hkv
    int32_t rows = 0;          // Nq
    int32_t dim = 0;           // D
    int32_t value_dim = 0;     // Dv
    int32_t source_count = 0;  // S
    float scale = 1.0f;
    float softcap = 0.0f;    // 0 = none
    int32_t newest = 0;      // no kernels for architectures after this one (80, 90); 0 = the card's own
    int32_t group = 0;       // Hq / Hkv, by the launchers
    int32_t dim_padded = 0;  // padded_dim(D, Dv), by the launchers
    LogitUnits logits;       // from scale and softcap, by the launchers
};

struct ForwardParams {
    Shape shape;
    Rows query;                    // (B, Hq, Nq, D)
    Rows out;                      // (B, Hq, Nq, Dv)
    float* lse = nullptr;          // (B, Hq, Nq) contiguous, natural log
    float* mass = nullptr;         // (B, Hq, Nq, S) contiguous, or null
    const float* sinks = nullptr;  // (Hq,) or null
    SourceParams sources[kMaxSources];
};

// rows_padded is rows_padded(Nq); D_pad is padded_dim(D, Dv).
struct BackwardParams {
    Shape shape;
    Rows query;                        // (B, Hq, Nq, D)
    Rows out;                          // (B, Hq, Nq, Dv)
    Rows grad_out;                     // (B, Hq, Nq, Dv)
    Rows grad_query;                   // (B, Hq, Nq, D), or null
    const float* lse = nullptr;        // (B, Hq, Nq) contiguous, natural log
    const float* grad_lse = nullptr;   // (B, Hq, Nq) contiguous, or null
    const float* mass = nullptr;       // (B, Hq, Nq, S) contiguous; read only with grad_mass
    const float* grad_mass = nullptr;  // (B, Hq, Nq, S) contiguous, or null
    float* lse2 = nullptr;             // (B, Hq, rows_padded) scratch: lse in log2 units, +inf in rows that are dead
    float* delta = nullptr;            // (S or 1, B, Hq, rows_padded) scratch: delta of each source
    uint64_t* live = nullptr;          // (B, Hq, rows_padded / 64) scratch: bit r is row 64 w + r
    float* dq_sum = nullptr;           // (B, Hq, rows_padded, D_pad) scratch, in fragments; null = no atomics
    float* sums = nullptr;             // (B, Hq, Nq, S, 2) contiguous: (dz, p) summed over columns; or null
    int64_t delta_source = 0;          // stride of delta's first dimension, 0 where all sources share one
    int32_t rows_padded = 0;
    BackwardSource sources[kMaxSources];
};

// What a block of a pass owns, and what it takes for that.
struct TileShape {
    const char* pass;  // the kernel's name
    int32_t rows;
    int32_t columns;
    int32_t threads;
    int32_t shared_bytes;
    const char* schedule = "mma.sync, a block a tile";
};

// The tile of the forward kernel that attn_fwd would launch for these params.
TileShape attn_fwd_tile(const ForwardParams& params);

// Those of attn_bwd_dq and attn_bwd_dkdv, likewise; where the latter is two launches, the second, which makes dK.
std::vector<TileShape> attn_bwd_tiles(const BackwardParams& params);

// The tiles of every kernel at a padded head dim: more than one of a pass where it has a choice or several launches.
// Hopper's, where they are built, are named sm90::.
std::vector<TileShape> tile_shapes(int dim_padded);

// What per-row scratch of the backward is padded to, so that no tile of any kernel reads or writes past its end: a
// multiple of 64.
int rows_padded(int rows);

// 64, 96, 128 or 256: the head dim that (dim, value_dim) is computed in.
int padded_dim(int dim, int value_dim);

// Launchers: everything is enqueued on `stream` (a cudaStream_t) of shape.device, which becomes the CUDA runtime's
// current device; nothing is waited for.
// They throw std::runtime_error with one sentence.
void attn_fwd(const ForwardParams& params, void* stream);
// lse2, delta, live, and zeros in dq_sum; must come before the others.
void attn_bwd_delta(const BackwardParams& params, void* stream);
// grad_query and sums, a block for each tile of rows: the same bits every time.
void attn_bwd_dq(const BackwardParams& params, void* stream);
// grad_key and grad_value of every source that wants them; with dq_sum also dQ, added up by atomics.
void attn_bwd_dkdv(const BackwardParams& params, void* stream);
// dq_sum to grad_query.
void attn_bwd_convert(const BackwardParams& params, void* stream);

}  // namespace attnfuse
