// Attention of one key-value head's query rows, for one instruction set; prefix_attention.cpp has the whole picture.

// Register tiles: up to kRows x kVectors accumulators, in both products.
#if BKDFAST_VECTOR_BYTES == 64
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

BKDFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BKDFAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
BKDFAST_INLINE int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ------------------------------------------------------------------------------------------------------- elementwise

typedef int8_t FloatBytes __attribute__((vector_size(BKDFAST_VECTOR_BYTES / 4)));
typedef int8_t DoubleBytes __attribute__((vector_size(BKDFAST_VECTOR_BYTES / 8)));

// a where the byte is not 0 (it is -1 then), else -infinity.
BKDFAST_INLINE Vec<float> where(const int8_t* seen, Vec<float> a) {
  FloatBytes bytes;
  __builtin_memcpy(&bytes, seen, sizeof bytes);
#if BKDFAST_VECTOR_BYTES == 64
  const __mmask16 mask = _mm_movepi8_mask(reinterpret_cast<__m128i>(bytes));
  return static_cast<Vec<float>::Native>(_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), mask, a.v));
#else
  return __builtin_convertvector(bytes, Counters) ? a.v : Vec<float>::broadcast(-__builtin_inff()).v;
#endif
}

BKDFAST_INLINE Vec<double> where(const int8_t* seen, Vec<double> a) {
  DoubleBytes bytes;
  __builtin_memcpy(&bytes, seen, sizeof bytes);
  return __builtin_convertvector(bytes, LongCounters) ? a.v : Vec<double>::broadcast(-__builtin_inf()).v;
}

// The larger of each pair; which one of a NaN and a number does not matter: the NaN is still there to be summed.
template <typename T>
BKDFAST_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a.v > b.v ? a.v : b.v;
}

template <typename T>
BKDFAST_INLINE T largest(Vec<T> a) {
  T lanes[Vec<T>::kWidth];
  a.store(lanes);
  for (int64_t half = Vec<T>::kWidth / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// e^a for a <= 0 and NaN, within a digit or two; 0 where it is subnormal. The polynomial is that of Cephes' expf.
BKDFAST_INLINE Vec<float> exponential(Vec<float> a) {
  using V = Vec<float>;
  const V magic = V::broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = fma(a, V::broadcast(1.44269504088896341f), magic);
  const V n = shifted - magic;
  V r = fma(n, V::broadcast(-0.693359375f), a);  // ln 2 in two parts: the product with the first is exact
  r = fma(n, V::broadcast(2.12194440e-4f), r);
  V p = V::broadcast(1.9875691500e-4f);
  p = fma(p, r, V::broadcast(1.3981999507e-3f));
  p = fma(p, r, V::broadcast(8.3334519073e-3f));
  p = fma(p, r, V::broadcast(4.1665795894e-2f));
  p = fma(p, r, V::broadcast(1.6666665459e-1f));
  p = fma(p, r, V::broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + V::broadcast(1.0f);
  // The integer sits in the low bits of `shifted`; moved up, it is the exponent.
  const Counters bits = reinterpret_cast<Counters>(shifted.v) - (0x4b400000 - 127);
  const V power = reinterpret_cast<V::Native>(bits << 23);
  return a.v < -87.3f ? V::zero().v : (p * power).v;
}

BKDFAST_INLINE Vec<double> exponential(Vec<double> a) {
  for (int64_t i = 0; i < Vec<double>::kWidth; ++i) a.v[i] = __builtin_exp(a.v[i]);
  return a;
}

// tanh: near 0 the polynomial of Cephes' tanhf, else by e^(-2|a|), so that small values keep their digits.
BKDFAST_INLINE Vec<float> tangent(Vec<float> a) {
  using V = Vec<float>;
  const V size = a.v < 0 ? (V::zero() - a).v : a.v, square = a * a;
  V p = V::broadcast(-5.70498872745e-3f);
  p = fma(p, square, V::broadcast(2.06390887954e-2f));
  p = fma(p, square, V::broadcast(-5.37397155531e-2f));
  p = fma(p, square, V::broadcast(1.33314422036e-1f));
  p = fma(p, square, V::broadcast(-3.33332819422e-1f));
  const V near = fma(p * square, a, a);
  const V e = exponential(size * V::broadcast(-2.0f));
  const V far = ((V::broadcast(1.0f) - e).v / (V::broadcast(1.0f) + e).v);
  return size.v < 0.625f ? near.v : a.v < 0 ? (V::zero() - far).v : far.v;
}

BKDFAST_INLINE Vec<double> tangent(Vec<double> a) {
  for (int64_t i = 0; i < Vec<double>::kWidth; ++i) a.v[i] = __builtin_tanh(a.v[i]);
  return a;
}

// ----------------------------------------------------------------------------------------------------------- packing

// Rows become columns: to[j * to_stride + i] = a[i][j] for j < columns.
template <typename T>
BKDFAST_INLINE void store_transposed(Vec<T>* a, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t kWidth = Vec<T>::kWidth;
#if BKDFAST_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
#if BKDFAST_VECTOR_BYTES == 64
#define BKDFAST_MM(name) _mm512_##name
    typedef __m512 Single;
#else
#define BKDFAST_MM(name) _mm256_##name
    typedef __m256 Single;
#endif
    // Within each 16 bytes: transposes of 4 rows by 4.
    Single b[kWidth], c[kWidth];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; i += 2) {
      b[i] = BKDFAST_MM(unpacklo_ps)(a[i].v, a[i + 1].v);
      b[i + 1] = BKDFAST_MM(unpackhi_ps)(a[i].v, a[i + 1].v);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; i += 4) {
      c[i] = BKDFAST_MM(shuffle_ps)(b[i], b[i + 2], 0x44);
      c[i + 1] = BKDFAST_MM(shuffle_ps)(b[i], b[i + 2], 0xee);
      c[i + 2] = BKDFAST_MM(shuffle_ps)(b[i + 1], b[i + 3], 0x44);
      c[i + 3] = BKDFAST_MM(shuffle_ps)(b[i + 1], b[i + 3], 0xee);
    }
#undef BKDFAST_MM
    // Then of the 16-byte parts.
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
#if BKDFAST_VECTOR_BYTES == 64
      const __m512 even = _mm512_shuffle_f32x4(c[j], c[4 + j], 0x88), odd = _mm512_shuffle_f32x4(c[j], c[4 + j], 0xdd);
      const __m512 even2 = _mm512_shuffle_f32x4(c[8 + j], c[12 + j], 0x88);
      const __m512 odd2 = _mm512_shuffle_f32x4(c[8 + j], c[12 + j], 0xdd);
      a[j].v = static_cast<typename Vec<T>::Native>(_mm512_shuffle_f32x4(even, even2, 0x88));
      a[8 + j].v = static_cast<typename Vec<T>::Native>(_mm512_shuffle_f32x4(even, even2, 0xdd));
      a[4 + j].v = static_cast<typename Vec<T>::Native>(_mm512_shuffle_f32x4(odd, odd2, 0x88));
      a[12 + j].v = static_cast<typename Vec<T>::Native>(_mm512_shuffle_f32x4(odd, odd2, 0xdd));
#else
      a[j].v = static_cast<typename Vec<T>::Native>(_mm256_permute2f128_ps(c[j], c[4 + j], 0x20));
      a[4 + j].v = static_cast<typename Vec<T>::Native>(_mm256_permute2f128_ps(c[j], c[4 + j], 0x31));
#endif
    }
#pragma GCC unroll 16
    for (int64_t j = 0; j < kWidth; ++j)
      if (j < columns) a[j].store(to + j * to_stride);
    return;
  }
#endif
  T lanes[kWidth * kWidth];
  for (int64_t i = 0; i < kWidth; ++i) a[i].store(lanes + i * kWidth);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < kWidth; ++i) to[j * to_stride + i] = lanes[i * kWidth + j];
}

// Keys [count, width] as panels of kVectors vectors of keys, each transposed to [width, keys of the panel]; the last
// panel has fewer vectors, and zeros behind the last key.
template <typename Acc, typename T>
void pack_keys(const T* from, int64_t stride, int64_t count, int64_t width, Acc* to) {
  using V = Vec<Acc>;
  constexpr int64_t kWidth = V::kWidth, kPanel = kVectors * kWidth;
  for (int64_t panel = 0; panel < count; panel += kPanel) {
    const int64_t keys = smaller(kPanel, count - panel), pitch = up(keys, kWidth);
    for (int64_t j = 0; j < keys; j += kWidth)
      for (int64_t d = 0; d < width; d += kWidth) {
        V rows[kWidth];
        const int64_t part = smaller(kWidth, width - d);
        const T* at = from + (panel + j) * stride + d;
        for (int64_t i = 0; i < kWidth; ++i)
          rows[i] = j + i >= keys    ? V::zero()
                    : part == kWidth ? V::load(at + i * stride)
                                     : V::load_partial(at + i * stride, part);
        store_transposed(rows, part, to + panel * width + d * pitch + j, pitch);
      }
  }
}

// Values [count, width] as rows of `pitch` numbers, zeros for what is not finite and behind the last column. lost[i]
// is 1 where value i has something that is not finite; returns whether any has.
template <typename Acc, typename T>
bool pack_values(const T* from, int64_t stride, int64_t count, int64_t width, int64_t pitch, Acc* to, int8_t* lost) {
  using V = Vec<Acc>;
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    V nan = V::zero();
    for (int64_t d = 0; d < pitch; d += V::kWidth) {
      const T* at = from + i * stride + d;
      const int64_t part = width - d;
      const V a = part >= V::kWidth ? V::load(at) : part > 0 ? V::load_partial(at, part) : V::zero();
      const V zero = a - a;  // NaN where a is not finite
      nan = nan + zero;
      V(zero.v == 0 ? a.v : V::zero().v).store(to + i * pitch + d);
    }
    const Acc total = sum(nan);
    lost[i] = !(total == 0);
    any |= lost[i] != 0;
  }
  return any;
}

// ---------------------------------------------------------------------------------------------------------- products

// out[r, j] = <q[r], key j> for R rows and C vectors of keys.
template <typename Acc, int R, int C>
void logits_tile(const Acc* q, int64_t q_pitch, const Acc* keys, int64_t keys_pitch, int64_t width, Acc* out,
                 int64_t out_pitch) {
  using V = Vec<Acc>;
  V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = V::zero();
  for (int64_t d = 0; d < width; ++d) {
    V key[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) key[c] = V::load(keys + d * keys_pitch + c * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V factor = V::broadcast(q[r * q_pitch + d]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fma(factor, key[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c].store(out + r * out_pitch + c * V::kWidth);
}

// out[r, d] = factor[r] * out[r, d] + sum of weights[r, j] * values[j, d] over j < count, for C vectors of d.
template <typename Acc, int R, int C>
void values_tile(const Acc* weights, int64_t weights_pitch, const Acc* values, int64_t values_pitch, int64_t count,
                 Acc* out, int64_t out_pitch, const Acc* factor) {
  using V = Vec<Acc>;
  V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      acc[r][c] = V::load(out + r * out_pitch + c * V::kWidth) * V::broadcast(factor ? factor[r] : Acc(1));
  for (int64_t j = 0; j < count; ++j) {
    V value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = V::load(values + j * values_pitch + c * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V weight = V::broadcast(weights[r * weights_pitch + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c].store(out + r * out_pitch + c * V::kWidth);
}

template <typename Acc, int R>
void logits_rows(int64_t vectors, const Acc* q, int64_t q_pitch, const Acc* keys, int64_t keys_pitch, int64_t width,
                 Acc* out, int64_t out_pitch) {
  if (vectors == 1) return logits_tile<Acc, R, 1>(q, q_pitch, keys, keys_pitch, width, out, out_pitch);
  if (vectors == 2) return logits_tile<Acc, R, 2>(q, q_pitch, keys, keys_pitch, width, out, out_pitch);
  if constexpr (kVectors == 4) {
    if (vectors == 3) return logits_tile<Acc, R, 3>(q, q_pitch, keys, keys_pitch, width, out, out_pitch);
    logits_tile<Acc, R, 4>(q, q_pitch, keys, keys_pitch, width, out, out_pitch);
  }
}

template <typename Acc, int R>
void values_rows(const Acc* weights, int64_t weights_pitch, const Acc* values, int64_t pitch, int64_t count, Acc* out,
                 const Acc* factor) {
  constexpr int64_t kWidth = Vec<Acc>::kWidth;
  int64_t d = 0;
  for (; d + kVectors * kWidth <= pitch; d += kVectors * kWidth)
    values_tile<Acc, R, kVectors>(weights, weights_pitch, values + d, pitch, count, out + d, pitch, factor);
  if constexpr (kVectors == 4) {
    if (pitch - d == 3 * kWidth)
      return values_tile<Acc, R, 3>(weights, weights_pitch, values + d, pitch, count, out + d, pitch, factor);
    if (pitch - d == 2 * kWidth)
      return values_tile<Acc, R, 2>(weights, weights_pitch, values + d, pitch, count, out + d, pitch, factor);
  }
  if (pitch - d == kWidth)
    values_tile<Acc, R, 1>(weights, weights_pitch, values + d, pitch, count, out + d, pitch, factor);
}

// Logits of `rows` rows with keys [begin, end) of `count` packed keys. Column 0 of out is `begin`, where a panel begins
// (or `end`: there is nothing to do).
template <typename Acc>
void logits(int64_t rows, const Acc* q, int64_t q_pitch, const Acc* packed, int64_t begin, int64_t end, int64_t count,
            int64_t width, Acc* out, int64_t out_pitch) {
  constexpr int64_t kWidth = Vec<Acc>::kWidth, kPanel = kVectors * kWidth;
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t pitch = up(smaller(kPanel, count - panel), kWidth);
    const int64_t vectors = up(smaller(kPanel, end - panel), kWidth) / kWidth;
    const Acc* keys = packed + panel * width;
    Acc* to = out + panel - begin;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
      logits_rows<Acc, kRows>(vectors, q + r * q_pitch, q_pitch, keys, pitch, width, to + r * out_pitch, out_pitch);
    for (; r + 3 <= rows; r += 3)
      logits_rows<Acc, 3>(vectors, q + r * q_pitch, q_pitch, keys, pitch, width, to + r * out_pitch, out_pitch);
    for (; r < rows; ++r)
      logits_rows<Acc, 1>(vectors, q + r * q_pitch, q_pitch, keys, pitch, width, to + r * out_pitch, out_pitch);
  }
}

template <typename Acc>
void add_values(int64_t rows, const Acc* weights, int64_t weights_pitch, const Acc* values, int64_t pitch,
                int64_t count, Acc* out, const Acc* factor) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    values_rows<Acc, kRows>(weights + r * weights_pitch, weights_pitch, values, pitch, count, out + r * pitch,
                            factor ? factor + r : nullptr);
  for (; r + 3 <= rows; r += 3)
    values_rows<Acc, 3>(weights + r * weights_pitch, weights_pitch, values, pitch, count, out + r * pitch,
                        factor ? factor + r : nullptr);
  for (; r < rows; ++r)
    values_rows<Acc, 1>(weights + r * weights_pitch, weights_pitch, values, pitch, count, out + r * pitch,
                        factor ? factor + r : nullptr);
}

// ----------------------------------------------------------------------------------------------------------- softmax

// A run of keys in a row of logits.
struct Run {
  int64_t column, count;  // in the row; whole vectors
  int64_t seen;           // where its bytes begin
};

// Logits to weights, in place. `peak`, `total` and `factor` of an online softmax: what was summed before is to be
// multiplied by `factor`.
template <typename Acc>
void soften(Acc* row, const Run* runs, const int8_t* seen, Acc scale, Acc softcap, Acc& peak, Acc& total, Acc& factor) {
  using V = Vec<Acc>;
  const V factors = V::broadcast(scale), cap = V::broadcast(softcap);
  V top = V::broadcast(peak);
  for (int k = 0; k < 2; ++k) {
    Acc* at = row + runs[k].column;
    const int8_t* bytes = seen + runs[k].seen;
    for (int64_t j = 0; j < runs[k].count; j += V::kWidth) {
      V a = V::load(at + j) * factors;
      if (softcap > 0) a = cap * tangent(V(a.v / cap.v));
      a = where(bytes + j, a);
      a.store(at + j);
      top = larger(a, top);
    }
  }
  const Acc highest = largest(top), infinity = Acc(__builtin_inf());
  const V base = V::broadcast(highest == -infinity ? Acc(0) : highest);
  V sums = V::zero();
  for (int k = 0; k < 2; ++k) {
    Acc* at = row + runs[k].column;
    for (int64_t j = 0; j < runs[k].count; j += V::kWidth) {
      const V a = exponential(V::load(at + j) - base);
      a.store(at + j);
      sums = sums + a;
    }
  }
  factor = exponential(V::broadcast(peak) - base).v[0];
  total = total * factor + sum(sums);
  peak = highest;
}

// ------------------------------------------------------------------------------------------------------------- blocks

template <typename T>
void read_mask(const Attention<T>& job, int64_t batch, int8_t* seen, Reach* reaches) {
  const int64_t counts[2] = {job.past, job.length}, starts[2] = {0, up(job.past, kPad)};
  for (int64_t s = 0; s < job.length; ++s) {
    const int8_t* mask = job.mask + batch * job.mask_stride[0] + s * job.mask_stride[1];
    int8_t* row = seen + s * job.seen_pitch;
    for (int k = 0; k < 2; ++k) {
      int8_t* to = row + starts[k];
      const int64_t count = counts[k];
      for (int64_t j = 0; j < count; ++j) to[j] = mask[j] ? -1 : 0;
      for (int64_t j = count; j < up(count, kPad); ++j) to[j] = 0;
      int64_t begin = 0, end = count;
      while (end > 0 && !to[end - 1]) --end;
      while (begin < end && !to[begin]) ++begin;
      reaches[s].begin[k] = begin < end ? begin : count;
      reaches[s].end[k] = end;
      mask += count;
    }
  }
}

// Rows [begin, begin + count) of the group of variants from `first` on, each variant with group * length rows.
template <typename T>
void attend_block(const Attention<T>& job, int64_t batch, int64_t head, int64_t first, int64_t begin, int64_t count,
                  const bool* lost, const Scratch<T>& scratch) {
  using Acc = AccumulatorOf<T>;
  using V = Vec<Acc>;
  const int64_t of_variant = job.group * job.length, width = job.width, pitch = job.pitch;
  const int64_t suffix_keys = up(job.length, kPad) * width, past_columns = up(job.past, kPad);
  Reach reach{{job.past, job.length}, {0, 0}};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = begin + i, variant = first + row / of_variant, s = row % job.length;
    const int64_t h = head * job.group + row % of_variant / job.length;
    const T* q = job.q + (variant * job.batch + batch) * job.q_stride[0] + h * job.q_stride[1] + s * job.q_stride[2];
    for (int64_t d = 0; d < width; d += V::kWidth)
      (width - d < V::kWidth ? V::load_partial(q + d, width - d) : V::load(q + d)).store(scratch.q + i * pitch + d);
    for (int k = 0; k < 2; ++k) {
      reach.begin[k] = smaller(reach.begin[k], scratch.reaches[s].begin[k]);
      reach.end[k] = larger(reach.end[k], scratch.reaches[s].end[k]);
    }
    scratch.peak[i] = job.sinks ? job.sinks[h] : -Acc(__builtin_inf());
    scratch.total[i] = job.sinks ? 1 : 0;
    for (int64_t d = 0; d < pitch; d += V::kWidth) V::zero().store(scratch.out + i * pitch + d);
  }
  // Keys [at[0], to[0]) of the prefix and [at[1], to[1]) of the suffix at a time: at most kKeys columns of weights.
  constexpr int64_t kPanel = kVectors * V::kWidth;
  int64_t at[2] = {reach.begin[0] / kPanel * kPanel, reach.begin[1] / kPanel * kPanel}, to[2];
  while (at[0] < reach.end[0] || at[1] < reach.end[1]) {
    to[0] = larger(at[0], smaller(reach.end[0], at[0] + kKeys));
    const int64_t columns = up(to[0] - at[0], V::kWidth), room = (kKeys - columns) / kPanel * kPanel;
    to[1] = larger(at[1], smaller(reach.end[1], at[1] + room));  // no room as long as the prefix goes on
    logits(count, scratch.q, pitch, scratch.keys[0], at[0], to[0], job.past, width, scratch.weights, kWeightsPitch);
    for (int64_t row = begin; row < begin + count;) {
      const int64_t variant = row / of_variant, end = smaller(begin + count, (variant + 1) * of_variant);
      logits(end - row, scratch.q + (row - begin) * pitch, pitch, scratch.keys[1] + variant * suffix_keys, at[1], to[1],
             job.length, width, scratch.weights + (row - begin) * kWeightsPitch + columns, kWeightsPitch);
      row = end;
    }
    const Run runs[2] = {{0, columns, at[0]}, {columns, up(to[1] - at[1], V::kWidth), past_columns + at[1]}};
    for (int64_t i = 0; i < count; ++i)
      soften(scratch.weights + i * kWeightsPitch, runs, scratch.seen + (begin + i) % job.length * job.seen_pitch,
             static_cast<Acc>(job.scale), static_cast<Acc>(job.softcap), scratch.peak[i], scratch.total[i],
             scratch.factor[i]);
    add_values(count, scratch.weights, kWeightsPitch, scratch.values[0] + at[0] * pitch, pitch, to[0] - at[0],
               scratch.out, scratch.factor);
    for (int64_t row = begin; row < begin + count;) {
      const int64_t variant = row / of_variant, end = smaller(begin + count, (variant + 1) * of_variant);
      add_values<Acc>(end - row, scratch.weights + (row - begin) * kWeightsPitch + columns, kWeightsPitch,
                      scratch.values[1] + (variant * job.length + at[1]) * pitch, pitch, to[1] - at[1],
                      scratch.out + (row - begin) * pitch, nullptr);
      row = end;
    }
    at[0] = to[0], at[1] = to[1];
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = begin + i, variant = first + row / of_variant, s = row % job.length;
    const int64_t h = head * job.group + row % of_variant / job.length;
    const int64_t r = variant * job.batch + batch;
    for (int k = 0; k < 2; ++k) {  // NaN for who sees a value that is not finite
      if (!lost[k]) continue;
      const int8_t* bad = scratch.lost[k] + (k ? row / of_variant * job.length : 0);
      const int8_t* seen = scratch.seen + s * job.seen_pitch + (k ? past_columns : 0);
      for (int64_t j = 0; j < (k ? job.length : job.past); ++j)
        if (bad[j] && seen[j]) scratch.total[i] = Acc(__builtin_nan(""));
    }
    T* out = job.out + ((r * job.length + s) * job.shared * job.group + h) * width;
    const V share = V::broadcast(scratch.total[i] == 0 ? Acc(0) : 1 / scratch.total[i]);
    for (int64_t d = 0; d < width; d += V::kWidth) {
      const V a = V::load(scratch.out + i * pitch + d) * share;
      width - d < V::kWidth ? a.store_partial(out + d, width - d) : a.store(out + d);
    }
  }
}

// Groups of variants [begin, end) of a batch row and a key-value head after another.
template <typename T>
void attend(const Attention<T>& job, int64_t begin, int64_t end, const Scratch<T>& scratch) {
  int64_t packed = -1, masked = -1;
  bool lost[2] = {false, false};
  const int64_t of_variant = job.group * job.length;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / job.groups, batch = pair / job.shared, head = pair % job.shared;
    if (masked != batch) read_mask(job, batch, scratch.seen, scratch.reaches);
    masked = batch;
    if (packed != pair) {
      pack_keys(job.prefix_k + batch * job.prefix_k_stride[0] + head * job.prefix_k_stride[1], job.prefix_k_stride[2],
                job.past, job.width, scratch.keys[0]);
      lost[0] = pack_values(job.prefix_v + batch * job.prefix_v_stride[0] + head * job.prefix_v_stride[1],
                            job.prefix_v_stride[2], job.past, job.width, job.pitch, scratch.values[0], scratch.lost[0]);
    }
    packed = pair;
    const int64_t first = unit % job.groups * job.of_group;
    const int64_t variants = smaller(job.of_group, job.variants - first);
    lost[1] = false;
    for (int64_t i = 0; i < variants; ++i) {
      const int64_t r = (first + i) * job.batch + batch;
      pack_keys(job.k + r * job.k_stride[0] + head * job.k_stride[1], job.k_stride[2], job.length, job.width,
                scratch.keys[1] + i * up(job.length, kPad) * job.width);
      lost[1] |=
          pack_values(job.v + r * job.v_stride[0] + head * job.v_stride[1], job.v_stride[2], job.length, job.width,
                      job.pitch, scratch.values[1] + i * job.length * job.pitch, scratch.lost[1] + i * job.length);
    }
    for (int64_t row = 0; row < variants * of_variant; row += kBlock)
      attend_block(job, batch, head, first, row, smaller(kBlock, variants * of_variant - row), lost, scratch);
  }
}
