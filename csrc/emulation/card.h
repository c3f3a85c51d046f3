// What a card is and has: csrc/device/card.h by the emulated machine's settings.
#pragma once

#include "machine.h"

namespace attnfuse {

inline void make_current(int /*device*/) { emulation::has_context = true; }
inline int compute_capability(int /*device*/) { return emulation::architecture; }
inline int driver_version() { return 13000; }
inline int multiprocessors(int /*device*/) { return emulation::multiprocessors; }
inline int shared_memory_limit(int /*device*/) { return emulation::shared_memory_bytes; }

}  // namespace attnfuse
