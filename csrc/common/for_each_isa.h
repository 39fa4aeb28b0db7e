// Includes BKDFAST_KERNEL once per instruction set; isa.h says how to use it. No include guard: one use per kernel.

#if !defined(BKDFAST_KERNEL)
#error "define BKDFAST_KERNEL first, see isa.h"
#endif

#if defined(BKDFAST_X86)

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12, inside its own _mm512_undefined_ps
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,prefer-vector-width=512")
#endif
#define BKDFAST_VECTOR_BYTES 64
namespace {
namespace avx512 {
#include "vec.h"
#include BKDFAST_KERNEL
}  // namespace avx512
}  // namespace
#undef BKDFAST_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")
#endif
#define BKDFAST_VECTOR_BYTES 32
namespace {
namespace avx2 {
#include "vec.h"
#include BKDFAST_KERNEL
}  // namespace avx2
}  // namespace
#undef BKDFAST_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

#endif  // BKDFAST_X86

#define BKDFAST_VECTOR_BYTES 16
namespace {
namespace scalar {
#include "vec.h"
#include BKDFAST_KERNEL
}  // namespace scalar
}  // namespace
#undef BKDFAST_VECTOR_BYTES
#undef BKDFAST_KERNEL
