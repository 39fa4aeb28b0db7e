// delta_sketch on NVIDIA GPUs: Y = D X, Z = D^T Y, |D|^2 and the count of changed entries, D = W1 - W0
// (bkdfast/ops/delta_sketch.py).
//
// Floor: both matrices read once, 4 m n k flops. Two bfloat16 matrices at k = 16 are 16 float32 flops a byte, which is
// where the FMA rate and the memory rate of an H200 meet. Not measured yet.
//
// Z needs all of a row's Y, so a delta is needed twice. Rows are taken in panels of both matrices that fit the L2
// cache: three launches a panel, Y in parts (each block a slice of the columns), their sum, and Z in parts (each block
// a slice of the panel's rows; parts grow over the panels), so memory is read once and L2 a second time. Z's parts are
// summed at the end. Both products are the register tile of cosine_monitor: 8 x 4 sums a lane, 16 or 32 columns of X.
// The number of parts depends on the shape only and parts are summed in order: no float atomics, results repeat.
//
// Considered: a panel of a few rows held in shared memory by one block (reads X and updates all of Z for every
// panel: several times the bytes of the weights through L2); columns split over a cluster of blocks with X and Z on
// chip and only Y exchanged, which is the floor on sm_90 and later, and is worth writing once this one has been
// measured.
//
// Weights of one 16- or 32-bit dtype in rows of whole 16-byte vectors are the fast path; every other pair of dtypes and
// layouts is read cell by cell. Both weights float64: the same with float64 sums.

#include <algorithm>

#include "../common/device.cuh"

namespace bkdfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 16;               // of the reduction, staged by a warp at a time
constexpr int64_t kPanelBytes = 16 << 20;  // of both matrices; L2 has 40 MB and more
constexpr int64_t kPartBytes = 32 << 10;   // of both matrices, for one block; a guess, not measured yet

struct Any {};  // tag: dtypes and strides are looked up cell by cell

struct Matrix {
  const void* data;
  int64_t stride_row, stride_column;
  int type;  // ScalarType
};

struct Problem {
  Matrix base, tuned;
  const void* x;
  int64_t x_row, x_column;
  int64_t rows, columns, count;  // m, n, k
  int64_t panel, panel_rows;     // first row, number of rows
  int64_t first;                 // column of X of this pass
  int64_t per_part;              // columns of a Y part, or rows of a Z part
  uint32_t tiles;
  void* parts;
  const void* y;
  double* squares;  // one per block of the Y kernel, or null
  int64_t* changed;
};

__device__ __forceinline__ double read_any(const Matrix& w, int64_t row, int64_t column) {
  const int64_t at = row * w.stride_row + column * w.stride_column;
  switch (static_cast<ScalarType>(w.type)) {
    case ScalarType::Half:
      return widen<double>(static_cast<const __half*>(w.data)[at]);
    case ScalarType::BFloat16:
      return widen<double>(static_cast<const __nv_bfloat16*>(w.data)[at]);
    case ScalarType::Float:
      return static_cast<const float*>(w.data)[at];
    default:
      return static_cast<const double*>(w.data)[at];
  }
}

template <typename W>
struct Reader {
  static constexpr int kSize = Vector<W>::kSize;
};
template <>
struct Reader<Any> {
  static constexpr int kSize = 1;
};

// Neighbouring cells of the delta in one row, zeros beyond the matrix; also counts them where kStatistics.
template <typename W, typename Acc, bool kStatistics>
__device__ __forceinline__ void read_delta(const Problem& p, int64_t row, int64_t column, int64_t last_row,
                                           int64_t last_column, Acc* delta, double& square, int32_t& changed) {
  constexpr int kSize = Reader<W>::kSize;
#pragma unroll
  for (int i = 0; i < kSize; ++i) delta[i] = 0;
  if (row >= last_row || column >= last_column) return;
  const auto use = [&](auto base, auto tuned, Acc& to) {
    to = static_cast<Acc>(tuned - base);
    if constexpr (kStatistics) {
      changed += !(base == tuned);
      square = fma(static_cast<double>(to), static_cast<double>(to), square);
    }
  };
  if constexpr (std::is_same_v<W, Any>) {
    const double base = read_any(p.base, row, column), tuned = read_any(p.tuned, row, column);
    // Without float64 the wider dtype is float32; the difference of two of its values rounds once either way, except
    // that float64 holds differences which float32 overflows to infinity: the cast does the same.
    use(base, tuned, delta[0]);
  } else {
    const auto read = [&](const Matrix& w) {
      return *reinterpret_cast<const Vector<W>*>(static_cast<const W*>(w.data) + row * w.stride_row + column);
    };
    const Vector<W> base = read(p.base), tuned = read(p.tuned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) use(widen<float>(base.values[i]), widen<float>(tuned.values[i]), delta[i]);
  }
}

template <typename Acc>
__device__ __forceinline__ Acc fused(Acc a, Acc b, Acc c) {
  if constexpr (sizeof(Acc) == 4) return __fmaf_rn(a, b, c);
  if constexpr (sizeof(Acc) == 8) return fma(a, b, c);
}

template <typename Acc>
struct alignas(16) Four {
  Acc values[4];
};

template <typename Acc>
__device__ __forceinline__ const Four<Acc>& four(const Acc* at) {
  return *reinterpret_cast<const Four<Acc>*>(at);
}

// Row of the tile of a lane's i-th sums, so that its reads of the left matrix are 16 bytes and meet no bank twice.
template <int kAcross, bool kTransposed>
__device__ __forceinline__ int row_of(int lane, int i) {
  return kTransposed ? lane / kAcross * 8 + i : lane / kAcross + kWarp / kAcross * i;
}

// A warp's product: sums[i][j] += over kColumns of left(row i) * right(column j); 8 x 4 a lane, kAcross lanes over the
// columns and the others over rows. kTransposed: left is stored [reduction][row].
template <typename Acc, int kAcross, bool kTransposed, int kPitch>
__device__ __forceinline__ void multiply(const Acc* left, const Acc (*right)[kAcross * 4], Acc (&sums)[8][4],
                                         int lane) {
  const int tx = lane % kAcross;
#pragma unroll 1
  for (int c = 0; c < kColumns; c += 4) {
    if constexpr (kTransposed) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Acc* row = left + (c + e) * kPitch + row_of<kAcross, true>(lane, 0);
        const Four<Acc> b = four(&right[c + e][tx * 4]), a[2] = {four(row), four(row + 4)};
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = fused(a[i / 4].values[i % 4], b.values[j], sums[i][j]);
      }
    } else {
      const Four<Acc> b[4] = {four(&right[c][tx * 4]), four(&right[c + 1][tx * 4]), four(&right[c + 2][tx * 4]),
                              four(&right[c + 3][tx * 4])};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Four<Acc> a = four(left + row_of<kAcross, false>(lane, i) * kPitch + c);
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = fused(a.values[e], b[e].values[j], sums[i][j]);
      }
    }
  }
}

// kSize staged cells; in fours where there are as many.
template <typename Acc, int kSize>
__device__ __forceinline__ void stage(Acc* to, const Acc* cells) {
  if constexpr (kSize % 4 == 0) {
#pragma unroll
    for (int e = 0; e < kSize; e += 4)
      *reinterpret_cast<Four<Acc>*>(to + e) = {cells[e], cells[e + 1], cells[e + 2], cells[e + 3]};
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e) to[e] = cells[e];
  }
}

// The four warps' sums, in order, for store(row of the tile, column of the tile, sum). `shared` has been read.
template <typename Acc, int kAcross, bool kTransposed, typename Store>
__device__ __forceinline__ void add_warps(const Acc (&sums)[8][4], Acc* shared, int warp, int lane, Store store) {
  constexpr int kWide = kAcross * 4, kRows = kWarp / kAcross * 8;
  const int tx = lane % kAcross;
  __syncthreads();
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Acc& to = shared[row_of<kAcross, kTransposed>(lane, i) * kWide + tx * 4 + j];
          to = turn == 0 ? sums[i][j] : to + sums[i][j];
        }
    }
    __syncthreads();
  }
  for (int at = threadIdx.x; at < kRows * kWide; at += kThreads) store(at / kWide, at % kWide, shared[at]);
}

// parts[part][row of the panel][j]: the panel's Y from one slice of the columns; warps take 16 columns each in turn.
template <typename W, typename Acc, int kAcross>
__global__ void __launch_bounds__(kThreads) y_kernel(const Problem p) {
  constexpr int kWide = kAcross * 4, kRows = kWarp / kAcross * 8, kSize = Reader<W>::kSize;
  constexpr int kPieces = kColumns / kSize, kStep = kWarp / kPieces, kPitch = kColumns + 4;
  __shared__ __align__(16) Acc ds[kWarps][kRows][kPitch];
  __shared__ __align__(16) Acc xs[kWarps][kColumns][kWide];
  static_assert(sizeof(Acc) * kRows * kWide <= sizeof(ds));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = p.panel + blockIdx.x % p.tiles * int64_t{kRows}, last_row = p.panel + p.panel_rows;
  const int64_t part = blockIdx.x / p.tiles;
  const int64_t last_column = min((part + 1) * p.per_part, p.columns);
  const Acc* x = static_cast<const Acc*>(p.x);
  Acc sums[8][4] = {};
  double square = 0;
  int32_t changed = 0;  // of this thread: at most the cells of its part
  for (int64_t from = part * p.per_part + warp * kColumns; from < last_column; from += kWarps * kColumns) {
    __syncwarp();  // a warp reads only what it staged itself
#pragma unroll(kSize == 1 ? 2 : kRows / kStep)
    for (int i = 0; i < kRows / kStep; ++i) {
      const int to = lane / kPieces + i * kStep, column = lane % kPieces * kSize;
      Acc delta[kSize];
      read_delta<W, Acc, true>(p, row + to, from + column, last_row, last_column, delta, square, changed);
      stage<Acc, kSize>(&ds[warp][to][column], delta);
    }
#pragma unroll
    for (int i = 0; i < kColumns * kWide / kWarp; ++i) {
      const int column = (lane + i * kWarp) / kWide, j = (lane + i * kWarp) % kWide;
      const bool exists = from + column < last_column && p.first + j < p.count;
      xs[warp][column][j] = exists ? x[(from + column) * p.x_row + (p.first + j) * p.x_column] : Acc(0);
    }
    __syncwarp();
    multiply<Acc, kAcross, false, kPitch>(&ds[warp][0][0], xs[warp], sums, lane);
  }
  Acc* parts = static_cast<Acc*>(p.parts) + part * p.panel_rows * kWide;
  add_warps<Acc, kAcross, false>(sums, &ds[0][0][0], warp, lane, [&](int i, int j, Acc sum) {
    if (row + i < last_row) parts[(row - p.panel + i) * kWide + j] = sum;
  });
  if (p.squares == nullptr) return;
  __shared__ double square_of[kWarps];
  __shared__ int64_t changed_of[kWarps];
  square = warp_sum(square);
  const int64_t counted = warp_sum(int64_t{changed});
  if (lane == 0) square_of[warp] = square, changed_of[warp] = counted;
  __syncthreads();
  if (threadIdx.x == 0) {
    p.squares[blockIdx.x] = ((square_of[0] + square_of[1]) + square_of[2]) + square_of[3];
    p.changed[blockIdx.x] = changed_of[0] + changed_of[1] + changed_of[2] + changed_of[3];
  }
}

// parts[part][column][j] += the panel's share of Z from one slice of its rows; warps take 16 rows each in turn.
template <typename W, typename Acc, int kAcross>
__global__ void __launch_bounds__(kThreads) z_kernel(const Problem p) {
  constexpr int kWide = kAcross * 4, kRows = kWarp / kAcross * 8, kSize = Reader<W>::kSize;
  constexpr int kPieces = kRows / kSize, kPitch = kRows + 4;
  __shared__ __align__(16) Acc ds[kWarps][kColumns][kPitch];
  __shared__ __align__(16) Acc ys[kWarps][kColumns][kWide];
  static_assert(sizeof(Acc) * kRows * kWide <= sizeof(ds));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = blockIdx.x % p.tiles * int64_t{kRows}, part = blockIdx.x / p.tiles;
  const int64_t last_row = p.panel + min((part + 1) * p.per_part, p.panel_rows);
  const Acc* y = static_cast<const Acc*>(p.y);
  Acc sums[8][4] = {};
  double square = 0;
  int32_t changed = 0;
  for (int64_t from = p.panel + part * p.per_part + warp * kColumns; from < last_row; from += kWarps * kColumns) {
    __syncwarp();
#pragma unroll(kSize == 1 ? 2 : kColumns * kPieces / kWarp)
    for (int i = 0; i < kColumns * kPieces / kWarp; ++i) {
      const int to = (lane + i * kWarp) / kPieces, at = (lane + i * kWarp) % kPieces * kSize;
      Acc delta[kSize];
      read_delta<W, Acc, false>(p, from + to, column + at, last_row, p.columns, delta, square, changed);
      stage<Acc, kSize>(&ds[warp][to][at], delta);
    }
#pragma unroll
    for (int i = 0; i < kColumns * kWide / kWarp; ++i) {
      const int to = (lane + i * kWarp) / kWide, j = (lane + i * kWarp) % kWide;
      const bool exists = from + to < last_row && p.first + j < p.count;
      ys[warp][to][j] = exists ? y[(from + to) * p.count + p.first + j] : Acc(0);
    }
    __syncwarp();
    multiply<Acc, kAcross, true, kPitch>(&ds[warp][0][0], ys[warp], sums, lane);
  }
  Acc* parts = static_cast<Acc*>(p.parts) + part * p.columns * kWide;
  add_warps<Acc, kAcross, true>(sums, &ds[0][0][0], warp, lane, [&](int i, int j, Acc sum) {
    if (column + i >= p.columns) return;
    Acc& to = parts[(column + i) * kWide + j];
    to = p.panel == 0 ? sum : to + sum;
  });
}

// out[row][first + j] = sum over the parts of parts[part][row][j], in order.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Acc* parts, int64_t count_parts, int64_t rows, int wide, Acc* out, int64_t count, int64_t first) {
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t row = at / wide, column = first + at % wide;
  if (row >= rows || column >= count) return;
  Acc sum = parts[at];
  for (int64_t part = 1; part < count_parts; ++part) sum += parts[part * rows * wide + at];
  out[row * count + column] = sum;
}

__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const double* squares, const int64_t* changed, int64_t blocks, double* square, int64_t* count) {
  __shared__ double square_of[kWarps];
  __shared__ int64_t changed_of[kWarps];
  double mine = 0;
  int64_t counted = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) mine += squares[i], counted += changed[i];
  mine = warp_sum(mine);
  counted = warp_sum(counted);
  if (threadIdx.x % kWarp == 0) square_of[threadIdx.x / kWarp] = mine, changed_of[threadIdx.x / kWarp] = counted;
  __syncthreads();
  if (threadIdx.x != 0) return;
  *square = ((square_of[0] + square_of[1]) + square_of[2]) + square_of[3];
  *count = changed_of[0] + changed_of[1] + changed_of[2] + changed_of[3];
}

// How a shape is cut: panels of rows, and parts of the columns (Y) and of a panel's rows (Z).
struct Plan {
  int64_t panel, panels, y_tiles, y_part, y_parts, z_tiles, z_part, z_parts;

  Plan(int64_t m, int64_t n, int64_t bytes, int64_t tile) {
    const int64_t step = kWarps * kColumns;
    const auto whole = [&](int64_t size) { return std::max(size / step * step, step); };
    panel = std::min(whole(kPanelBytes / (n * bytes)), ceil_div(m, step) * step);
    panels = ceil_div(m, panel);
    y_tiles = ceil_div(panel, tile), z_tiles = ceil_div(n, tile);
    y_part = z_part = whole(kPartBytes / (tile * bytes));
    y_parts = ceil_div(n, y_part), z_parts = ceil_div(panel, z_part);
  }
};

template <typename W, typename Acc, int kAcross>
void pass(const Launcher& launch, Problem p, const Plan& plan, const Tensor& y, const Tensor& z, double* squares,
          int64_t* changed) {
  constexpr int kWide = kAcross * 4;
  const ScalarType type = y.scalar_type();
  const Tensor y_parts = torch::stable::new_empty(y, {plan.y_parts, plan.panel, kWide}, type);
  const Tensor z_parts = torch::stable::new_empty(y, {plan.z_parts, p.columns, kWide}, type);
  Acc* y_data = static_cast<Acc*>(y.mutable_data_ptr());
  p.y = y_data;
  for (int64_t i = 0; i < plan.panels; ++i) {
    p.panel = i * plan.panel, p.panel_rows = std::min(plan.panel, p.rows - p.panel);
    p.parts = y_parts.mutable_data_ptr();
    p.tiles = static_cast<uint32_t>(plan.y_tiles), p.per_part = plan.y_part;
    p.squares = squares ? squares + i * plan.y_tiles * plan.y_parts : nullptr;
    p.changed = squares ? changed + i * plan.y_tiles * plan.y_parts : nullptr;
    launch(y_kernel<W, Acc, kAcross>, plan.y_tiles * plan.y_parts, kThreads, p);
    launch(sum_kernel<Acc>, ceil_div(p.panel_rows * kWide, kThreads), kThreads, static_cast<const Acc*>(p.parts),
           plan.y_parts, p.panel_rows, kWide, y_data + p.panel * p.count, p.count, p.first);
    p.parts = z_parts.mutable_data_ptr();
    p.tiles = static_cast<uint32_t>(plan.z_tiles), p.per_part = plan.z_part;
    launch(z_kernel<W, Acc, kAcross>, plan.z_tiles * plan.z_parts, kThreads, p);
  }
  launch(sum_kernel<Acc>, ceil_div(p.columns * kWide, kThreads), kThreads,
         static_cast<const Acc*>(z_parts.const_data_ptr()), plan.z_parts, p.columns, kWide,
         static_cast<Acc*>(z.mutable_data_ptr()), p.count, p.first);
}

template <typename W, typename Acc>
void run(const Launcher& launch, Problem p, int64_t bytes, const Tensor& y, const Tensor& z, const Tensor& square,
         const Tensor& changed) {
  const auto tile = [](int64_t across) { return kWarp / across * 8; };
  int64_t blocks = 0;
  Tensor squares, counts;
  for (int64_t first = 0; first < std::max<int64_t>(p.count, 1); first += 32) {
    // A float64 tile of 64 rows does not fit 48 KB of shared memory.
    const bool narrow = sizeof(Acc) == 4 && p.count - first <= 16;
    const Plan plan(p.rows, p.columns, bytes, tile(narrow ? 4 : 8));
    p.first = first;
    if (first == 0) {
      blocks = plan.panels * plan.y_tiles * plan.y_parts;
      squares = torch::stable::new_empty(y, {blocks}, ScalarType::Double);
      counts = torch::stable::new_empty(y, {blocks}, ScalarType::Long);
    }
    double* at = first == 0 ? static_cast<double*>(squares.mutable_data_ptr()) : nullptr;
    int64_t* counted = static_cast<int64_t*>(counts.mutable_data_ptr());
    if constexpr (sizeof(Acc) == 4) {
      if (narrow) pass<W, Acc, 4>(launch, p, plan, y, z, at, counted);
    }
    if (!narrow) pass<W, Acc, 8>(launch, p, plan, y, z, at, counted);
  }
  launch(statistics_kernel, 1, kThreads, static_cast<const double*>(squares.const_data_ptr()),
         static_cast<const int64_t*>(counts.const_data_ptr()), blocks, static_cast<double*>(square.mutable_data_ptr()),
         static_cast<int64_t*>(changed.mutable_data_ptr()));
}

Matrix matrix_of(const Tensor& w) {
  return {w.const_data_ptr(), w.stride(0), w.stride(1), static_cast<int>(w.scalar_type())};
}

bool weight_type(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float ||
         type == ScalarType::Double;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_sketch(Tensor w0, Tensor w1, Tensor x) {
  STD_TORCH_CHECK(w0.dim() == 2 && w1.dim() == 2 && w0.size(0) == w1.size(0) && w0.size(1) == w1.size(1),
                  "delta_sketch: the weights must be two matrices of one shape");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == w0.size(1), "delta_sketch: x must be [n, k] with n = ", w0.size(1));
  STD_TORCH_CHECK(weight_type(w0.scalar_type()) && weight_type(w1.scalar_type()),
                  "delta_sketch: the weights must be bfloat16, float16, float32 or float64");
  const bool doubles = w0.scalar_type() == ScalarType::Double && w1.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(x.scalar_type() == (doubles ? ScalarType::Double : ScalarType::Float),
                  "delta_sketch: x must be float32 (float64 when both weights are)");
  STD_TORCH_CHECK(w1.get_device_index() == w0.get_device_index() && x.get_device_index() == w0.get_device_index(),
                  "delta_sketch: all tensors must be on one device");
  Problem p{};
  p.rows = w0.size(0), p.columns = w0.size(1), p.count = x.size(1);
  if (p.rows == 0 || p.columns == 0)
    return {torch::stable::new_zeros(x, {p.rows, p.count}), torch::stable::new_zeros(x, {p.columns, p.count}),
            torch::stable::new_zeros(x, {}, ScalarType::Double), torch::stable::new_zeros(x, {}, ScalarType::Long)};
  p.base = matrix_of(w0), p.tuned = matrix_of(w1);
  p.x = x.const_data_ptr(), p.x_row = x.stride(0), p.x_column = x.stride(1);
  const Tensor y = torch::stable::new_empty(x, {p.rows, p.count}),
               z = torch::stable::new_empty(x, {p.columns, p.count});
  const Tensor square = torch::stable::new_empty(x, {}, ScalarType::Double);
  const Tensor changed = torch::stable::new_empty(x, {}, ScalarType::Long);
  const Launcher launch("delta_sketch", w0);
  const int64_t bytes = w0.element_size() + w1.element_size();
  const int64_t vector = 16 / w0.element_size();
  bool whole = w0.scalar_type() == w1.scalar_type() && !doubles && p.columns % vector == 0;
  for (const Matrix* w : {&p.base, &p.tuned})
    whole = whole && w->stride_column == 1 && (p.rows == 1 || w->stride_row % vector == 0) && aligned(w->data);
  if (doubles) {
    run<Any, double>(launch, p, bytes, y, z, square, changed);
  } else if (!whole) {
    run<Any, float>(launch, p, bytes, y, z, square, changed);
  } else if (w0.scalar_type() == ScalarType::BFloat16) {
    run<__nv_bfloat16, float>(launch, p, bytes, y, z, square, changed);
  } else if (w0.scalar_type() == ScalarType::Half) {
    run<__half, float>(launch, p, bytes, y, z, square, changed);
  } else {
    run<float, float>(launch, p, bytes, y, z, square, changed);
  }
  return {y, z, square, changed};
}

}  // namespace
}  // namespace bkdfast

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CUDA, m) { m.impl("delta_sketch", TORCH_BOX(&bkdfast::delta_sketch)); }
