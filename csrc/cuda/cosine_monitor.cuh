// What norm_tap.cu needs of cosine_monitor.cu: the launch that serves both ops.
#pragma once

#include "norm_row.cuh"

namespace bkdfast {

// Checks, and launches the cosines of x; with norm.y, whose rows must be whole, also the norm of x in the same launch
// where x's layout permits. Returns whether it did.
bool launch_monitor(const char* op, const Tensor& x, const Tensor& directions, const Tensor& tokens,
                    const Tensor& ranges, const Tensor& extremes, const Tensor& counts, int64_t layer,
                    const Norm& norm);

}  // namespace bkdfast
