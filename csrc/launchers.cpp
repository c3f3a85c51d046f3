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
template <int D>
std::vector<TileShape> attn_fwd_tiles();
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

// Hopper's forward kernel takes what runs on compute capability 9.0 and has tensor maps of the query, the output and
// every key and value that is not empty. Everything else is the sm_80 kernel's.
bool on_hopper(const ForwardParams& p) {
    const Shape& shape = p.shape;
    const bool is_allowed = shape.newest == 0 || shape.newest >= 90;
    if (!kHasHopper || !is_allowed || compute_capability(shape.device) != 90 || shape.rows == 0 ||
        !has_map(p.query, shape.batch, shape.heads, shape.rows, shape.dim) ||
        !has_map(p.out, shape.batch, shape.heads, shape.rows, shape.value_dim)) {
        return false;
    }
    for (int s = 0; s < shape.source_count; ++s) {
        const SourceParams& source = p.sources[s];
        if (source.columns > 0 &&
            !(has_map(source.key, shape.batch, shape.key_heads, source.columns, shape.dim) &&
              has_map(source.value, shape.batch, shape.key_heads, source.columns, shape.value_dim))) {
            return false;
        }
    }
    return true;
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
            TileShape tile = sm90::attn_fwd_tiles<D>()[0];
            tile.pass = "sm90::attn_fwd";
            shapes.push_back(tile);
        });
    }
    return shapes;
}

TileShape attn_fwd_tile(const ForwardParams& given) {
    const ForwardParams params = completed(given);
    TileShape tile;
    if constexpr (kHasHopper) {
        if (on_hopper(params)) {
            with_hopper_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { tile = sm90::attn_fwd_tiles<D>()[0]; });
            return tile;
        }
    }
    with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { tile = sm80::attn_fwd_tiles<D>()[0]; });
    return tile;
}

void attn_fwd(const ForwardParams& given, void* stream) {
    const ForwardParams params = completed(given);
    if constexpr (kHasHopper) {
        if (on_hopper(params)) {
            return with_dtype(params.shape, [&]<typename T>(Type<T>) {
                with_hopper_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm90::attn_fwd<T, D>(params, stream); });
            });
        }
    }
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_fwd<T, D>(params, stream); });
    });
}

void attn_bwd_dq(const BackwardParams& given, void* stream) {
    const BackwardParams params = completed(given);
    with_dtype(params.shape, [&]<typename T>(Type<T>) {
        with_dim(params.shape.dim_padded, [&]<int D>(Dim<D>) { sm80::attn_bwd_dq<T, D>(params, stream); });
    });
}

void attn_bwd_dkdv(const BackwardParams& given, void* stream) {
    const BackwardParams params = completed(given);
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
    with_dtype(params.shape, [&]<typename T>(Type<T>) { sm80::attn_bwd_convert<T>(params, stream); });
}

}  // namespace attnfuse
