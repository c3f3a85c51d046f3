// From the one launcher a pass that Python calls to the kernel built for its dtype and head dim.
#include <stdexcept>
#include <string>

#include "attention.h"
#include "card.h"
#include "choose.h"

namespace attnfuse {

namespace sm80 {
// Instantiated in instances/, a file for each head dim.
template <typename T, int D>
void attn_fwd(const ForwardParams& params, void* stream);
template <typename T, int D>
void attn_bwd_dq(const BackwardParams& params, void* stream);
template <typename T, int D>
void attn_bwd_dkdv(const BackwardParams& params, void* stream);
template <int D>
std::vector<TileShape> attn_fwd_tiles();
template <int D>
std::vector<TileShape> attn_bwd_dq_tiles();
template <int D>
std::vector<TileShape> attn_bwd_dkdv_tiles();
template <typename T>
void attn_bwd_delta(const BackwardParams& params, void* stream);
template <typename T>
void attn_bwd_convert(const BackwardParams& params, void* stream);
}  // namespace sm80

namespace sm90 {
// Instantiated in instances/*_sm90.cu, which are compiled where Hopper is among the architectures (ATTNFUSE_SM90).
template <typename T, int D>
void attn_fwd(const ForwardParams& params, void* stream);
template <typename T, int D>
void attn_bwd_dq(const BackwardParams& params, void* stream);
template <typename T, int D>
void attn_bwd_dkdv(const BackwardParams& params, void* stream);
template <typename T, int D>
void attn_bwd_convert(const BackwardParams& params, void* stream);
template <int D>
std::vector<TileShape> attn_fwd_tiles();
template <int D>
std::vector<TileShape> attn_bwd_dq_tiles();
template <int D>
std::vector<TileShape> attn_bwd_dkdv_tiles();
}  // namespace sm90

namespace {

template <typename Call>
void with_dim(int dim_padded, Call call) {
    switch (dim_padded) {
        case 64:
            return call(Dim<64>{});
        case 96:
            return call(Dim<96>{});
        case 128:
            return call(Dim<128>{});
        default:
            return call(Dim<256>{});
    }
}

// Head dims that Hopper's kernels are built for: 96 runs in 128.
template <typename Call>
void with_hopper_dim(int dim_padded, Call call) {
    switch (dim_padded) {
        case 64:
            return call(Dim<64>{});
        case 96:
        case 128:
            return call(Dim<128>{});
        default:
            return call(Dim<256>{});
    }
}

// Whether a tensor map can describe x (batch, heads, rows, dim): rows on 16 bytes, none that overlap (an expanded or
// unfolded tensor has such), and no stride from 2^40 bytes.
bool has_map(const Rows& x, int batch, int heads, int rows, int dim) {
    const auto fits = [dim](int64_t stride, int count) {
        return count == 1 || (stride >= dim && stride < int64_t{1} << 39);
    };
    return x.data != nullptr && x.aligned && fits(x.batch, batch) && fits(x.head, heads) && fits(x.row, rows);
}

#ifdef ATTNFUSE_SM90
constexpr bool kHasHopper = true;
#else
constexpr bool kHasHopper = false;
#endif

// Whether Hopper's kernels may run at all.
bool is_hopper(const Shape& shape) {
    const bool is_allowed = shape.newest == 0 || shape.newest >= 90;
    return kHasHopper && is_allowed && compute_capability(shape.device) == 90 && shape.rows > 0;
}

bool has_query_map(const Shape& shape, const Rows& x, int dim) {
    return has_map(x, shape.batch, shape.heads, shape.rows, dim);
}

// x is a key, a value or the gradient of one. Of a source without columns nothing is ever visited.
bool has_source_map(const Shape& shape, const SourceParams& source, const Rows& x, int dim) {
    return source.columns == 0 || has_map(x, shape.batch, shape.key_heads, source.columns, dim);
}

template <typename Params>
bool have_source_maps(const Params& p) {
    for (int s = 0; s < p.shape.source_count; ++s) {
        const auto& source = p.sources[s];
        if (!has_source_map(p.shape, source, source.key, p.shape.dim) ||
            !has_source_map(p.shape, source, source.value, p.shape.value_dim)) {
            return false;
        }
    }
    return true;
}

// Hopper's forward kernel takes what runs on compute capability 9.0 and has tensor maps of the query, the output and
// every key and value that is not empty. Everything else is the sm_80 kernel's.
bool on_hopper(const ForwardParams& p) {
    return is_hopper(p.shape) && has_query_map(p.shape, p.query, p.shape.dim) &&
           has_query_map(p.shape, p.out, p.shape.value_dim) && have_source_maps(p);
}

// Its backward likewise, with maps of the gradients. Its params are more than drivers before CUDA 12.1 take.
bool on_hopper(const BackwardParams& p) {
    if (!is_hopper(p.shape) || driver_version() < 12010 || !has_query_map(p.shape, p.query, p.shape.dim) ||
        !has_query_map(p.shape, p.grad_out, p.shape.value_dim) || !have_source_maps(p)) {
        return false;
    }
    if (p.grad_query.data != nullptr && !has_query_map(p.shape, p.grad_query, p.shape.dim)) {
        return false;
    }
    for (int s = 0; s < p.shape.source_count; ++s) {
        const BackwardSource& source = p.sources[s];
        if ((source.grad_key.data != nullptr && !has_source_map(p.shape, source, source.grad_key, p.shape.dim)) ||
            (source.grad_value.data != nullptr &&
             !has_source_map(p.shape, source, source.grad_value, p.shape.value_dim))) {
            return false;
        }
    }
    return true;
}

// Has Hopper's kernels serve `params`, by call(type, dim), if they can; returns whether they did.
template <typename Params, typename Call>
bool served_by_hopper(const Params& params, Call call) {
    if constexpr (kHasHopper) {
        if (on_hopper(params)) {
            with_dtype(params.shape, [&](auto type) {
                with_hopper_dim(params.shape.dim_padded, [&](auto dim) { call(type, dim); });
            });
            return true;
        }
    }
    return false;
}

}  // namespace

int padded_dim(int dim, int value_dim) {
    const int wider = dim > value_dim ? dim : value_dim;
    for (const int padded : {64, 96, 128, 256}) {
        if (wider <= padded) {
            return padded;
        }
    }
    throw std::runtime_error("head dims go up to 256, got " + std::to_string(wider));
}

std::vector<TileShape> tile_shapes(int dim_padded) {
    std::vector<TileShape> shapes;
    with_dim(dim_padded, [&]<int D>(Dim<D>) {
        for (const auto& tiles :
             {sm80::attn_fwd_tiles<D>(), sm80::attn_bwd_dq_tiles<D>(), sm80::attn_bwd_dkdv_tiles<D>()}) {
            shapes.insert(shapes.end(), tiles.begin(), tiles.end());
        }
    });
    if constexpr (kHasHopper) {
        with_hopper_dim(dim_padded, [&]<int D>(Dim<D>) {
            shapes.push_back(sm90::attn_fwd_tiles<D>()[0]);
            shapes.back().pass = "sm90::attn_fwd";
            shapes.push_back(sm90::attn_bwd_dq_tiles<D>()[0]);
            shapes.back().pass = "sm90::attn_bwd_dq";
            for (TileShape tile : sm90::attn_bwd_dkdv_tiles<D>()) {
                tile.pass = "sm90::attn_bwd_dkdv";
                shapes.push_back(tile);
            }
        });
    }
    return shapes;
}

int rows_padded(int rows) {
    int padded = 0;
    for (const int tile : {64, 80, 128}) {
        const int up = (rows + tile - 1) / tile * tile;
        padded = up > padded ? up : padded;
    }
    return (padded + 63) / 64 * 64;
}

std::vector<TileShape> attn_bwd_tiles(const BackwardParams& given) {
    const BackwardParams params = completed(given);
    std::vector<TileShape> tiles;
    if (served_by_hopper(params, [&]<typename T, int D>(Type<T>, Dim<D>) {
            tiles = {sm90::attn_bwd_dq_tiles<D>()[0], sm90::attn_bwd_dkdv_tiles<D>().back()};
        })) {
        return tiles;
    }
    with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) {
        tiles = {sm80::attn_bwd_dq_tiles<D>()[0], sm80::attn_bwd_dkdv_tiles<D>().back()};
    });
    return tiles;
}

TileShape attn_fwd_tile(const ForwardParams& given) {
    const ForwardParams params = completed(given);
    TileShape tile;
    if (served_by_hopper(params, [&]<typename T, int D>(Type<T>, Dim<D>) { tile = sm90::attn_fwd_tiles<D>()[0]; })) {
        return tile;
    }
    with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { tile = sm80::attn_fwd_tiles<D>()[0]; });
    return tile;
}

void attn_fwd(const ForwardParams& given, void* stream) {
    const ForwardParams params = completed(given);
    if (served_by_hopper(params, [&]<typename T, int D>(Type<T>, Dim<D>) { sm90::attn_fwd<T, D>(params, stream); })) {
        return;
    }
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_fwd<T, D>(params, stream); });
    });
}

void attn_bwd_dq(const BackwardParams& given, void* stream) {
    const BackwardParams params = completed(given);
    if (served_by_hopper(
            params, [&]<typename T, int D>(Type<T>, Dim<D>) { sm90::attn_bwd_dq<T, D>(params, stream); })) {
        return;
    }
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_bwd_dq<T, D>(params, stream); });
    });
}

void attn_bwd_dkdv(const BackwardParams& given, void* stream) {
    const BackwardParams params = completed(given);
    if (served_by_hopper(
            params, [&]<typename T, int D>(Type<T>, Dim<D>) { sm90::attn_bwd_dkdv<T, D>(params, stream); })) {
        return;
    }
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_bwd_dkdv<T, D>(params, stream); });
    });
}

void attn_bwd_delta(const BackwardParams& given, void* stream) {
    const BackwardParams params = completed(given);
    with_dtype(params.shape, [&]<typename T>(Type<T>) { sm80::attn_bwd_delta<T>(params, stream); });
}

void attn_bwd_convert(const BackwardParams& given, void* stream) {
    const BackwardParams params = completed(given);
    // As attn_bwd_dkdv was: it has laid dq_sum out.
    if (served_by_hopper(
            params, [&]<typename T, int D>(Type<T>, Dim<D>) { sm90::attn_bwd_convert<T, D>(params, stream); })) {
        return;
    }
    with_dtype(params.shape, [&]<typename T>(Type<T>) { sm80::attn_bwd_convert<T>(params, stream); });
}

}  // namespace attnfuse
