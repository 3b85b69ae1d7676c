// Find one string of a flat JSON object without building the object: UTF-8 in, UTF-8 out.
//
// Only what is certain is answered. A line that is damaged, nested, blank, not UTF-8 or uncommon in another way gives
// nothing, and the caller's JSON library decides what it is. So this accepts a part of JSON, and nothing else.
// Time: one pass over the line, a second one over a text with escapes.

#include "lines.h"
#include "utf8.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace py = pybind11;

namespace megatron_adapt {
namespace {

constexpr size_t kMaxDigits = 15;  // of a number that every library reads alike

// The fixed bits of characters of two and three bytes, the first byte lowest.
constexpr uint32_t kTwoMask = 0xC0E0, kTwo = 0x80C0, kThreeMask = 0xC0C0F0, kThree = 0x8080E0;

int read_hex(const char* at, const char* end) {
    if (end - at < 4) return -1;
    int value = 0;
    for (int i = 0; i < 4; ++i) {
        const char c = at[i];
        const int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0) return -1;
        value = value << 4 | digit;
    }
    return value;
}

// The bytes of the character at ``at``, whose first one is above 0x7F; 0 where it is no UTF-8.
size_t measure_character(const unsigned char* at, size_t room) {
    const unsigned char first = at[0];
    const size_t size = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
    if (!size || size > room) return 0;
    for (size_t i = 1; i < size; ++i) {
        if ((at[i] & 0xC0) != 0x80) return 0;
    }
    const unsigned char second = at[1];
    const bool is_bad = (first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) ||
                        (first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F);
    return is_bad ? 0 : size;
}

class Reader {
   public:
    Reader(const char* at, size_t size) : at_(at), end_(at + size) {}

    void skip_space() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
    }

    bool take(char c) {
        skip_space();
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }

    bool is_at_end() {
        skip_space();
        return at_ == end_;
    }

    // Reads a string; ``raw`` is what stands between its quotes.
    bool take_string(std::string_view& raw, bool& has_escapes) {
        if (!take('"')) return false;
        const char* start = at_;
        has_escapes = false;
        while (at_ < end_) {
            skip_plain();
            if (at_ == end_) return false;
            const unsigned char c = *at_;
            if (c == '"') {
                raw = std::string_view(start, at_ - start);
                ++at_;
                return true;
            }
            if (c >= 0x80) {
                if (!skip_wide()) return false;
            } else if (c == '\\') {
                has_escapes = true;
                if (!skip_escape()) return false;
            } else if (c < 0x20) {
                return false;
            } else {
                ++at_;
            }
        }
        return false;
    }

    // Reads a number, true, false or null.
    bool take_plain_value() {
        skip_space();
        for (const std::string_view word : {"true", "false", "null"}) {
            if (std::string_view(at_, end_ - at_).substr(0, word.size()) == word) {
                at_ += word.size();
                return true;
            }
        }
        if (at_ < end_ && *at_ == '-') ++at_;
        const char* digits = at_;
        if (!skip_digits() || (*digits == '0' && at_ - digits > 1)) return false;
        if (at_ < end_ && *at_ == '.') {
            ++at_;
            if (!skip_digits()) return false;
        }
        return static_cast<size_t>(at_ - digits) <= kMaxDigits;
    }

   private:
    // Skips eight bytes at a time that need no look: no quote, backslash, control or byte above 0x7F.
    void skip_plain() {
        constexpr uint64_t kOnes = 0x0101010101010101, kHighs = 0x8080808080808080;
        while (end_ - at_ >= 8) {
            uint64_t word;
            std::memcpy(&word, at_, 8);
            const uint64_t quote = word ^ kOnes * '"', backslash = word ^ kOnes * '\\';
            const uint64_t found = (quote - kOnes) | (backslash - kOnes) | (word - kOnes * 0x20) | word;
            if (found & kHighs) return;
            at_ += 8;
        }
    }

    // Skips characters above 0x7F.
    bool skip_wide() {
        while (at_ < end_ && static_cast<unsigned char>(*at_) >= 0x80) {
            const auto* bytes = reinterpret_cast<const unsigned char*>(at_);
            const size_t room = end_ - at_;
            const uint32_t word = room >= 3 ? bytes[0] | bytes[1] << 8 | bytes[2] << 16 : 0;
            const unsigned char first = bytes[0];
            if ((word & kThreeMask) == kThree && first != 0xE0 && first != 0xED) {
                at_ += 3;
            } else if ((word & kTwoMask) == kTwo && first >= 0xC2) {
                at_ += 2;
            } else if (const size_t size = measure_character(bytes, room)) {
                at_ += size;
            } else {
                return false;
            }
        }
        return true;
    }

    bool skip_escape() {
        if (end_ - at_ < 2) return false;
        const char kind = at_[1];
        at_ += 2;
        if (kind != 'u') return std::string_view("\"\\/bfnrt").find(kind) != std::string_view::npos;
        const int unit = read_hex(at_, end_);
        if (unit < 0) return false;
        at_ += 4;
        if (unit < 0xD800 || unit > 0xDFFF) return true;
        if (unit > 0xDBFF || end_ - at_ < 6 || at_[0] != '\\' || at_[1] != 'u') return false;
        const int second = read_hex(at_ + 2, end_);
        at_ += 6;
        return second >= 0xDC00 && second <= 0xDFFF;
    }

    bool skip_digits() {
        const char* start = at_;
        while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
        return at_ > start;
    }

    const char* at_;
    const char* end_;
};

// Resolves the escapes of a string that ``take_string`` has read.
void unescape(std::string_view raw, std::string& out) {
    const char *at = raw.data(), *end = at + raw.size();
    out.clear();
    while (at < end) {
        const void* found = std::memchr(at, '\\', end - at);
        const char* next = found ? static_cast<const char*>(found) : end;
        out.append(at, next - at);
        if (next == end) return;
        const char kind = next[1];
        at = next + 2;
        if (kind != 'u') {
            constexpr std::string_view kKinds = "bfnrt", kMeanings = "\b\f\n\r\t";
            const size_t place = kKinds.find(kind);
            out += place == std::string_view::npos ? kind : kMeanings[place];
            continue;
        }
        uint32_t c = read_hex(at, end);
        at += 4;
        if (c >= 0xD800 && c <= 0xDFFF) {
            c = 0x10000 + ((c - 0xD800) << 10) + (read_hex(at + 2, end) - 0xDC00);
            at += 6;
        }
        append_utf8(c, out);
    }
}

// Whether a character is sure to be no white space; those that begin with the same bytes as one that is are left out.
bool has_ink(std::string_view text) {
    for (size_t i = 0; i < text.size(); ++i) {
        const unsigned char c = text[i];
        if ((c > 0x20 && c < 0x7F) || (c > 0xC2 && c != 0xE1 && c != 0xE2 && c != 0xE3)) return true;
        if (c == 0xE3 && static_cast<unsigned char>(text[i + 1]) != 0x80) return true;
    }
    return false;
}

py::object find_text(const py::bytes& line, const py::bytes& key) {
    const std::string_view bytes = line, wanted = key;
    Reader reader(bytes.data(), bytes.size());
    std::string_view name, value, text;
    bool has_escapes = false, text_has_escapes = false, is_found = false;
    if (!reader.take('{')) return py::none();
    do {
        if (!reader.take_string(name, has_escapes) || has_escapes || !reader.take(':')) return py::none();
        const bool is_string = reader.take_string(value, has_escapes);
        if (name == wanted) {
            if (is_found || !is_string) return py::none();
            text = value;
            text_has_escapes = has_escapes;
            is_found = true;
        } else if (!is_string && !reader.take_plain_value()) {
            return py::none();
        }
    } while (reader.take(','));
    if (!is_found || !reader.take('}') || !reader.is_at_end()) return py::none();
    thread_local std::string resolved;
    if (text_has_escapes) {
        unescape(text, resolved);
        text = resolved;
    }
    if (!has_ink(text)) return py::none();
    return py::bytes(text.data(), text.size());
}

}  // namespace

void bind_lines(py::module_& module) {
    module.def("find_text", &find_text, py::arg("line"), py::arg("key"),
               "Return the text of a JSON line in UTF-8, or None where the line needs a closer look.");
}

}  // namespace megatron_adapt
