// From the one launcher a pass that Python calls to the kernel built for its dtype and head dim.
#include <stdexcept>
#include <string>

#include "attention.h"
#include "core/logit_units.h"

namespace attnfuse {

struct bf16;
struct fp16;

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

namespace {

template <typename T>
struct Type {
    using type = T;
};
template <int D>
struct Dim {
    static constexpr int value = D;
};

template <typename Call>
void with_dtype(const Shape& shape, Call call) {
    if (shape.dtype == Dtype::bfloat16) {
        call(Type<bf16>{});
    } else {
        call(Type<fp16>{});
    }
}

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

// `params` with what launchers fill in.
template <typename Params>
Params completed(Params params) {
    Shape& shape = params.shape;
    shape.group = shape.heads / shape.key_heads;
    shape.dim_padded = padded_dim(shape.dim, shape.value_dim);
    shape.logits = logit_units(shape.scale, shape.softcap);
    return params;
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
    return shapes;
}

void attn_fwd(const ForwardParams& given, void* stream) {
    const ForwardParams params = completed(given);
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
