// The way from sq_grad_linear to its Hopper kernel, which lives in an object of its own because it
// compiles for sm_90a only.
#pragma once

#include "fisher/doors.h"

namespace fastunlearn {

// Adds to `out` and returns true where FASTUNLEARN_WGMMA=1 asks for this kernel and device, types
// and shape allow it; otherwise touches nothing.
bool launch_sq_grad_wgmma(const Tensor& out, const LinearDoor& door);

}  // namespace fastunlearn
