// The host's side of a kernel: launching it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "card.h"

namespace attnfuse {

// kernel<<<blocks, threads, shared_bytes, stream>>>(params)
template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void* stream, const Params& params) {
    if (blocks == 0) {
        return;
    }
    if (blocks > INT32_MAX) {
        throw std::runtime_error(
            "the problem needs " + std::to_string(blocks) + " blocks, a launch takes " + std::to_string(INT32_MAX));
    }
    make_current(params.shape.device);
    if (shared_bytes > 48 * 1024) {
        require(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "a kernel's shared memory was refused");
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    require(cudaGetLastError(), "a kernel could not be launched");
}

}  // namespace attnfuse
