// Rows of a norm; compiled for each instruction set (csrc/common/isa.h).

#include "../cpu/square_sum_kernel.h"

// v as it is after a trip through T.
template <typename T>
BKDFAST_INLINE Vec<float> rounded(Vec<float> v) {
  if constexpr (sizeof(T) == 4) return v;
  if constexpr (std::is_same_v<T, c10::BFloat16>)  // in registers
    return reinterpret_cast<Floats>(bfloat16_bits(v.v) & 0xffff0000u);
  T narrow[kLanes];
  v.store(narrow);
  return Vec<float>::load(narrow);
}

template <typename T, int kKind>
BKDFAST_INLINE Vec<float> normed(Vec<float> x, Vec<float> mean, Vec<float> scale, Vec<float> w, Vec<float> b) {
  if constexpr (kKind == bkdfast::kRms) return w * rounded<T>(x * scale);
  if constexpr (kKind == bkdfast::kRmsWide) return (x * scale) * w;
  if constexpr (kKind == bkdfast::kRmsOne) return (x * scale) * (Vec<float>::broadcast(1) + w);
  return (x - mean) * scale * w + b;
}

template <typename T, int kKind>
void norm_row(const T* x, const T* weight, const T* bias, int64_t width, float mean, float scale, T* y) {
  const Vec<float> m = Vec<float>::broadcast(mean), s = Vec<float>::broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec<float> b = kKind == bkdfast::kLayer && bias ? Vec<float>::load(bias + i) : Vec<float>::zero();
    normed<T, kKind>(Vec<float>::load(x + i), m, s, Vec<float>::load(weight + i), b).store(y + i);
  }
  if (const int64_t left = width - i; left > 0) {
    const Vec<float> b =
        kKind == bkdfast::kLayer && bias ? Vec<float>::load_partial(bias + i, left) : Vec<float>::zero();
    normed<T, kKind>(Vec<float>::load_partial(x + i, left), m, s, Vec<float>::load_partial(weight + i, left), b)
        .store_partial(y + i, left);
  }
}

template <typename T>
float square_of(const T* x, int64_t width) {
  float total = 0;
  for (int64_t i = 0; i < width; i += bkdfast::kBlock)
    total += square_of_block(x + i, width - i < bkdfast::kBlock ? width - i : bkdfast::kBlock, nullptr);
  return total;
}

// Sum of (x - shift)^kPower, kPower 1 or 2.
template <typename T, int kPower>
float moment(const T* x, int64_t width, float shift) {
  Vec<float> sums[4] = {Vec<float>::zero(), Vec<float>::zero(), Vec<float>::zero(), Vec<float>::zero()};
  const Vec<float> s = Vec<float>::broadcast(shift);
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<float> v = Vec<float>::load(x + i + j * kLanes) - s;
      sums[j] = kPower == 2 ? fma(v, v, sums[j]) : sums[j] + v;
    }
  float rest = 0;  // apart from the total, beside which its terms are small
  for (; i < width; ++i) {
    const float v = static_cast<float>(x[i]) - shift;
    rest += kPower == 2 ? v * v : v;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// Rows first..first+count; `square` holds |x|^2 of them, or is null; `gathered` has room for a row, read where x's
// columns are apart.
template <typename T>
void norm_rows(const bkdfast::NormJob& job, int64_t first, int64_t count, const float* square, void* gathered) {
  const int64_t width = job.width;
  const T* weight = static_cast<const T*>(job.weight);
  const T* bias = static_cast<const T*>(job.bias);
  for (int64_t n = first; n < first + count; ++n) {
    const T* x = static_cast<const T*>(job.x) + n * job.stride_token;
    if (job.stride_column != 1 && width > 1) {
      T* row = static_cast<T*>(gathered);
      for (int64_t i = 0; i < width; ++i) row[i] = x[i * job.stride_column];
      x = row;
    }
    T* y = static_cast<T*>(job.y) + n * width;
    if (job.kind == bkdfast::kLayer) {
      const float mean = moment<T, 1>(x, width, 0) / width;
      const float scale = 1.0f / __builtin_sqrtf(moment<T, 2>(x, width, mean) / width + job.eps);
      norm_row<T, bkdfast::kLayer>(x, weight, bias, width, mean, scale, y);
    } else {
      const float total = square ? square[n - first] : square_of(x, width);
      const float scale = 1.0f / __builtin_sqrtf(total / width + job.eps);
      if (job.kind == bkdfast::kRms) norm_row<T, bkdfast::kRms>(x, weight, bias, width, 0, scale, y);
      if (job.kind == bkdfast::kRmsWide) norm_row<T, bkdfast::kRmsWide>(x, weight, bias, width, 0, scale, y);
      if (job.kind == bkdfast::kRmsOne) norm_row<T, bkdfast::kRmsOne>(x, weight, bias, width, 0, scale, y);
    }
    if (job.step) __builtin_memcpy(static_cast<T*>(job.step) + n * width, x, width * sizeof(T));
  }
}
