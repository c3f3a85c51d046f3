// What the kernels for few queries and long keys take beside the params of attention.h, and their launchers.
//
// Packed rows: the query heads of one key head stand below each other, row r = (head of the group) Nq + i, so that K
// and V of the key head are read once for all of them. The keys of all sources are split over blocks.
#pragma once

#include "attention.h"

namespace attnfuse {

// A row of a partial holds this many floats: whole 32-byte sectors.
inline constexpr int partial_width(int dim) { return (dim + 7) / 8 * 8; }

// width is partial_width(Dv); states is S with mass, else 1: all sources in one.
struct SplitParams : ForwardParams {
    int32_t splits = 1;
    float* partial = nullptr;  // (splits, B, Hq, Nq, width): sum_j 2^(z - largest) v
    float* state = nullptr;    // (splits, B, Hq, Nq, states, 2): largest z in log2 units so far, sum_j 2^(z - largest)
};

// width is partial_width(D). The sums of BackwardParams are (splits * attn_bwd_few_parts, B, Hq, Nq, S, 2) here.
struct FewParams : BackwardParams {
    int32_t splits = 1;
    float* partial = nullptr;  // (splits, B, Hq, Nq, width): sum_j ds k; null where grad_query is
};

// The tiles of both passes that a head dim is computed in, for up to so many packed rows each.
std::vector<TileShape> few_tile_shapes(int dim_padded);
// The tile that a pass ("attn_fwd_split", "attn_bwd_few") takes for so many packed rows.
TileShape few_tile(const char* pass, int dim_padded, int packed_rows);
// The most packed rows that the backward takes on a device.
int attn_bwd_few_rows(int dim_padded, int device);
// How many parts the row sums of a split come in.
int attn_bwd_few_parts(int dim_padded, int packed_rows);
// Of a device.
int multiprocessor_count(int device);

// partial and state, then out, lse and mass from them.
void attn_fwd_split(const SplitParams& params, void* stream);
// grad_key and grad_value where they are wanted, every element of them, and partial and sums; after attn_bwd_delta.
// grad_query from partial. The same bits every time.
void attn_bwd_few(const FewParams& params, void* stream);

}  // namespace attnfuse
