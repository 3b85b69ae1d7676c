// Keyed permutation of windows and their cuts on the ring; the twin and the method are in
// megatron_adapt/data/windows.py.

#include "windows.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

// The numbers of an epoch, a row of the table.
struct Epoch {
    uint64_t num_windows;
    uint64_t side;
    int64_t origin;
    int64_t seq_length;
    int64_t num_tokens;
    uint64_t keys[8];
};
static_assert(sizeof(Epoch) == 13 * sizeof(uint64_t));

uint64_t mix(uint64_t value) {  // finaliser of SplitMix64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
    return value ^ (value >> 31);
}

uint64_t scramble(uint64_t value, const Epoch& epoch) {
    const uint64_t side = epoch.side;
    uint64_t left = value / side;
    uint64_t right = value % side;
    for (const uint64_t key : epoch.keys) {
        const uint64_t sum = left + mix(right + key) % side;  // below 2 * side
        left = right;
        right = sum < side ? sum : sum - side;
    }
    return left * side + right;
}

using Numbers = py::array_t<int64_t, py::array::c_style>;

std::pair<Numbers, Numbers> locate_windows(const Numbers& places, const Numbers& groups,
                                           const py::array_t<uint64_t, py::array::c_style>& drawn) {
    const py::ssize_t count = places.size();
    Numbers windows(count);
    Numbers starts(count);
    const int64_t* place_data = places.data();
    const int64_t* group_data = groups.data();
    const uint64_t* drawn_data = drawn.data();
    int64_t* window_data = windows.mutable_data();
    int64_t* start_data = starts.mutable_data();
    {
        py::gil_scoped_release released;
        for (py::ssize_t at = 0; at < count; ++at) {
            Epoch epoch;
            std::memcpy(&epoch, drawn_data + 13 * group_data[at], sizeof(Epoch));
            uint64_t window = scramble(static_cast<uint64_t>(place_data[at]), epoch);
            while (window >= epoch.num_windows) window = scramble(window, epoch);
            const int64_t start = epoch.origin + static_cast<int64_t>(window) * epoch.seq_length;  // < 2 * num_tokens
            window_data[at] = static_cast<int64_t>(window);
            start_data[at] = start < epoch.num_tokens ? start : start - epoch.num_tokens;
        }
    }
    return {windows, starts};
}

Numbers cut_documents(const Numbers& document_starts, int64_t seq_length) {
    const int64_t* documents = document_starts.data();
    const py::ssize_t num_documents = document_starts.size() - 1;
    const int64_t last = documents[num_documents] - 1;
    std::vector<int64_t> found{0};
    {
        py::gil_scoped_release released;
        py::ssize_t next = 0;  // the first document that begins behind the window's end
        while (found.back() < last) {
            const int64_t end = found.back() + seq_length;
            if (end >= last) {
                found.push_back(last);
                break;
            }
            while (next < num_documents && documents[next] <= end) ++next;
            const int64_t begun = documents[next - 1];
            found.push_back(begun > found.back() ? begun : end);
        }
    }
    return Numbers(static_cast<py::ssize_t>(found.size()), found.data());
}

}  // namespace

void bind_windows(py::module_& module) {
    module.def("cut_documents", &cut_documents, py::arg("document_starts"), py::arg("seq_length"),
               "First token of each window, and the last token: int64 [D + 1] -> int64 [W + 1].");
    module.def("locate_windows", &locate_windows, py::arg("places"), py::arg("groups"), py::arg("drawn"),
               "Window, and first token on the ring, of places in epochs: int64 [N], int64 [N], uint64 [G, 13] -> "
               "int64 [N], int64 [N].");
}

}  // namespace megatron_adapt
