// tall_dot and tall_combine on the CPU: A^T B, A C and X - A C of tall float64 matrices (bkdfast/ops/tall_products.py).
//
// A is a list of blocks of columns, each stored by rows, so that a basis grows without being copied. Vectors run along
// the columns of B and C, entries of A are broadcast.
//
// Sums: rows of A^T B are cut into kGroups runs, whose sums are added in their order; an entry of A C is one sum. No
// sum depends on the number of threads, nor does any bit of the result; it does depend on the instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "../common/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPad = 8;     // columns are padded to the widest vector
constexpr int64_t kChunk = 64;  // rows that are in the cache
constexpr int64_t kGroups = 8;  // partial sums of A^T B, whatever the number of threads
constexpr int64_t kSmall = int64_t{1} << 18;  // multiplications that are not worth a second thread

struct Block {
  const double* data;  // [n, width]
  int64_t width;
};

struct Blocks {
  const Block* at;
  int64_t count;
};

}  // namespace

#define BKDFAST_KERNEL "../cpu/tall_products_kernel.h"
#include "../common/for_each_isa.h"

namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Not a vector: its zeros would be written by this thread, before the others touch the memory.
std::unique_ptr<double[]> allocate(int64_t count) { return std::unique_ptr<double[]>(new double[count]); }

const double* matrix(const Tensor& x, const char* op, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows, op, ": matrices of different heights");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.is_contiguous(), op,
                  ": matrices must be contiguous float64");
  return static_cast<const double*>(x.const_data_ptr());
}

struct Tall {
  std::vector<Block> blocks;
  int64_t rows, columns = 0;

  Tall(const std::vector<Tensor>& a, const char* op) {
    STD_TORCH_CHECK(!a.empty() && a[0].dim() == 2, op, ": a must have one block of columns at least");
    rows = a[0].size(0);
    for (const Tensor& block : a) {
      blocks.push_back({matrix(block, op, rows), block.size(1)});
      columns += block.size(1);
    }
  }
  Blocks list() const { return {blocks.data(), static_cast<int64_t>(blocks.size())}; }
};

Tensor tall_dot(std::vector<Tensor> a, Tensor b) {
  const Tall tall(a, "tall_dot");
  const double* right = matrix(b, "tall_dot", tall.rows);
  const int64_t columns = b.size(1), stride = round_up(columns, kPad), size = tall.columns * stride;
  Tensor out = torch::stable::new_empty(b, {tall.columns, columns});
  double* to = static_cast<double*>(out.mutable_data_ptr());
  const auto kernel = BKDFAST_CHOOSE(dot_rows);
  const auto partial = allocate(kGroups * size);
  const bool small = tall.rows * size < kSmall;
  torch::stable::parallel_for(0, kGroups, small ? kGroups : 1, [&](int64_t from, int64_t until) {
    const auto packed = std::make_unique<double[]>(columns == stride ? 0 : kChunk * stride);
    for (int64_t g = from; g < until; ++g) {
      const int64_t begin = g * tall.rows / kGroups, end = (g + 1) * tall.rows / kGroups;
      double* sum = partial.get() + g * size;
      if (begin == end) std::fill_n(sum, size, 0.0);
      kernel(tall.list(), right, columns, begin, end, stride, packed.get(), sum);
    }
  });
  torch::stable::parallel_for(0, tall.columns, small ? tall.columns : 64, [&](int64_t from, int64_t until) {
    double* sum = partial.get();
    for (int64_t i = from; i < until; ++i) {
      for (int64_t g = 1; g < kGroups; ++g)
        for (int64_t at = i * stride; at < i * stride + columns; ++at) sum[at] += sum[g * size + at];
      std::copy_n(sum + i * stride, columns, to + i * columns);
    }
  });
  return out;
}

Tensor tall_combine(std::vector<Tensor> a, Tensor c, std::optional<Tensor> x) {
  const Tall tall(a, "tall_combine");
  const double* factors = matrix(c, "tall_combine", tall.columns);
  const int64_t columns = c.size(1), stride = round_up(columns, kPad);
  const double* start = x ? matrix(*x, "tall_combine", tall.rows) : nullptr;
  STD_TORCH_CHECK(!x || x->size(1) == columns, "tall_combine: x and c must have the same number of columns");
  Tensor out = torch::stable::new_empty(c, {tall.rows, columns});
  double* to = static_cast<double*>(out.mutable_data_ptr());
  std::unique_ptr<double[]> padded;
  if (columns != stride) {
    padded = std::make_unique<double[]>(tall.columns * stride);
    for (int64_t i = 0; i < tall.columns; ++i) std::copy_n(factors + i * columns, columns, padded.get() + i * stride);
    factors = padded.get();
  }
  const auto kernel = BKDFAST_CHOOSE(combine_rows);
  const int64_t chunks = (tall.rows + kChunk - 1) / kChunk;
  const int64_t grain = kSmall / std::max<int64_t>(kChunk * tall.columns * stride, 1) + 1;
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t from, int64_t until) {
    for (int64_t chunk = from; chunk < until; ++chunk)
      kernel(tall.list(), factors, stride, start, to, columns, chunk * kChunk,
             std::min(tall.rows, (chunk + 1) * kChunk));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) {
  m.impl("tall_dot", TORCH_BOX(&tall_dot));
  m.impl("tall_combine", TORCH_BOX(&tall_combine));
}
