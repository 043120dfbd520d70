// JSON as a tree of plain values, read strictly: no name twice in an object, nothing that is no number, a bounded depth.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "error.hpp"

namespace fastmaf::record {

class Json {
public:
    using List = std::vector<Json>;
    using Object = std::vector<std::pair<std::string, Json>>;  // sorted by name

    // An integer that no int64 holds is a double.
    std::variant<std::nullptr_t, bool, int64_t, double, std::string, List, Object> value = nullptr;

    bool is_null() const { return std::holds_alternative<std::nullptr_t>(value); }
    const bool* boolean() const { return std::get_if<bool>(&value); }
    const int64_t* integer() const { return std::get_if<int64_t>(&value); }
    const std::string* text() const { return std::get_if<std::string>(&value); }
    const List* list() const { return std::get_if<List>(&value); }
    const Object* object() const { return std::get_if<Object>(&value); }
    const Json* find(std::string_view name) const;  // of an object; null if it has no such
    std::string shown() const;                      // in a few characters, for messages
    int depth() const;                              // how many lists and objects lie within each other
};

// Deepest nesting of lists and objects.
constexpr int kDeepest = 66;

// `what` begins the messages.
Json parse_json(std::string_view text, const std::string& what);

// A text from a file in a message: quoted, in one line, its middle left out where it is long.
std::string in_quotes(std::string_view text);

}  // namespace fastmaf::record
