// What the emulated machine's own tests share.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

namespace attnfuse::selftest {

using Check = std::pair<const char*, void (*)()>;
// selftest_asynchronous.cpp's
std::vector<Check> asynchronous_checks();

inline void expect(bool holds, const std::string& what) {
    if (!holds) {
        throw std::runtime_error("expected " + what);
    }
}

// The message contains all of these, in this order.
inline void expect_error(const std::function<void()>& action, const std::vector<std::string>& parts) {
    std::string message;
    try {
        action();
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    std::size_t at = 0;
    for (const std::string& part : parts) {
        at = message.find(part, at);
        expect(at != std::string::npos, "\"" + part + "\" in \"" + message + "\"");
        at += part.size();
    }
}

struct Buffers {
    const void* in = nullptr;
    void* out = nullptr;
    int choice = 0;
};
using Kernel = void (*)(Buffers);

inline void start(Kernel kernel, int blocks, int threads, int shared_bytes, Buffers buffers = {}) {
    launch(kernel, blocks, threads, shared_bytes, nullptr, buffers);
}

}  // namespace attnfuse::selftest
