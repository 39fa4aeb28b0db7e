// What this CPU can do, under the names of Linux's /proc/cpuinfo.

#include "native.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bkdfast {

#if defined(__x86_64__) || defined(__i386__)

namespace {

enum Register { kEax, kEbx, kEcx, kEdx };

struct Leaf {
  uint32_t registers[4] = {};
  Leaf(uint32_t leaf, uint32_t subleaf) {
    __get_cpuid_count(leaf, subleaf, &registers[kEax], &registers[kEbx], &registers[kEcx], &registers[kEdx]);
  }
  bool bit(Register which, int index) const { return registers[which] >> index & 1; }
};

// The register sets that the operating system saves (XCR0). Read as bytes: the intrinsic needs a compiler flag.
uint64_t saved_registers() {
  if (!Leaf(1, 0).bit(kEcx, 27)) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
  const Leaf base(1, 0), extended(7, 0), more(7, 1);
  const uint64_t saved = saved_registers();
  const auto saves = [&](uint64_t mask) { return (saved & mask) == mask; };
  const bool ymm = saves(0x6), zmm = saves(0xe6), tile = saves(0x60000);
  return {
      {"sse4_2", base.bit(kEcx, 20)},
      {"avx", ymm && base.bit(kEcx, 28)},
      {"avx2", ymm && extended.bit(kEbx, 5)},
      {"fma", ymm && base.bit(kEcx, 12)},
      {"f16c", ymm && base.bit(kEcx, 29)},
      {"avx_vnni", ymm && more.bit(kEax, 4)},
      {"avx512f", zmm && extended.bit(kEbx, 16)},
      {"avx512bw", zmm && extended.bit(kEbx, 30)},
      {"avx512cd", zmm && extended.bit(kEbx, 28)},
      {"avx512dq", zmm && extended.bit(kEbx, 17)},
      {"avx512vl", zmm && extended.bit(kEbx, 31)},
      {"avx512_vnni", zmm && extended.bit(kEcx, 11)},
      {"avx512_bf16", zmm && more.bit(kEax, 5)},
      {"avx512_fp16", zmm && extended.bit(kEdx, 23)},
      {"amx_tile", tile && extended.bit(kEdx, 24)},
      {"amx_bf16", tile && extended.bit(kEdx, 22)},
      {"amx_int8", tile && extended.bit(kEdx, 25)},
  };
}

#elif defined(__aarch64__) && defined(__linux__)

std::vector<std::pair<std::string, bool>> cpu_features() {
  const uint64_t first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  const auto bit = [](uint64_t word, int index) { return (word >> index & 1) != 0; };
  return {
      {"asimd", bit(first, 1)}, {"asimdhp", bit(first, 10)}, {"asimddp", bit(first, 20)}, {"sve", bit(first, 22)},
      {"sve2", bit(second, 1)}, {"i8mm", bit(second, 13)},   {"bf16", bit(second, 14)},
  };
}

#else

std::vector<std::pair<std::string, bool>> cpu_features() { return {}; }

#endif

}  // namespace bkdfast
