// cosine_monitor on the CPU (bkdfast/ops/cosine_monitor.py).
//
// Threads take chunks of tokens with all directions. Cosines do not depend on the chunk or the tile that a token falls
// into, minimum and maximum not on the order: the result is the same for any number of threads, bit for bit.
//
// Floor: 2 N K D flops at prefill, the directions read once at decode. One thread of a Zen 5 core (AVX-512, 240 GFLOP/s
// fp32), D = 4096, K = 40, medians:
//   prefill, N = 512: 0.98 ms in fp32 and bf16, of which 0.70 ms are the flops at peak (a tile with its operands in the
//     L1 runs at 235 GFLOP/s; reading x and its squares takes most of the rest). Plain PyTorch 2.3 to 2.4 ms (fp32) and
//     2.8 to 3.0 ms (bf16), compiled or not: its product alone runs at 75 to 95 GFLOP/s.
//   decode, 32 blocks of 4 tokens: 0.57 to 0.67 ms; reading the 21 MB takes 0.4 to 0.5 ms. A loop of plain PyTorch over
//     the blocks 3.1 ms, one batched product 1.5 ms.
// Lost: tokens outside and directions inside (5% slower, the directions leave the L1), 5 x 5 tiles (equal), 6 x 4 (8%),
// blocks of 512 (5%) or 2048 columns (10%), packing float32 too (6%), widening bfloat16 in the tile instead of packing
// (10%), fetching the next columns of x ahead (4%), fetching the directions ahead at prefill (3%; at decode it gains
// 10%). bfloat16 dot products of directions split in two would run at the same peak with 16 bits of the directions.

#include "cosine_monitor.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <type_traits>

#include "../common/isa.h"

namespace bkdfast {

enum TokenRow : int64_t { kSegment, kRange, kPosition };  // in the order of bkdfast/ops/monitor_state.py

}  // namespace bkdfast

#define BKDFAST_KERNEL "../cpu/cosine_monitor_kernel.h"
#include "../common/for_each_isa.h"

namespace bkdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Monitor::Monitor(const char* op, const Tensor& x, const Tensor& directions, const Tensor& tokens, const Tensor& ranges,
                 Tensor& extremes, Tensor& counts, int64_t layer) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK((dims == 2 || dims == 3) && directions.dim() == 3 && x.size(dims - 1) == directions.size(2), op,
                  ": x must be [N, D] or [M, N, D] and directions [L, K, D]");
  const int64_t blocks = dims == 3 ? x.size(0) : 1, n = x.size(dims - 2), d = x.size(dims - 1);
  const int64_t layers = directions.size(0), k = directions.size(1);
  STD_TORCH_CHECK(layer >= 0 && layer <= layers - blocks, op, ": layer ", layer, " and ", blocks,
                  " blocks of x, but the directions have ", layers);
  STD_TORCH_CHECK(
      tokens.dim() == 2 && tokens.size(0) == 3 && tokens.size(1) == n && tokens.scalar_type() == ScalarType::Int, op,
      ": tokens must be [3, N] int32");
  STD_TORCH_CHECK(counts.dim() == 3 && counts.size(0) == layers && counts.size(2) == 2 && extremes.dim() == 4 &&
                      extremes.size(0) == layers && extremes.size(1) == counts.size(1) && extremes.size(2) == 2 &&
                      extremes.size(3) == k && counts.scalar_type() == ScalarType::Int,
                  op, ": extremes must be [L, S, 2, K] and counts [L, S, 2] int32");
  STD_TORCH_CHECK(ranges.dim() == 4 && ranges.size(0) == layers && ranges.size(2) == 2 && ranges.size(3) == k, op,
                  ": ranges must be [L, R, 2, K]");
  STD_TORCH_CHECK(directions.scalar_type() == ScalarType::Float && ranges.scalar_type() == ScalarType::Float &&
                      extremes.scalar_type() == ScalarType::Float,
                  op, ": directions, ranges and extremes must be float32");
  STD_TORCH_CHECK(
      directions.is_contiguous() && ranges.is_contiguous() && extremes.is_contiguous() && counts.is_contiguous(), op,
      ": directions, ranges, extremes and counts must be contiguous");
  const int64_t rows = ranges.size(1), segments = counts.size(1);
  job_ = {x.const_data_ptr(),
          dims == 3 ? x.stride(0) : 0,
          x.stride(dims - 2),
          x.stride(dims - 1),
          blocks,
          n,
          d,
          k,
          static_cast<const float*>(directions.const_data_ptr()) + layer * k * d,
          static_cast<const int32_t*>(tokens.const_data_ptr()),
          tokens.stride(0),
          tokens.stride(1),
          static_cast<const float*>(ranges.const_data_ptr()) + layer * rows * 2 * k,
          rows,
          static_cast<float*>(extremes.mutable_data_ptr()) + layer * segments * 2 * k,
          static_cast<int32_t*>(counts.mutable_data_ptr()) + layer * segments * 2,
          segments};
  chunks_of_block_ = (n + kChunk - 1) / kChunk;
  reduce_ = BKDFAST_CHOOSE(reduce);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      cosines_ = BKDFAST_CHOOSE(cosines<float>);
      break;
    case ScalarType::Double:
      cosines_ = BKDFAST_CHOOSE(cosines<double>);
      break;
    case ScalarType::BFloat16:
      cosines_ = BKDFAST_CHOOSE(cosines<c10::BFloat16>);
      break;
    case ScalarType::Half:
      cosines_ = BKDFAST_CHOOSE(cosines<c10::Half>);
      break;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float16, bfloat16, float32 or float64");
  }
}

int64_t Monitor::grain() const {
  // A token or a direction read costs about what eight multiplications cost.
  const int64_t work = job_.blocks * job_.width * (job_.tokens * job_.count + 8 * (job_.tokens + job_.count));
  return work < (1 << 21) ? std::max<int64_t>(chunks(), 1) : 1;
}

MonitorChunk Monitor::observe(int64_t index, float* scratch) {
  const int64_t first = index % chunks_of_block_ * kChunk;
  float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  MonitorChunk chunk{index / chunks_of_block_, first, std::min(kChunk, job_.tokens - first), aligned,
                     aligned + kChunk * kPitch};
  cosines_(job_, chunk);
  const std::lock_guard<std::mutex> lock(accumulators_);
  reduce_(job_, chunk);
  return chunk;
}

}  // namespace bkdfast

namespace {

using torch::stable::Tensor;

void cosine_monitor(Tensor x, Tensor directions, Tensor tokens, Tensor ranges, Tensor extremes, Tensor counts,
                    int64_t layer) {
  bkdfast::Monitor monitor("cosine_monitor", x, directions, tokens, ranges, extremes, counts, layer);
  torch::stable::parallel_for(0, monitor.chunks(), monitor.grain(), [&](int64_t from, int64_t to) {
    monitor.run(from, to, [](const bkdfast::MonitorChunk&) {});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) { m.impl("cosine_monitor", TORCH_BOX(&cosine_monitor)); }
