// ldmatrix and stmatrix: csrc/device/ldmatrix.h, each row read or written in the name of the lane that gave its
// address.
#pragma once

#include <cstdint>

#include "machine.h"
#include "shared.h"

namespace attnfuse {
namespace emulation {

void ldmatrix(uint32_t (&fragment)[4], SharedAddress row, bool transposed, Where where);
void stmatrix_transposed(SharedAddress row, const uint32_t (&fragment)[4], Where where);

}  // namespace emulation

inline void ldmatrix_x4(
    uint32_t (&fragment)[4], SharedAddress row, emulation::Where where = emulation::Where::current()) {
    emulation::ldmatrix(fragment, row, false, where);
}
inline void ldmatrix_x4_trans(
    uint32_t (&fragment)[4], SharedAddress row, emulation::Where where = emulation::Where::current()) {
    emulation::ldmatrix(fragment, row, true, where);
}
inline void stmatrix_x4_trans(
    SharedAddress row, const uint32_t (&fragment)[4], emulation::Where where = emulation::Where::current()) {
    emulation::stmatrix_transposed(row, fragment, where);
}

}  // namespace attnfuse
