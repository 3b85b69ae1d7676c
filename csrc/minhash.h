// MinHash signatures of texts; the twin is in megatron_adapt/corpus/duplicates.py.

#pragma once

#include <pybind11/pybind11.h>

namespace megatron_adapt {

void bind_minhash(pybind11::module_& module);

}  // namespace megatron_adapt
