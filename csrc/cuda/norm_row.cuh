// The norm of one row by a warp or a block, as `_norm` of bkdfast/ops/norm_tap.py rounds it; also used by norm_monitor.
#pragma once

#include <type_traits>

#include "../common/device.cuh"

namespace bkdfast {

enum Kind { kRms, kRmsWide, kRmsOne, kLayer };

struct Norm {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* y;           // null: no norm is asked for
  void* kept;        // rows of the step buffer, or null
  int64_t rows, width, stride_row, stride_cell;
  double eps;
  int kind;
  bool whole;  // every row can be read and written in 16-byte vectors
};

// Sum over the group's threads; a group is a warp, or all warps of the block. Every thread gets it.
template <typename Acc>
__device__ __forceinline__ Acc group_sum(Acc value, void* shared, int threads) {
  value = warp_sum(value);
  if (threads <= kWarp) return value;
  Acc* sums = static_cast<Acc*>(shared);
  __syncthreads();  // the sums of the previous call have been read
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = sums[0];
  for (int w = 1; w < threads / kWarp; ++w) value += sums[w];
  return value;
}

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Piece {
  T values[kSize];
};

// kHeld pieces a thread stay in registers between the passes; 0: any width, read again from the caches.
template <typename T, typename Acc, int kSize, int kHeld>
__device__ __forceinline__ void norm_row_as(const Norm& p, int64_t row, int thread, int threads, void* shared) {
  using Out = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* x = static_cast<const T*>(p.x) + row * p.stride_row;
  const int64_t pieces = p.width / kSize;
  Piece<T, kSize> held[kHeld > 0 ? kHeld : 1];
  const auto read = [&](int64_t at) {
    if constexpr (kSize > 1) return *reinterpret_cast<const Piece<T, kSize>*>(x + at * kSize);
    if constexpr (kSize == 1) return Piece<T, kSize>{x[at * p.stride_cell]};
  };
  const auto each = [&](auto&& use) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (thread + i * threads < pieces) use(static_cast<int64_t>(thread + i * threads), held[i]);
    } else {
      for (int64_t at = thread; at < pieces; at += threads) use(at, read(at));
    }
  };
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (thread + i * threads < pieces) held[i] = read(thread + i * threads);
  }
  Acc mean = 0, square = 0;
  if (p.kind == kLayer) {
    each([&](int64_t, const Piece<T, kSize>& piece) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) mean += widen<Acc>(piece.values[i]);
    });
    mean = group_sum(mean, shared, threads) / static_cast<Acc>(p.width);
  }
  T* kept = p.kept ? static_cast<T*>(p.kept) + row * p.width : nullptr;
  each([&](int64_t at, const Piece<T, kSize>& piece) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Acc centred = widen<Acc>(piece.values[i]) - mean;
      square += centred * centred;
    }
    if (kept) reinterpret_cast<Piece<T, kSize>*>(kept)[at] = piece;
  });
  square = group_sum(square, shared, threads);
  Acc scale;
  if constexpr (std::is_same_v<Acc, double>) scale = rsqrt(square / static_cast<Acc>(p.width) + p.eps);
  if constexpr (std::is_same_v<Acc, float>)
    scale = rsqrtf(square / static_cast<Acc>(p.width) + static_cast<float>(p.eps));
  auto* y = reinterpret_cast<Piece<T, kSize>*>(static_cast<T*>(p.y) + row * p.width);
  const auto* weight = static_cast<const Piece<T, kSize>*>(p.weight);
  const auto* bias = static_cast<const Piece<T, kSize>*>(p.bias);
  each([&](int64_t at, const Piece<T, kSize>& piece) {
    const Piece<T, kSize> w = weight[at], b = p.kind == kLayer && bias ? bias[at] : Piece<T, kSize>{};
    Piece<T, kSize> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Acc unit = (widen<Acc>(piece.values[i]) - mean) * scale;
      const T rounded = narrow<T>(unit);
      if (p.kind == kRms) out.values[i] = narrow<T>(widen<Out>(w.values[i]) * widen<Out>(rounded));
      if (p.kind == kRmsWide) out.values[i] = narrow<T>(static_cast<Out>(unit) * widen<Out>(w.values[i]));
      if (p.kind == kRmsOne) out.values[i] = narrow<T>(unit * (1 + widen<Acc>(w.values[i])));
      if (p.kind == kLayer) {
        const Acc scaled = unit * widen<Acc>(w.values[i]);
        out.values[i] = narrow<T>(bias ? scaled + widen<Acc>(b.values[i]) : scaled);
      }
    }
    y[at] = out;
  });
}

template <typename T, int kSize, int kHeld>
__device__ __forceinline__ void norm_row(const Norm& p, int64_t row, int thread, int threads, void* shared) {
  // RMS norms of float64 compute in float32 like the models' modules.
  if constexpr (std::is_same_v<T, double>) {
    if (p.kind == kLayer) return norm_row_as<T, double, kSize, kHeld>(p, row, thread, threads, shared);
  }
  norm_row_as<T, float, kSize, kHeld>(p, row, thread, threads, shared);
}

}  // namespace bkdfast
