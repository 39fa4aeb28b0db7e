// delta_sketch on the CPU: Y = D X, Z = D^T Y, |D|_F^2 and the changed entries, D = W1 - W0
// (bkdfast/ops/delta_sketch.py).
//
// Both matrices are read once. For a panel of kPanel rows, block of columns after block: the float32 difference goes to
// a buffer of the panel, with its squares (float64) and changed entries counted on the way, and into Y = D X while a
// tile of it is in L1; then Z += D^T Y of the panel. Vectors run along the columns of W in both products, X and Z are
// kept transposed: a 6 x 4 tile of Y loads 10 vectors for 24 fmas, and k needs no padding.
//
// Sums: rows are cut into kGroups runs of whole panels, each with its own partial Z, added up a binary tree. A thread
// adds what it can as it goes, into memory that is still in the cache. No sum depends on the number of threads, nor
// does any bit of the result; it does depend on the instruction set.
//
// Where the CPU has a bfloat16 matrix unit (AMX), bfloat16 weights go through it: delta_sketch_amx.h.
//
// Floor: 4 m n k flops, the matrices read once. One thread of an EPYC with full AVX-512 (fp32 fma peak 240 GFLOP/s,
// reads 45 GB/s), against plain PyTorch in its best panels (32 rows); torch.mm reaches 95 GFLOP/s there at 2048^3:
//
//   4096 x 4096 bfloat16, k = 16    8.4 to 9.4 ms, 114 to 128 GFLOP/s   PyTorch 23 ms
//               the same with AVX2 14 ms, portable 33 to 40 ms; k = 0: 2.7 ms
//                         k = 72   27.4 ms, 176 GFLOP/s           61.9 ms
//   4096 x 4096 float32,  k = 16   12.3 ms,  87 GFLOP/s           22.1 ms
//   4096 x 11008 bfloat16, k = 16  22 to 25 ms, 113 to 130 GFLOP/s   53 ms
//
// At k = 16 a third forms the difference, the products run at 190 GFLOP/s. Transposed weights, which are gathered a
// word at a time, take three times as long.
//
// One thread of a Xeon with AVX-512 (Sapphire or Emerald Rapids; fma peak 213 GFLOP/s, torch.mm 171), milliseconds at
// 4096 x 4096, before that is what it took with all partial Z kept to the end and an addition in each broadcast:
//
//   k                  0      8      16     32     80
//   bfloat16          3.3    8.4    13.7   23.6   59      before 3.3, 8.9, 14.8, 26.1, 71
//   float32          10.2   15.0    19.8   30.2   69      before 10.3, 15.6, 21.3, 32.9, 85; reads 14 GB/s
//
// Of 13.7 ms, D takes 5, Y 3.8 (140 GFLOP/s), Z 3.7. At k = 80, Z and X are a megabyte each and leave L2 every panel.
//
// Lost on both: fetching ahead inside the product, the same at k = 16 and 1.2 times slower at k = 8.
// Lost on the Xeon: Y by broadcast entries of D and vectors along k, no faster with 24 x 1 vectors at k = 16 (a load
// for each fma), with 12 x 2 vectors 1.07 times faster at k = 32 and not worth a second layout of X; 3 x 8 tiles for Z
// and blocks of 256 and 384 columns, within the noise; blocks of 768, panels of 48 rows below k = 64 (1.08 times faster
// at k = 80), slower.
// Lost on the EPYC: no fetch ahead, 12.4 ms against 9.9; forming 16 columns a step with a fetch each, 10.2 against 9.1
// for 32; panels of 48 rows, as good at best and in some processes 1.3 times slower at k = 48.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPad = 16;     // columns are padded with zeros to the widest vector
constexpr int64_t kBlock = 512;  // columns of a block
constexpr int64_t kPanel = 24;   // rows of a panel
constexpr int64_t kGroups = 16;  // partial sums of Z, whatever the number of threads

enum class Type { kBFloat16, kHalf, kFloat, kDouble };

struct Weight {
  const char* data;
  int64_t columns, row_stride, column_stride;  // elements
  int64_t item;                                // bytes of one
  Type type;
};

template <typename Acc>
struct Job {
  Weight base, tuned;
  int64_t m, n, k;
  const Acc* x;  // block after block, each [k, kBlock]
  Acc* y;        // [m, k]
  int64_t delta_stride, z_stride;
};

template <typename Acc>
struct Scratch {
  Acc* delta;         // [kPanel, delta_stride]
  char* gathered[2];  // [kPanel, kBlock] of each weight, when its columns are apart
};

struct Totals {
  double frobenius_sq = 0;
  int64_t changed = 0;
  bool complete = true;  // false: Y and Z lack something (delta_sketch_amx.h)
};

}  // namespace

#define BKDFAST_KERNEL "../cpu/delta_sketch_kernel.h"
#include "../common/for_each_isa.h"

#if defined(BKDFAST_AMX)
namespace {

constexpr int64_t kTilePanel = 32;     // rows of a panel
constexpr int64_t kTileSpan = 2048;    // columns whose tiles are made at a time: a page of a row
constexpr int64_t kTileSteps = 16;     // of 32 columns, whose products are added up in the unit
constexpr int64_t kTileBytes = 1088;   // a tile of 1024 and a cache line, so that tiles do not share sets of the cache
constexpr int64_t kTileColumns = 9;    // of X; for fewer, vectors are faster
constexpr float kTileRange = 1 << 20;  // largest entries of X's columns are in 1 / kTileRange to kTileRange
constexpr double kTileNorm = 1e9;      // as the norm of D is

struct TileJob {
  Weight base, tuned;
  int64_t m, n, k, groups;  // groups of 16 columns of X
  const char* x_tiles;      // [step][group][part]
  const float* x;
  int64_t x_row, x_column;  // strides
  float* y;                 // [m, k]
  int64_t z_stride;
};

// Entries of D that two parts do not hold, and what is left of them; one in 64 of a panel may be such.
struct Rest {
  float* value;
  int32_t *row, *column;
  int64_t count, capacity;  // count > capacity: the last ones are missing
};

// What a panel needs, in memory of its own.
struct TilePanel {
  char* tiles;       // of D
  char* y_parts;     // tiles of Y^T, of 16 columns of Y
  float* y;          // [kTilePanel, groups * 16]
  float* sums;       // [4, 16, 16]
  uint8_t* has_low;  // [steps]
  Rest rest;
  int64_t bytes;  // of all
};

TilePanel lay_out(char* memory, int64_t n, int64_t groups) {
  const int64_t steps = (n + 31) / 32, capacity = kTilePanel * n / 64;
  uintptr_t end =
      reinterpret_cast<uintptr_t>(memory);  // not a pointer: memory is null where only the size is asked for
  const auto take = [&](int64_t bytes) {
    return reinterpret_cast<char*>(std::exchange(end, end + (bytes + 63) / 64 * 64));
  };
  TilePanel panel;
  panel.tiles = take(steps * 4 * kTileBytes);
  panel.y_parts = take(12 * kTileBytes);
  panel.y = reinterpret_cast<float*>(take(kTilePanel * groups * 64));
  panel.sums = reinterpret_cast<float*>(take(4 * 1024));
  panel.has_low = reinterpret_cast<uint8_t*>(take(steps));
  panel.rest.value = reinterpret_cast<float*>(take(capacity * 4));
  panel.rest.row = reinterpret_cast<int32_t*>(take(capacity * 4));
  panel.rest.column = reinterpret_cast<int32_t*>(take(capacity * 4));
  panel.rest.count = 0;
  panel.rest.capacity = capacity;
  panel.bytes = static_cast<int64_t>(end - reinterpret_cast<uintptr_t>(memory));
  return panel;
}

// Where column j of W is in Z.
int64_t tile_column(int64_t j) { return j / 32 * 32 + j % 2 * 16 + j % 32 / 2; }

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12, inside its own _mm512_undefined_ps
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
namespace amx {
#include "delta_sketch_amx.h"
}  // namespace amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

}  // namespace
#endif

namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Rows an even number of cache lines apart fall into the same few sets of the cache.
template <typename Acc>
int64_t odd_lines(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(Acc);
  return (round_up(columns, kPad) / line | 1) * line;
}

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <typename T>
std::unique_ptr<T[], Free> allocate(int64_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t{64})));
}

// X [n, k] of any strides as blocks of kBlock rows, each transposed to [k, kBlock], zeros behind the last row.
template <typename Acc>
std::unique_ptr<Acc[], Free> pack_x(const Tensor& x) {
  const int64_t n = x.size(0), k = x.size(1), row = x.stride(0), column = x.stride(1);
  const int64_t padded = round_up(n, kBlock);
  auto packed = allocate<Acc>(padded * k);
  const Acc* from = static_cast<const Acc*>(x.const_data_ptr());
  for (int64_t block = 0; block < padded; block += kBlock)
    for (int64_t c = 0; c < k; ++c) {
      Acc* to = packed.get() + block * k + c * kBlock;
      const int64_t count = std::min(kBlock, n - block);
      for (int64_t j = 0; j < count; ++j) to[j] = from[(block + j) * row + c * column];
      std::fill(to + count, to + kBlock, Acc(0));
    }
  return packed;
}

// The partial Z of groups [first, first + count): a node of the tree over the groups.
template <typename Acc>
struct Part {
  int64_t first, count;
  Acc* z;  // [k, stride]
};

// Appends a part, first adding it to the last one while the two are siblings in the tree: neighbours of one size, on
// its boundary. Which sums there are does not depend on the number of threads. `add` is called with (sum, term).
template <typename Acc, typename Add>
void append(std::vector<Part<Acc>>& parts, Part<Acc> part, const Add& add) {
  for (; !parts.empty(); parts.pop_back()) {
    const Part<Acc>& left = parts.back();
    if (left.count != part.count || left.first % (2 * left.count) != 0) break;
    add(left.z, part.z);
    part = {left.first, 2 * left.count, left.z};
  }
  parts.push_back(part);
}

template <typename Acc>
void add_columns(Acc* sum, const Acc* term, int64_t count) {
  for (int64_t j = 0; j < count; ++j) sum[j] += term[j];
}

// How a kernel takes its rows and leaves its Z.
struct Layout {
  int64_t panel;                   // rows of a panel
  int64_t z_rows, z_stride;        // of a partial Z
  int64_t (*z_column)(int64_t j);  // where column j of W is in it: j's multiple of 64 and a place in these 64
  int64_t scratch;                 // bytes that a group of rows needs beside it
};

// out [n, k] = the sum of all parts, their groups in order.
template <typename Acc>
void reduce_z(const std::vector<Part<Acc>>& parts, const Layout& layout, int64_t n, int64_t k, int64_t grain,
              Acc* out) {
  std::vector<std::pair<Acc*, const Acc*>> sums;
  const auto note = [&](Acc* sum, const Acc* term) { sums.emplace_back(sum, term); };
  std::vector<Part<Acc>> rest;
  for (const Part<Acc>& part : parts) append(rest, part, note);
  for (size_t i = 1; i < rest.size(); ++i) note(rest[0].z, rest[i].z);
  constexpr int64_t kStep = 64;
  int64_t order[kStep];  // it repeats
  for (int64_t i = 0; i < kStep; ++i) order[i] = layout.z_column(i);
  torch::stable::parallel_for(0, (n + kStep - 1) / kStep, (grain + kStep - 1) / kStep, [&](int64_t from, int64_t to) {
    for (int64_t j = from * kStep; j < std::min(n, to * kStep); j += kStep)
      for (int64_t c = 0; c < k; ++c) {
        const int64_t at = c * layout.z_stride, count = std::min(kStep, n - j);
        const int64_t columns = std::min(kStep, layout.z_stride - j);  // a Z may have its columns in another order
        for (const auto& [sum, term] : sums) add_columns(sum + at + j, term + at + j, columns);
        for (int64_t i = 0; i < count; ++i) out[(j + i) * k + c] = rest[0].z[at + j + order[i]];
      }
  });
}

// Cuts the rows into groups of whole panels, which depend on m alone, and so do the sums; `add_rows` is called with
// (begin, end, scratch, z, totals).
template <typename Acc, typename AddRows>
Totals run(int64_t m, int64_t n, int64_t k, const Layout& layout, Acc* z_out, const AddRows& add_rows) {
  const int64_t panels = (m + layout.panel - 1) / layout.panel;
  const int64_t groups = std::min(kGroups, panels);
  const int64_t z_size = layout.z_rows * layout.z_stride, scratch = round_up(layout.scratch, 64);
  const auto z_parts = allocate<Acc>(groups * z_size);
  // Memory for each group, of which a thread touches the share of the first group it serves.
  const auto memory = allocate<char>(groups * scratch);
  std::vector<Totals> totals(groups);
  std::vector<std::vector<Part<Acc>>> parts_from(groups);  // by the first group of the thread
  const bool small = m * n * (k + 8) < (int64_t{1} << 20);
  torch::stable::parallel_for(0, groups, small ? groups : 1, [&](int64_t from, int64_t to) {
    std::vector<Part<Acc>> parts;
    for (int64_t g = from; g < to; ++g) {
      Totals own;  // not in place: neighbours' totals share a cache line
      // Where a sibling's was before it was added: a partial Z per level of the tree stays in the cache.
      Acc* part = z_parts.get() + (from + parts.size()) * z_size;
      add_rows(g * panels / groups * layout.panel, std::min(m, (g + 1) * panels / groups * layout.panel),
               memory.get() + from * scratch, part, own);
      totals[g] = own;
      append(parts, {g, 1, part}, [&](Acc* sum, const Acc* term) { add_columns(sum, term, z_size); });
    }
    parts_from[from] = std::move(parts);
  });
  std::vector<Part<Acc>> parts;
  for (const auto& own : parts_from) parts.insert(parts.end(), own.begin(), own.end());
  reduce_z(parts, layout, n, k, small ? n : 1024, z_out);
  Totals sum;
  for (const Totals& part : totals) {
    sum.frobenius_sq += part.frobenius_sq;
    sum.changed += part.changed;
    sum.complete = sum.complete && part.complete;
  }
  return sum;
}

template <typename Acc, typename Kernel>
Totals with_vectors(const Weight& base, const Weight& tuned, const Tensor& x, Tensor& y, Tensor& z, Kernel kernel) {
  const int64_t m = y.size(0), n = x.size(0), k = x.size(1);
  const auto packed = pack_x<Acc>(x);
  const int64_t stride = odd_lines<Acc>(n);
  const Job<Acc> job{base,  tuned, m, n, k, packed.get(), static_cast<Acc*>(y.mutable_data_ptr()), k ? stride : kBlock,
                     stride};
  const bool gather = base.column_stride != 1 || tuned.column_stride != 1;
  const int64_t delta_size = round_up(kPanel * job.delta_stride * sizeof(Acc), 64);
  const int64_t gathered_size = gather ? kPanel * kBlock * 8 : 0;
  const Layout layout{kPanel, k, stride, [](int64_t j) { return j; }, delta_size + 2 * gathered_size};
  return run(m, n, k, layout, static_cast<Acc*>(z.mutable_data_ptr()),
             [&](int64_t begin, int64_t end, char* memory, Acc* part, Totals& totals) {
               const Scratch<Acc> scratch{reinterpret_cast<Acc*>(memory),
                                          {memory + delta_size, memory + delta_size + gathered_size}};
               kernel(job, begin, end, scratch, part, totals);
             });
}

#if defined(BKDFAST_AMX)
// False: these weights or this X are not for the matrix unit, and what was written is to be written again.
bool with_tiles(const Weight& base, const Weight& tuned, const Tensor& x, Tensor& y, Tensor& z, Totals& totals) {
  const int64_t m = y.size(0), n = x.size(0), k = x.size(1);
  if (bkdfast::isa() != bkdfast::Isa::kAmx || k < kTileColumns || base.type != Type::kBFloat16 ||
      tuned.type != Type::kBFloat16 || base.column_stride != 1 || tuned.column_stride != 1)
    return false;
  const int64_t groups = (k + 15) / 16, steps = (n + 31) / 32;
  const auto tiles = allocate<char>(steps * groups * 3 * kTileBytes);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  if (!amx::pack_tiles(from, x.stride(0), x.stride(1), n, k, tiles.get())) return false;
  const Layout layout{kTilePanel, groups * 16, odd_lines<float>(steps * 32), tile_column,
                      lay_out(nullptr, n, groups).bytes};
  const TileJob job{base,
                    tuned,
                    m,
                    n,
                    k,
                    groups,
                    tiles.get(),
                    from,
                    x.stride(0),
                    x.stride(1),
                    static_cast<float*>(y.mutable_data_ptr()),
                    layout.z_stride};
  totals = run(m, n, k, layout, static_cast<float*>(z.mutable_data_ptr()),
               [&](int64_t begin, int64_t end, char* memory, float* part, Totals& own) {
                 amx::sketch_tiles(job, begin, end, memory, part, own);
               });
  const double norm = std::sqrt(totals.frobenius_sq);
  return totals.complete && (totals.changed == 0 || (norm >= 1 / kTileNorm && norm <= kTileNorm));
}
#endif

Totals sketch(const Weight& base, const Weight& tuned, bool both_double, const Tensor& x, Tensor& y, Tensor& z) {
  if (y.size(0) == 0 || x.size(0) == 0) {
    for (Tensor* result : {&y, &z}) std::memset(result->mutable_data_ptr(), 0, result->numel() * (both_double ? 8 : 4));
    return {};
  }
  if (both_double) return with_vectors<double>(base, tuned, x, y, z, BKDFAST_CHOOSE(sketch_double));
#if defined(BKDFAST_AMX)
  if (Totals totals; with_tiles(base, tuned, x, y, z, totals)) return totals;
#endif
  return with_vectors<float>(base, tuned, x, y, z, BKDFAST_CHOOSE(sketch_float));
}

Weight weight_of(const Tensor& w, const char* name) {
  Weight weight{static_cast<const char*>(w.const_data_ptr()), w.size(1), w.stride(0), w.stride(1), 0, Type::kFloat};
  switch (w.scalar_type()) {
    case ScalarType::BFloat16:
      return weight.item = 2, weight.type = Type::kBFloat16, weight;
    case ScalarType::Half:
      return weight.item = 2, weight.type = Type::kHalf, weight;
    case ScalarType::Float:
      return weight.item = 4, weight.type = Type::kFloat, weight;
    case ScalarType::Double:
      return weight.item = 8, weight.type = Type::kDouble, weight;
    default:
      STD_TORCH_CHECK(false, "delta_sketch: ", name, " must be bfloat16, float16, float32 or float64");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_sketch(Tensor w0, Tensor w1, Tensor x) {
  STD_TORCH_CHECK(w0.dim() == 2 && w1.dim() == 2 && x.dim() == 2 && w0.size(0) == w1.size(0) &&
                      w0.size(1) == w1.size(1) && x.size(0) == w0.size(1),
                  "delta_sketch: w0 and w1 must be [m, n] and x [n, k]");
  const Weight base = weight_of(w0, "w0"), tuned = weight_of(w1, "w1");
  const bool both_double = base.type == Type::kDouble && tuned.type == Type::kDouble;
  STD_TORCH_CHECK(x.scalar_type() == (both_double ? ScalarType::Double : ScalarType::Float),
                  "delta_sketch: x must be float32 (float64 when both weights are)");
  Tensor y = torch::stable::new_empty(x, {w0.size(0), x.size(1)});
  Tensor z = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor frobenius_sq = torch::stable::new_empty(x, {}, ScalarType::Double);
  Tensor changed = torch::stable::new_empty(x, {}, ScalarType::Long);
  const Totals totals = sketch(base, tuned, both_double, x, y, z);
  *static_cast<double*>(frobenius_sq.mutable_data_ptr()) = totals.frobenius_sq;
  *static_cast<int64_t*>(changed.mutable_data_ptr()) = totals.changed;
  return {y, z, frobenius_sq, changed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) { m.impl("delta_sketch", TORCH_BOX(&delta_sketch)); }
