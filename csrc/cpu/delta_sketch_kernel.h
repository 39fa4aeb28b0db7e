// The row panels of delta_sketch, for one instruction set; delta_sketch.cpp has the types and the whole picture.

// Register tiles: kRows x kColumns accumulators for Y, kVectors x kColumns for Z.
#if BKDFAST_VECTOR_BYTES == 64
constexpr int kRows = 6, kColumns = 4, kVectors = 6;
#else
constexpr int kRows = 3, kColumns = 4, kVectors = 3;
#endif

// out = tuned - base for `count` entries of one row, zeros up to a multiple of kPad.
template <typename Acc, typename Base, typename Tuned>
void form_delta(const void* base_row, const void* tuned_row, int64_t count, Acc* out, Totals& totals) {
  const Base* base = static_cast<const Base*>(base_row);
  const Tuned* tuned = static_cast<const Tuned*>(tuned_row);
  if constexpr (sizeof(Acc) == 4 && (sizeof(Base) == 8 || sizeof(Tuned) == 8)) {
    // float64 against a narrower type: the difference is taken in double and rounded once.
    for (int64_t j = 0; j < count; ++j) {
      const double a = static_cast<double>(base[j]), b = static_cast<double>(tuned[j]);
      out[j] = static_cast<Acc>(b - a);
      totals.changed += a != b;
      totals.frobenius_sq += static_cast<double>(out[j]) * static_cast<double>(out[j]);
    }
    for (int64_t j = count; j % kPad; ++j) out[j] = 0;
  } else {
    using V = Vec<Acc>;
    using D = Vec<double>;
    D low = D::zero(), high = D::zero();
    auto changed = V::zero().v != V::zero().v;
    int64_t j = 0;
    for (; j < count; j += V::kWidth) {
      const bool whole = j + V::kWidth <= count;
      const V a = whole ? V::load(base + j) : V::load_partial(base + j, count - j);
      const V b = whole ? V::load(tuned + j) : V::load_partial(tuned + j, count - j);
      const V delta = b - a;
      changed -= a.v != b.v;
      delta.store(out + j);
      if constexpr (sizeof(Acc) == 4) {
        const D first = lower(delta), second = upper(delta);
        low = fma(first, first, low);
        high = fma(second, second, high);
      } else {
        low = fma(delta, delta, low);
      }
    }
    for (; j % kPad; j += V::kWidth) V::zero().store(out + j);
    totals.frobenius_sq += sum(low + high);
    int64_t differing = 0;
    for (int64_t i = 0; i < V::kWidth; ++i) differing += changed[i];
    totals.changed += differing;
  }
}

template <typename Acc, typename Base>
auto delta_former_of(Type tuned) -> void (*)(const void*, const void*, int64_t, Acc*, Totals&) {
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
auto delta_former(Type base, Type tuned) -> void (*)(const void*, const void*, int64_t, Acc*, Totals&) {
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
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) y[r * y_stride + c] += sum(acc[r][c]);
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

// z[c, j] (+)= sum_r y[r, c] delta[r, j] for V_ vectors of j.
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
  int64_t j = 0;
  for (; j + kVectors * kWidth <= columns; j += kVectors * kWidth)
    accumulate_columns<Acc, kVectors>(delta + j, delta_stride, rows, y, k, z + j, z_stride, fresh);
  for (; j < columns; j += kWidth)
    accumulate_columns<Acc, 1>(delta + j, delta_stride, rows, y, k, z + j, z_stride, fresh);
}

// A block [rows, count] of a weight with any strides, copied to rows of kBlock entries.
template <typename Word>
void gather_words(const Word* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t count, Word* to) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < rows; ++r) to[r * kBlock + j] = from[r * row_stride + j * column_stride];
}

void gather(const Weight& weight, const char* from, int64_t rows, int64_t count, void* to) {
  if (weight.item == 2)
    gather_words(reinterpret_cast<const uint16_t*>(from), weight.row_stride, weight.column_stride, rows, count,
                 static_cast<uint16_t*>(to));
  else if (weight.item == 4)
    gather_words(reinterpret_cast<const uint32_t*>(from), weight.row_stride, weight.column_stride, rows, count,
                 static_cast<uint32_t*>(to));
  else
    gather_words(reinterpret_cast<const uint64_t*>(from), weight.row_stride, weight.column_stride, rows, count,
                 static_cast<uint64_t*>(to));
}

// Rows [begin, end) of Y, and what they add to Z (transposed, [k, z_stride]), the norm and the count.
template <typename Acc>
void sketch_rows(const Job<Acc>& job, int64_t begin, int64_t end, const Scratch<Acc>& scratch, Acc* z, Totals& totals) {
  const auto form = delta_former<Acc>(job.base.type, job.tuned.type);
  const Weight* weights[2] = {&job.base, &job.tuned};
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t rows = end - panel < kPanel ? end - panel : kPanel;
    Acc* y = job.y + panel * job.k;
    for (int64_t i = 0; i < rows * job.k; ++i) y[i] = 0;
    for (int64_t column = 0; column < job.n; column += kBlock) {
      const int64_t count = job.n - column < kBlock ? job.n - column : kBlock;
      const int64_t padded = (count + kPad - 1) / kPad * kPad;
      const char* rows_of[2];
      int64_t stride_of[2];  // bytes
      for (int i = 0; i < 2; ++i) {
        const Weight& weight = *weights[i];
        rows_of[i] = weight.data + (panel * weight.row_stride + column * weight.column_stride) * weight.item;
        stride_of[i] = weight.row_stride * weight.item;
        if (weight.column_stride != 1 && count > 1) {
          gather(weight, rows_of[i], rows, count, scratch.gathered[i]);
          rows_of[i] = static_cast<const char*>(scratch.gathered[i]);
          stride_of[i] = kBlock * weight.item;
        }
      }
      const Acc* x = job.x + column * job.k;  // [k, x_stride] of this block
      for (int64_t row = 0; row < rows; row += kRows) {
        const int tile = rows - row < kRows ? static_cast<int>(rows - row) : kRows;
        Acc* delta = scratch.delta + row * job.delta_stride + (job.k ? column : 0);
        for (int r = 0; r < tile; ++r)
          form(rows_of[0] + (row + r) * stride_of[0], rows_of[1] + (row + r) * stride_of[1], count,
               delta + r * job.delta_stride, totals);
        multiply(tile, delta, job.delta_stride, x, kBlock, padded, y + row * job.k, job.k);
      }
    }
    accumulate(scratch.delta, job.delta_stride, rows, job.z_stride, y, job.k, z, job.z_stride, panel == begin);
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
