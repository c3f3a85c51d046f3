// Tensor maps (sm_90): what a copy engine must know of a tensor to bring a box of it. Made on the host, by the driver,
// which is found through the runtime: nothing links it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "card.h"

namespace attnfuse {

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// Rows of `dim` 16-bit numbers by three strides in bytes, a box of which is 64 numbers of `box_rows` rows: 128 bytes a
// row in shared memory, the 16-byte chunk c of row r standing at c ^ r % 8. What is outside the tensor reads as zeros
// and is not written. sizes (dim, rows, heads, batch) are at least 1; address and strides are multiples of 16 bytes.
// The thread must have made a device current.
inline TensorMap encode_tensor_map(
    void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3], uint32_t box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        require(status, "the driver's cuTensorMapEncodeTiled could not be asked for");
        if (result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("the driver has no cuTensorMapEncodeTiled, which Hopper's kernels need");
        }
        return reinterpret_cast<Encode>(found);
    }();
    const cuuint64_t size[4] = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const cuuint64_t stride[3] = {strides[0], strides[1], strides[2]};
    const cuuint32_t box[4] = {64, box_rows, 1, 1}, step[4] = {1, 1, 1, 1};
    CUtensorMap made;
    const CUresult status = encode(
        // The copy moves bits: one type serves both formats. Zeros are what fills a box, not NaN.
        &made, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error(
            "the driver refused a tensor map with error " + std::to_string(static_cast<int>(status)));
    }
    TensorMap map;
    std::memcpy(&map, &made, sizeof map);
    return map;
}

}  // namespace attnfuse
