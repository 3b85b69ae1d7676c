// Earliest-deadline order of sources; the twin, the proof and the limits are in megatron_adapt/data/blend.py.

#include "blend.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

__extension__ typedef unsigned __int128 Wide;  // placed * total is below 2^112

// placed * total / weight kept as whole + rest / weight while placed grows, so that only the start needs 128 bits.
struct Cursor {
    int64_t weight;
    int64_t whole;
    int64_t rest;
    int64_t whole_step;
    int64_t rest_step;

    Cursor(int64_t total, int64_t weight, int64_t placed)
        : weight(weight), whole_step(total / weight), rest_step(total % weight) {
        const Wide product = static_cast<Wide>(placed) * static_cast<Wide>(total);
        whole = static_cast<int64_t>(product / static_cast<Wide>(weight));
        rest = static_cast<int64_t>(product % static_cast<Wide>(weight));
    }

    int64_t release() const { return whole; }  // floor(placed * total / weight): 0-based step
    int64_t deadline() const {                 // ceil((placed + 1) * total / weight): exclusive
        // 0 <= rest < weight and 0 <= rest_step < weight: their sum lies in [0, 2 * weight).
        const bool carries = rest >= weight - rest_step;
        const int64_t next_rest = carries ? rest - (weight - rest_step) : rest + rest_step;
        return whole + whole_step + (carries ? 1 : 0) + (next_rest > 0 ? 1 : 0);
    }
    void advance() {
        const bool carries = rest >= weight - rest_step;
        rest = carries ? rest - (weight - rest_step) : rest + rest_step;
        whole += whole_step + (carries ? 1 : 0);
    }
};

using Counts = py::array_t<int64_t, py::array::c_style>;

// A set of small numbers that gives back the least: a bit each, and a bit for every 64 of the level below.
class LeastFirst {
   public:
    explicit LeastFirst(size_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(size_t number) {
        for (auto& level : levels_) {
            uint64_t& word = level[number / 64];
            const bool known = word != 0;
            word |= uint64_t{1} << (number % 64);
            if (known) return;
            number /= 64;
        }
    }

    size_t pop() {  // not empty
        size_t number = 0;
        for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
            number = 64 * number + static_cast<size_t>(__builtin_ctzll((*level)[number]));
        }
        size_t rest = number;
        for (auto& level : levels_) {
            uint64_t& word = level[rest / 64];
            word &= word - 1;
            if (word != 0) break;
            rest /= 64;
        }
        return number;
    }

   private:
    std::vector<std::vector<uint64_t>> levels_;
};

struct Window {
    int64_t deadline;  // steps from the start of the block, exclusive
    int32_t release;   // likewise, 0 if earlier
    int32_t source;
};

// The order, a block of steps at a time: the windows that may be read in it are ranked by (deadline, source), and every
// step reads the least rank released so far. The time for a window does not depend on the number of sources.
class Order {
   public:
    Order(const int64_t* weights, const int64_t* placed, int64_t num_sources) {
        int64_t total = 0;
        for (int64_t source = 0; source < num_sources; ++source) {
            total += weights[source];
            step_ += placed[source];
        }
        for (int64_t source = 0; source < num_sources; ++source) {
            if (weights[source] == 0) continue;
            cursors_.emplace_back(total, weights[source], placed[source]);
            names_.push_back(static_cast<int32_t>(source));
        }
    }

    template <typename Emit>
    void run(int64_t count, Emit&& emit) {
        const int64_t block = std::max<int64_t>(kLeastBlock, 8 * static_cast<int64_t>(cursors_.size()));
        while (count > 0) {
            const int64_t steps = std::min(count, block);
            run_block(static_cast<int32_t>(steps), emit);
            count -= steps;
        }
    }

   private:
    static constexpr int64_t kLeastBlock = 1 << 13;

    template <typename Emit>
    void run_block(int32_t steps, Emit&& emit) {
        collect(steps);
        rank(steps);
        LeastFirst ready(ranked_.size());
        size_t next = 0;
        for (int32_t step = 0; step < steps; ++step) {
            for (; next < static_cast<size_t>(ends_[step]); ++next) ready.insert(by_release_[next]);
            const int32_t source = ranked_[ready.pop()].source;  // by step t at least t + 1 windows are released
            cursors_[source].advance();
            emit(names_[source]);
        }
        step_ += steps;
    }

    void collect(int32_t steps) {
        windows_.clear();
        for (size_t source = 0; source < cursors_.size(); ++source) {
            for (Cursor cursor = cursors_[source]; cursor.release() < step_ + steps; cursor.advance()) {
                const auto release = static_cast<int32_t>(std::max<int64_t>(0, cursor.release() - step_));
                windows_.push_back({cursor.deadline() - step_, release, static_cast<int32_t>(source)});
            }
        }
    }

    void rank(int32_t steps) {
        // Stable counting sort: windows come by source. Few end outside the block, at most one of a source after it.
        const auto bucket = [steps](const Window& window) {
            return static_cast<size_t>(std::clamp<int64_t>(window.deadline, 0, steps + 1));
        };
        ends_.assign(steps + 3, 0);
        for (const Window& window : windows_) ++ends_[bucket(window) + 1];
        for (int32_t at = 1; at < steps + 3; ++at) ends_[at] += ends_[at - 1];
        const int32_t early = ends_[1], far = ends_[steps + 1];
        ranked_.resize(windows_.size());
        for (const Window& window : windows_) ranked_[ends_[bucket(window)]++] = window;
        const auto before = [](const Window& a, const Window& b) { return a.deadline < b.deadline; };
        std::stable_sort(ranked_.begin(), ranked_.begin() + early, before);
        std::stable_sort(ranked_.begin() + far, ranked_.end(), before);

        ends_.assign(steps + 1, 0);
        for (const Window& window : ranked_) ++ends_[window.release + 1];
        for (int32_t at = 1; at < steps + 1; ++at) ends_[at] += ends_[at - 1];
        by_release_.resize(ranked_.size());
        for (size_t at = 0; at < ranked_.size(); ++at) {
            by_release_[ends_[ranked_[at].release]++] = static_cast<int32_t>(at);
        }
    }

    int64_t step_ = 0;
    std::vector<Cursor> cursors_;  // of the sources with a weight
    std::vector<int32_t> names_;
    std::vector<Window> windows_;
    std::vector<Window> ranked_;
    std::vector<int32_t> by_release_;  // ranks
    std::vector<int32_t> ends_;        // of the ranks released at each step
};

py::array_t<uint16_t> interleave(const Counts& weights, const Counts& placed, int64_t count) {
    py::array_t<uint16_t> order(count);
    uint16_t* data = order.mutable_data();
    {
        py::gil_scoped_release released;
        Order sources(weights.data(), placed.data(), weights.size());
        sources.run(count, [data](int32_t source) mutable { *data++ = static_cast<uint16_t>(source); });
    }
    return order;
}

py::array_t<int64_t> count_steps(const Counts& weights, const Counts& placed, int64_t count) {
    py::array_t<int64_t> counts(weights.size());
    int64_t* data = counts.mutable_data();
    {
        py::gil_scoped_release released;
        for (py::ssize_t source = 0; source < weights.size(); ++source) data[source] = 0;
        Order sources(weights.data(), placed.data(), weights.size());
        sources.run(count, [data](int32_t source) { ++data[source]; });
    }
    return counts;
}

}  // namespace

void bind_blend(py::module_& module) {
    module.def("interleave", &interleave, py::arg("weights"), py::arg("placed"), py::arg("count"),
               "Order the next windows of K sources: int64 weights, windows placed [K] -> uint16 source ids [count].");
    module.def("count_steps", &count_steps, py::arg("weights"), py::arg("placed"), py::arg("count"),
               "Count the windows of each source among those that ``interleave`` would give: int64 [K].");
}

}  // namespace megatron_adapt
