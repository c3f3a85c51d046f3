// The host's half of core/logits.cuh.
#pragma once

#include "../attention.h"

namespace attnfuse {

constexpr float kLog2e = 1.4426950408889634f;

inline LogitUnits logit_units(float scale, float softcap) {
    LogitUnits units;
    // max(x) unit is the largest logit only where unit is positive: any other scale is multiplied in beforehand.
    units.prepared = softcap != 0.0f || !(scale > 0.0f);
    units.unit = units.prepared ? 1.0f : scale * kLog2e;
    units.from_cap = softcap * kLog2e;
    units.to_cap = softcap != 0.0f ? scale / softcap : scale * kLog2e;
    return units;
}

}  // namespace attnfuse
