// One-permutation MinHash over runs of code points; the twin and the method are in megatron_adapt/corpus/duplicates.py.

#include "minhash.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

constexpr uint64_t kEmpty = UINT64_MAX;

uint64_t mix(uint64_t value) {  // the finaliser of SplitMix64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
    return value ^ (value >> 31);
}

// Fills an empty bin from the one that a hash of (bin, try) points at; the same walk for every text.
void fill_empty(std::vector<uint64_t>& bins) {
    const std::vector<uint64_t> own = bins;
    const uint64_t size = bins.size();
    for (uint64_t bin = 0; bin < size; ++bin) {
        for (uint64_t attempt = 1; bins[bin] == kEmpty; ++attempt) {
            bins[bin] = own[mix(bin * 0x9E3779B97F4A7C15ULL + attempt) % size];
        }
    }
}

std::vector<uint64_t> sign(const char32_t* text, size_t length, size_t run, size_t num_bins) {
    std::vector<uint64_t> bins(num_bins, kEmpty);
    const size_t num_runs = length > run ? length - run + 1 : 1;
    for (size_t start = 0; start < num_runs; ++start) {
        uint64_t hash = 0;
        for (size_t at = start; at < start + run && at < length; ++at) hash = mix(hash + text[at] + 1);
        uint64_t& bin = bins[hash % num_bins];
        const uint64_t rank = mix(hash);
        if (rank < bin) bin = rank;
    }
    fill_empty(bins);
    return bins;
}

py::array_t<uint64_t> sign_text(py::buffer code_points, size_t run, size_t num_bins) {
    const py::buffer_info info = code_points.request();
    const auto* text = static_cast<const char32_t*>(info.ptr);
    const size_t length = static_cast<size_t>(info.size * info.itemsize) / sizeof(char32_t);
    std::vector<uint64_t> bins;
    {
        py::gil_scoped_release release;
        bins = sign(text, length, run, num_bins);
    }
    return py::array_t<uint64_t>(static_cast<py::ssize_t>(bins.size()), bins.data());
}

}  // namespace

void bind_minhash(py::module_& module) {
    module.def("sign_text", &sign_text, py::arg("code_points"), py::arg("run"), py::arg("num_bins"),
               "Return the least hash in each bin of all runs of `run` code points (a UTF-32 buffer).");
}

}  // namespace megatron_adapt
