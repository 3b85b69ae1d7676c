// Learn BPE pieces on top of given pieces (Sennrich et al. 2016), with counts kept up to date.
//
// All words lie behind one another in one array of positions. `sym_[p]` is the symbol that starts at position p;
// a merged symbol spans several positions and notes its length at its first and at its last one, so that both
// neighbours are found in one step and a merge moves nothing. A candidate is a byte string; every pair of
// neighbours that spells it counts towards it. Each candidate keeps the positions where it may start; positions
// that a merge has overtaken are noticed when they are visited. The heap holds for every open candidate an entry
// at least as high as its count, lowered when it comes up.
// Memory: about 30 bytes per position and 100 per distinct pair. Time: linear in the merged positions, plus the heap.

#include "merges.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

constexpr uint32_t kNone = 0xFFFFFFFF;

enum class State : uint8_t { kOpen, kRefused, kLearned };

struct Candidate {
    uint64_t hash;
    int64_t count = 0;
    uint32_t left, right;     // one pair that spells it
    uint32_t symbol = kNone;  // once learned
    State state = State::kOpen;
    bool touched = false;
    std::vector<uint32_t> positions;
};

// Candidate of a pair of symbols; open addressing keeps an entry at 12 bytes.
class PairTable {
   public:
    PairTable() : keys_(1 << 16, kEmpty), values_(1 << 16) {}

    uint32_t& operator[](uint64_t key) {
        if (2 * size_ >= keys_.size()) grow();
        size_t slot = find(key);
        if (keys_[slot] == kEmpty) {
            keys_[slot] = key;
            values_[slot] = kNone;
            ++size_;
        }
        return values_[slot];
    }

   private:
    static constexpr uint64_t kEmpty = ~0ULL;

    size_t find(uint64_t key) const {
        size_t slot = (key * 0x9E3779B97F4A7C15ULL >> 20) & (keys_.size() - 1);
        while (keys_[slot] != kEmpty && keys_[slot] != key) slot = (slot + 1) & (keys_.size() - 1);
        return slot;
    }

    void grow() {
        auto keys = std::move(keys_);
        auto values = std::move(values_);
        keys_.assign(2 * keys.size(), kEmpty);
        values_.assign(2 * keys.size(), kNone);
        for (size_t i = 0; i < keys.size(); ++i) {
            if (keys[i] == kEmpty) continue;
            size_t slot = find(keys[i]);
            keys_[slot] = keys[i];
            values_[slot] = values[i];
        }
    }

    std::vector<uint64_t> keys_;
    std::vector<uint32_t> values_;
    size_t size_ = 0;
};

class Learner {
   public:
    Learner(std::vector<std::string> symbols, const int32_t* ids, const int64_t* offsets, const int64_t* counts,
            int64_t num_words)
        : texts_(std::move(symbols)), slots_(1 << 16, kNone), counts_(counts, counts + num_words) {
        const int64_t length = offsets[num_words];
        if (length >= kNone || num_words >= kNone) throw std::invalid_argument("more than 4 billion symbols");
        sym_.assign(ids, ids + length);
        span_.assign(length, 1);
        word_.resize(length);
        for (int64_t w = 0; w < num_words; ++w) {
            for (int64_t p = offsets[w]; p < offsets[w + 1]; ++p) word_[p] = static_cast<uint32_t>(w);
            for (int64_t p = offsets[w]; p + 1 < offsets[w + 1]; ++p) add(static_cast<uint32_t>(p), sym_[p], sym_[p + 1]);
        }
        push_touched();
    }

    std::vector<std::pair<py::bytes, int64_t>> learn(int64_t num_pieces, int64_t min_frequency,
                                                     const py::function& accept) {
        std::vector<std::pair<py::bytes, int64_t>> learned;
        while (static_cast<int64_t>(learned.size()) < num_pieces && !heap_.empty()) {
            const Entry entry = heap_.top();
            heap_.pop();
            Candidate& candidate = candidates_[entry.candidate];
            if (candidate.state == State::kLearned) {
                merge(entry.candidate);
            } else if (candidate.state == State::kOpen && entry.count > candidate.count) {
                if (candidate.count >= min_frequency) push(entry.candidate);
            } else if (candidate.state == State::kOpen && entry.count == candidate.count) {
                if (candidate.count < min_frequency) break;
                const std::string text = spell(candidate);
                if (!accept(py::bytes(text)).cast<bool>()) {
                    candidate.state = State::kRefused;
                    std::vector<uint32_t>().swap(candidate.positions);
                    continue;
                }
                learned.emplace_back(py::bytes(text), candidate.count);
                candidate.state = State::kLearned;
                candidate.symbol = static_cast<uint32_t>(texts_.size());
                texts_.push_back(text);
                merge(entry.candidate);
            }
        }
        return learned;
    }

   private:
    struct Entry {
        int64_t count;
        uint32_t candidate;
    };

    // Highest count first, then the shorter, then the smaller byte string.
    struct Later {
        const Learner* owner;
        bool operator()(const Entry& a, const Entry& b) const {
            if (a.count != b.count) return a.count < b.count;
            if (a.candidate == b.candidate) return false;
            const std::string x = owner->spell(owner->candidates_[a.candidate]);
            const std::string y = owner->spell(owner->candidates_[b.candidate]);
            return x.size() != y.size() ? x.size() > y.size() : x > y;
        }
    };

    std::string spell(const Candidate& c) const { return texts_[c.left] + texts_[c.right]; }

    // Learned pieces come up before all counts, in the order they were learned.
    void push(uint32_t at) {
        const Candidate& c = candidates_[at];
        heap_.push({c.state == State::kLearned ? std::numeric_limits<int64_t>::max() - c.symbol : c.count, at});
    }

    void push_touched() {
        for (uint32_t at : touched_) {
            candidates_[at].touched = false;
            push(at);
        }
        touched_.clear();
    }

    uint32_t find_candidate(uint32_t left, uint32_t right) {
        uint32_t& known = pairs_[static_cast<uint64_t>(left) << 32 | right];
        if (known != kNone) return known;
        const std::string text = texts_[left] + texts_[right];
        const uint64_t hash = std::hash<std::string>()(text);
        if (2 * candidates_.size() >= slots_.size()) grow_slots();
        size_t slot = hash & (slots_.size() - 1);
        for (; slots_[slot] != kNone; slot = (slot + 1) & (slots_.size() - 1)) {
            const Candidate& c = candidates_[slots_[slot]];
            if (c.hash == hash && spell(c) == text) return known = slots_[slot];
        }
        known = slots_[slot] = static_cast<uint32_t>(candidates_.size());
        Candidate made;
        made.hash = hash;
        made.left = left;
        made.right = right;
        candidates_.push_back(std::move(made));
        return known;
    }

    void grow_slots() {
        slots_.assign(2 * slots_.size(), kNone);
        for (uint32_t at = 0; at < candidates_.size(); ++at) {
            size_t slot = candidates_[at].hash & (slots_.size() - 1);
            while (slots_[slot] != kNone) slot = (slot + 1) & (slots_.size() - 1);
            slots_[slot] = at;
        }
    }

    void add(uint32_t position, uint32_t left, uint32_t right) {
        const uint32_t at = find_candidate(left, right);
        Candidate& c = candidates_[at];
        if (c.state == State::kRefused) return;
        c.count += counts_[word_[position]];
        c.positions.push_back(position);
        if (!c.touched) {
            c.touched = true;
            touched_.push_back(at);
        }
    }

    void remove(uint32_t position, uint32_t left, uint32_t right) {
        candidates_[find_candidate(left, right)].count -= counts_[word_[position]];
    }

    bool same_word(uint32_t a, uint32_t b) const { return b < sym_.size() && word_[a] == word_[b]; }

    // Merge a learned candidate wherever its pairs stand, from left to right.
    void merge(uint32_t at) {
        std::vector<uint32_t> positions;
        positions.swap(candidates_[at].positions);
        std::sort(positions.begin(), positions.end());
        const uint32_t symbol = candidates_[at].symbol;
        for (uint32_t first : positions) {
            const uint32_t left = sym_[first];
            if (left == kNone) continue;
            const uint32_t second = first + span_[first];
            if (!same_word(first, second) || find_candidate(left, sym_[second]) != at) continue;
            const uint32_t right = sym_[second];
            const uint32_t end = second + span_[second];
            const bool has_before = first > 0 && word_[first - 1] == word_[first];
            const uint32_t before = has_before ? first - span_[first - 1] : kNone;
            if (has_before) remove(first, sym_[before], left);
            if (same_word(first, end)) remove(first, right, sym_[end]);
            remove(first, left, right);
            sym_[first] = symbol;
            sym_[second] = kNone;
            span_[first] = span_[end - 1] = end - first;
            if (has_before) add(before, sym_[before], symbol);
            if (same_word(first, end)) add(first, symbol, sym_[end]);
        }
        push_touched();
    }

    std::vector<std::string> texts_;
    std::vector<Candidate> candidates_;
    std::vector<uint32_t> slots_;  // candidate by the hash of its bytes
    PairTable pairs_;
    std::vector<uint32_t> sym_, span_, word_;
    std::vector<int64_t> counts_;
    std::vector<uint32_t> touched_;
    std::priority_queue<Entry, std::vector<Entry>, Later> heap_{Later{this}};
};

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::vector<std::pair<py::bytes, int64_t>> learn_merges(const std::vector<py::bytes>& symbols, Array<int32_t> ids,
                                                        Array<int64_t> offsets, Array<int64_t> counts,
                                                        int64_t num_pieces, int64_t min_frequency,
                                                        const py::function& accept) {
    const int64_t num_words = counts.size();
    if (offsets.size() != num_words + 1 || offsets.at(0) != 0 || offsets.at(num_words) != ids.size())
        throw std::invalid_argument("offsets do not fit ids and counts");
    for (int64_t w = 0; w < num_words; ++w)
        if (offsets.at(w) > offsets.at(w + 1)) throw std::invalid_argument("offsets decrease");
    for (int64_t i = 0; i < ids.size(); ++i)
        if (ids.data()[i] < 0 || ids.data()[i] >= static_cast<int64_t>(symbols.size()))
            throw std::invalid_argument("an id has no symbol");
    std::vector<std::string> texts(symbols.begin(), symbols.end());
    Learner learner(std::move(texts), ids.data(), offsets.data(), counts.data(), num_words);
    return learner.learn(num_pieces, min_frequency, accept);
}

}  // namespace

void bind_merges(py::module_& module) {
    module.def("learn_merges", &learn_merges, py::arg("symbols"), py::arg("ids"), py::arg("offsets"),
               py::arg("counts"), py::arg("num_pieces"), py::arg("min_frequency"), py::arg("accept"),
               "Learn BPE pieces over symbol sequences: (piece, frequency) in the order learned.");
}

}  // namespace megatron_adapt
