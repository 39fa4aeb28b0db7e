// tall_dot, tall_combine and cholesky_inverse on the CPU (bkdfast/ops/tall_products.py): A^T B, A C and X - A C of tall
// float64 matrices, and what makes their columns orthonormal.
//
// A is a list of blocks of columns, each stored by rows, so that a basis grows without being copied. Vectors run along
// the columns of B and C, entries of A are broadcast.
//
// Sums: rows of A^T B are cut into kGroups runs, whose sums are added in their order; an entry of A C is one sum. No
// sum depends on the number of threads, nor does any bit of the result; it does depend on the instruction set.
//
// Floor: 2 n P q flops. One thread of a Xeon with AVX-512 (fma peak 106 GFLOP/s), n = 4096, nothing in L2,
// milliseconds; torch.mm is as fast on one thread, and its bits change with the number of threads:
//
//   P x q           16 x 16   48 x 16   128 x 32   80 x 80   400 x 80
//   A^T B             0.07      0.14       0.61      0.82       3.7
//     torch.mm        0.07      0.13       0.53      0.75       3.7
//   X - A C           0.08      0.15       0.60      0.82       3.7
//     torch.addmm     0.09      0.15       0.53      0.86       3.5
//
// Lost: fetching A ahead in A C (in A^T B it gains 1.2 times at 400 x 80). kSmall = 2^23: leading_triplets of 4096 x
// 4096 with two threads is 2 to 7% slower at k = 8 and 20, and 1.3 times faster where another process holds one of the
// two cores. 2^18: no faster, and there five times slower.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPad = 8;     // columns are padded to the widest vector
constexpr int64_t kChunk = 64;  // rows that are in the cache
constexpr int64_t kGroups = 8;  // partial sums of A^T B, whatever the number of threads
// Multiplications that one thread does, in 0.05 ms. A second thread gains little there, and where another process holds
// its core, it is waited for a few milliseconds.
constexpr int64_t kSmall = int64_t{1} << 21;

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

  Tall(const std::vector<Tensor>& parts, int64_t rows, const char* op) : rows(rows) {
    for (const Tensor& part : parts) add(matrix(part, op, rows), part.size(1));
  }
  void add(const double* data, int64_t width) {
    blocks.push_back({data, width});
    columns += width;
  }
  Blocks list() const { return {blocks.data(), static_cast<int64_t>(blocks.size())}; }
};

int64_t rows_of(const std::vector<Tensor>& a, const char* op) {
  STD_TORCH_CHECK(!a.empty() && a[0].dim() == 2, op, ": a must have one block of columns at least");
  return a[0].size(0);
}

// A^T B [P, columns], chunk after chunk of B's rows, each of which `make(from, to)` computes first.
template <typename Make>
void products(const Tall& a, const double* b, int64_t columns, bool small, double* out, const Make& make) {
  const int64_t stride = round_up(columns, kPad), size = a.columns * stride;
  const auto kernel = BKDFAST_CHOOSE(dot_rows);
  const auto partial = allocate(kGroups * size);
  torch::stable::parallel_for(0, kGroups, small ? kGroups : 1, [&](int64_t from, int64_t until) {
    const auto packed = std::make_unique<double[]>(columns == stride ? 0 : kChunk * stride);
    for (int64_t g = from; g < until; ++g) {
      const int64_t begin = g * a.rows / kGroups, end = (g + 1) * a.rows / kGroups;
      double* sum = partial.get() + g * size;
      if (begin == end) std::fill_n(sum, size, 0.0);
      for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t stop = std::min(end, chunk + kChunk);
        make(chunk, stop);
        kernel(a.list(), b, columns, chunk, stop, stride, packed.get(), sum, chunk == begin);
      }
    }
  });
  torch::stable::parallel_for(0, a.columns, small ? a.columns : 64, [&](int64_t from, int64_t until) {
    double* sum = partial.get();
    for (int64_t i = from; i < until; ++i) {
      for (int64_t g = 1; g < kGroups; ++g)
        for (int64_t at = i * stride; at < i * stride + columns; ++at) sum[at] += sum[g * size + at];
      std::copy_n(sum + i * stride, columns, out + i * columns);
    }
  });
}

Tensor tall_dot(std::vector<Tensor> a, Tensor b) {
  const Tall left(a, rows_of(a, "tall_dot"), "tall_dot");
  const double* right = matrix(b, "tall_dot", left.rows);
  Tensor out = torch::stable::new_empty(b, {left.columns, b.size(1)});
  const bool small = left.rows * left.columns * b.size(1) < kSmall;
  products(left, right, b.size(1), small, static_cast<double*>(out.mutable_data_ptr()), [](int64_t, int64_t) {});
  return out;
}

std::tuple<Tensor, Tensor> tall_combine(std::vector<Tensor> a, Tensor c, std::optional<Tensor> x, std::vector<Tensor> b,
                                        bool dot) {
  const char* op = "tall_combine";
  const Tall left(a, rows_of(a, op), op);
  const double* factors = matrix(c, op, left.columns);
  const int64_t columns = c.size(1), stride = round_up(columns, kPad);
  const double* start = x ? matrix(*x, op, left.rows) : nullptr;
  STD_TORCH_CHECK(!x || x->size(1) == columns, op, ": x and c must have the same number of columns");
  Tall other(b, left.rows, op);
  Tensor y = torch::stable::new_empty(c, {left.rows, columns});
  double* to = static_cast<double*>(y.mutable_data_ptr());
  other.add(to, columns);
  Tensor out = torch::stable::new_empty(c, {dot ? other.columns : 0, columns});
  std::unique_ptr<double[]> padded;
  if (columns != stride) {
    padded = std::make_unique<double[]>(left.columns * stride);
    for (int64_t i = 0; i < left.columns; ++i) std::copy_n(factors + i * columns, columns, padded.get() + i * stride);
    factors = padded.get();
  }
  const auto kernel = BKDFAST_CHOOSE(combine_rows);
  const auto make = [&](int64_t from, int64_t until) {
    kernel(left.list(), factors, stride, start, to, columns, from, until);
  };
  const int64_t work = left.rows * columns * (left.columns + (dot ? other.columns : 0));
  if (dot) {
    products(other, to, columns, work < kSmall, static_cast<double*>(out.mutable_data_ptr()), make);
    return {y, out};
  }
  const int64_t chunks = (left.rows + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, work < kSmall ? chunks : 1, [&](int64_t from, int64_t until) {
    for (int64_t chunk = from; chunk < until; ++chunk) make(chunk * kChunk, std::min(left.rows, (chunk + 1) * kChunk));
  });
  return {y, out};
}

// The upper triangles of U with `u` = U^T U, in place, and of its inverse; false where there is none.
bool factor(double* u, double* inverse, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double pivot = u[i * n + i];
    if (!(pivot > 0)) return false;
    for (int64_t j = i; j < n; ++j) u[i * n + j] /= std::sqrt(pivot);
    for (int64_t k = i + 1; k < n; ++k)
      for (int64_t j = k; j < n; ++j) u[k * n + j] -= u[i * n + k] * u[i * n + j];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    inverse[i * n + i] = 1;
    for (int64_t k = i + 1; k < n; ++k)
      for (int64_t j = k; j < n; ++j) inverse[i * n + j] -= u[i * n + k] * inverse[k * n + j];
    for (int64_t j = i; j < n; ++j) inverse[i * n + j] /= u[i * n + i];
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor> cholesky_inverse(Tensor gram) {
  const char* op = "cholesky_inverse";
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1), op, ": gram must be a square matrix");
  const int64_t n = gram.size(0);
  const double* from = matrix(gram, op, n);
  Tensor upper = torch::stable::new_empty(gram, {n, n});
  Tensor inverse = torch::stable::new_empty(gram, {n, n});
  Tensor skewed = torch::stable::new_empty(gram, {});
  double* u = static_cast<double*>(upper.mutable_data_ptr());
  double* v = static_cast<double*>(inverse.mutable_data_ptr());
  const auto size = allocate(n);
  for (int64_t i = 0; i < n; ++i) size[i] = std::sqrt(from[i * n + i]);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) u[i * n + j] = j < i ? 0 : from[i * n + j] / size[j] / size[i];
  std::fill_n(v, n * n, 0.0);
  double squares = std::numeric_limits<double>::infinity();
  if (factor(u, v, n)) {
    squares = 0;
    for (int64_t i = 0; i < n * n; ++i) squares += v[i] * v[i];
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) {
      u[i * n + j] *= size[j];
      v[i * n + j] /= size[i];
    }
  *static_cast<double*>(skewed.mutable_data_ptr()) = std::numeric_limits<double>::epsilon() * squares;
  return {upper, inverse, skewed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) {
  m.impl("tall_dot", TORCH_BOX(&tall_dot));
  m.impl("tall_combine", TORCH_BOX(&tall_combine));
  m.impl("cholesky_inverse", TORCH_BOX(&cholesky_inverse));
}
