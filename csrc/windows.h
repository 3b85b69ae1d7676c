// Order of a source's windows in an epoch; see megatron_adapt/data/windows.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_windows(pybind11::module_& module);

}  // namespace megatron_adapt
