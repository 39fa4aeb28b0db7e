// prefix_attention on the CPU (bkdfast/ops/prefix_attention.py).
//
// Threads take groups of variants of one batch row and one key-value head. The query rows of all variants there
// (variants, then query heads, then tokens) see the same prefix, whose keys are transposed and whose values are copied
// once for them, into the L2; the keys and values of each suffix likewise, for that variant's rows. Then an online
// softmax: blocks of kBlock rows against up to kKeys keys at a time, first of the prefix, then of the suffixes, in
// register tiles of 6 x 4 vectors in both products. Keys outside what the rows of a block see are skipped: the upper
// triangle of long suffixes, padding, what is behind a window.
//
// A row's sums run in the same order whatever block or tile it falls into, so neither the number of threads nor the
// other variants change a bit; the instruction set does.
//
// Floor: 4 Dh flops for each query and key that it sees. One thread of a Zen 4 core (AVX-512, fma peak 116 GFLOP/s
// fp32; torch.mm 96 at 2048^3), B = 4, H = Hkv = 8, Dh = 64, ms. Plain PyTorch: the fastest of einsum, compiled or not,
// and scaled_dot_product_attention over a prefix copied before; then the latter with the copy:
//
//                                float32                            bfloat16
//   V = 64, S = 9, P = 504       30.7 (78 GFLOP/s)   107   351      29.8    82   204
//   V = 64, S = 9, P = 120       11.2 (53)            24    94      11.3    13    62
//   V = 8,  S = 9, P = 120        1.8 (41)           2.9   5.1       1.7   1.9   3.9
//   V = 8,  S = 128, P = 0       15.1 (36)            19    22      14.4    17    22
//
// The products take 60 to 80% of it, exponentials 14%, reading q, k and v (heads inside: a head's rows lie apart) most
// of the rest. Lost or equal: blocks of 24 or 96 rows, 256 or 1024 keys at a time, fetching the next group's rows
// ahead. bfloat16 is widened; the instructions for it would double the rate of the products, and round the weights.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#include "../common/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPad = 16;                     // columns are padded to the widest vector
constexpr int64_t kBlock = 48;                   // query rows of a block
constexpr int64_t kKeys = 512;                   // keys whose weights are held at a time
constexpr int64_t kWeightsPitch = kKeys + kPad;  // an odd number of cache lines: rows do not share the same few sets

template <typename T>
using AccumulatorOf = std::conditional_t<sizeof(T) == 8, double, float>;

template <typename T>
struct Attention {
  int64_t variants, batch, shared, group, length, past, width;  // V, B, Hkv, H / Hkv, S, P, Dh
  const T *q, *k, *v, *prefix_k, *prefix_v;
  int64_t q_stride[3], k_stride[3], v_stride[3], prefix_k_stride[3], prefix_v_stride[3];
  const int8_t* mask;
  int64_t mask_stride[2];
  const AccumulatorOf<T>* sinks;
  double scale, softcap;
  T* out;
  int64_t of_group, groups;   // variants whose suffixes are packed together, and how many such groups there are
  int64_t pitch, seen_pitch;  // of rows of Dh, and of the mask
};

// The first key that a query sees and the end of those, of the prefix and of the suffix; it sees none: past the end, 0.
struct Reach {
  int64_t begin[2], end[2];
};

template <typename T>
struct Scratch {
  using Acc = AccumulatorOf<T>;
  Acc *keys[2], *values[2];  // packed: of the prefix, and of the suffixes of a group of variants
  int8_t* lost[2];           // which of the values have something that is not finite
  Acc *q, *weights, *out, *peak, *total, *factor;
  int8_t* seen;
  Reach* reaches;
};

}  // namespace

#define BKDFAST_KERNEL "../cpu/prefix_attention_kernel.h"
#include "../common/for_each_isa.h"

namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Hands out aligned pieces of one allocation; without memory it only counts.
struct Carver {
  char* memory;
  int64_t used = 0;

  template <typename P>
  void take(P*& piece, int64_t count) {
    piece = memory ? reinterpret_cast<P*>(memory + used) : nullptr;
    used += round_up(count * sizeof(P), 64);
  }
};

template <typename T>
Scratch<T> carve(const Attention<T>& job, Carver& from) {
  Scratch<T> scratch;
  const int64_t past = round_up(job.past, kPad), length = round_up(job.length, kPad);
  from.take(scratch.keys[0], past * job.width);
  from.take(scratch.keys[1], job.of_group * length * job.width);
  from.take(scratch.values[0], job.past * job.pitch);
  from.take(scratch.values[1], job.of_group * job.length * job.pitch);
  from.take(scratch.lost[0], job.past);
  from.take(scratch.lost[1], job.of_group * job.length);
  from.take(scratch.q, kBlock * job.pitch);
  from.take(scratch.weights, kBlock * kWeightsPitch);
  from.take(scratch.out, kBlock * job.pitch);
  from.take(scratch.peak, kBlock);
  from.take(scratch.total, kBlock);
  from.take(scratch.factor, kBlock);
  from.take(scratch.seen, job.length * job.seen_pitch);
  from.take(scratch.reaches, job.length);
  return scratch;
}

struct Free {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <typename T, typename Kernel>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
         const Tensor& mask, double scale, double softcap, const std::optional<Tensor>& sinks, Tensor& out,
         Kernel kernel) {
  Attention<T> job{};
  job.batch = prefix_k.size(0), job.shared = prefix_k.size(1), job.past = prefix_k.size(2), job.width = q.size(3);
  job.variants = q.size(0) / job.batch, job.group = q.size(1) / job.shared, job.length = q.size(2);
  const auto place = [](const Tensor& from, const T*& data, int64_t* strides) {
    data = static_cast<const T*>(from.const_data_ptr());
    for (int i = 0; i < 3; ++i) strides[i] = from.stride(i);
  };
  place(q, job.q, job.q_stride);
  place(k, job.k, job.k_stride);
  place(v, job.v, job.v_stride);
  place(prefix_k, job.prefix_k, job.prefix_k_stride);
  place(prefix_v, job.prefix_v, job.prefix_v_stride);
  job.mask = static_cast<const int8_t*>(mask.const_data_ptr());
  job.mask_stride[0] = mask.stride(0), job.mask_stride[1] = mask.stride(1);
  job.sinks = sinks ? static_cast<const AccumulatorOf<T>*>(sinks->const_data_ptr()) : nullptr;
  job.scale = scale, job.softcap = softcap;
  job.out = static_cast<T*>(out.mutable_data_ptr());
  const int64_t of_variant = job.group * job.length;
  job.of_group = std::min(job.variants, std::max<int64_t>(1, 2 * kBlock / of_variant));
  job.groups = (job.variants + job.of_group - 1) / job.of_group;
  job.pitch = round_up(job.width, kPad);
  job.seen_pitch = round_up(job.past, kPad) + round_up(job.length, kPad);

  const int64_t units = job.batch * job.shared * job.groups;
  const double flops = 4.0 * q.size(0) * q.size(1) * job.length * (job.past + job.length) * job.width;
  torch::stable::parallel_for(0, units, flops < (1 << 21) ? units : 1, [&](int64_t from, int64_t to) {
    Carver count{nullptr};
    carve(job, count);
    const std::unique_ptr<char, Free> memory(static_cast<char*>(::operator new(count.used, std::align_val_t{64})));
    Carver carver{memory.get()};
    kernel(job, from, to, carve(job, carver));
  });
}

Tensor prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor mask, double scale,
                        double softcap, std::optional<Tensor> sinks) {
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && prefix_k.dim() == 4 && prefix_v.dim() == 4 && mask.dim() == 3,
      "prefix_attention: q, k, v, prefix_k and prefix_v must have 4 dimensions and mask 3");
  const int64_t rows = q.size(0), heads = q.size(1), length = q.size(2), width = q.size(3);
  const int64_t batch = prefix_k.size(0), shared = prefix_k.size(1), past = prefix_k.size(2);
  bool fits = k.size(0) == rows && k.size(1) == shared && k.size(2) == length && k.size(3) == width;
  fits = fits && prefix_k.size(3) == width && shared > 0 && heads % shared == 0;
  fits = fits && (batch ? rows % batch == 0 : rows == 0);
  fits = fits && mask.size(0) == batch && mask.size(1) == length && mask.size(2) == past + length;
  for (int i = 0; i < 4; ++i) fits = fits && v.size(i) == k.size(i) && prefix_v.size(i) == prefix_k.size(i);
  fits = fits && (!sinks || (sinks->dim() == 1 && sinks->size(0) == heads && sinks->is_contiguous()));
  STD_TORCH_CHECK(fits,
                  "prefix_attention: q must be [R, H, S, Dh], k and v [R, Hkv, S, Dh], prefix_k and prefix_v "
                  "[B, Hkv, P, Dh], mask [B, S, P + S] and sinks [H], contiguous");
  const ScalarType type = q.scalar_type();
  for (const Tensor* x : {&q, &k, &v, &prefix_k, &prefix_v}) {
    STD_TORCH_CHECK(x->scalar_type() == type, "prefix_attention: q, k, v, prefix_k and prefix_v must have one dtype");
    STD_TORCH_CHECK(x->size(3) <= 1 || x->stride(3) == 1, "prefix_attention: the last dimension must be contiguous");
  }
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && (mask.size(2) <= 1 || mask.stride(2) == 1),
                  "prefix_attention: mask must be bool with its last dimension contiguous");
  STD_TORCH_CHECK(!sinks || sinks->scalar_type() == (type == ScalarType::Double ? type : ScalarType::Float),
                  "prefix_attention: sinks must be float32 (float64 when q is)");
  Tensor out = torch::stable::new_empty(q, {rows, length, heads, width});
  if (rows * heads * length * width == 0) return out;
  switch (type) {
    case ScalarType::Float:
      run<float>(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks, out, BKDFAST_CHOOSE(attend<float>));
      break;
    case ScalarType::Double:
      run<double>(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks, out, BKDFAST_CHOOSE(attend<double>));
      break;
    case ScalarType::BFloat16:
      run<c10::BFloat16>(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks, out,
                         BKDFAST_CHOOSE(attend<c10::BFloat16>));
      break;
    case ScalarType::Half:
      run<c10::Half>(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks, out, BKDFAST_CHOOSE(attend<c10::Half>));
      break;
    default:
      STD_TORCH_CHECK(false, "prefix_attention: q must be float16, bfloat16, float32 or float64");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) { m.impl("prefix_attention", TORCH_BOX(&prefix_attention)); }
