// BPE over sequences of pieces: the compiled twin of megatron_adapt/tokenizer/merges.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_merges(pybind11::module_& module);

}  // namespace megatron_adapt
