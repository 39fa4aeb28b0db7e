// cosine_monitor on NVIDIA GPUs: cosines of tokens to directions, reduced per segment (bkdfast/ops/cosine_monitor.py).
//
// Floor: x [M, N, D] and directions [M, K, D] read once, 2 M N K D flops in float32. Not measured yet.
// x of any other layout than rows of 16-byte vectors, and float64, goes through a float32 copy.
//
// Decode (N <= 16): memory-bound on the directions. A block takes four of them and up to 16 tokens; a thread reads the
// same 16 bytes of each direction and the cells of x beside them, so directions come from memory once, x from L2 for
// every four directions, and nothing is staged. All blocks of the model in one launch.
//
// Prefill: a block's eight warps hold 32 tokens x 32 directions each in registers (8 x 4 a lane) and split D eight ways
// (few tokens: more blocks), or 128 tokens four ways and D two ways (many tokens: fewer reads of the directions).
// Chunks of 16 columns are staged in shared memory; the next one is on its way to registers while a chunk is
// multiplied: 12 16-byte reads of shared memory for 128 FMAs. Partial sums of the warps are added in a fixed order.
// Plain FMA: it is the bound from some 15 directions on. Tensor cores with directions in three bfloat16 parts would be
// as exact for 16-bit x; TF32 would not be.
//
// In both, |x|^2 comes from the values staged anyway. Minimum and maximum reach the state through integer atomics, so
// results do not depend on the order of blocks. norm_monitor is the same launch: at prefill the block that has just
// read a tile of x normalises its rows from the caches; at decode further blocks take a row each.

#include <algorithm>
#include <cfloat>

#include "cosine_monitor.cuh"

namespace bkdfast {
namespace {

enum TokenRow { kSegment, kRange, kPosition };  // of bkdfast/ops/monitor_state.py

struct Monitor {
  const void* x;
  int64_t blocks, tokens, width, stride_block, stride_token, stride_cell;
  const float* directions;  // from the first block on; also the state
  int64_t count;
  const int32_t* token;
  int64_t token_row, token_step;
  const float* ranges;
  float* extremes;
  int32_t* counts;
  int64_t range_rows, segments;
  uint32_t token_tiles, direction_tiles;
};

// A token as it is judged; segment < 0: not observed.
struct Token {
  int64_t segment, range;
  int32_t position;
};

__device__ __forceinline__ Token token_of(const Monitor& p, int64_t n) {
  if (n >= p.tokens) return {-1, -1, 0};
  const int32_t* at = p.token + n * p.token_step;
  const int64_t segment = at[kSegment * p.token_row], range = at[kRange * p.token_row];
  return {segment < p.segments ? segment : -1, range < p.range_rows ? range : -1, at[kPosition * p.token_row]};
}

__device__ __forceinline__ bool finite(float square) { return square <= FLT_MAX; }  // false for NaN

__device__ __forceinline__ float cosine_of(float dot, float square) {
  return square < FLT_MIN ? 0.f : dot / sqrtf(square);
}

__device__ __forceinline__ bool outside(const Monitor& p, int64_t block, int64_t range, int64_t k, float cosine) {
  if (range < 0) return false;
  const float* bounds = p.ranges + (block * p.range_rows + range) * 2 * p.count + k;
  return !(cosine >= bounds[0] && cosine <= bounds[p.count]);  // NaN, of either, is outside
}

__device__ __forceinline__ int32_t* counts_of(const Monitor& p, int64_t block, int64_t segment) {
  return p.counts + (block * p.segments + segment) * 2;
}

__device__ __forceinline__ void enter(const Monitor& p, int64_t block, int64_t segment, int64_t k, float low,
                                      float high) {
  float* extremes = p.extremes + (block * p.segments + segment) * 2 * p.count + k;
  if (low == low) atomic_min(extremes, low);  // NaN enters no extreme
  if (high == high) atomic_max(extremes + p.count, high);
}

__device__ __forceinline__ void not_finite(const Monitor& p, int64_t block, const Token& token) {
  int32_t* counts = counts_of(p, block, token.segment);
  atomicAdd(counts, 1);
  atomicMin(counts + 1, token.position);
}

// kSize cells; zeros where they are beyond the tensor.
template <typename T, int kSize>
__device__ __forceinline__ Piece<T, kSize> read(const T* cells, bool exist) {
  Piece<T, kSize> piece{};
  if (exist) piece = *reinterpret_cast<const Piece<T, kSize>*>(cells);
  return piece;
}

constexpr int kTile = 32;             // tokens of a warp, and directions
constexpr int kColumns = 16;          // of D, staged by a warp at a time
constexpr int kPitch = kColumns + 4;  // rows of a tile start in different banks, and stay 16-byte aligned
constexpr int kWarps = 8;

template <typename T, int kTokenWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 2) prefill_kernel(const Monitor p, const Norm norm) {
  constexpr int kParts = kWarps / kTokenWarps;  // of D
  constexpr int kVector = Vector<T>::kSize;     // cells in 16 bytes
  constexpr int kPieces = kColumns / kVector;   // of a token's staged columns; also what a lane stages
  constexpr int kRowStep = kWarp / kPieces;     // tokens staged by the warp at once
  constexpr int kShareStep = 8 * kTokenWarps;   // direction rows staged at once by the warps of a part
  constexpr int kShared = kTile / kShareStep;   // direction rows a lane stages
  constexpr int kTokens = kTile * kTokenWarps;
  constexpr int kScan = 16;  // tokens that one warp reduces
  __shared__ __align__(16) float xs[kWarps][kTile][kPitch];
  __shared__ __align__(16) float ds[kParts][kTile][kPitch];
  __shared__ float squares[kParts][kTokens];
  float (*dots)[kTile + 1] = reinterpret_cast<float (*)[kTile + 1]>(&xs[0][0][0]);  // after the last product
  static_assert(sizeof(float) * kTokens * (kTile + 1) <= sizeof(xs));

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int part = warp / kTokenWarps, group = warp % kTokenWarps;
  const int64_t direction_tile = blockIdx.x % p.direction_tiles;
  const int64_t first = blockIdx.x / p.direction_tiles % p.token_tiles * static_cast<int64_t>(kTokens);
  const int64_t block = blockIdx.x / p.direction_tiles / p.token_tiles;
  // What this lane stages: rows kRowStep and kShareStep apart, columns from its own on.
  const int token_row = lane / kPieces, token_column = lane % kPieces * kVector;
  const int share_row = group * 8 + lane / 4, share_column = lane % 4 * 4;
  const int tokens = static_cast<int>(min(p.tokens - first - group * kTile, int64_t{kTile}));
  const int count = static_cast<int>(min(p.count - direction_tile * kTile, int64_t{kTile}));
  const int width = static_cast<int>(p.width);
  const T* x = static_cast<const T*>(p.x) + block * p.stride_block +
               (first + group * kTile + token_row) * p.stride_token + token_column;
  const float* directions =
      p.directions + (block * p.count + direction_tile * kTile + share_row) * p.width + share_column;

  Piece<T, kVector> held[kPieces];
  Piece<float, 4> held_directions[kShared];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      held[i] = read<T, kVector>(x + i * kRowStep * p.stride_token + from,
                                 from + token_column < width && token_row + i * kRowStep < tokens);
#pragma unroll
    for (int i = 0; i < kShared; ++i)
      held_directions[i] = read<float, 4>(directions + i * kShareStep * p.width + from,
                                          from + share_column < width && share_row + i * kShareStep < count);
  };
  // With one warp of tokens a warp reads only what it staged itself.
  const auto staged = [] {
    if constexpr (kTokenWarps == 1) __syncwarp();
    if constexpr (kTokenWarps > 1) __syncthreads();
  };

  const int tx = lane % 8, ty = lane / 8;
  float sums[8][4] = {}, square[kPieces] = {};
  fetch(part * kColumns);
  for (int from = 0; from < width; from += kColumns * kParts) {
    staged();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float* to = &xs[warp][token_row + i * kRowStep][token_column];
#pragma unroll
      for (int e = 0; e < kVector; e += 4) {
        Piece<float, 4> values;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          values.values[v] = widen<float>(held[i].values[e + v]);
          square[i] = __fmaf_rn(values.values[v], values.values[v], square[i]);
        }
        *reinterpret_cast<Piece<float, 4>*>(to + e) = values;
      }
    }
#pragma unroll
    for (int i = 0; i < kShared; ++i)
      *reinterpret_cast<Piece<float, 4>*>(&ds[part][share_row + i * kShareStep][share_column]) = held_directions[i];
    staged();
    fetch(from + kColumns * kParts + part * kColumns);
#pragma unroll 1
    for (int c = 0; c < kColumns; c += 4) {
      Piece<float, 4> b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const Piece<float, 4>*>(&ds[part][tx + 8 * j][c]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Piece<float, 4> a = *reinterpret_cast<const Piece<float, 4>*>(&xs[warp][ty + 4 * i][c]);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j] = __fmaf_rn(a.values[e], b[j].values[e], sums[i][j]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
#pragma unroll
    for (int other = kPieces / 2; other > 0; other /= 2) square[i] += __shfl_xor_sync(kFullWarp, square[i], other);
    if (lane % kPieces == 0) squares[part][group * kTile + token_row + i * kRowStep] = square[i];
  }
  __syncthreads();  // every product is done: xs becomes dots
  for (int turn = 0; turn < kParts; ++turn) {
    if (part == turn) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& dot = dots[group * kTile + ty + 4 * i][tx + 8 * j];
          dot = turn == 0 ? sums[i][j] : dot + sums[i][j];
        }
    }
    __syncthreads();
  }

  // A lane is a direction; runs of one segment, the usual case, reach memory once. Branches below are the warp's.
  const int64_t k = direction_tile * kTile + lane;
  int64_t segment = -1;
  float low = 0, high = 0;
  for (int t = warp * kScan; t < (warp + 1) * kScan && t < kTokens; ++t) {
    const Token token = token_of(p, first + t);
    if (token.segment < 0) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kParts; ++w) total += squares[w][t];
    if (!finite(total)) {
      if (direction_tile == 0 && lane == 0) not_finite(p, block, token);
      continue;
    }
    const float cosine = cosine_of(dots[t][lane], total);
    const bool offends = k < p.count && outside(p, block, token.range, k, cosine);
    if (__ballot_sync(kFullWarp, offends) != 0 && lane == 0)
      atomicMin(counts_of(p, block, token.segment) + 1, token.position);
    if (token.segment != segment) {
      if (segment >= 0 && k < p.count) enter(p, block, segment, k, low, high);
      segment = token.segment;
      low = high = cosine;
    } else {
      low = fminf(low, cosine);
      high = fmaxf(high, cosine);
    }
  }
  if (segment >= 0 && k < p.count) enter(p, block, segment, k, low, high);

  if (norm.y != nullptr && direction_tile == 0) {
    for (int64_t row = first + warp; row < first + kTokens && row < p.tokens; row += kWarps)
      norm_row<T, Vector<T>::kSize, 0>(norm, row, lane, kWarp, nullptr);
  }
}

// Sums kValues values over the warp with about one shuffle a value: each step halves what a lane carries. The sum of
// value v ends in lane v / (kValues / 32), or in all lanes of a group of 32 / kValues.
template <int kValues, int kOther = kWarp / 2>
__device__ __forceinline__ void fold(float* values, int lane) {
  if constexpr (kOther > 0 && kValues == 1) {
    values[0] += __shfl_xor_sync(kFullWarp, values[0], kOther);
    fold<1, kOther / 2>(values, lane);
  } else if constexpr (kOther > 0) {
    const bool upper = lane & kOther;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float give = upper ? values[i] : values[i + kValues / 2];
      const float keep = upper ? values[i + kValues / 2] : values[i];
      values[i] = keep + __shfl_xor_sync(kFullWarp, give, kOther);
    }
    fold<kValues / 2, kOther / 2>(values, lane);
  }
}

template <int kValues>
__device__ __forceinline__ void fold_to(float* values, float* to, int lane) {
  fold<kValues>(values, lane);
  constexpr int kEach = kValues >= kWarp ? kValues / kWarp : 1, kLanes = kValues >= kWarp ? 1 : kWarp / kValues;
  if (lane % kLanes == 0) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[lane / kLanes * kEach + i] = values[i];
  }
}

constexpr int kDecodeWarps = 4;
constexpr int kDecodeDirections = 4;

template <typename T, int kTokens>
__global__ void __launch_bounds__(kDecodeWarps* kWarp) decode_kernel(const Monitor p, const Norm norm) {
  constexpr int kThreads = kDecodeWarps * kWarp;
  __shared__ __align__(16) float dots[kDecodeWarps][kTokens * kDecodeDirections];
  __shared__ float squares[kDecodeWarps][kTokens];
  const uint32_t cosines = p.direction_tiles * static_cast<uint32_t>(p.blocks);
  if (blockIdx.x >= cosines) {  // of norm_monitor
    __shared__ double shared[kDecodeWarps];
    norm_row<T, Vector<T>::kSize, 0>(norm, blockIdx.x - cosines, threadIdx.x, kThreads, shared);
    return;
  }
  const int64_t tile = blockIdx.x % p.direction_tiles, block = blockIdx.x / p.direction_tiles;
  const T* x = static_cast<const T*>(p.x) + block * p.stride_block;
  const float* directions = p.directions + block * p.count * p.width;
  float sums[kTokens * kDecodeDirections] = {}, square[kTokens] = {};
  for (int64_t d = threadIdx.x * 4; d < p.width; d += kThreads * 4) {
    Piece<float, 4> to[kDecodeDirections];
#pragma unroll
    for (int j = 0; j < kDecodeDirections; ++j) {
      const int64_t k = tile * kDecodeDirections + j;
      to[j] = read<float, 4>(directions + k * p.width + d, k < p.count);
    }
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const Piece<T, 4> cells = read<T, 4>(x + n * p.stride_token + d, n < p.tokens);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float value = widen<float>(cells.values[e]);
        square[n] = __fmaf_rn(value, value, square[n]);
#pragma unroll
        for (int j = 0; j < kDecodeDirections; ++j) {
          float& sum = sums[n * kDecodeDirections + j];
          sum = __fmaf_rn(value, to[j].values[e], sum);
        }
      }
    }
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  fold_to<kTokens * kDecodeDirections>(sums, dots[warp], lane);
  fold_to<kTokens>(square, squares[warp], lane);
  __syncthreads();
  if (threadIdx.x >= kTokens * kDecodeDirections) return;
  const int n = threadIdx.x / kDecodeDirections;
  const int64_t k = tile * kDecodeDirections + threadIdx.x % kDecodeDirections;
  const Token token = token_of(p, n);
  if (token.segment < 0) return;
  float dot = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    dot += dots[w][threadIdx.x];
    total += squares[w][n];
  }
  if (!finite(total)) {
    if (tile == 0 && threadIdx.x % kDecodeDirections == 0) not_finite(p, block, token);
    return;
  }
  if (k >= p.count) return;
  const float cosine = cosine_of(dot, total);
  enter(p, block, token.segment, k, cosine, cosine);
  if (outside(p, block, token.range, k, cosine)) atomicMin(counts_of(p, block, token.segment) + 1, token.position);
}

template <typename T>
void launch_as(const Launcher& launch, Monitor p, const Norm& norm) {
  if (p.tokens <= 16) {
    p.direction_tiles = static_cast<uint32_t>(ceil_div(p.count > 0 ? p.count : 1, kDecodeDirections));
    const int64_t blocks = p.direction_tiles * p.blocks + (norm.y ? norm.rows : 0);
    return launch(p.tokens <= 4 ? decode_kernel<T, 4> : decode_kernel<T, 16>, blocks, kDecodeWarps * kWarp, p, norm);
  }
  p.direction_tiles = static_cast<uint32_t>(ceil_div(p.count > 0 ? p.count : 1, kTile));
  // Two blocks for each of some 128 multiprocessors are enough to take the larger tile. Not measured yet.
  const bool many = ceil_div(p.tokens, 4 * kTile) * p.direction_tiles * p.blocks >= 256;
  p.token_tiles = static_cast<uint32_t>(ceil_div(p.tokens, many ? 4 * kTile : kTile));
  const int64_t blocks = p.direction_tiles * p.blocks * p.token_tiles;
  launch(many ? prefill_kernel<T, 4> : prefill_kernel<T, 1>, blocks, kWarps * kWarp, p, norm);
}

struct Strides {
  int64_t block, row, cell;
};

constexpr int kCopyThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const T* from, float* to, int64_t cells, int64_t rows, int64_t padded, int64_t width, Strides strides) {
  const int64_t step = int64_t{kCopyThreads} * gridDim.x;
  for (int64_t i = blockIdx.x * int64_t{kCopyThreads} + threadIdx.x; i < cells; i += step) {
    const int64_t d = i % padded, row = i / padded % rows, block = i / padded / rows;
    to[i] = d < width ? widen<float>(from[block * strides.block + row * strides.row + d * strides.cell]) : 0.f;
  }
}

void copy_padded(const Launcher& launch, ScalarType type, const void* from, const Tensor& to, Strides strides,
                 int64_t width) {
  const int64_t cells = to.numel(), rows = to.size(1), padded = to.size(2);
  const auto copy = [&](auto zero) {
    using T = decltype(zero);
    launch(copy_kernel<T>, std::min<int64_t>(ceil_div(cells, kCopyThreads), 4096), kCopyThreads,
           static_cast<const T*>(from), static_cast<float*>(to.mutable_data_ptr()), cells, rows, padded, width,
           strides);
  };
  if (type == ScalarType::BFloat16) return copy(__nv_bfloat16{});
  if (type == ScalarType::Half) return copy(__half{});
  if (type == ScalarType::Float) return copy(float{});
  copy(double{});
}

}  // namespace

bool launch_monitor(const char* op, const Tensor& x, const Tensor& directions, const Tensor& tokens,
                    const Tensor& ranges, const Tensor& extremes, const Tensor& counts, int64_t layer,
                    const Norm& norm) {
  const bool several = x.dim() == 3;
  STD_TORCH_CHECK((x.dim() == 2 || several) && directions.dim() == 3 && x.size(several + 1) == directions.size(2), op,
                  ": x must be [N, D] or [M, N, D] and directions [L, K, D]");
  Monitor p{};
  p.blocks = several ? x.size(0) : 1;
  p.tokens = x.size(several), p.width = x.size(several + 1), p.count = directions.size(1);
  const int64_t layers = directions.size(0);
  STD_TORCH_CHECK(layer >= 0 && layer <= layers - p.blocks, op, ": blocks ", layer, " to ", layer + p.blocks - 1,
                  " of x, but the directions have ", layers);
  STD_TORCH_CHECK(
      tokens.dim() == 2 && tokens.size(0) == 3 && tokens.size(1) == p.tokens && tokens.scalar_type() == ScalarType::Int,
      op, ": tokens must be [3, ", p.tokens, "] int32");
  STD_TORCH_CHECK(counts.dim() == 3 && counts.size(0) == layers && counts.size(2) == 2 &&
                      counts.scalar_type() == ScalarType::Int && counts.is_contiguous(),
                  op, ": counts must be a contiguous [", layers, ", S, 2] int32 tensor");
  p.segments = counts.size(1);
  STD_TORCH_CHECK(extremes.dim() == 4 && extremes.size(0) == layers && extremes.size(1) == p.segments &&
                      extremes.size(2) == 2 && extremes.size(3) == p.count,
                  op, ": extremes must be [", layers, ", ", p.segments, ", 2, ", p.count, "]");
  STD_TORCH_CHECK(ranges.dim() == 4 && ranges.size(0) == layers && ranges.size(2) == 2 && ranges.size(3) == p.count, op,
                  ": ranges must be [", layers, ", R, 2, ", p.count, "]");
  p.range_rows = ranges.size(1);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16 ||
                      x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  op, ": x must be float16, bfloat16, float32 or float64");
  for (const Tensor* state : {&directions, &ranges, &extremes})
    STD_TORCH_CHECK(state->scalar_type() == ScalarType::Float && state->is_contiguous(), op,
                    ": directions, ranges and extremes must be contiguous float32 tensors");
  for (const Tensor* other : {&directions, &tokens, &ranges, &extremes, &counts})
    STD_TORCH_CHECK(other->get_device_index() == x.get_device_index(), op,
                    ": all tensors must be on x's device; move them there");
  STD_TORCH_CHECK(p.width < 1 << 30, op, ": D is ", p.width, ", too large");
  if (p.blocks == 0 || p.tokens == 0) return false;

  p.x = x.const_data_ptr();
  p.stride_block = several ? x.stride(0) : 0, p.stride_token = x.stride(several), p.stride_cell = x.stride(several + 1);
  p.directions = static_cast<const float*>(directions.const_data_ptr()) + layer * p.count * p.width;
  p.token = static_cast<const int32_t*>(tokens.const_data_ptr());
  p.token_row = tokens.stride(0), p.token_step = tokens.stride(1);
  p.ranges = static_cast<const float*>(ranges.const_data_ptr()) + layer * p.range_rows * 2 * p.count;
  p.extremes = static_cast<float*>(extremes.mutable_data_ptr()) + layer * p.segments * 2 * p.count;
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr()) + layer * p.segments * 2;
  const Launcher launch(op, x);
  const bool narrow = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  const int64_t vector = narrow ? 8 : 4;
  const bool whole = x.scalar_type() != ScalarType::Double && p.width % vector == 0 &&
                     (p.stride_cell == 1 || p.width == 1) && aligned(p.x) && aligned(p.directions) &&
                     (p.tokens == 1 || p.stride_token % vector == 0) && (p.blocks == 1 || p.stride_block % vector == 0);
  if (whole) {
    if (x.scalar_type() == ScalarType::BFloat16) launch_as<__nv_bfloat16>(launch, p, norm);
    if (x.scalar_type() == ScalarType::Half) launch_as<__half>(launch, p, norm);
    if (x.scalar_type() == ScalarType::Float) launch_as<float>(launch, p, norm);
    return norm.y != nullptr;
  }
  // Any other layout and float64: float32 copies with rows of whole vectors; zeros beyond D change no sum.
  const int64_t width = ceil_div(p.width, 4) * 4;
  const Tensor copy = torch::stable::new_empty(x, {p.blocks, p.tokens, width}, ScalarType::Float);
  const Tensor padded = torch::stable::new_empty(x, {p.blocks, p.count, width}, ScalarType::Float);
  copy_padded(launch, x.scalar_type(), p.x, copy, {p.stride_block, p.stride_token, p.stride_cell}, p.width);
  copy_padded(launch, ScalarType::Float, p.directions, padded, {p.count * p.width, p.width, 1}, p.width);
  p.x = copy.const_data_ptr(), p.directions = static_cast<const float*>(padded.const_data_ptr());
  p.width = p.stride_token = width, p.stride_block = p.tokens * width, p.stride_cell = 1;
  launch_as<float>(launch, p, Norm{});
  return false;
}

namespace {

void cosine_monitor(Tensor x, Tensor directions, Tensor tokens, Tensor ranges, Tensor extremes, Tensor counts,
                    int64_t layer) {
  launch_monitor("cosine_monitor", x, directions, tokens, ranges, extremes, counts, layer, Norm{});
}

}  // namespace
}  // namespace bkdfast

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CUDA, m) { m.impl("cosine_monitor", TORCH_BOX(&bkdfast::cosine_monitor)); }
