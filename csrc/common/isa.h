// One kernel source, compiled for AVX-512, AVX2 and portable C++; the machine that runs it chooses (BKDFAST_CPU caps).
// Above AVX-512 is its matrix unit, AMX, for which an op may have a kernel of its own beside these.
//
//   #include "../common/isa.h"                         // after every std and torch header the kernel needs
//   #define BKDFAST_KERNEL "../cpu/my_op_kernel.h"     // path as seen from csrc/common
//   #include "../common/for_each_isa.h"                // includes it once in each of avx512::, avx2::, scalar::
//   const auto kernel = BKDFAST_CHOOSE(my_kernel);     // &avx512::my_kernel or ...; throws on a bad BKDFAST_CPU:
//   torch::stable::parallel_for(..., [&] { kernel(...); });  // choose before the threads
//
// my_op_kernel.h: no include guard, no #include, no lambda, no std:: container, no implicit constructor with
// initialisers (GCC compiles those for the generic target). Functions and templates over Vec<float> and Vec<double>
// (vec.h); types shared with the caller are declared before for_each_isa.h. All of it is in an anonymous namespace of
// its level, so nothing compiled for one level can be linked in for another.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define BKDFAST_AMX 1  // this compiler knows the matrix unit
#endif
#define BKDFAST_X86 1
#define BKDFAST_CHOOSE(kernel)                               \
  (bkdfast::isa() >= bkdfast::Isa::kAvx512 ? &avx512::kernel \
   : bkdfast::isa() == bkdfast::Isa::kAvx2 ? &avx2::kernel   \
                                           : &scalar::kernel)
#else
#define BKDFAST_CHOOSE(kernel) (bkdfast::isa(), &scalar::kernel)
#endif

#define BKDFAST_INLINE inline __attribute__((always_inline))

namespace bkdfast {

enum class Isa { kScalar, kAvx2, kAvx512, kAmx };

struct IsaChoice {
  Isa isa;
  std::string error;  // empty, or what is wrong with BKDFAST_CPU
};

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAmx ? "amx" : isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "scalar";
}

#if defined(BKDFAST_AMX)
inline bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16) && (edx & kTile);
}

// Asks Linux to let this process use the matrix unit, whose registers make the state of a thread eight kilobytes
// larger. That cannot be taken back: only where the unit is to be used.
inline bool may_use_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
inline bool has_amx() { return false; }
inline bool may_use_amx() { return false; }
#endif

inline Isa best_isa() {
#if defined(BKDFAST_X86)
  // These ask the operating system too: a CPU whose kernel does not save the wide registers does not support them.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 && has_amx() ? Isa::kAmx : avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
#else
  return Isa::kScalar;
#endif
}

inline IsaChoice choose_isa() {
  const char* set = std::getenv("BKDFAST_CPU");
  const std::string wanted = set ? set : "";
  Isa best = best_isa();
  if (best == Isa::kAmx && (wanted.empty() || wanted == isa_name(best)) && !may_use_amx()) best = Isa::kAvx512;
  if (wanted.empty()) return {best, ""};
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (wanted != isa_name(isa)) continue;
    if (isa <= best) return {isa, ""};
    return {best, "BKDFAST_CPU=" + wanted + ", but the best this CPU has is " + isa_name(best) + "; unset it"};
  }
  return {best, "BKDFAST_CPU='" + wanted + "' is not one of amx, avx512, avx2, scalar; unset it or fix it"};
}

// The environment is read once, at the first op.
inline const IsaChoice& isa_choice() {
  static const IsaChoice choice = choose_isa();
  return choice;
}

inline Isa isa() {
  const IsaChoice& choice = isa_choice();
  STD_TORCH_CHECK(choice.error.empty(), choice.error);
  return choice.isa;
}

}  // namespace bkdfast
