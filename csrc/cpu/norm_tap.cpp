// norm_tap and norm_monitor on the CPU (bkdfast/ops/norm_tap.py).
//
// Floor: x read and y written. A row passes twice, the second time from the L1; norm_monitor takes |x|^2 from the
// cosines of the chunk. One thread of a Zen 5 core, N = 512, D = 4096, medians: norm_tap 0.31 ms in fp32 and 0.46 ms in
// bf16 (with a step 0.62 and 0.51), HuggingFace's LlamaRMSNorm 1.45 and 1.48 ms; norm_monitor with K = 40 1.33 and
// 1.39 ms, LlamaRMSNorm and a plain monitor 3.6 and 4.7 ms. Rounding to bfloat16 through memory instead of in
// registers cost 40%.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/isa.h"
#include "cosine_monitor.h"

namespace bkdfast {

enum Kind : int64_t { kRms, kRmsWide, kRmsOne, kLayer };  // in the order of bkdfast/ops/norm_tap.py

struct NormJob {
  const void* x;
  int64_t stride_token, stride_column;
  int64_t tokens, width;
  const void* weight;
  const void* bias;  // or null
  void* y;
  void* step;  // row 0 of the block, or null
  float eps;
  double eps_double;
  int64_t kind;
};

}  // namespace bkdfast

#define BKDFAST_KERNEL "../cpu/norm_tap_kernel.h"
#include "../common/for_each_isa.h"

namespace {

using bkdfast::NormJob;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 serves tests and small models: the RMS norms of the models compute in float32 even then.
void norm_rows_double(const NormJob& job, int64_t first, int64_t count, const float*, void*) {
  const double* weight = static_cast<const double*>(job.weight);
  const double* bias = static_cast<const double*>(job.bias);
  const int64_t width = job.width, stride = job.stride_column;
  for (int64_t n = first; n < first + count; ++n) {
    const double* x = static_cast<const double*>(job.x) + n * job.stride_token;
    double* y = static_cast<double*>(job.y) + n * width;
    if (job.step)
      for (int64_t i = 0; i < width; ++i) static_cast<double*>(job.step)[n * width + i] = x[i * stride];
    if (job.kind == bkdfast::kLayer) {
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < width; ++i) mean += x[i * stride];
      mean /= width;
      for (int64_t i = 0; i < width; ++i) variance += (x[i * stride] - mean) * (x[i * stride] - mean);
      const double scale = 1 / std::sqrt(variance / width + job.eps_double);
      for (int64_t i = 0; i < width; ++i) y[i] = (x[i * stride] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0);
      continue;
    }
    double square = 0;
    for (int64_t i = 0; i < width; ++i) {
      const float v = static_cast<float>(x[i * stride]);
      square += static_cast<double>(v * v);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(square) / width + job.eps);
    for (int64_t i = 0; i < width; ++i) {
      const float unit = static_cast<float>(x[i * stride]) * scale;
      y[i] = job.kind == bkdfast::kRmsOne ? static_cast<double>(unit * (1.0f + static_cast<float>(weight[i])))
                                          : unit * weight[i];
    }
  }
}

class Norm {
 public:
  Norm(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
       int64_t kind) {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1), op,
                    ": x must be [N, D] and weight [D]");
    STD_TORCH_CHECK(kind >= bkdfast::kRms && kind <= bkdfast::kLayer, op, ": kind ", kind, " is not one of 0 to 3");
    STD_TORCH_CHECK(!bias || (kind == bkdfast::kLayer && bias->dim() == 1 && bias->size(0) == x.size(1)), op,
                    ": bias must be [D], and only a LAYER norm has one");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()), op,
                    ": weight and bias must have x's dtype");
    STD_TORCH_CHECK(weight.is_contiguous() && (!bias || bias->is_contiguous()), op,
                    ": weight and bias must be contiguous");
    STD_TORCH_CHECK(eps >= 0, op, ": eps is negative");
    switch (x.scalar_type()) {
      case ScalarType::Float:
        rows_ = BKDFAST_CHOOSE(norm_rows<float>);
        break;
      case ScalarType::Double:
        rows_ = &norm_rows_double;
        break;
      case ScalarType::BFloat16:
        rows_ = BKDFAST_CHOOSE(norm_rows<c10::BFloat16>);
        break;
      case ScalarType::Half:
        rows_ = BKDFAST_CHOOSE(norm_rows<c10::Half>);
        break;
      default:
        STD_TORCH_CHECK(false, op, ": x must be float16, bfloat16, float32 or float64");
    }
    y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    job = {x.const_data_ptr(),
           x.stride(0),
           x.stride(1),
           x.size(0),
           x.size(1),
           weight.const_data_ptr(),
           bias ? bias->const_data_ptr() : nullptr,
           y.mutable_data_ptr(),
           nullptr,
           static_cast<float>(eps),
           eps,
           kind};
  }

  // Room for a row whose columns are apart.
  std::vector<double> scratch() const { return std::vector<double>(job.stride_column == 1 ? 0 : job.width); }

  void rows(int64_t first, int64_t count, const float* square, void* scratch) const {
    rows_(job, first, count, square, scratch);
  }

  NormJob job;
  Tensor y;

 private:
  void (*rows_)(const NormJob&, int64_t, int64_t, const float*, void*);
};

Tensor norm_tap(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps, int64_t kind, Tensor step,
                int64_t layer) {
  Norm norm("norm_tap", x, weight, bias, eps, kind);
  const int64_t n = x.size(0), d = x.size(1);
  STD_TORCH_CHECK(step.dim() == 3 && step.scalar_type() == x.scalar_type(),
                  "norm_tap: step must be [L, C, D] of x's dtype");
  if (const int64_t room = step.size(1); room > 0) {
    STD_TORCH_CHECK(room >= n && step.size(2) == d && step.is_contiguous(),
                    "norm_tap: step must be contiguous with room for [", n, ", ", d, "] in each block");
    STD_TORCH_CHECK(layer >= 0 && layer < step.size(0), "norm_tap: block ", layer, " is out of range, step has ",
                    step.size(0));
    const int64_t item = x.element_size();
    norm.job.step = static_cast<char*>(step.mutable_data_ptr()) + layer * room * d * item;
  }
  // Waking a thread costs as much as some 64 thousand numbers.
  const int64_t grain = std::max<int64_t>((1 << 16) / std::max<int64_t>(d, 1), 1);
  torch::stable::parallel_for(0, n, grain, [&](int64_t from, int64_t to) {
    auto scratch = norm.scratch();
    norm.rows(from, to - from, nullptr, scratch.data());
  });
  return norm.y;
}

Tensor norm_monitor(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps, int64_t kind, Tensor directions,
                    Tensor tokens, Tensor ranges, Tensor extremes, Tensor counts, int64_t layer) {
  Norm norm("norm_monitor", x, weight, bias, eps, kind);
  bkdfast::Monitor monitor("norm_monitor", x, directions, tokens, ranges, extremes, counts, layer);
  torch::stable::parallel_for(0, monitor.chunks(), monitor.grain(), [&](int64_t from, int64_t to) {
    auto scratch = norm.scratch();
    monitor.run(from, to, [&](const bkdfast::MonitorChunk& chunk) {
      norm.rows(chunk.first, chunk.tokens, chunk.square, scratch.data());
    });
  });
  return norm.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) {
  m.impl("norm_tap", TORCH_BOX(&norm_tap));
  m.impl("norm_monitor", TORCH_BOX(&norm_monitor));
}
