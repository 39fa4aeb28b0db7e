// patch_heads on NVIDIA GPUs: in-place edits of [B, T, S*W] activations by an edit table (bkdfast/ops/patch_heads.py).
//
// Floor: the edited cells, read and written once; at decode (T = 1) the latency of one launch and of a chain of four
// dependent reads: table, offset, cell or source, store. Not measured yet.
//
// A warp owns the cells of one row, one chunk of tokens and one range of slices, and walks the whole table in order: 32
// edits at a time, one a lane, are tested in registers, a ballot leaves those that touch the warp's cells, and the warp
// applies them one after another. No cell has two owners, so edits that meet apply in table order whatever their rows
// and origins, without barriers, shared memory, atomics or a workspace. Empty edits cost their share of one test.
// The price: every warp reads the table (28 bytes an edit, mostly from L1); tables of very many edits for few cells
// would want a sort by row.
//
// Considered: a warp for each edit (no order where edits meet); a block for each row (decode would use B of the
// multiprocessors only); the table in shared memory (a barrier and a copy before the first test).
//
// Nothing on the device can raise: an edit that addresses no row, origin or slice is skipped, and so are its tokens
// whose source row does not exist.

#include <algorithm>

#include "../common/device.cuh"

namespace bkdfast {
namespace {

// Columns of the table, in the order of bkdfast/ops/edit_table.py.
enum Column { kRow, kOrigin, kStart, kStop, kSlice, kSource, kStride, kColumns };

constexpr int kWarpsPerBlock = 4;
constexpr int64_t kTokensPerWarp = 64;
constexpr int64_t kMostWarps = 1 << 14;

template <typename T, typename Acc>
struct Problem {
  T* z;
  int64_t rows, tokens, slices, width;
  int64_t stride_row, stride_token, stride_cell;
  const int32_t* table;
  const Acc* coefficients;
  int64_t edits;
  const Acc* source;
  int64_t sources;
  const int32_t* offset;
  int64_t origins, offset_stride, offset_step;
  uint32_t chunks, groups;  // of tokens; of slices
  int64_t slices_per_warp;
};

// One edit as a warp's row and chunk see it. Dead: begin >= end.
template <typename Acc>
struct Edit {
  int32_t begin, end;  // tokens of the chunk
  int64_t entry;       // source row of the chunk's first token
  int32_t stride, slice;
  Acc a, b;
};

template <typename T, typename Acc>
__device__ __forceinline__ Edit<Acc> read_edit(const Problem<T, Acc>& p, int64_t e, int64_t row, int64_t first_token,
                                               int64_t first_slice) {
  Edit<Acc> edit{};
  if (e >= p.edits) return edit;
  const int32_t* at = p.table + e * kColumns;
  const int32_t start = at[kStart], stop = at[kStop], origin = at[kOrigin], slice = at[kSlice], on = at[kRow];
  const bool live = start < stop && (on == row || on == -1) && origin >= 0 && origin < p.origins &&
                    slice >= first_slice && slice < first_slice + p.slices_per_warp && slice < p.slices;
  if (!live) return edit;
  // 64-bit: start - first can leave the 32-bit range when a span is open.
  const int64_t first = p.offset[origin * p.offset_stride + row * p.offset_step];
  const int64_t position = first + first_token, tokens = min(p.tokens - first_token, kTokensPerWarp);
  edit.begin = static_cast<int32_t>(min(max(start - position, int64_t{0}), tokens));
  edit.end = static_cast<int32_t>(max(min(stop - position, tokens), int64_t{0}));
  edit.stride = at[kStride];
  edit.entry = at[kSource] + edit.stride * (position - start);
  edit.slice = slice;
  edit.a = p.coefficients[2 * e];
  edit.b = p.coefficients[2 * e + 1];
  return edit;
}

template <typename Acc>
__device__ __forceinline__ Edit<Acc> broadcast(const Edit<Acc>& edit, int from) {
  return {__shfl_sync(kFullWarp, edit.begin, from), __shfl_sync(kFullWarp, edit.end, from),
          __shfl_sync(kFullWarp, edit.entry, from), __shfl_sync(kFullWarp, edit.stride, from),
          __shfl_sync(kFullWarp, edit.slice, from), __shfl_sync(kFullWarp, edit.a, from),
          __shfl_sync(kFullWarp, edit.b, from)};
}

// kSize neighbouring cells of one token: 16 bytes, or one cell of any layout. 0 does not read what it scales.
template <typename T, typename Acc, int kSize>
__device__ __forceinline__ void edit_cells(T* cells, const Acc* from, Acc a, Acc b) {
  struct alignas(sizeof(T) * kSize) Cells {
    T values[kSize];
  };
  struct alignas(sizeof(Acc) * kSize > 16 ? 16 : sizeof(Acc) * kSize) Added {
    Acc values[kSize];
  };
  Acc result[kSize] = {};
  if (a != 0) {
    const Cells old = *reinterpret_cast<const Cells*>(cells);
#pragma unroll
    for (int i = 0; i < kSize; ++i) result[i] = a * widen<Acc>(old.values[i]);
  }
  if (b != 0) {
    const Added added = *reinterpret_cast<const Added*>(from);
    // Not 0 + b*s where a is 0: that would turn -0 into +0.
#pragma unroll
    for (int i = 0; i < kSize; ++i) result[i] = a != 0 ? result[i] + b * added.values[i] : b * added.values[i];
  }
  Cells now;
#pragma unroll
  for (int i = 0; i < kSize; ++i) now.values[i] = narrow<T>(result[i]);
  *reinterpret_cast<Cells*>(cells) = now;
}

// Lanes lie over 2^shift vectors of a slice first, then over tokens.
template <typename T, typename Acc, int kSize>
__device__ __forceinline__ void apply(const Problem<T, Acc>& p, const Edit<Acc>& edit, T* chunk, int lane, int shift) {
  const int64_t vectors = p.width / kSize;
  const int across = 1 << shift;
  T* slice = chunk + edit.slice * p.width * p.stride_cell;
  for (int t = edit.begin + (lane >> shift); t < edit.end; t += kWarp >> shift) {
    const int64_t entry = edit.entry + static_cast<int64_t>(edit.stride) * t;
    if (edit.b != 0 && (entry < 0 || entry >= p.sources)) continue;
    T* cells = slice + t * p.stride_token;
    const Acc* from = p.source + (edit.b != 0 ? entry * p.width : 0);
    for (int64_t v = lane & (across - 1); v < vectors; v += across)
      edit_cells<T, Acc, kSize>(cells + v * kSize * p.stride_cell, from + v * kSize, edit.a, edit.b);
  }
}

template <typename T, typename Acc, int kSize>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) patch_heads_kernel(const Problem<T, Acc> p) {
  const uint32_t warp = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  // Neighbouring warps share a row, hence the table's lines and the row's offsets.
  const int64_t group = warp % p.groups, chunk = warp / p.groups % p.chunks, row = warp / p.groups / p.chunks;
  if (row >= p.rows) return;  // whole warps
  int shift = 0;
  while (shift < 5 && (1 << shift) < p.width / kSize) ++shift;
  T* cells = p.z + row * p.stride_row + chunk * kTokensPerWarp * p.stride_token;
  for (int64_t e = 0; e < p.edits; e += kWarp) {
    const Edit<Acc> mine = read_edit(p, e + lane, row, chunk * kTokensPerWarp, group * p.slices_per_warp);
    for (unsigned left = __ballot_sync(kFullWarp, mine.begin < mine.end); left != 0; left &= left - 1) {
      const Edit<Acc> edit = broadcast(mine, __ffs(left) - 1);
      apply<T, Acc, kSize>(p, edit, cells, lane, shift);
      __syncwarp();  // the next edit may meet these cells in other lanes
    }
  }
}

template <typename T, typename Acc>
void run(const Tensor& z, const Tensor& table, const Tensor& coefficients, const Tensor& source, const Tensor& offset) {
  constexpr int kSize = Vector<T>::kSize;
  Problem<T, Acc> p{};
  p.z = static_cast<T*>(z.mutable_data_ptr());
  p.rows = z.size(0), p.tokens = z.size(1), p.width = source.size(1), p.slices = z.size(2) / p.width;
  p.stride_row = z.stride(0), p.stride_token = z.stride(1), p.stride_cell = z.stride(2);
  p.table = static_cast<const int32_t*>(table.const_data_ptr());
  p.coefficients = static_cast<const Acc*>(coefficients.const_data_ptr());
  p.edits = table.size(0);
  p.source = static_cast<const Acc*>(source.const_data_ptr());
  p.sources = source.size(0);
  p.offset = static_cast<const int32_t*>(offset.const_data_ptr());
  p.origins = offset.size(0), p.offset_stride = offset.stride(0), p.offset_step = offset.stride(1);
  if (p.rows == 0 || p.tokens == 0 || p.slices == 0 || p.edits == 0) return;
  const int64_t chunks = ceil_div(p.tokens, kTokensPerWarp);
  p.slices_per_warp = std::min(ceil_div(p.rows * chunks * p.slices, kMostWarps), p.slices);
  const int64_t groups = ceil_div(p.slices, p.slices_per_warp), warps = p.rows * chunks * groups;
  STD_TORCH_CHECK(warps <= INT32_MAX, "patch_heads: z is too large for one launch; split its rows");
  p.chunks = static_cast<uint32_t>(chunks), p.groups = static_cast<uint32_t>(groups);
  const bool whole = p.stride_cell == 1 && p.width % kSize == 0 && aligned(p.z) && aligned(p.source) &&
                     (p.rows == 1 || p.stride_row % kSize == 0) && (p.tokens == 1 || p.stride_token % kSize == 0);
  const Launcher launch("patch_heads", z);
  launch(whole ? patch_heads_kernel<T, Acc, kSize> : patch_heads_kernel<T, Acc, 1>, ceil_div(warps, kWarpsPerBlock),
         kWarpsPerBlock * kWarp, p);
}

void patch_heads(Tensor z, Tensor table, Tensor coefficients, Tensor source, Tensor offset) {
  STD_TORCH_CHECK(z.dim() == 3, "patch_heads: z must be [B, T, S*W]");
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(1) == kColumns && table.scalar_type() == ScalarType::Int && table.is_contiguous(),
      "patch_heads: table must be a contiguous [E, 7] int32 tensor");
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(0) == table.size(0) && coefficients.size(1) == 2 &&
                      coefficients.is_contiguous(),
                  "patch_heads: coefficients must be a contiguous [E, 2] tensor");
  STD_TORCH_CHECK(source.dim() == 2 && source.is_contiguous() && source.size(1) > 0 && z.size(2) % source.size(1) == 0,
                  "patch_heads: source must be a contiguous [rows, W] tensor with W dividing z's last dimension");
  STD_TORCH_CHECK(offset.dim() == 2 && offset.size(1) >= z.size(0) && offset.scalar_type() == ScalarType::Int,
                  "patch_heads: offset must be [origins, >=B] int32");
  for (const Tensor* other : {&table, &coefficients, &source, &offset})
    STD_TORCH_CHECK(other->get_device_index() == z.get_device_index(),
                    "patch_heads: all tensors must be on z's device; move them there");
  for (int64_t d = 0; d < 3; ++d)
    STD_TORCH_CHECK(z.stride(d) != 0 || z.size(d) <= 1, "patch_heads: z is expanded, its rows share memory; clone it");
  const ScalarType acc = z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(coefficients.scalar_type() == acc && source.scalar_type() == acc,
                  "patch_heads: coefficients and source must be float32 (float64 when z is)");
  switch (z.scalar_type()) {
    case ScalarType::Float:
      return run<float, float>(z, table, coefficients, source, offset);
    case ScalarType::Double:
      return run<double, double>(z, table, coefficients, source, offset);
    case ScalarType::BFloat16:
      return run<__nv_bfloat16, float>(z, table, coefficients, source, offset);
    case ScalarType::Half:
      return run<__half, float>(z, table, coefficients, source, offset);
    default:
      STD_TORCH_CHECK(false, "patch_heads: z must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace
}  // namespace bkdfast

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CUDA, m) { m.impl("patch_heads", TORCH_BOX(&bkdfast::patch_heads)); }
