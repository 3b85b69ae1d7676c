// The text of a JSON line: the compiled shortcut of megatron_adapt/corpus/documents.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_lines(pybind11::module_& module);

}  // namespace megatron_adapt
