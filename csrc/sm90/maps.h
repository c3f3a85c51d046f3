// Tensor maps of what attention.h calls Rows.
#pragma once

#include "../attention.h"
#include "tensor_map.h"

namespace attnfuse::sm90 {

// Of x (batch, heads, rows, dim), in boxes of 64 columns and box_rows rows.
inline TensorMap map_of(const Rows& x, int dim, int rows, int heads, int batch, int box_rows) {
    const uint64_t sizes[4] = {
        static_cast<uint64_t>(dim), static_cast<uint64_t>(rows), static_cast<uint64_t>(heads),
        static_cast<uint64_t>(batch)};
    // Where there is one of a kind, no stride is taken, and what stands there may be anything.
    const auto bytes = [&](int64_t stride, int count) {
        return static_cast<uint64_t>(count > 1 ? 2 * stride : 2 * dim);
    };
    const uint64_t strides[3] = {bytes(x.row, rows), bytes(x.head, heads), bytes(x.batch, batch)};
    return encode_tensor_map(x.data, sizes, strides, box_rows);
}

// Of keys and values of all sources, in boxes of COLUMNS rows; returns how many columns there are in all.
template <int COLUMNS, typename Arguments>
int64_t map_sources(Arguments& p) {
    const Shape& shape = p.shape;
    int64_t columns = 0;
    for (int s = 0; s < shape.source_count; ++s) {
        const SourceParams& source = p.sources[s];
        columns += source.columns;
        if (source.columns > 0) {  // else no tile of it is ever visited
            p.key_maps[s] = map_of(source.key, shape.dim, source.columns, shape.key_heads, shape.batch, COLUMNS);
            p.value_maps[s] =
                map_of(source.value, shape.value_dim, source.columns, shape.key_heads, shape.batch, COLUMNS);
        }
    }
    return columns;
}

// How many heads' keys and values take about 32 MB of the 50 MB of L2.
inline int32_t section_of(const Shape& shape, int64_t columns) {
    const int64_t head_bytes = columns * (shape.dim + shape.value_dim) * 2, heads = int64_t{shape.heads} * shape.batch;
    const int64_t fitting = (int64_t{32} << 20) / (head_bytes > 0 ? head_bytes : 1) * shape.group;
    return static_cast<int32_t>(fitting < 1 ? 1 : fitting > heads ? heads : fitting);
}

}  // namespace attnfuse::sm90
