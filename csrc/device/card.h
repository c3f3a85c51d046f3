// What a card is and has, for code that chooses between kernels: host code alone, without a kernel in sight.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace attnfuse {

inline void require(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    require(cudaDeviceGetAttribute(&value, attribute, device), "no CUDA device to launch on");
    return value;
}

// This runtime is linked statically: it does not know which device torch's has made the current one. A thread that has
// not used CUDA yet gets the device's context here; without one the driver makes no tensor map.
inline void make_current(int device) { require(cudaSetDevice(device), "no CUDA device to launch on"); }

// 80 for compute capability 8.0.
inline int compute_capability(int device) {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
           device_attribute(cudaDevAttrComputeCapabilityMinor, device);
}
// Of the driver: 12010 for one of CUDA 12.1.
inline int driver_version() {
    int version = 0;
    require(cudaDriverGetVersion(&version), "the CUDA driver could not be asked for its version");
    return version;
}
inline int multiprocessors(int device) { return device_attribute(cudaDevAttrMultiProcessorCount, device); }
// Bytes of shared memory a block may ask for.
inline int shared_memory_limit(int device) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

}  // namespace attnfuse
