// Names, arguments and docstrings of the compiled functions; each kernel binds itself.

#include <pybind11/pybind11.h>

#include "blend.h"
#include "ids.h"
#include "lines.h"
#include "merges.h"
#include "minhash.h"
#include "runs.h"
#include "windows.h"

PYBIND11_MODULE(_csrc, module) {
    module.doc() = "Compiled twins of numpy code in megatron_adapt; arrays in, arrays out.";
    megatron_adapt::bind_blend(module);
    megatron_adapt::bind_ids(module);
    megatron_adapt::bind_lines(module);
    megatron_adapt::bind_merges(module);
    megatron_adapt::bind_minhash(module);
    megatron_adapt::bind_runs(module);
    megatron_adapt::bind_windows(module);
}
