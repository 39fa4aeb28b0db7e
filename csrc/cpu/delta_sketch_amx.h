// The row panels of delta_sketch on the bfloat16 matrix unit of x86 (AMX), for bfloat16 weights; delta_sketch.cpp has
// the types and the whole picture.
//
// The unit multiplies tiles of 16 x 32 and 32 x 16 bfloat16 numbers and adds in float32, 16 times faster than fmas do.
// It gets float32 numbers as sums of bfloat16 parts, whose products are exact:
//
//   D = high + low [+ rest]    by truncation, exactly: 8 bits each. `rest` is zero but for entries of very different
//                              weights (one in thousands); those are kept in a list and multiplied one by one.
//   X, Y = three parts         rounded to nearest, exactly.
//   D X = high X1 + high X2 + high X3 + low X1 + low X2; what is left out is below 2^-24 of |D| |X|.
//
// A step is 32 columns of W. D is stored in one kind of tiles, [step][row / 16][part], 16 rows x 32 columns: the left
// factor of D X. As the right factor of Y^T D the unit takes such a tile for 32 rows, the columns of each pair one
// below the other, and 16 columns. With zeros between the entries of Y every other of these rows drops out: Y^T D comes
// in two halves, of even and of odd columns, at half the unit's rate, which still is more than the caches deliver. Z,
// [k, columns], has its columns in the order of the halves: `tile_column` says where one is. A second kind of tiles,
// whole for Y^T D, takes a tenth longer at k = 16: it is one more thing to write while D is formed.
//
// One thread of a Xeon (Sapphire or Emerald Rapids), bfloat16, milliseconds, on a shared machine where 12 may be 14:
//
//   m x n           4096 x 4096                    4096 x 11008
//   k               16       32       80           16       32       80
//   matrix unit     12       19       39           45       62       118
//   AVX-512         15       25       62           46       79       184
//
// Of 12 ms, D takes 6, of which the memory's half is hidden badly, Y 2 and Z 2.4. Sums of mixed
// signs round half as much as by fmas, those of one sign as much. Lost: a second kind of tiles, whole for Y^T D, the
// same at 4096 columns and 1.3 times slower at 11008 for what it takes from the cache; D formed a second time for Z, a
// span of X and Z at a time for 128 rows, 1.3 to 1.8 times slower; spans of 512 and 1024 columns, 1.1 to 1.2 times
// slower; fetching ahead within a row, or during the products.
//
// The norm adds four squares in float32, all else in float64. Denormal numbers are zero to the unit: the caller sees to
// it that none matters.

#define BKDFAST_TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define BKDFAST_TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define BKDFAST_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::)
#define BKDFAST_TILE_FMA(sum, left, right) __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum::)

struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

BKDFAST_INLINE __m512 top_half(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
}

// Pairs of bfloat16 numbers, `first` in the low half: the upper halves of float32 numbers.
BKDFAST_INLINE __m512i pair_top_halves(__m512 first, __m512 second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  return _mm512_ternarylogic_epi32(low, _mm512_castps_si512(second), _mm512_set1_epi32(-65536), 0xf8);
}

// x to the nearest bfloat16 number, as float32; x is finite.
BKDFAST_INLINE __m512 nearest_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return top_half(_mm512_castsi512_ps(up));
}

// X as right factors, [step][group of 16 columns][part], tile row i: rows 2 i and 2 i + 1 of the step. False: some
// column of X is too large, too small or not finite.
bool pack_tiles(const float* x, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k, char* out) {
  for (int64_t group = 0; group < (k + 15) / 16; ++group) {
    const int64_t columns = k - group * 16 < 16 ? k - group * 16 : 16;
    const float* from = x + group * 16 * column_stride;
    __m512 largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t row = 0; row < (n + 31) / 32 * 32; row += 2) {
      alignas(64) float values[2][16] = {};
      for (int64_t r = row; r < n && r < row + 2; ++r)
        for (int64_t c = 0; c < columns; ++c) values[r - row][c] = from[r * row_stride + c * column_stride];
      __m512 first = _mm512_load_ps(values[0]), second = _mm512_load_ps(values[1]);
      largest = _mm512_max_ps(largest, _mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
      sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));  // max_ps loses NaN
      char* to = out + (row / 32 * ((k + 15) / 16) + group) * 3 * kTileBytes + row % 32 / 2 * 64;
      for (int part = 0; part < 3; ++part) {
        const __m512 a = nearest_bfloat16(first), b = nearest_bfloat16(second);
        _mm512_store_si512(to + part * kTileBytes, pair_top_halves(a, b));
        first = _mm512_sub_ps(first, a);
        second = _mm512_sub_ps(second, b);
      }
    }
    const __mmask16 zero = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __mmask16 fits = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1 / kTileRange), _CMP_GE_OQ) &
                           _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kTileRange), _CMP_LE_OQ);
    const __mmask16 number = _mm512_cmp_ps_mask(sum, sum, _CMP_ORD_Q);
    if (((zero | fits) & number) != 0xffff) return false;
  }
  return true;
}

// Notes what two parts leave of D in every second column from `column`; `remainder`: what one part leaves.
__attribute__((noinline)) void note_rest(__m512 remainder, int64_t row, int64_t column, Rest& rest) {
  if (rest.count > rest.capacity) return;
  alignas(64) float left[16];
  _mm512_store_ps(left, _mm512_sub_ps(remainder, top_half(remainder)));
  for (int i = 0; i < 16; ++i) {
    if (left[i] == 0) continue;
    if (rest.count < rest.capacity) {
      rest.value[rest.count] = left[i];
      rest.row[rest.count] = static_cast<int32_t>(row);
      rest.column[rest.count] = static_cast<int32_t>(column + 2 * i);
    }
    ++rest.count;
  }
}

// Two rows of a panel.
struct RowPair {
  const char *base[2], *tuned[2];
  __mmask32 mask[2];                // columns that there are
  int64_t row;                      // of the first
  int64_t base_ahead, tuned_ahead;  // bytes to what is read after these rows, which may lie outside the weights
};

BKDFAST_INLINE void fetch(const char* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) + ahead), 0, 2);
}

// Tiles of two rows of a step. kWhole: all columns are there.
template <bool kWhole>
BKDFAST_INLINE void form_step(const RowPair& rows, int64_t column, int64_t step, char* tiles, uint8_t* has_low,
                              __m512d& squares, int64_t& changed, Rest& rest) {
  const __m512i upper = _mm512_set1_epi32(-65536), magnitude = _mm512_set1_epi16(0x7fff);
  __m512 even[2], odd[2];
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    const char *from = rows.base[r] + step * 64, *to = rows.tuned[r] + step * 64;
    fetch(from, rows.base_ahead);
    fetch(to, rows.tuned_ahead);
    const __m512i base = kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(rows.mask[r], from);
    const __m512i tuned = kWhole ? _mm512_loadu_si512(to) : _mm512_maskz_loadu_epi16(rows.mask[r], to);
    even[r] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_slli_epi32(tuned, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(base, 16)));
    odd[r] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_and_si512(tuned, upper)),
                           _mm512_castsi512_ps(_mm512_and_si512(base, upper)));
  }
  __m512 square = _mm512_mul_ps(even[0], even[0]);
  square = _mm512_fmadd_ps(odd[0], odd[0], square);
  square = _mm512_fmadd_ps(even[1], even[1], square);
  square = _mm512_fmadd_ps(odd[1], odd[1], square);
  squares = _mm512_add_pd(squares, _mm512_cvtps_pd(_mm512_castps512_ps256(square)));
  squares = _mm512_add_pd(squares, _mm512_cvtps_pd(_mm512_extractf32x8_ps(square, 1)));
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const __m512i first = pair_top_halves(even[0], odd[0]), second = pair_top_halves(even[1], odd[1]);
    _mm512_store_si512(tiles + part * kTileBytes, first);
    _mm512_store_si512(tiles + part * kTileBytes + 64, second);
    if (part == 1) break;
    changed += __builtin_popcount(_mm512_test_epi16_mask(first, magnitude)) +
               __builtin_popcount(_mm512_test_epi16_mask(second, magnitude));
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      even[r] = _mm512_sub_ps(even[r], top_half(even[r]));
      odd[r] = _mm512_sub_ps(odd[r], top_half(odd[r]));
    }
    const __m512i some = _mm512_ternarylogic_epi32(_mm512_castps_si512(even[0]), _mm512_castps_si512(odd[0]),
                                                   _mm512_castps_si512(even[1]), 0xfe);
    const __m512i any = _mm512_or_si512(some, _mm512_castps_si512(odd[1]));
    *has_low |= _mm512_test_epi32_mask(any, any) != 0;
    if (__builtin_expect(_mm512_test_epi32_mask(any, _mm512_set1_epi32(0xffff)) != 0, 0)) {
      for (int r = 0; r < 2; ++r) {
        note_rest(even[r], rows.row + r, column, rest);
        note_rest(odd[r], rows.row + r, column + 1, rest);
      }
    }
  }
}

// Tiles of columns [column, column + count) of a panel, their squares and changed entries counted.
void form_span(const TileJob& job, int64_t panel, int64_t rows, int64_t column, int64_t count, TilePanel& at,
               Totals& totals) {
  const int64_t steps = (count + 31) / 32, whole = rows == kTilePanel ? count / 32 : 0;
  uint8_t* has_low = at.has_low + column / 32;
  for (int64_t s = 0; s < steps; ++s) has_low[s] = 0;
  for (int64_t q = 0; q < kTilePanel / 2; ++q) {
    RowPair pair{{}, {}, {}, 2 * q, 4 * job.base.row_stride, 4 * job.tuned.row_stride};
    if (q == kTilePanel / 2 - 1) {
      const bool last = column + count == job.n;
      const int64_t rows_on = last ? 2 : 2 - kTilePanel, columns_on = last ? -column : kTileSpan;
      pair.base_ahead = (rows_on * job.base.row_stride + columns_on) * 2;
      pair.tuned_ahead = (rows_on * job.tuned.row_stride + columns_on) * 2;
    }
    for (int r = 0; r < 2; ++r) {
      const bool there = 2 * q + r < rows;
      const int64_t row = panel + (there ? 2 * q + r : 0);
      pair.base[r] = job.base.data + (row * job.base.row_stride + column) * 2;
      pair.tuned[r] = job.tuned.data + (row * job.tuned.row_stride + column) * 2;
      pair.mask[r] = there ? ~__mmask32{0} : 0;
    }
    char* tiles = at.tiles + column / 32 * 4 * kTileBytes + q / 8 * 2 * kTileBytes + q % 8 * 128;
    __m512d squares = _mm512_setzero_pd();
    int64_t changed = 0;
    for (int64_t s = 0; s < whole; ++s)
      form_step<true>(pair, column + s * 32, s, tiles + s * 4 * kTileBytes, has_low + s, squares, changed, at.rest);
    for (int64_t s = whole; s < steps; ++s) {
      if (count - s * 32 < 32)
        for (int r = 0; r < 2; ++r) pair.mask[r] &= (uint32_t{1} << (count - s * 32)) - 1;
      form_step<false>(pair, column + s * 32, s, tiles + s * 4 * kTileBytes, has_low + s, squares, changed, at.rest);
    }
    totals.frobenius_sq += _mm512_reduce_add_pd(squares);
    totals.changed += changed;
  }
}

// y [32, 16] += D X for `steps` steps of a panel and 16 columns of X, whose tiles are `x_stride` apart.
void multiply_tiles(const char* tiles, const uint8_t* has_low, const char* x, int64_t x_stride, int64_t steps,
                    float* sums, float* y, int64_t y_stride) {
  // Sums of 16 rows each: 0 and 1 of the large products, 2 and 3 of the small ones, which round less so.
  for (int64_t begin = 0; begin < steps; begin += kTileSteps) {
    BKDFAST_TILE_ZERO(0);
    BKDFAST_TILE_ZERO(1);
    BKDFAST_TILE_ZERO(2);
    BKDFAST_TILE_ZERO(3);
    for (int64_t s = begin; s < steps && s < begin + kTileSteps; ++s) {
      const char *at = x + s * x_stride, *d = tiles + s * 4 * kTileBytes;
      BKDFAST_TILE_LOAD(5, at, 64);
      BKDFAST_TILE_LOAD(6, at + kTileBytes, 64);
      BKDFAST_TILE_LOAD(7, at + 2 * kTileBytes, 64);
      BKDFAST_TILE_LOAD(4, d, 64);
      BKDFAST_TILE_FMA(0, 4, 5);
      BKDFAST_TILE_FMA(2, 4, 6);
      BKDFAST_TILE_FMA(2, 4, 7);
      BKDFAST_TILE_LOAD(4, d + 2 * kTileBytes, 64);
      BKDFAST_TILE_FMA(1, 4, 5);
      BKDFAST_TILE_FMA(3, 4, 6);
      BKDFAST_TILE_FMA(3, 4, 7);
      if (!has_low[s]) continue;
      BKDFAST_TILE_LOAD(4, d + kTileBytes, 64);
      BKDFAST_TILE_FMA(2, 4, 5);
      BKDFAST_TILE_FMA(2, 4, 6);
      BKDFAST_TILE_LOAD(4, d + 3 * kTileBytes, 64);
      BKDFAST_TILE_FMA(3, 4, 5);
      BKDFAST_TILE_FMA(3, 4, 6);
    }
    BKDFAST_TILE_STORE(0, sums, 64);
    BKDFAST_TILE_STORE(1, sums + 256, 64);
    BKDFAST_TILE_STORE(2, sums + 512, 64);
    BKDFAST_TILE_STORE(3, sums + 768, 64);
    for (int r = 0; r < 32; ++r) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + r * 16), _mm512_load_ps(sums + 512 + r * 16));
      _mm512_store_ps(y + r * y_stride, _mm512_add_ps(_mm512_load_ps(y + r * y_stride), sum));
    }
  }
}

// Y^T of a panel and 16 columns as left factors, [row / 16][part][half] tiles, row c: (y, 0) or (0, y) for each row.
void cut_y(const float* y, int64_t y_stride, char* parts) {
  const __m512i sixteens =
      _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  for (int r = 0; r < kTilePanel; ++r) {
    __m512 left = _mm512_load_ps(y + r * y_stride);
    for (int part = 0; part < 3; ++part) {
      const __m512 next = nearest_bfloat16(left);
      char* to = parts + (r / 16 * 3 + part) * 2 * kTileBytes + r % 16 * 4;
      _mm512_i32scatter_epi32(to, sixteens, _mm512_srli_epi32(_mm512_castps_si512(next), 16), 4);
      _mm512_i32scatter_epi32(to + kTileBytes, sixteens, _mm512_castps_si512(next), 4);
      left = _mm512_sub_ps(left, next);
    }
  }
}

// z [16, 32] of each of `steps` steps += Y^T D.
void accumulate_tiles(const char* y_parts, const char* tiles, const uint8_t* has_low, int64_t steps, float* z,
                      int64_t z_stride) {
  for (int64_t s = 0; s < steps; ++s, z += 32, tiles += 4 * kTileBytes) {
    BKDFAST_TILE_LOAD(0, z, z_stride * 4);
    BKDFAST_TILE_LOAD(1, z + 16, z_stride * 4);
    const char* left = y_parts;
    for (const char* d = tiles; d < tiles + 4 * kTileBytes; d += 2 * kTileBytes, left += 6 * kTileBytes) {
      BKDFAST_TILE_LOAD(2, d, 64);
      BKDFAST_TILE_LOAD(4, left, 64);
      BKDFAST_TILE_LOAD(5, left + kTileBytes, 64);
      BKDFAST_TILE_LOAD(6, left + 2 * kTileBytes, 64);
      BKDFAST_TILE_LOAD(7, left + 3 * kTileBytes, 64);
      BKDFAST_TILE_FMA(0, 4, 2);
      BKDFAST_TILE_FMA(1, 5, 2);
      BKDFAST_TILE_FMA(0, 6, 2);
      BKDFAST_TILE_FMA(1, 7, 2);
      if (has_low[s]) {
        BKDFAST_TILE_LOAD(3, d + kTileBytes, 64);
        BKDFAST_TILE_FMA(0, 4, 3);
        BKDFAST_TILE_FMA(1, 5, 3);
        BKDFAST_TILE_FMA(0, 6, 3);
        BKDFAST_TILE_FMA(1, 7, 3);
      }
      BKDFAST_TILE_LOAD(4, left + 4 * kTileBytes, 64);
      BKDFAST_TILE_LOAD(5, left + 5 * kTileBytes, 64);
      BKDFAST_TILE_FMA(0, 4, 2);
      BKDFAST_TILE_FMA(1, 5, 2);
    }
    BKDFAST_TILE_STORE(0, z, z_stride * 4);
    BKDFAST_TILE_STORE(1, z + 16, z_stride * 4);
  }
}

// Rows [begin, end) of Y, and what they add to Z (transposed, [padded k, z_stride]), the norm and the count.
void sketch_tiles(const TileJob& job, int64_t begin, int64_t end, char* scratch, float* z, Totals& totals) {
  const int64_t k = job.groups * 16;
  TilePanel at = lay_out(scratch, job.n, job.groups);
  Rest& rest = at.rest;
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  for (int64_t i = 0; i < k * job.z_stride; ++i) z[i] = 0;
  for (int64_t panel = begin; panel < end; panel += kTilePanel) {
    const int64_t rows = end - panel < kTilePanel ? end - panel : kTilePanel;
    rest.count = 0;
    for (int64_t i = 0; i < kTilePanel * k; ++i) at.y[i] = 0;
    for (int64_t column = 0; column < job.n; column += kTileSpan) {
      const int64_t count = job.n - column < kTileSpan ? job.n - column : kTileSpan, step = column / 32;
      form_span(job, panel, rows, column, count, at, totals);
      if (rest.count > rest.capacity) break;
      for (int64_t g = 0; g < job.groups; ++g)
        multiply_tiles(at.tiles + step * 4 * kTileBytes, at.has_low + step,
                       job.x_tiles + (step * job.groups + g) * 3 * kTileBytes, job.groups * 3 * kTileBytes,
                       (count + 31) / 32, at.sums, at.y + g * 16, k);
    }
    if (rest.count > rest.capacity) {
      totals.complete = false;
      break;
    }
    for (int64_t i = 0; i < rest.count; ++i)
      for (int64_t c = 0; c < job.k; ++c)
        at.y[rest.row[i] * k + c] += rest.value[i] * job.x[rest.column[i] * job.x_row + c * job.x_column];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < job.k; ++c) job.y[(panel + r) * job.k + c] = at.y[r * k + c];
    for (int64_t g = 0; g < job.groups; ++g) {
      cut_y(at.y + g * 16, k, at.y_parts);
      accumulate_tiles(at.y_parts, at.tiles, at.has_low, (job.n + 31) / 32, z + g * 16 * job.z_stride, job.z_stride);
    }
    for (int64_t i = 0; i < rest.count; ++i)
      for (int64_t c = 0; c < job.k; ++c)
        z[c * job.z_stride + tile_column(rest.column[i])] += rest.value[i] * at.y[rest.row[i] * k + c];
  }
  __asm__ volatile("tilerelease");
}
