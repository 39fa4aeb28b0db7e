// Checks of edit tables (bkdfast/ops/edit_table.py): values in range, no cell addressed twice.
//
// One pass for the ranges. For the cells one sort by (slice, row, origin, start), which puts the edits of all rows
// (row -1) first in their slice: edits of one row and origin then overlap only if two neighbours do, and an edit of
// one row finds the all-row edits around it by bisection. O(E log E), whatever the table holds.
// bkdfast/ops/edit_checks.py does the same in numpy and is what this is tested against.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "native.h"

namespace bkdfast {
namespace {

// Columns of the table, in the order of bkdfast/ops/edit_table.py.
enum Column : int64_t { kRow, kOrigin, kStart, kStop, kSlice, kSource, kStride, kColumns };
constexpr int64_t kAllRows = -1;
constexpr int64_t kOpen = int64_t{1} << 30;
constexpr int64_t kOrigins = 128;
constexpr int64_t kWide = int64_t{1} << 31;

// One edit as the sort sees it. Positions are counted from -kOpen, so that they are not negative.
struct Span {
  uint64_t place;  // slice, row + 1
  uint64_t begin;  // origin, start
  uint64_t end;    // origin, stop

  uint32_t slice() const { return place >> 32; }
  bool all_rows() const { return static_cast<uint32_t>(place) == 0; }
  bool everywhere() const {
    return static_cast<uint32_t>(begin) == 0 && static_cast<uint32_t>(end) == static_cast<uint32_t>(2 * kOpen);
  }
};

inline bool before(const Span& one, const Span& other) {
  return one.place != other.place ? one.place < other.place : one.begin < other.begin;
}

std::optional<Fault> fault_of(const int64_t* e, const double* scale, int64_t slices, int64_t sources, double largest) {
  if (e[kSlice] < 0 || e[kSlice] >= slices) return Fault::kSlice;
  if (e[kSlice] >= kWide) return Fault::kWideSlice;
  if (e[kRow] < kAllRows) return Fault::kNegativeRow;
  if (e[kRow] >= kWide) return Fault::kWideRow;
  if (e[kStart] > e[kStop]) return Fault::kBackwards;
  if (e[kStart] < -kOpen || e[kStop] > kOpen) return Fault::kFar;
  if (e[kOrigin] < 0 || e[kOrigin] >= kOrigins) return Fault::kOrigin;
  if (e[kStride] != 0 && e[kStride] != 1) return Fault::kStride;
  if (e[kSource] < -kWide || e[kSource] >= kWide) return Fault::kWideSource;
  if (scale[1] != 0 && e[kStart] < e[kStop]) {
    const int64_t last = e[kSource] + e[kStride] * (e[kStop] - e[kStart] - 1);
    if (e[kSource] < 0 || last >= sources) return Fault::kSource;
  }
  // Not (x > largest): NaN compares false with everything.
  if (!(std::fabs(scale[0]) <= largest && std::fabs(scale[1]) <= largest)) return Fault::kCoefficients;
  return std::nullopt;
}

// The edits [begin, end) of one slice, sorted.
bool disjoint_in_slice(const Span* begin, const Span* end) {
  const Span* own = std::find_if_not(begin, end, [](const Span& span) { return span.all_rows(); });
  for (const Span* at = begin; at != end; ++at) {
    const bool follows = at != begin && at[-1].place == at->place;
    const bool followed = at + 1 != end && at[1].place == at->place;
    // Whatever the origins are, a span without ends meets every other span of its rows.
    if (at->everywhere() && (follows || followed || (at->all_rows() ? end - begin > 1 : own != begin))) return false;
    // The end of an edit of an earlier origin is before every start of a later one.
    if (follows && at[-1].end > at->begin) return false;
  }
  if (own == begin) return true;
  // The all-row edits are disjoint and none is everywhere, or it would be the slice's only edit.
  for (const Span* at = own; at != end; ++at) {
    const Span* next =
        std::upper_bound(begin, own, at->begin, [](uint64_t value, const Span& span) { return value < span.begin; });
    if ((next != begin && next[-1].end > at->begin) || (next != own && next->begin < at->end)) return false;
  }
  return true;
}

}  // namespace

std::optional<FaultyEdit> first_fault(const EditView& edits, int64_t slices, int64_t sources, double largest) {
  for (int64_t i = 0; i < edits.count; ++i) {
    const auto fault = fault_of(edits.rows + i * kColumns, edits.coefficients + 2 * i, slices, sources, largest);
    if (fault) return FaultyEdit{*fault, i};
  }
  return std::nullopt;
}

bool disjoint(const int64_t* rows, int64_t count) {
  std::vector<Span> spans;
  spans.reserve(count);
  for (const int64_t* e = rows; e != rows + count * kColumns; e += kColumns) {
    if (e[kStart] >= e[kStop]) continue;
    const auto origin = static_cast<uint64_t>(e[kOrigin]) << 32;
    spans.push_back({static_cast<uint64_t>(e[kSlice]) << 32 | static_cast<uint64_t>(e[kRow] + 1),
                     origin | static_cast<uint64_t>(e[kStart] + kOpen),
                     origin | static_cast<uint64_t>(e[kStop] + kOpen)});
  }
  std::sort(spans.begin(), spans.end(), before);
  const Span* const end = spans.data() + spans.size();
  for (const Span* slice = spans.data(); slice != end;) {
    const Span* next = std::find_if(slice, end, [&](const Span& span) { return span.slice() != slice->slice(); });
    if (!disjoint_in_slice(slice, next)) return false;
    slice = next;
  }
  return true;
}

}  // namespace bkdfast
