// |row|^2 in float32, in an order that depends on the width alone; for the kernels of cosine_monitor and norm_tap.

constexpr int64_t kLanes = Vec<float>::kWidth;

// Adds the squares of width <= kBlock columns to four sums; with `to`, also keeps the columns there in float32, zeros
// behind them up to a whole vector.
template <typename T>
BKDFAST_INLINE float square_of_block(const T* row, int64_t width, float* to) {
  Vec<float> sums[4] = {Vec<float>::zero(), Vec<float>::zero(), Vec<float>::zero(), Vec<float>::zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<float> v = Vec<float>::load(row + i + j * kLanes);
      sums[j] = fma(v, v, sums[j]);
      if (to) v.store(to + i + j * kLanes);
    }
  for (; i < width; i += kLanes) {
    const Vec<float> v = width - i < kLanes ? Vec<float>::load_partial(row + i, width - i) : Vec<float>::load(row + i);
    sums[0] = fma(v, v, sums[0]);
    if (to) v.store(to + i);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
