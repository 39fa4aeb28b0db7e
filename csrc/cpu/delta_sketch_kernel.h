// The row panels of delta_sketch, for one instruction set; delta_sketch.cpp has the types and the whole picture.

// Register tiles: kRows x kColumns accumulators for Y, kVectors x kColumns for Z.
#if BKDFAST_VECTOR_BYTES == 64
constexpr int kRows = 6, kColumns = 4, kVectors = 6;
#else
constexpr int kRows = 3, kColumns = 4, kVectors = 3;
#endif

// Rows of a block of one weight. What lies `ahead` bytes on is read a block later; the hardware alone does not see that
// coming and reaches a third of the memory's bandwidth. It may lie outside the weight: fetching never faults.
struct Rows {
  const char* at;
  int64_t stride, ahead;  // bytes

  BKDFAST_INLINE void fetch(int64_t row, int64_t offset, int64_t bytes) const {
    const uintptr_t from = reinterpret_cast<uintptr_t>(at) + row * stride + ahead + offset;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(from + i), 0, 2);
  }
};

// What form_delta takes from the rows of a tile in one block. Adding up the elements of the vectors for each row
// instead is 3% of a pass at k = 16; once a panel the sums would be so long that their rounding shows.
template <typename Acc>
struct Sums {
  using Counter = std::conditional_t<sizeof(Acc) == 4, Counters, LongCounters>;
  Vec<double> low, high;
  Counter changed;
  Totals scalar;

  // Written out: an implicit constructor would be compiled for the generic target.
  BKDFAST_INLINE Sums() : low(Vec<double>::zero()), high(Vec<double>::zero()), changed{} {}
  BKDFAST_INLINE void add(Vec<Acc> base, Vec<Acc> tuned, Acc* out) {
    const Vec<Acc> delta = tuned - base;
    delta.store(out);
    changed = count_unequal(base, tuned, changed);
    if constexpr (sizeof(Acc) == 4) {
      const Vec<double> first = lower(delta), second = upper(delta);
      low = fma(first, first, low);
      high = fma(second, second, high);
    } else {
      const Vec<double> next = fma(delta, delta, low);  // in turns: two short sums round less than a long one
      low = high;
      high = next;
    }
  }
  BKDFAST_INLINE void total(Totals& totals) const {
    totals.frobenius_sq += sum(low + high) + scalar.frobenius_sq;
    totals.changed += scalar.changed;
    for (int64_t i = 0; i < Vec<Acc>::kWidth; ++i) totals.changed += changed[i];
  }
};

// out = tuned - base for `count` entries of one row, zeros up to a multiple of kPad.
template <typename Acc, typename Base, typename Tuned>
void form_delta(const Rows& base_rows, const Rows& tuned_rows, int64_t row, int64_t count, Acc* out, Sums<Acc>& tile) {
  const Base* base = reinterpret_cast<const Base*>(base_rows.at + row * base_rows.stride);
  const Tuned* tuned = reinterpret_cast<const Tuned*>(tuned_rows.at + row * tuned_rows.stride);
  if constexpr (sizeof(Acc) == 4 && (sizeof(Base) == 8 || sizeof(Tuned) == 8)) {
    // float64 against a narrower type: the difference is taken in double and rounded once.
    for (int64_t j = 0; j < count; ++j) {
      const double a = static_cast<double>(base[j]), b = static_cast<double>(tuned[j]);
      out[j] = static_cast<Acc>(b - a);
      tile.scalar.changed += a != b;
      tile.scalar.frobenius_sq += static_cast<double>(out[j]) * static_cast<double>(out[j]);
    }
    for (int64_t j = count; j % kPad; ++j) out[j] = 0;
  } else {
    using V = Vec<Acc>;
    constexpr int64_t kStep = 32;  // a line of 16-bit weights
    Sums<Acc> sums = tile;
    int64_t j = 0;
    for (; j + kStep <= count; j += kStep) {
      base_rows.fetch(row, j * sizeof(Base), kStep * sizeof(Base));
      tuned_rows.fetch(row, j * sizeof(Tuned), kStep * sizeof(Tuned));
#pragma GCC unroll 8
      for (int64_t i = j; i < j + kStep; i += V::kWidth) sums.add(V::load(base + i), V::load(tuned + i), out + i);
    }
    for (; j + V::kWidth <= count; j += V::kWidth) sums.add(V::load(base + j), V::load(tuned + j), out + j);
    if (j < count) {
      sums.add(V::load_partial(base + j, count - j), V::load_partial(tuned + j, count - j), out + j);
      j += V::kWidth;
    }
    for (; j % kPad; j += V::kWidth) V::zero().store(out + j);
    tile = sums;
  }
}

template <typename Acc>
using DeltaFormer = void (*)(const Rows&, const Rows&, int64_t, int64_t, Acc*, Sums<Acc>&);

template <typename Acc, typename Base>
DeltaFormer<Acc> delta_former_of(Type tuned) {
  if constexpr (sizeof(Acc) == 8) {
    return form_delta<double, double, double>;
  } else {
    switch (tuned) {
      case Type::kBFloat16:
        return form_delta<Acc, Base, c10::BFloat16>;
      case Type::kHalf:
        return form_delta<Acc, Base, c10::Half>;
      case Type::kFloat:
        return form_delta<Acc, Base, float>;
      default:
        return form_delta<Acc, Base, double>;
    }
  }
}

template <typename Acc>
DeltaFormer<Acc> delta_former(Type base, Type tuned) {
  switch (base) {
    case Type::kBFloat16:
      return delta_former_of<Acc, c10::BFloat16>(tuned);
    case Type::kHalf:
      return delta_former_of<Acc, c10::Half>(tuned);
    case Type::kFloat:
      return delta_former_of<Acc, float>(tuned);
    default:
      return delta_former_of<Acc, double>(tuned);
  }
}

// y[r, c] += sum_j delta[r, j] x[c, j], vectors along j: each load feeds R or C products.
template <typename Acc, int R, int C>
void multiply_tile(const Acc* delta, int64_t delta_stride, const Acc* x, int64_t x_stride, int64_t count, Acc* y,
                   int64_t y_stride) {
  using V = Vec<Acc>;
  V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = V::zero();
  for (int64_t j = 0; j < count; j += V::kWidth) {
    V d[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) d[r] = V::load(delta + r * delta_stride + j);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V column = V::load(x + c * x_stride + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] = fma(d[r], column, acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if constexpr (C == 4) {
      add_sums(acc[r], y + r * y_stride);
    } else {
      for (int c = 0; c < C; ++c) y[r * y_stride + c] += sum(acc[r][c]);
    }
  }
}

template <typename Acc, int R>
void multiply_rows(const Acc* delta, int64_t delta_stride, const Acc* x, int64_t x_stride, int64_t count, Acc* y,
                   int64_t k) {
  static_assert(kColumns == 4);
  int64_t c = 0;
  for (; c + 4 <= k; c += 4) multiply_tile<Acc, R, 4>(delta, delta_stride, x + c * x_stride, x_stride, count, y + c, k);
  x += c * x_stride;
  if (k - c == 3) multiply_tile<Acc, R, 3>(delta, delta_stride, x, x_stride, count, y + c, k);
  if (k - c == 2) multiply_tile<Acc, R, 2>(delta, delta_stride, x, x_stride, count, y + c, k);
  if (k - c == 1) multiply_tile<Acc, R, 1>(delta, delta_stride, x, x_stride, count, y + c, k);
}

template <typename Acc>
void multiply(int rows, const Acc* delta, int64_t delta_stride, const Acc* x, int64_t x_stride, int64_t count, Acc* y,
              int64_t k) {
  if (rows == kRows) return multiply_rows<Acc, kRows>(delta, delta_stride, x, x_stride, count, y, k);
  for (int r = 0; r < rows; ++r)
    multiply_rows<Acc, 1>(delta + r * delta_stride, delta_stride, x, x_stride, count, y + r * k, k);
}

// z[c, j] (+)= sum_r y[r, c] delta[r, j] for N vectors of j.
template <typename Acc, int N, int C>
void accumulate_tile(const Acc* delta, int64_t delta_stride, int64_t rows, const Acc* y, int64_t y_stride, Acc* z,
                     int64_t z_stride, bool fresh) {
  using V = Vec<Acc>;
  V acc[C][N];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) acc[c][i] = fresh ? V::zero() : V::load(z + c * z_stride + i * V::kWidth);
  for (int64_t r = 0; r < rows; ++r) {
    V d[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) d[i] = V::load(delta + r * delta_stride + i * V::kWidth);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V factor = V::broadcast(y[r * y_stride + c]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[c][i] = fma(d[i], factor, acc[c][i]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) acc[c][i].store(z + c * z_stride + i * V::kWidth);
}

template <typename Acc, int N>
void accumulate_columns(const Acc* delta, int64_t delta_stride, int64_t rows, const Acc* y, int64_t k, Acc* z,
                        int64_t z_stride, bool fresh) {
  int64_t c = 0;
  for (; c + kColumns <= k; c += kColumns)
    accumulate_tile<Acc, N, kColumns>(delta, delta_stride, rows, y + c, k, z + c * z_stride, z_stride, fresh);
  for (; c < k; ++c) accumulate_tile<Acc, N, 1>(delta, delta_stride, rows, y + c, k, z + c * z_stride, z_stride, fresh);
}

template <typename Acc>
void accumulate(const Acc* delta, int64_t delta_stride, int64_t rows, int64_t columns, const Acc* y, int64_t k, Acc* z,
                int64_t z_stride, bool fresh) {
  constexpr int64_t kWidth = Vec<Acc>::kWidth;
  int64_t j = columns;  // backwards: the last columns are still in the cache, the first will be needed next
  for (; j % (kVectors * kWidth); j -= kWidth)
    accumulate_columns<Acc, 1>(delta + j - kWidth, delta_stride, rows, y, k, z + j - kWidth, z_stride, fresh);
  for (; j > 0; j -= kVectors * kWidth)
    accumulate_columns<Acc, kVectors>(delta + j - kVectors * kWidth, delta_stride, rows, y, k,
                                      z + j - kVectors * kWidth, z_stride, fresh);
}

// A block [rows, count] of a weight with any strides, copied to rows of kBlock entries; strides in bytes.
template <int64_t kItem>
void gather(const char* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t count, char* to) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(to + (r * kBlock + j) * kItem, from + r * row_stride + j * column_stride, kItem);
}

Rows rows_of(const Weight& weight, int64_t panel, int64_t rows, int64_t column, int64_t count, char* gathered) {
  const int64_t item = weight.item, stride = weight.row_stride * item, apart = weight.column_stride * item;
  const char* at = weight.data + panel * stride + column * apart;
  if (apart == item || count == 1) {
    const bool last = column + count == weight.columns;
    return {at, stride, last ? kPanel * stride - column * item : kBlock * item};
  }
  const auto copy = item == 2 ? gather<2> : item == 4 ? gather<4> : gather<8>;
  copy(at, stride, apart, rows, count, gathered);
  return {gathered, kBlock * item, 0};
}

// Rows [begin, end) of Y, and what they add to Z (transposed, [k, z_stride]), the norm and the count.
template <typename Acc>
void sketch_rows(const Job<Acc>& job, int64_t begin, int64_t end, const Scratch<Acc>& scratch, Acc* z, Totals& totals) {
  const auto form = delta_former<Acc>(job.base.type, job.tuned.type);
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t rows = end - panel < kPanel ? end - panel : kPanel;
    Acc* y = job.y + panel * job.k;
    for (int64_t i = 0; i < rows * job.k; ++i) y[i] = 0;
    for (int64_t column = 0; column < job.n; column += kBlock) {
      const int64_t count = job.n - column < kBlock ? job.n - column : kBlock;
      const int64_t padded = (count + kPad - 1) / kPad * kPad;
      const Rows base = rows_of(job.base, panel, rows, column, count, scratch.gathered[0]);
      const Rows tuned = rows_of(job.tuned, panel, rows, column, count, scratch.gathered[1]);
      const Acc* x = job.x + column * job.k;  // [k, x_stride] of this block
      for (int64_t row = 0; row < rows; row += kRows) {
        const int tile = rows - row < kRows ? static_cast<int>(rows - row) : kRows;
        Acc* delta = scratch.delta + row * job.delta_stride + (job.k ? column : 0);
        Sums<Acc> sums;
        for (int r = 0; r < tile; ++r) form(base, tuned, row + r, count, delta + r * job.delta_stride, sums);
        sums.total(totals);
        multiply(tile, delta, job.delta_stride, x, kBlock, padded, y + row * job.k, job.k);
      }
    }
    accumulate(scratch.delta, job.delta_stride, rows, (job.n + kPad - 1) / kPad * kPad, y, job.k, z, job.z_stride,
               panel == begin);
  }
}

void sketch_float(const Job<float>& job, int64_t begin, int64_t end, const Scratch<float>& scratch, float* z,
                  Totals& totals) {
  sketch_rows(job, begin, end, scratch, z, totals);
}

void sketch_double(const Job<double>& job, int64_t begin, int64_t end, const Scratch<double>& scratch, double* z,
                   Totals& totals) {
  sketch_rows(job, begin, end, scratch, z, totals);
}
