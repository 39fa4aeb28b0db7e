// Vec<float> and Vec<double> of BKDFAST_VECTOR_BYTES; included by for_each_isa.h inside avx512::, avx2:: and scalar::.
//
// GCC/clang vector extensions, with intrinsics where those do not reach: fma, fp16, horizontal sums. "scalar" has
// 16 bytes, which every x86-64 and ARM has, and no fma instruction: fma(a, b, c) rounds twice there.

// The bits of as many 16- and 32-bit numbers as Vec<float> has elements.
typedef uint16_t Bits16 __attribute__((vector_size(BKDFAST_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(BKDFAST_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(BKDFAST_VECTOR_BYTES)));

// v rounded to bfloat16, to nearest, ties to even: the upper halves of the elements; the lower halves are noise.
BKDFAST_INLINE Bits32 bfloat16_bits(Floats v) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  const Bits32 nan = reinterpret_cast<Bits32>(v != v);
  return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (nan & 0x7fc00000u);
}

template <typename T>
struct Vec {
  typedef T Native __attribute__((vector_size(BKDFAST_VECTOR_BYTES)));
  static constexpr int64_t kWidth = BKDFAST_VECTOR_BYTES / sizeof(T);
  Native v;

  BKDFAST_INLINE Vec() = default;
  BKDFAST_INLINE Vec(Native native) : v(native) {}
  static BKDFAST_INLINE Vec zero() { return Native{}; }
  // Minus, not plus: 0 + value is not value for -0, and so compiled into an addition.
  static BKDFAST_INLINE Vec broadcast(T value) { return value - Native{}; }

  static BKDFAST_INLINE Vec load(const T* from) {
    Vec r;
    __builtin_memcpy(&r.v, from, sizeof(Native));
    return r;
  }
  static BKDFAST_INLINE Vec load(const c10::BFloat16* from) {
    static_assert(sizeof(T) == 4, "16-bit types widen to float");
#if BKDFAST_VECTOR_BYTES == 64  // GCC 12 makes two halves of a convertvector
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return static_cast<Native>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
#elif BKDFAST_VECTOR_BYTES == 32
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return static_cast<Native>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
#else
    Bits16 bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return reinterpret_cast<Native>(__builtin_convertvector(bits, Bits32) << 16);
#endif
  }
  static BKDFAST_INLINE Vec load(const c10::Half* from) {
    static_assert(sizeof(T) == 4, "16-bit types widen to float");
#if BKDFAST_VECTOR_BYTES == 64
    return static_cast<Native>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif BKDFAST_VECTOR_BYTES == 32
    return static_cast<Native>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    return Native{from[0], from[1], from[2], from[3]};
#endif
  }
  // The first `count` < kWidth elements, zeros behind them; nothing past them is read.
  template <typename From>
  static BKDFAST_INLINE Vec load_partial(const From* from, int64_t count) {
    alignas(BKDFAST_VECTOR_BYTES) From buffer[kWidth];
    __builtin_memset(static_cast<void*>(buffer), 0, sizeof buffer);
    __builtin_memcpy(static_cast<void*>(buffer), from, count * sizeof(From));
    return load(buffer);
  }

  BKDFAST_INLINE void store(T* to) const { __builtin_memcpy(to, &v, sizeof(Native)); }
  BKDFAST_INLINE void store(c10::BFloat16* to) const {
    static_assert(sizeof(T) == 4, "16-bit types are rounded from float");
    const Bits16 out = __builtin_convertvector(bfloat16_bits(v) >> 16, Bits16);
    __builtin_memcpy(static_cast<void*>(to), &out, sizeof out);
  }
  BKDFAST_INLINE void store(c10::Half* to) const {
    static_assert(sizeof(T) == 4, "16-bit types are rounded from float");
#if BKDFAST_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif BKDFAST_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int64_t i = 0; i < kWidth; ++i) to[i] = static_cast<c10::Half>(v[i]);
#endif
  }
  template <typename To>
  BKDFAST_INLINE void store_partial(To* to, int64_t count) const {
    alignas(BKDFAST_VECTOR_BYTES) To buffer[kWidth];
    store(buffer);
    __builtin_memcpy(static_cast<void*>(to), buffer, count * sizeof(To));
  }

  friend BKDFAST_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend BKDFAST_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend BKDFAST_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
};

BKDFAST_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if BKDFAST_VECTOR_BYTES == 64
  return static_cast<Vec<float>::Native>(_mm512_fmadd_ps(a.v, b.v, c.v));
#elif BKDFAST_VECTOR_BYTES == 32
  return static_cast<Vec<float>::Native>(_mm256_fmadd_ps(a.v, b.v, c.v));
#else
  return a * b + c;
#endif
}

BKDFAST_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if BKDFAST_VECTOR_BYTES == 64
  return static_cast<Vec<double>::Native>(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif BKDFAST_VECTOR_BYTES == 32
  return static_cast<Vec<double>::Native>(_mm256_fmadd_pd(a.v, b.v, c.v));
#else
  return a * b + c;
#endif
}

// The two halves of a float vector in double.
BKDFAST_INLINE Vec<double> lower(Vec<float> a) {
#if BKDFAST_VECTOR_BYTES == 64
  return static_cast<Vec<double>::Native>(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
#elif BKDFAST_VECTOR_BYTES == 32
  return static_cast<Vec<double>::Native>(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
#else
  return Vec<double>::Native{a.v[0], a.v[1]};
#endif
}

BKDFAST_INLINE Vec<double> upper(Vec<float> a) {
#if BKDFAST_VECTOR_BYTES == 64
  return static_cast<Vec<double>::Native>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
#elif BKDFAST_VECTOR_BYTES == 32
  return static_cast<Vec<double>::Native>(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
#else
  return Vec<double>::Native{a.v[2], a.v[3]};
#endif
}

// Adds one to each counter whose place differs in a and b; NaN differs from everything.
typedef int32_t Counters __attribute__((vector_size(BKDFAST_VECTOR_BYTES)));
typedef int64_t LongCounters __attribute__((vector_size(BKDFAST_VECTOR_BYTES)));

BKDFAST_INLINE Counters count_unequal(Vec<float> a, Vec<float> b, Counters counters) {
#if BKDFAST_VECTOR_BYTES == 64
  const __m512i c = reinterpret_cast<__m512i>(counters);
  return reinterpret_cast<Counters>(
      _mm512_mask_sub_epi32(c, _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ), c, _mm512_set1_epi32(-1)));
#else
  return counters - (a.v != b.v);
#endif
}

BKDFAST_INLINE LongCounters count_unequal(Vec<double> a, Vec<double> b, LongCounters counters) {
  return counters - (a.v != b.v);
}

// Sum of the elements, in a fixed tree.
BKDFAST_INLINE float sum(Vec<float> a) {
#if BKDFAST_VECTOR_BYTES == 64
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
#elif BKDFAST_VECTOR_BYTES == 32
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
#else
  const Vec<float>::Native c = a.v;
#endif
  return (c[0] + c[2]) + (c[1] + c[3]);
}

BKDFAST_INLINE double sum(Vec<double> a) {
#if BKDFAST_VECTOR_BYTES == 64
  const __m256d b = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
#elif BKDFAST_VECTOR_BYTES == 32
  const __m128d c = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
#else
  const Vec<double>::Native c = a.v;
#endif
  return c[0] + c[1];
}

// Sums of the elements of four vectors, each in a fixed tree that is not sum()'s, with a third of its instructions.
typedef float Four __attribute__((vector_size(16)));

BKDFAST_INLINE Four sum4(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
#if BKDFAST_VECTOR_BYTES == 64
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#elif BKDFAST_VECTOR_BYTES == 32
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
#if BKDFAST_VECTOR_BYTES == 16
  return Four{sum(a), sum(b), sum(c), sum(d)};
#else
  return static_cast<Four>(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#endif
}

// to[i] += sum of a[i], i < 4.
BKDFAST_INLINE void add_sums(const Vec<float>* a, float* to) {
  Four total;
  __builtin_memcpy(&total, to, sizeof total);
  total += sum4(a[0], a[1], a[2], a[3]);
  __builtin_memcpy(to, &total, sizeof total);
}

BKDFAST_INLINE void add_sums(const Vec<double>* a, double* to) {
  for (int i = 0; i < 4; ++i) to[i] += sum(a[i]);
}
