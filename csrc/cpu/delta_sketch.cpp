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
// at k = 80), slower. The bfloat16 matrix unit (AMX), with three bfloat16 parts for each number: 11 ms at k = 16 as the
// best of a prototype, 17 at 32, 34 at 80; cutting D into parts costs at k = 16 most of what the unit saves, and sums
// of one sign round three times worse in Y.
// Lost on the EPYC: no fetch ahead, 12.4 ms against 9.9; forming 16 columns a step with a fetch each, 10.2 against 9.1
// for 32; panels of 48 rows, as good at best and in some processes 1.3 times slower at k = 48.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
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
};

}  // namespace

#define BKDFAST_KERNEL "../cpu/delta_sketch_kernel.h"
#include "../common/for_each_isa.h"

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

// out [n, k] = the sum of all parts, their groups in order.
template <typename Acc>
void reduce_z(const std::vector<Part<Acc>>& parts, int64_t stride, int64_t n, int64_t k, int64_t grain, Acc* out) {
  std::vector<std::pair<Acc*, const Acc*>> sums;
  const auto note = [&](Acc* sum, const Acc* term) { sums.emplace_back(sum, term); };
  std::vector<Part<Acc>> rest;
  for (const Part<Acc>& part : parts) append(rest, part, note);
  for (size_t i = 1; i < rest.size(); ++i) note(rest[0].z, rest[i].z);
  torch::stable::parallel_for(0, n, grain, [&](int64_t from, int64_t to) {
    constexpr int64_t kStep = 64;
    for (int64_t j = from; j < to; j += kStep)
      for (int64_t c = 0; c < k; ++c) {
        const int64_t at = c * stride + j, count = std::min(kStep, to - j);
        for (const auto& [sum, term] : sums) add_columns(sum + at, term + at, count);
        for (int64_t i = 0; i < count; ++i) out[(j + i) * k + c] = rest[0].z[at + i];
      }
  });
}

template <typename Acc, typename Kernel>
Totals run(const Weight& base, const Weight& tuned, const Tensor& x, Tensor& y, Tensor& z, Kernel kernel) {
  const int64_t m = y.size(0), n = x.size(0), k = x.size(1);
  Acc* z_out = static_cast<Acc*>(z.mutable_data_ptr());
  if (m == 0 || n == 0) {
    std::fill_n(static_cast<Acc*>(y.mutable_data_ptr()), m * k, Acc(0));
    std::fill_n(z_out, n * k, Acc(0));
    return {};
  }
  const auto packed = pack_x<Acc>(x);
  const int64_t stride = odd_lines<Acc>(n);
  const Job<Acc> job{base,  tuned, m, n, k, packed.get(), static_cast<Acc*>(y.mutable_data_ptr()), k ? stride : kBlock,
                     stride};
  // Rows to groups, whole panels each: depends on m alone, and so do the sums.
  const int64_t panels = (m + kPanel - 1) / kPanel;
  const int64_t groups = std::min(kGroups, panels);
  const auto z_parts = allocate<Acc>(groups * k * stride);
  const bool gather = base.column_stride != 1 || tuned.column_stride != 1;
  const int64_t delta_size = round_up(kPanel * job.delta_stride * sizeof(Acc), 64);
  const int64_t gathered_size = gather ? kPanel * kBlock * 8 : 0;
  // Memory for each group, of which a thread touches the share of the first group it serves.
  const auto scratch_memory = allocate<char>(groups * (delta_size + 2 * gathered_size));
  std::vector<Totals> totals(groups);
  std::vector<std::vector<Part<Acc>>> parts_from(groups);  // by the first group of the thread
  const bool small = m * n * (k + 8) < (int64_t{1} << 20);
  torch::stable::parallel_for(0, groups, small ? groups : 1, [&](int64_t from, int64_t to) {
    char* memory = scratch_memory.get() + from * (delta_size + 2 * gathered_size);
    const Scratch<Acc> scratch{reinterpret_cast<Acc*>(memory),
                               {memory + delta_size, memory + delta_size + gathered_size}};
    std::vector<Part<Acc>> parts;
    for (int64_t g = from; g < to; ++g) {
      Totals own;  // not in place: neighbours' totals share a cache line
      // Where a sibling's was before it was added: a partial Z per level of the tree stays in the cache.
      Acc* part = z_parts.get() + (from + parts.size()) * k * stride;
      kernel(job, g * panels / groups * kPanel, std::min(m, (g + 1) * panels / groups * kPanel), scratch, part, own);
      totals[g] = own;
      append(parts, {g, 1, part}, [&](Acc* sum, const Acc* term) { add_columns(sum, term, k * stride); });
    }
    parts_from[from] = std::move(parts);
  });
  std::vector<Part<Acc>> parts;
  for (const auto& own : parts_from) parts.insert(parts.end(), own.begin(), own.end());
  reduce_z(parts, stride, n, k, small ? n : 1024, z_out);
  Totals sum;
  for (const Totals& part : totals) {
    sum.frobenius_sq += part.frobenius_sq;
    sum.changed += part.changed;
  }
  return sum;
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
  const Totals totals = both_double ? run<double>(base, tuned, x, y, z, BKDFAST_CHOOSE(sketch_double))
                                    : run<float>(base, tuned, x, y, z, BKDFAST_CHOOSE(sketch_float));
  *static_cast<double*>(frobenius_sq.mutable_data_ptr()) = totals.frobenius_sq;
  *static_cast<int64_t*>(changed.mutable_data_ptr()) = totals.changed;
  return {y, z, frobenius_sq, changed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) { m.impl("delta_sketch", TORCH_BOX(&delta_sketch)); }
