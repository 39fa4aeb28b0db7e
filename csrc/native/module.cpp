// bkdfast._native: the host-side runtime. It links neither torch nor CUDA.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "native.h"

namespace py = pybind11;

namespace {

// `noconvert` at the bindings: a silent copy here would hide that the caller's array is not what it should be.
using Integers = py::array_t<int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

int64_t length(const py::array& values, py::ssize_t columns) {
  if (values.ndim() != 2 || values.shape(1) != columns) {
    throw std::invalid_argument("expected [E, " + std::to_string(columns) + "]");
  }
  return values.shape(0);
}

py::object first_fault(const Integers& rows, const Doubles& coefficients, int64_t slices, int64_t sources,
                       double largest) {
  const bkdfast::EditView edits{rows.data(), coefficients.data(), length(rows, 7)};
  if (length(coefficients, 2) != edits.count) throw std::invalid_argument("one coefficient pair per edit");
  const auto found = bkdfast::first_fault(edits, slices, sources, largest);
  if (!found) return py::none();
  return py::make_tuple(static_cast<int>(found->fault), found->edit);
}

bool disjoint(const Integers& rows) { return bkdfast::disjoint(rows.data(), length(rows, 7)); }

py::dict cpu_features() {
  py::dict features;
  for (const auto& [name, present] : bkdfast::cpu_features()) features[py::str(name)] = present;
  return features;
}

py::dict build_info() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = "gcc " __VERSION__;
#else
  facts["compiler"] = "unknown";
#endif
  facts["cxx_standard"] = static_cast<int64_t>(__cplusplus);
#if defined(__OPTIMIZE__)
  facts["optimized"] = true;
#else
  facts["optimized"] = false;
#endif
  facts["flags"] = NATIVE_FLAGS;
  facts["python"] = PY_VERSION;
  facts["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Host-side runtime of bkdfast; the functions of edit tables are those of bkdfast.ops.edit_checks.";
  m.def("first_fault", &first_fault, py::arg("rows").noconvert(), py::arg("coefficients").noconvert(),
        py::arg("slices"), py::arg("sources"), py::arg("largest"));
  m.def("disjoint", &disjoint, py::arg("rows").noconvert());
  m.def("cpu_features", &cpu_features);
  m.def("build_info", &build_info);
}
