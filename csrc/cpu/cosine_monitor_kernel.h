// Cosines of a chunk of tokens, and their reduction; compiled for each instruction set (csrc/common/isa.h).
//
// A tile holds kTokens x kRows dot products as vectors along the columns: both operands are read as they lie, nothing
// is transposed or broadcast, and every loaded vector is used kTokens or kRows times. The directions of a tile stay in
// the L1 while the tokens of the chunk pass. float32 tokens are read in place, others from a packed copy in float32.

#include "../cpu/square_sum_kernel.h"

#if BKDFAST_VECTOR_BYTES == 64
constexpr int kTokens = 4, kRows = 6;  // 24 sums, 4 tokens and a direction in 32 registers
#elif BKDFAST_VECTOR_BYTES == 32
constexpr int kTokens = 3, kRows = 4;  // 12 sums, 3 tokens and a direction in 16 registers
#else
constexpr int kTokens = 2, kRows = 4;
#endif

// out[t, r] (+)= <x[t], d[r]> over `width` columns. kAhead: d comes from memory, fetch it 2 KB ahead.
template <int kT, int kR, bool kAhead>
void tile(const float* x, int64_t x_stride, const float* d, int64_t d_stride, int64_t width, float* out,
          int64_t out_stride, bool add) {
  Vec<float> sums[kT][kR];
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) sums[t][r] = Vec<float>::zero();
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vec<float> token[kT];
#pragma GCC unroll 8
    for (int t = 0; t < kT; ++t) token[t] = Vec<float>::load(x + t * x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      if constexpr (kAhead) __builtin_prefetch(d + r * d_stride + i + 512);
      const Vec<float> direction = Vec<float>::load(d + r * d_stride + i);
#pragma GCC unroll 8
      for (int t = 0; t < kT; ++t) sums[t][r] = fma(token[t], direction, sums[t][r]);
    }
  }
  if (whole < width)  // x is packed, with zeros behind the last column
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Vec<float> direction = Vec<float>::load_partial(d + r * d_stride + whole, width - whole);
#pragma GCC unroll 8
      for (int t = 0; t < kT; ++t) sums[t][r] = fma(Vec<float>::load(x + t * x_stride + whole), direction, sums[t][r]);
    }
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < kR; r += 4) {
      const Vec<float> none = Vec<float>::zero();
      const Four four = sum4(sums[t][r], r + 1 < kR ? sums[t][r + 1] : none, r + 2 < kR ? sums[t][r + 2] : none,
                             r + 3 < kR ? sums[t][r + 3] : none);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (r + j == kR) break;
        float* to = out + t * out_stride + r + j;
        *to = add ? *to + four[j] : four[j];
      }
    }
}

// `tokens` and `rows` are what is left of x and d.
template <int kT, int kR, bool kAhead>
void any_tile(int64_t tokens, int64_t rows, const float* x, int64_t x_stride, const float* d, int64_t d_stride,
              int64_t width, float* out, int64_t out_stride, bool add) {
  if constexpr (kT > 1)
    if (tokens < kT)
      return any_tile<kT - 1, kR, kAhead>(tokens, rows, x, x_stride, d, d_stride, width, out, out_stride, add);
  if constexpr (kR > 1)
    if (rows < kR)
      return any_tile<kT, kR - 1, kAhead>(tokens, rows, x, x_stride, d, d_stride, width, out, out_stride, add);
  tile<kT, kR, kAhead>(x, x_stride, d, d_stride, width, out, out_stride, add);
}

// Columns first..first+width of one token in float32; returns the sum of their squares.
template <typename T>
float pack(const T* row, int64_t stride, int64_t width, float* to) {
  if constexpr (sizeof(T) < 8)
    if (stride == 1) return square_of_block(row, width, to);
  for (int64_t i = 0; i < width; ++i) to[i] = static_cast<float>(row[i * stride]);
  return square_of_block(to, width, to);
}

template <typename T>
void cosines(const bkdfast::MonitorJob& job, bkdfast::MonitorChunk& chunk) {
  const int64_t count = job.count, width = job.width, tokens = chunk.tokens;
  const T* x = static_cast<const T*>(job.x) + chunk.block * job.stride_block + chunk.first * job.stride_token;
  const float* directions = job.directions + chunk.block * count * width;
  const bool in_place = std::is_same_v<T, float> && job.stride_column == 1 && width % kLanes == 0;
  const float* packed = in_place ? reinterpret_cast<const float*>(x) : chunk.x;
  const int64_t pitch = in_place ? job.stride_token : bkdfast::kPitch;
  int64_t begin = 0;
  do {  // at least once: no columns, no norm
    const int64_t columns = width - begin < bkdfast::kBlock ? width - begin : bkdfast::kBlock;
    const T* from = x + begin * job.stride_column;
    for (int64_t t = 0; t < tokens; ++t) {
      const float square = pack(from + t * job.stride_token, job.stride_column, columns,
                                in_place ? nullptr : chunk.x + t * bkdfast::kPitch);
      chunk.square[t] = begin ? chunk.square[t] + square : square;
    }
    for (int64_t k = 0; k < count; k += kRows) {
      const float* d = directions + k * width + begin;
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const auto product = tokens <= kTokens ? any_tile<kTokens, kRows, true> : any_tile<kTokens, kRows, false>;
        product(tokens - t, count - k, packed + t * pitch, pitch, d, width, columns, chunk.cosine + t * count + k,
                count, begin > 0);
      }
    }
    if (in_place) packed += columns;
    begin += bkdfast::kBlock;
  } while (begin < width);

  for (int64_t t = 0; t < chunk.tokens; ++t) {
    float* cosine = chunk.cosine + t * count;
    const float square = chunk.square[t], norm = __builtin_sqrtf(square);
    const bool zero = square < __FLT_MIN__, finite = square <= __FLT_MAX__;
    // + 0: of 0 and -0 the minimum would depend on the order.
    for (int64_t k = 0; k < count; ++k) cosine[k] = zero ? 0.0f : cosine[k] / norm + 0.0f;
    const int64_t range = job.table[bkdfast::kRange * job.table_row + (chunk.first + t) * job.table_token];
    bool offends = !finite;
    if (range >= 0 && range < job.range_rows) {
      const float* low = job.ranges + (chunk.block * job.range_rows + range) * 2 * count;
      const float* high = low + count;
      int inside = 1;  // not outside = 0: NaN, of a cosine or of a range, compares false with everything
      for (int64_t k = 0; k < count; ++k) inside &= (cosine[k] >= low[k]) & (cosine[k] <= high[k]);
      offends |= inside == 0;
    }
    chunk.offends[t] = offends;
  }
}

// Into the accumulators, one thread at a time.
void reduce(const bkdfast::MonitorJob& job, const bkdfast::MonitorChunk& chunk) {
  const int64_t count = job.count;
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const int32_t* token = job.table + (chunk.first + t) * job.table_token;
    const int64_t segment = token[bkdfast::kSegment * job.table_row];
    if (segment < 0 || segment >= job.segments) continue;
    int32_t* counts = job.counts + (chunk.block * job.segments + segment) * 2;
    const int32_t position = token[bkdfast::kPosition * job.table_row];
    if (chunk.offends[t] && position < counts[1]) counts[1] = position;
    if (!(chunk.square[t] <= __FLT_MAX__)) {
      ++counts[0];
      continue;
    }
    float* low = job.extremes + (chunk.block * job.segments + segment) * 2 * count;
    float* high = low + count;
    const float* cosine = chunk.cosine + t * count;
    // A cosine that is NaN stays out: it compares false with everything.
    for (int64_t k = 0; k < count; ++k) low[k] = cosine[k] < low[k] ? cosine[k] : low[k];
    for (int64_t k = 0; k < count; ++k) high[k] = cosine[k] > high[k] ? cosine[k] : high[k];
  }
}
