// The safetensors container: eight bytes with the length of a JSON header, the header, and the raw numbers behind it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "error.hpp"

namespace fastmaf::record {

enum class Numbers : int { f32, f64, i64 };

inline const char* name_of(Numbers numbers) { return numbers == Numbers::f32 ? "float32" : numbers == Numbers::f64 ? "float64" : "int64"; }

// Points into the bytes of the file, at any alignment.
struct Tensor {
    Numbers numbers = Numbers::f32;
    std::vector<int64_t> shape;
    int64_t size = 0;  // entries
    const char* data = nullptr;
};

struct Container {
    std::map<std::string, Tensor> tensors;
    std::map<std::string, std::string> metadata;
};

// Checks everything, the digest too if the metadata has one; the bytes must outlive the tensors.
Container read_container(std::string_view data);

// The CRC-32 of zlib, of PNG and of Ethernet, continued from `crc`.
uint32_t crc32(std::string_view data, uint32_t crc = 0);

// How the keys of our metadata begin, and that of the CRC-32, in 8 hexadecimal digits, of this metadata and of all tensors.
constexpr const char* kOurs = "fastmaf";
constexpr const char* kDigest = "fastmaf_digest";

}  // namespace fastmaf::record
