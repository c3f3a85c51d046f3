// What the launchers share: from a dtype to its type, and params as the kernels want them.
#pragma once

#include "attention.h"
#include "core/logit_units.h"

namespace attnfuse {

struct bf16;
struct fp16;

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

// `params` with what launchers fill in.
template <typename Params>
Params completed(Params params) {
    Shape& shape = params.shape;
    shape.group = shape.heads / shape.key_heads;
    shape.dim_padded = padded_dim(shape.dim, shape.value_dim);
    shape.logits = logit_units(shape.scale, shape.softcap);
    return params;
}

}  // namespace attnfuse
