// Lists of ids as arrays: the compiled twin of np.fromiter in megatron_adapt/data/backend.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_ids(pybind11::module_& module);

}  // namespace megatron_adapt
