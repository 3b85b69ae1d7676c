// Earliest-deadline interleave of sources; the twin and the proof are in megatron_adapt/data/blend.py.

#include "blend.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

// j * total / count kept as whole + rest / count while j grows, so that no product can overflow.
struct Cursor {
    int64_t count;
    int64_t placed = 0;
    int64_t whole = 0;
    int64_t rest = 0;
    int64_t whole_step;
    int64_t rest_step;

    Cursor(int64_t total, int64_t count)
        : count(count), whole_step(count ? total / count : 0), rest_step(count ? total % count : 0) {}

    bool finished() const { return placed == count; }
    int64_t release() const { return whole; }  // floor(placed * total / count): 0-based step
    int64_t deadline() const {                 // ceil((placed + 1) * total / count): exclusive
        // 0 <= rest < count and 0 <= rest_step < count: their sum lies in [0, 2 * count).
        const bool carries = rest >= count - rest_step;
        const int64_t next_rest = carries ? rest - (count - rest_step) : rest + rest_step;
        return whole + whole_step + (carries ? 1 : 0) + (next_rest > 0 ? 1 : 0);
    }
    void advance() {
        const bool carries = rest >= count - rest_step;
        rest = carries ? rest - (count - rest_step) : rest + rest_step;
        whole += whole_step + (carries ? 1 : 0);
        ++placed;
    }
};

using Entry = std::pair<int64_t, int32_t>;  // (time, source): ties fall to the lower source
using Heap = std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>>;

void interleave_into(uint16_t* order, int64_t total, std::vector<Cursor>& cursors) {
    Heap pending;  // by release
    Heap ready;    // by deadline
    for (size_t source = 0; source < cursors.size(); ++source) {
        if (!cursors[source].finished()) {
            ready.emplace(cursors[source].deadline(), static_cast<int32_t>(source));
        }
    }
    for (int64_t step = 0; step < total; ++step) {
        while (!pending.empty() && pending.top().first <= step) {
            const int32_t source = pending.top().second;
            pending.pop();
            ready.emplace(cursors[source].deadline(), source);
        }
        const int32_t source = ready.top().second;  // never empty: by step t at least t + 1 windows are released
        ready.pop();
        order[step] = static_cast<uint16_t>(source);
        Cursor& cursor = cursors[source];
        cursor.advance();
        if (cursor.finished()) continue;
        if (cursor.release() <= step + 1) {
            ready.emplace(cursor.deadline(), source);
        } else {
            pending.emplace(cursor.release(), source);
        }
    }
}

py::array_t<uint16_t> interleave(const py::array_t<int64_t, py::array::c_style>& windows) {
    const auto counts = windows.unchecked<1>();
    int64_t total = 0;
    for (py::ssize_t source = 0; source < counts.shape(0); ++source) total += counts(source);
    std::vector<Cursor> cursors;
    cursors.reserve(counts.shape(0));
    for (py::ssize_t source = 0; source < counts.shape(0); ++source) cursors.emplace_back(total, counts(source));
    py::array_t<uint16_t> order(total);
    uint16_t* data = order.mutable_data();
    {
        py::gil_scoped_release released;
        interleave_into(data, total, cursors);
    }
    return order;
}

}  // namespace

void bind_blend(py::module_& module) {
    module.def("interleave", &interleave, py::arg("windows"),
               "Order the windows of K sources by earliest deadline: int64 counts [K] -> uint16 source ids [sum].");
}

}  // namespace megatron_adapt
