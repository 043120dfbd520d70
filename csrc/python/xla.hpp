// The call interface of XLA's foreign functions, version 0.x, as far as a handler on the CPU reads it: layouts of xla/ffi/api/c_api.h, of
// which a handler may rely on the order and size of fields within one major version.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmaf::xla {

struct Extension {
    size_t size;
    int32_t type;
    Extension* next;
};
constexpr int32_t kMetadata = 1;

struct Version {
    size_t size;
    Extension* extensions;
    int32_t major, minor;
};

struct Metadata {
    size_t size;
    Version version;
    uint32_t traits;
    int64_t state;
};

struct MetadataExtension {
    Extension extension;
    Metadata* metadata;
};

struct Error;

struct ErrorArguments {
    size_t size;
    Extension* extensions;
    const char* message;
    int32_t code;
};
constexpr int32_t kInvalidArgument = 3, kResourceExhausted = 8, kInternal = 13;

struct Api {
    size_t size;
    Extension* extensions;
    Version version;
    const void* internal;
    Error* (*make_error)(ErrorArguments*);
};

constexpr int32_t kSigned64 = 5, kUnsigned32 = 8, kFloat32 = 11, kFloat64 = 12;

struct Buffer {
    size_t size;
    Extension* extensions;
    int32_t dtype;
    void* data;
    int64_t rank;
    int64_t* dims;
};

struct Buffers {  // arguments or results
    size_t size;
    Extension* extensions;
    int64_t count;
    int32_t* types;
    Buffer** buffers;
};

struct Name {
    const char* data;
    size_t size;
};

struct Scalar {
    int32_t dtype;
    const void* value;
};
constexpr int32_t kScalar = 3;

struct Attributes {
    size_t size;
    Extension* extensions;
    int64_t count;
    int32_t* types;
    Name** names;
    void** values;
};

struct Call {
    size_t size;
    Extension* extensions;
    const Api* api;
    void* context;
    int32_t stage;
    Buffers arguments, results;
    Attributes attributes;
};

using Handler = Error*(Call*);

}  // namespace fastmaf::xla
