// The tiles of tall_products, for one instruction set; tall_products.cpp has the types and the whole picture.

// Register tiles: kTall x up to kWide vectors.
#if BKDFAST_VECTOR_BYTES == 64
constexpr int kTall = 8, kWide = 3;
#else
constexpr int kTall = 4, kWide = 2;
#endif

// to[i, :] (+)= sum_r a[r, i] b[r, :], i < I, for N vectors of columns.
template <int I, int N>
void dot_tile(const double* a, int64_t a_stride, const double* b, int64_t stride, int64_t rows, double* to, bool fresh,
              bool fetch) {
  using V = Vec<double>;
  V acc[I][N];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[i][v] = fresh ? V::zero() : V::load(to + i * stride + v * V::kWidth);
  for (int64_t r = 0; r < rows; ++r) {
    if (fetch) {  // the next chunk, which the hardware does not see coming; it may lie outside A
      const uintptr_t next = reinterpret_cast<uintptr_t>(a) + (r + kChunk) * a_stride * sizeof(double);
      __builtin_prefetch(reinterpret_cast<const char*>(next), 0, 2);
    }
    V right[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) right[v] = V::load(b + r * stride + v * V::kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const V left = V::broadcast(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[i][v] = fma(left, right[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[i][v].store(to + i * stride + v * V::kWidth);
}

template <int N>
void dot_strip(const Blocks& a, int64_t row, const double* b, int64_t stride, int64_t rows, double* to, bool fresh,
               bool fetch) {
  for (int64_t block = 0; block < a.count; ++block) {
    const int64_t width = a.at[block].width;
    const double* from = a.at[block].data + row * width;
    int64_t i = 0;
    for (; i + kTall <= width; i += kTall)
      dot_tile<kTall, N>(from + i, width, b, stride, rows, to + i * stride, fresh, fetch);
    for (; i < width; ++i) dot_tile<1, N>(from + i, width, b, stride, rows, to + i * stride, fresh, fetch);
    to += width * stride;
  }
}

// to [P, stride] (+)= A^T B of rows [begin, end), kChunk at most; `packed` [kChunk, stride] holds B's, and zeros behind
// its columns, where they need padding.
void dot_rows(const Blocks& a, const double* b, int64_t columns, int64_t begin, int64_t end, int64_t stride,
              double* packed, double* to, bool fresh) {
  constexpr int64_t kWidth = Vec<double>::kWidth;
  const int64_t rows = end - begin;
  const double* right = b + begin * columns;
  if (columns != stride) {
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(packed + r * stride, right + r * columns, columns * sizeof(double));
    right = packed;
  }
  int64_t c = 0;
  // Never one vector at the end: that is half as fast.
  for (; stride - c >= (kWide + 2) * kWidth || stride - c == kWide * kWidth; c += kWide * kWidth)
    dot_strip<kWide>(a, begin, right + c, stride, rows, to + c, fresh, c == 0);
  for (; stride - c >= 2 * kWidth; c += 2 * kWidth)
    dot_strip<2>(a, begin, right + c, stride, rows, to + c, fresh, c == 0);
  if (c < stride) dot_strip<1>(a, begin, right + c, stride, rows, to + c, fresh, c == 0);
}

// to[r, :] = x[r, :] - sum_i a[r, i] c[i, :], or the sum where there is no x; I rows, N vectors from column `first` on.
template <int I, int N>
void combine_tile(const Blocks& a, int64_t row, const double* c, int64_t stride, const double* x, double* to,
                  int64_t first, int64_t columns) {
  using V = Vec<double>;
  V acc[I][N];
#pragma GCC unroll 8
  for (int r = 0; r < I; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[r][v] = V::zero();
  const double* factors = c + first;
  for (int64_t block = 0; block < a.count; ++block) {
    const int64_t width = a.at[block].width;
    const double* from = a.at[block].data + row * width;
    for (int64_t i = 0; i < width; ++i, factors += stride) {
      V right[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) right[v] = V::load(factors + v * V::kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < I; ++r) {
        const V left = V::broadcast(from[r * width + i]);
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    const int64_t column = first + v * V::kWidth, left = columns - column;
#pragma GCC unroll 8
    for (int r = 0; r < I; ++r) {
      const int64_t at = (row + r) * columns + column;
      if (left >= V::kWidth) {
        (x ? V::load(x + at) - acc[r][v] : acc[r][v]).store(to + at);
      } else if (left > 0) {
        (x ? V::load_partial(x + at, left) - acc[r][v] : acc[r][v]).store_partial(to + at, left);
      }
    }
  }
}

template <int N>
void combine_strip(const Blocks& a, const double* c, int64_t stride, const double* x, double* to, int64_t first,
                   int64_t columns, int64_t begin, int64_t end) {
  int64_t r = begin;
  for (; r + kTall <= end; r += kTall) combine_tile<kTall, N>(a, r, c, stride, x, to, first, columns);
  for (; r < end; ++r) combine_tile<1, N>(a, r, c, stride, x, to, first, columns);
}

// Rows [begin, end) of X - A C or A C; C is [P, stride], zeros behind its columns.
void combine_rows(const Blocks& a, const double* c, int64_t stride, const double* x, double* to, int64_t columns,
                  int64_t begin, int64_t end) {
  constexpr int64_t kWidth = Vec<double>::kWidth;
  int64_t first = 0;
  for (; stride - first >= (kWide + 2) * kWidth || stride - first == kWide * kWidth; first += kWide * kWidth)
    combine_strip<kWide>(a, c, stride, x, to, first, columns, begin, end);
  for (; stride - first >= 2 * kWidth; first += 2 * kWidth)
    combine_strip<2>(a, c, stride, x, to, first, columns, begin, end);
  if (first < stride) combine_strip<1>(a, c, stride, x, to, first, columns, begin, end);
}
