// Count the words of SentencePiece text, where a word is a run of one kind of character behind at most one marker.
//
// A table gives each code point a class, and each class the kind of run it begins and the set of kinds it goes on with,
// so that text is read once, a character at a time. Words are kept in UTF-8 in blocks that never move, and found by
// open addressing. Time: about 10 ns a character. Memory: the bytes of the distinct words and 40 bytes for each.

#include "runs.h"
#include "utf8.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

constexpr uint32_t kMarker = 0x2581;  // how SentencePiece writes a space
constexpr uint32_t kNumCodePoints = 0x110000;
constexpr uint8_t kNoRun = 0xFF;

struct Class {
    uint8_t begins;      // kind of run, or kNoRun
    uint64_t goes_on;    // bit k: continues a run of kind k
    bool is_wanted;      // a word with such a character is counted
};

class Counts {
   public:
    Counts() : slots_(1 << 12, kEmpty) {}

    void add(std::string_view word) {
        if (2 * words_.size() >= slots_.size()) grow();
        size_t slot = find(word);
        if (slots_[slot] == kEmpty) {
            slots_[slot] = static_cast<uint32_t>(words_.size());
            words_.push_back({keep(word), 0});
        }
        ++words_[slots_[slot]].count;
    }

    py::dict to_dict() const {
        py::dict found;
        for (const Word& word : words_) found[py::str(word.text.data(), word.text.size())] = word.count;
        return found;
    }

   private:
    struct Word {
        std::string_view text;
        int64_t count;
    };

    static constexpr uint32_t kEmpty = 0xFFFFFFFF;
    static constexpr size_t kBlockBytes = 1 << 20;

    size_t find(std::string_view word) const {
        size_t slot = std::hash<std::string_view>{}(word) & (slots_.size() - 1);
        while (slots_[slot] != kEmpty && words_[slots_[slot]].text != word) slot = (slot + 1) & (slots_.size() - 1);
        return slot;
    }

    void grow() {
        slots_.assign(2 * slots_.size(), kEmpty);
        for (size_t i = 0; i < words_.size(); ++i) slots_[find(words_[i].text)] = static_cast<uint32_t>(i);
    }

    std::string_view keep(std::string_view word) {
        if (word.size() > room_) {
            room_ = std::max(kBlockBytes, word.size());
            blocks_.push_back(std::make_unique<char[]>(room_));
            next_ = blocks_.back().get();
        }
        std::memcpy(next_, word.data(), word.size());
        std::string_view kept(next_, word.size());
        next_ += word.size();
        room_ -= word.size();
        return kept;
    }

    std::vector<uint32_t> slots_;
    std::vector<Word> words_;
    std::vector<std::unique_ptr<char[]>> blocks_;
    char* next_ = nullptr;
    size_t room_ = 0;
};

template <class Char>
void count_text(const Char* text, size_t size, const uint8_t* classes, const std::vector<Class>& kinds, Counts& counts) {
    std::string word;
    bool has_marker = true;  // SentencePiece puts one in front of a text
    for (size_t i = 0; i < size;) {
        if (text[i] == ' ' || static_cast<uint32_t>(text[i]) == kMarker) {
            has_marker = true;
            ++i;
            continue;
        }
        const Class& first = kinds[classes[text[i]]];
        size_t end = i + 1;
        if (first.begins != kNoRun) {
            bool is_wanted = first.is_wanted || (has_marker && kinds[classes[kMarker]].is_wanted);
            for (; end < size; ++end) {
                const Class& next = kinds[classes[text[end]]];
                if (!(next.goes_on >> first.begins & 1)) break;
                is_wanted |= next.is_wanted;
            }
            if (is_wanted) {
                word.clear();
                if (has_marker) append_utf8(kMarker, word);
                for (; i < end; ++i) append_utf8(text[i], word);
                counts.add(word);
            }
        }
        i = end;
        has_marker = false;
    }
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::dict count_runs(const py::iterable& texts, const Array<uint8_t>& classes, const Array<uint8_t>& begins,
                    const Array<uint64_t>& goes_on, const Array<bool>& is_wanted) {
    const size_t num_classes = begins.size();
    if (classes.size() != kNumCodePoints || static_cast<size_t>(goes_on.size()) != num_classes ||
        static_cast<size_t>(is_wanted.size()) != num_classes) {
        throw std::invalid_argument("count_runs: one class a code point, and one entry a class");
    }
    if (*std::max_element(classes.data(), classes.data() + kNumCodePoints) >= num_classes) {
        throw std::invalid_argument("count_runs: a code point of a class that has no entry");
    }
    std::vector<Class> kinds;
    for (size_t i = 0; i < num_classes; ++i) kinds.push_back({begins.at(i), goes_on.at(i), is_wanted.at(i)});
    Counts counts;
    for (const py::handle& text : texts) {
        PyObject* object = text.ptr();
        if (!PyUnicode_Check(object)) throw std::invalid_argument("count_runs: a text that is no string");
        const size_t size = PyUnicode_GET_LENGTH(object);
        switch (PyUnicode_KIND(object)) {
            case PyUnicode_1BYTE_KIND:
                count_text(PyUnicode_1BYTE_DATA(object), size, classes.data(), kinds, counts);
                break;
            case PyUnicode_2BYTE_KIND:
                count_text(PyUnicode_2BYTE_DATA(object), size, classes.data(), kinds, counts);
                break;
            default:
                count_text(PyUnicode_4BYTE_DATA(object), size, classes.data(), kinds, counts);
        }
    }
    return counts.to_dict();
}

}  // namespace

void bind_runs(py::module_& module) {
    module.def("count_runs", &count_runs, py::arg("texts"), py::arg("classes"), py::arg("begins"), py::arg("goes_on"),
               py::arg("is_wanted"),
               "Count the words of texts; see megatron_adapt/tokenizer/runs.py for the tables.");
}

}  // namespace megatron_adapt
