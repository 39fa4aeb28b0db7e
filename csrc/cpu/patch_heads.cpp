// patch_heads on the CPU: in-place edits of [B, T, S*W] activations by an edit table (bkdfast/ops/patch_heads.py).
//
// Floor: the edited cells, read and written once; 32 edits of one token cost little more than the call. Threads split
// the batch rows; every row sees its edits in table order, so the result does not depend on the number of threads even
// where edits meet.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of the table, in the order of bkdfast/ops/edit_table.py.
enum Column : int64_t { kRow, kOrigin, kStart, kStop, kSlice, kSource, kStride, kColumns };

struct Edits {
  const int32_t* table;
  int64_t count;
  const int32_t* offset;
  int64_t origins;
  int64_t offset_stride, offset_step;
  int64_t sources;
  int64_t width;
};

template <typename T>
using AccOf = std::conditional_t<sizeof(T) == 8, double, float>;

template <typename T>
struct Activations {
  T* data;
  int64_t rows, tokens, slices;
  int64_t stride_row, stride_token, stride_cell;
};

struct Span {
  int64_t begin, end;  // tokens of this call
  int64_t first;       // position of the call's first token
};

// 64-bit: start - first can leave the 32-bit range when a span is open.
inline Span span_of(const Edits& edits, const int32_t* edit, int64_t row, int64_t tokens) {
  const int64_t first = edits.offset[edit[kOrigin] * edits.offset_stride + row * edits.offset_step];
  return {std::max<int64_t>(edit[kStart] - first, 0), std::min<int64_t>(edit[kStop] - first, tokens), first};
}

inline int64_t entry_of(const int32_t* edit, const Span& span, int64_t token) {
  return edit[kSource] + edit[kStride] * (token + span.first - edit[kStart]);
}

}  // namespace

#define BKDFAST_KERNEL "../cpu/patch_heads_kernel.h"
#include "../common/for_each_isa.h"

namespace {

// Before the first write and outside the threads: an exception inside parallel_for loses its message.
void check_sources(const Edits& edits, int64_t e, int64_t rows, int64_t tokens) {
  const int32_t* edit = edits.table + e * kColumns;
  STD_TORCH_CHECK(edit[kStride] == 0 || edit[kStride] == 1, "patch_heads: edit ", e, " has stride ", edit[kStride],
                  ", which is not 0 (one source row) or 1 (one source row a token)");
  const int64_t from = edit[kRow] < 0 ? 0 : edit[kRow], to = edit[kRow] < 0 ? rows : from + 1;
  for (int64_t row = from; row < to; ++row) {
    const Span span = span_of(edits, edit, row, tokens);
    if (span.begin >= span.end) continue;
    const int64_t last = entry_of(edit, span, span.end - 1);
    STD_TORCH_CHECK(edit[kSource] >= 0 && last < edits.sources, "patch_heads: edit ", e, " reads source row ", last,
                    " of ", edits.sources);
  }
}

// Cells that share memory would change with the order of the writes, which is each backend's own.
void check_memory(const Tensor& z, const Tensor& source) {
  if (z.numel() == 0) return;
  int64_t order[3] = {0, 1, 2};
  std::sort(order, order + 3, [&](int64_t i, int64_t j) { return z.stride(i) < z.stride(j); });
  int64_t extent = 1;  // elements from the first cell to behind the last one, over the dimensions seen so far
  for (int64_t d : order) {
    if (z.size(d) == 1) continue;
    STD_TORCH_CHECK(z.stride(d) >= extent,
                    "patch_heads: z is expanded or overlaps itself, its cells share memory; clone it");
    extent += (z.size(d) - 1) * z.stride(d);
  }
  const char* cells = static_cast<const char*>(z.const_data_ptr());
  const char* rows = static_cast<const char*>(source.const_data_ptr());
  STD_TORCH_CHECK(source.numel() == 0 || rows + source.numel() * source.element_size() <= cells ||
                      cells + extent * z.element_size() <= rows,
                  "patch_heads: source lies within z's memory; clone it");
}

template <typename T>
void run(Tensor& z, const Edits& edits, const Tensor& coefficients, const Tensor& source) {
  using Acc = AccOf<T>;
  const auto edit = BKDFAST_CHOOSE(edit_rows<T>);
  const Activations<T> view{static_cast<T*>(z.mutable_data_ptr()),
                            z.size(0),
                            z.size(1),
                            z.size(2) / edits.width,
                            z.stride(0),
                            z.stride(1),
                            z.stride(2)};
  const Acc* ab = static_cast<const Acc*>(coefficients.const_data_ptr());
  int64_t cells = 0;
  for (int64_t e = 0; e < edits.count; ++e) {
    const int32_t* edit = edits.table + e * kColumns;
    if (edit[kStart] >= edit[kStop]) continue;
    const int64_t span = std::min<int64_t>(static_cast<int64_t>(edit[kStop]) - edit[kStart], view.tokens);
    cells += span * edits.width * (edit[kRow] < 0 ? view.rows : 1);
    STD_TORCH_CHECK(edit[kRow] >= -1 && edit[kRow] < view.rows && edit[kOrigin] >= 0 && edit[kOrigin] < edits.origins &&
                        edit[kSlice] >= 0 && edit[kSlice] < view.slices,
                    "patch_heads: edit ", e, " addresses row ", edit[kRow], ", origin ", edit[kOrigin], ", slice ",
                    edit[kSlice], ", but there are ", view.rows, " rows, ", edits.origins, " origins, ", view.slices,
                    " slices");
    if (ab[2 * e + 1] != 0) check_sources(edits, e, view.rows, view.tokens);
  }
  const Acc* from = static_cast<const Acc*>(source.const_data_ptr());
  // Waking a second thread costs more than editing some tens of thousands of cells.
  const int64_t grain = cells > (1 << 16) ? 1 : view.rows;
  torch::stable::parallel_for(0, view.rows, std::max<int64_t>(grain, 1),
                              [&](int64_t from_row, int64_t to_row) { edit(view, edits, ab, from, from_row, to_row); });
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
  check_memory(z, source);
  const ScalarType acc = z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(coefficients.scalar_type() == acc && source.scalar_type() == acc,
                  "patch_heads: coefficients and source must be float32 (float64 when z is)");
  const Edits edits{static_cast<const int32_t*>(table.const_data_ptr()),
                    table.size(0),
                    static_cast<const int32_t*>(offset.const_data_ptr()),
                    offset.size(0),
                    offset.stride(0),
                    offset.stride(1),
                    source.size(0),
                    source.size(1)};
  switch (z.scalar_type()) {
    case ScalarType::Float:
      return run<float>(z, edits, coefficients, source);
    case ScalarType::Double:
      return run<double>(z, edits, coefficients, source);
    case ScalarType::BFloat16:
      return run<c10::BFloat16>(z, edits, coefficients, source);
    case ScalarType::Half:
      return run<c10::Half>(z, edits, coefficients, source);
    default:
      STD_TORCH_CHECK(false, "patch_heads: z must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkdfast, CPU, m) { m.impl("patch_heads", TORCH_BOX(&patch_heads)); }
