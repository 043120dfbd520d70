#include "container.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>

#include "json.hpp"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files hold little-endian numbers, which are read as they are");

namespace fastmaf::record {

namespace {

constexpr uint64_t kLongestHeader = 100'000'000;  // the limit of the format
constexpr size_t kMostAxes = 32;

[[noreturn]] void damaged(const std::string& why) { throw Error("it is damaged or no safetensors file (" + why + ")"); }

bool is_other_dtype(std::string_view name) {
    for (const char* other : {"BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "U64", "F8_E4M3", "F8_E5M2"})
        if (name == other) return true;
    return false;
}

// a * b, or the largest number where that is more.
uint64_t product(uint64_t a, uint64_t b) {
    constexpr uint64_t most = std::numeric_limits<uint64_t>::max();
    return b && a > most / b ? most : a * b;
}

std::vector<int64_t> counts(const Json& node) {
    std::vector<int64_t> result;
    const Json::List* list = node.list();
    if (!list) damaged("a tensor has a shape or range that is not made of counts");
    for (const Json& item : *list) {
        const int64_t* count = item.integer();
        if (!count || *count < 0) damaged("a tensor has a shape or range that is not made of counts");
        result.push_back(*count);
    }
    return result;
}

struct Range {
    int64_t first, last;
};

Tensor tensor_of(const std::string& name, const Json& entry, std::string_view numbers, std::vector<Range>& ranges) {
    const Json::Object* fields = entry.object();
    const Json* dtype = fields ? entry.find("dtype") : nullptr;
    const Json* shape = fields ? entry.find("shape") : nullptr;
    const Json* offsets = fields ? entry.find("data_offsets") : nullptr;
    if (!dtype || !shape || !offsets || fields->size() != 3) damaged("a tensor lacks its dtype, shape or data_offsets");
    const std::string code = dtype->text() ? *dtype->text() : "";
    if (is_other_dtype(code)) throw Error("tensor " + in_quotes(name) + " has dtype " + code + "; it must be one of F32, F64, I64");
    if (code != "F32" && code != "F64" && code != "I64") damaged("a tensor has a dtype that the format does not know");
    Tensor tensor;
    tensor.numbers = code == "F32" ? Numbers::f32 : code == "F64" ? Numbers::f64 : Numbers::i64;
    tensor.shape = counts(*shape);
    const std::vector<int64_t> range = counts(*offsets);
    if (tensor.shape.size() > kMostAxes || range.size() != 2 || range[0] > range[1] || range[1] > int64_t(numbers.size()))
        damaged("a tensor lies outside the file");
    const uint64_t width = tensor.numbers == Numbers::f32 ? 4 : 8;
    uint64_t all = width, without_zeros = width;
    for (int64_t extent : tensor.shape) {
        all = product(all, uint64_t(extent));
        without_zeros = product(without_zeros, uint64_t(std::max<int64_t>(extent, 1)));
    }
    const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
    if ((empty ? 0 : all) != uint64_t(range[1] - range[0]) || without_zeros > uint64_t(std::numeric_limits<int64_t>::max()))
        damaged("a tensor has a shape that does not fill its range");
    tensor.size = (range[1] - range[0]) / int64_t(width);
    tensor.data = numbers.data() + range[0];
    ranges.push_back({range[0], range[1]});
    return tensor;
}

void check_ranges(std::vector<Range>& ranges, int64_t size) {
    std::sort(ranges.begin(), ranges.end(), [](Range a, Range b) { return a.first != b.first ? a.first < b.first : a.last < b.last; });
    int64_t end = 0;
    for (const Range& range : ranges) {
        if (range.first != end)
            damaged((range.first < end ? "two tensors share" : "no tensor has") +
                    (" the bytes from " + std::to_string(std::min(range.first, end))) + " on");
        end = range.last;
    }
    if (end != size) damaged("no tensor has the bytes from " + std::to_string(end) + " on");
}

void check_digest(const Container& container) {
    const auto digest = container.metadata.find(kDigest);
    if (digest == container.metadata.end()) return;
    // Of our metadata and of the tensors, in the order of their names; each name and text ends in a zero byte.
    const std::string_view end("\0", 1);
    uint32_t crc = 0;
    for (const auto& [key, text] : container.metadata)
        if (key.rfind(kOurs, 0) == 0 && key != kDigest)
            for (std::string_view piece : {std::string_view(key), end, std::string_view(text), end}) crc = crc32(piece, crc);
    for (const auto& [name, tensor] : container.tensors) {
        crc = crc32(end, crc32(name, crc));
        crc = crc32({tensor.data, size_t(tensor.size) * (tensor.numbers == Numbers::f32 ? 4 : 8)}, crc);
    }
    char digits[9];
    std::snprintf(digits, sizeof digits, "%08x", crc);
    if (digest->second != digits)
        throw Error("it is damaged: the CRC-32 of its contents is " + std::string(digits) + ", and it names another");
}

// kCrc[k][b]: what byte b does when k more bytes follow it.
constexpr auto kCrc = [] {
    std::array<std::array<uint32_t, 256>, 8> table{};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0u);
        table[0][b] = crc;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t b = 0; b < 256; ++b) table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
    return table;
}();

}  // namespace

uint32_t crc32(std::string_view data, uint32_t crc) {
    crc = ~crc;
    const char* p = data.data();
    size_t left = data.size();
    for (; left >= 8; left -= 8, p += 8) {  // eight bytes at a time
        uint64_t word;
        std::memcpy(&word, p, 8);
        word ^= crc;
        crc = 0;
        for (size_t k = 0; k < 8; ++k) crc ^= kCrc[7 - k][(word >> (8 * k)) & 255];
    }
    for (; left; --left, ++p) crc = (crc >> 8) ^ kCrc[0][(crc ^ uint8_t(*p)) & 255];
    return ~crc;
}

Container read_container(std::string_view data) {
    uint64_t length = 0;
    if (data.size() >= 8) std::memcpy(&length, data.data(), 8);
    if (data.size() < 8 || length > data.size() - 8 || length > kLongestHeader) damaged("its header is cut off");
    const std::string_view numbers = data.substr(8 + size_t(length));
    Json header;
    try {
        header = parse_json(data.substr(8, size_t(length)), "its header");
    } catch (const Error& error) { damaged(error.what()); }
    if (!header.object()) damaged("its header is not a JSON object");
    Container container;
    std::vector<Range> ranges;
    for (const auto& [name, entry] : *header.object()) {
        if (name == "__metadata__") {
            if (!entry.object()) damaged("its metadata is not text by name");
            for (const auto& [key, value] : *entry.object()) {
                if (!value.text()) damaged("its metadata is not text by name");
                container.metadata.emplace(key, *value.text());
            }
        } else {
            container.tensors.emplace_hint(container.tensors.end(), name, tensor_of(name, entry, numbers, ranges));
        }
    }
    check_ranges(ranges, int64_t(numbers.size()));
    check_digest(container);
    return container;
}

}  // namespace fastmaf::record
