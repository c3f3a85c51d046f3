// The host's side of a kernel: csrc/device/launch.h, where a launch is run to its end on the calling thread.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "card.h"
#include "machine.h"

namespace attnfuse {

template <typename Params>
void launch(
    void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void* /*stream*/, const Params& params) {
    if (blocks == 0) {
        return;
    }
    if (blocks < 0 || blocks > INT32_MAX) {
        throw std::runtime_error(
            "the problem needs " + std::to_string(blocks) + " blocks, a launch takes " + std::to_string(INT32_MAX));
    }
    struct Call {
        void (*kernel)(Params);
        const Params& params;
    };
    const Call call{kernel, params};
    const auto body = [](const void* argument) {
        const Call& made = *static_cast<const Call*>(argument);
        made.kernel(made.params);
    };
    emulation::run(blocks, threads, shared_bytes, body, &call);
}

}  // namespace attnfuse
