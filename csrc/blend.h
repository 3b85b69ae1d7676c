// Order in which the windows of several sources are read; see megatron_adapt/data/blend.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_blend(pybind11::module_& module);

}  // namespace megatron_adapt
