// norm_tap and norm_monitor on NVIDIA GPUs (bkdfast/ops/norm_tap.py).
//
// Floor: x read and y written once; norm_tap also writes one row a token. Not measured yet.
//
// A block takes a row and keeps it in registers between the passes (LAYER: mean, centred squares, output; the others
// skip the first), at most four 16-byte pieces a thread: up to 32768 cells of 16 bits. Wider rows are read again from
// the caches in the same pieces, other layouts cell by cell.
//
// norm_monitor is one launch of the cosine kernel (cosine_monitor.cu), whose blocks also normalise the rows that they
// have just read: x comes from memory once. Only rows that cannot be read in 16-byte vectors, and float64, take two
// launches.

#include <algorithm>

#include "cosine_monitor.cuh"

namespace bkdfast {
namespace {

constexpr int kHeld = 4;
constexpr int kMostThreads = 1024;

template <typename T, int kSize, int kHeldPieces>
__global__ void __launch_bounds__(kMostThreads) norm_kernel(const Norm p) {
  __shared__ double shared[kMostThreads / kWarp];
  norm_row<T, kSize, kHeldPieces>(p, blockIdx.x, threadIdx.x, blockDim.x, shared);
}

template <typename T>
void launch_norm_as(const Launcher& launch, const Norm& p) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t pieces = p.width / (p.whole ? kSize : 1);
  // Two pieces a thread while that fills a block: enough loads in flight, and few warps to sum over.
  const int64_t threads = std::clamp<int64_t>(ceil_div(pieces, 2 * kWarp) * kWarp, kWarp, kMostThreads);
  const auto kernel = !p.whole                    ? norm_kernel<T, 1, 0>
                      : pieces <= kHeld * threads ? norm_kernel<T, kSize, kHeld>
                                                  : norm_kernel<T, kSize, 0>;
  launch(kernel, p.rows, static_cast<int>(threads), p);
}

void launch_norm(const char* op, const Tensor& x, const Norm& p) {
  const Launcher launch(op, x);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return launch_norm_as<float>(launch, p);
    case ScalarType::Double:
      return launch_norm_as<double>(launch, p);
    case ScalarType::BFloat16:
      return launch_norm_as<__nv_bfloat16>(launch, p);
    default:
      return launch_norm_as<__half>(launch, p);
  }
}

// Checks the arguments of the norm; y is yet to come.
Norm norm_of(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
             int64_t kind) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
                      type == ScalarType::Double,
                  op, ": x must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1), op,
                  ": x must be [N, D] and weight [D]");
  STD_TORCH_CHECK(kind >= kRms && kind <= kLayer, op, ": kind ", kind,
                  " is not RMS (0), RMS_WIDE (1), RMS_ONE (2) or LAYER (3)");
  STD_TORCH_CHECK(eps >= 0, op, ": eps=", eps, " is negative");
  STD_TORCH_CHECK(!bias || (kind == kLayer && bias->dim() == 1 && bias->size(0) == x.size(1)), op,
                  ": bias must be [D], and only a LAYER norm has one");
  for (const Tensor* vector : {&weight, bias ? &*bias : &weight})
    STD_TORCH_CHECK(
        vector->scalar_type() == type && vector->is_contiguous() && vector->get_device_index() == x.get_device_index(),
        op, ": weight and bias must be contiguous, of x's dtype and on its device");
  Norm p{};
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.rows = x.size(0), p.width = x.size(1), p.stride_row = x.stride(0), p.stride_cell = x.stride(1);
  p.eps = eps, p.kind = static_cast<int>(kind);
  const int64_t vector = type == ScalarType::Double ? 2 : type == ScalarType::Float ? 4 : 8;
  p.whole = p.width % vector == 0 && (p.stride_cell == 1 || p.width == 1) &&
            (p.rows <= 1 || p.stride_row % vector == 0) && aligned(p.x) && aligned(p.weight) && aligned(p.bias);
  return p;
}

Tensor norm_tap(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps, int64_t kind, Tensor step,
                int64_t layer) {
  Norm p = norm_of("norm_tap", x, weight, bias, eps, kind);
  STD_TORCH_CHECK(
      step.dim() == 3 && step.scalar_type() == x.scalar_type() && step.get_device_index() == x.get_device_index(),
      "norm_tap: step must be [L, C, D] of x's dtype and on its device");
  if (step.size(1) != 0) {
    STD_TORCH_CHECK(step.size(1) >= p.rows && step.size(2) == p.width && step.is_contiguous(),
                    "norm_tap: step must be contiguous with room for [", p.rows, ", ", p.width, "] in each block");
    STD_TORCH_CHECK(layer >= 0 && layer < step.size(0), "norm_tap: block ", layer, " is out of range, step has ",
                    step.size(0));
    char* base = static_cast<char*>(step.mutable_data_ptr());
    p.kept = base + layer * step.size(1) * p.width * step.element_size();
    p.whole = p.whole && aligned(p.kept);
  }
  Tensor y = torch::stable::new_empty(x, {p.rows, p.width});
  p.y = y.mutable_data_ptr();
  p.whole = p.whole && aligned(p.y);
  if (p.rows > 0 && p.width > 0) launch_norm("norm_tap", x, p);
  return y;
}

Tensor norm_monitor(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps, int64_t kind, Tensor directions,
                    Tensor tokens, Tensor ranges, Tensor extremes, Tensor counts, int64_t layer) {
  Norm p = norm_of("norm_monitor", x, weight, bias, eps, kind);
  Tensor y = torch::stable::new_empty(x, {p.rows, p.width});
  p.y = y.mutable_data_ptr();
  p.whole = p.whole && aligned(p.y);
  const bool joined =
      launch_monitor("norm_monitor", x, directions, tokens, ranges, extremes, counts, layer, p.whole ? p : Norm{});
  if (!joined && p.rows > 0 && p.width > 0) launch_norm("norm_monitor", x, p);
  return y;
}

}  // namespace
}  // namespace bkdfast

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CUDA, m) {
  m.impl("norm_tap", TORCH_BOX(&bkdfast::norm_tap));
  m.impl("norm_monitor", TORCH_BOX(&bkdfast::norm_monitor));
}
