// launchers.cpp for few.h.
#include <cstring>

#include "card.h"
#include "choose.h"
#include "few.h"

namespace attnfuse {

namespace sm80 {
// Instantiated in instances/, a file for each head dim and pass.
template <typename T, int D>
void attn_fwd_split(const SplitParams& params, void* stream);
template <typename T, int D>
void attn_bwd_few(const FewParams& params, void* stream);
template <typename T>
void attn_fwd_combine(const SplitParams& params, void* stream);
template <typename T>
void attn_bwd_few_reduce(const FewParams& params, void* stream);
template <int D>
std::vector<TileShape> attn_fwd_split_tiles();
template <int D>
std::vector<TileShape> attn_bwd_few_tiles();
template <int D>
std::vector<int> attn_bwd_few_sum_parts();
}  // namespace sm80

namespace {

// Head dims that these kernels are built for. 96 runs in 128: what is right of a head dim is not read, and reading is
// what they wait for.
template <typename Call>
auto with_few_dim(int dim_padded, Call call) {
    if (dim_padded <= 64) {
        return call(Dim<64>{});
    }
    if (dim_padded <= 128) {
        return call(Dim<128>{});
    }
    return call(Dim<256>{});
}

std::vector<TileShape> tiles_of(const char* pass, int dim_padded) {
    const bool is_forward = std::strcmp(pass, "attn_fwd_split") == 0;
    return with_few_dim(dim_padded, [&]<int D>(Dim<D>) {
        return is_forward ? sm80::attn_fwd_split_tiles<D>() : sm80::attn_bwd_few_tiles<D>();
    });
}

// Which of `tiles`, the last one where no one is large enough.
size_t index_of(const std::vector<TileShape>& tiles, int packed_rows) {
    size_t n = 0;
    while (n + 1 < tiles.size() && tiles[n].rows < packed_rows) {
        ++n;
    }
    return n;
}

}  // namespace

std::vector<TileShape> few_tile_shapes(int dim_padded) {
    std::vector<TileShape> tiles = tiles_of("attn_fwd_split", dim_padded);
    for (const TileShape& tile : tiles_of("attn_bwd_few", dim_padded)) {
        tiles.push_back(tile);
    }
    return tiles;
}

TileShape few_tile(const char* pass, int dim_padded, int packed_rows) {
    const std::vector<TileShape> tiles = tiles_of(pass, dim_padded);
    return tiles[index_of(tiles, packed_rows)];
}

int attn_bwd_few_rows(int dim_padded, int device) {
    int rows = 0;
    const int limit = shared_memory_limit(device);
    for (const TileShape& tile : tiles_of("attn_bwd_few", dim_padded)) {
        rows = tile.shared_bytes <= limit ? tile.rows : rows;
    }
    return rows;
}

int attn_bwd_few_parts(int dim_padded, int packed_rows) {
    const size_t n = index_of(tiles_of("attn_bwd_few", dim_padded), packed_rows);
    return with_few_dim(dim_padded, [&]<int D>(Dim<D>) { return sm80::attn_bwd_few_sum_parts<D>()[n]; });
}

int multiprocessor_count(int device) { return multiprocessors(device); }

void attn_fwd_split(const SplitParams& given, void* stream) {
    const SplitParams params = completed(given);
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_few_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_fwd_split<T, D>(params, stream); });
        sm80::attn_fwd_combine<T>(params, stream);
    });
}

void attn_bwd_few(const FewParams& given, void* stream) {
    const FewParams params = completed(given);
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_few_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_bwd_few<T, D>(params, stream); });
        if (params.partial != nullptr) {
            sm80::attn_bwd_few_reduce<T>(params, stream);
        }
    });
}

}  // namespace attnfuse
