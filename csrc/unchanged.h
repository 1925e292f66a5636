// Whether Python's objects are still what a caller found them to be, without running Python.
#pragma once
#include <pybind11/pybind11.h>

namespace peftk {

void define_unchanged(pybind11::module_& m);

}  // namespace peftk
