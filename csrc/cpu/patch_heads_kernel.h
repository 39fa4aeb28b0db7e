// The edits of some rows, for one instruction set; patch_heads.cpp has the types and the whole picture.

// One slice of one token whose cells lie side by side.
template <typename T, typename Acc>
BKDFAST_INLINE void edit_slice(T* cell, const Acc* from, int64_t width, Acc a, Acc b) {
  using V = Vec<Acc>;
  const V keep = V::broadcast(a), add = V::broadcast(b);
  for (int64_t i = 0; i < width; i += V::kWidth) {
    const int64_t count = width - i;
    const bool whole = count >= V::kWidth;
    V value = V::zero();
    if (a != 0) value = keep * (whole ? V::load(cell + i) : V::load_partial(cell + i, count));
    if (b != 0) {
      const V added = add * (whole ? V::load(from + i) : V::load_partial(from + i, count));
      value = a != 0 ? value + added : added;
    }
    if (whole) {
      value.store(cell + i);
    } else {
      value.store_partial(cell + i, count);
    }
  }
}

template <typename T, typename Acc>
void edit_strided(T* cell, int64_t stride, const Acc* from, int64_t width, Acc a, Acc b) {
  for (int64_t i = 0; i < width; ++i) {
    const Acc kept = a == 0 ? Acc(0) : a * static_cast<Acc>(cell[i * stride]);
    const Acc value = b == 0 ? kept : a == 0 ? b * from[i] : kept + b * from[i];
    cell[i * stride] = static_cast<T>(value);
  }
}

// Rows from..to. Edits outside: with rows outside, each of B rows would search the whole table for its edits.
// a == 0 does not read z and b == 0 does not read the source: NaN there does not spread.
template <typename T>
void edit_rows(const Activations<T>& z, const Edits& edits, const AccOf<T>* coefficients, const AccOf<T>* source,
               int64_t from, int64_t to) {
  for (int64_t e = 0; e < edits.count; ++e) {
    const int32_t* edit = edits.table + e * kColumns;
    if (edit[kStart] >= edit[kStop]) continue;
    const int64_t first = edit[kRow] > from ? edit[kRow] : from;
    const int64_t end = edit[kRow] >= 0 && edit[kRow] < to ? edit[kRow] + 1 : to;
    const AccOf<T> a = coefficients[2 * e], b = coefficients[2 * e + 1];
    for (int64_t row = first; row < end; ++row) {
      const Span span = span_of(edits, edit, row, z.tokens);
      T* slice = z.data + row * z.stride_row + edit[kSlice] * edits.width * z.stride_cell;
      for (int64_t t = span.begin; t < span.end; ++t) {
        T* cell = slice + t * z.stride_token;
        const AccOf<T>* entry = source + entry_of(edit, span, t) * edits.width;
        if (z.stride_cell == 1) {
          edit_slice<T, AccOf<T>>(cell, entry, edits.width, a, b);
        } else {
          edit_strided<T, AccOf<T>>(cell, z.stride_cell, entry, edits.width, a, b);
        }
      }
    }
  }
}
