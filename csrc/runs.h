// Words of text as runs of one kind of character: the compiled twin of megatron_adapt/tokenizer/runs.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_runs(pybind11::module_& module);

}  // namespace megatron_adapt
