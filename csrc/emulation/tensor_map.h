// Tensor maps: csrc/device/tensor_map.h without a driver, checked for what the driver would refuse.
#pragma once

#include <cstdint>

#include "machine.h"

namespace attnfuse {

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

namespace emulation {

TensorMapFields make_tensor_map(
    void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3], uint32_t box_rows);
TensorMap packed(const TensorMapFields& fields);
// Fails where the map was not made by encode_tensor_map.
TensorMapFields unpacked(const TensorMap& map, Where where);

}  // namespace emulation

inline TensorMap encode_tensor_map(
    void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3], uint32_t box_rows) {
    return emulation::packed(emulation::make_tensor_map(data, sizes, strides, box_rows));
}

}  // namespace attnfuse
