// What the parts of bkdfast._native offer to its bindings (module.cpp). Nothing here knows torch or Python.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace bkdfast {

// A view of an edit table: [count, 7] integers and [count, 2] coefficients, row-major.
struct EditView {
  const int64_t* rows;
  const double* coefficients;
  int64_t count;
};

// In the order of FAULTS in bkdfast/ops/edit_checks.py, which holds the words.
enum class Fault {
  kSlice,
  kWideSlice,
  kNegativeRow,
  kWideRow,
  kBackwards,
  kFar,
  kOrigin,
  kStride,
  kWideSource,
  kSource,
  kCoefficients,
};

struct FaultyEdit {
  Fault fault;
  int64_t edit;
};

// The first edit with a value out of range, and the first of its faults.
std::optional<FaultyEdit> first_fault(const EditView& edits, int64_t slices, int64_t sources, double largest);

// Whether no two edits address one cell; the table has passed first_fault.
bool disjoint(const int64_t* rows, int64_t count);

// (Name as Linux spells it, whether the CPU has it and the operating system saves its registers).
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace bkdfast
