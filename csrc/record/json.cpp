#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include <nlohmann/json.hpp>

namespace fastmaf::record {

namespace {

using Events = nlohmann::json_sax<nlohmann::json>;

// Builds the tree from the parser's events; false ends the parsing.
class Builder final : public Events {
public:
    Json root;
    const char* fault = nullptr;

    bool null() override { return put(Json{}); }
    bool boolean(bool value) override { return put(Json{value}); }
    bool number_integer(number_integer_t value) override { return put(Json{int64_t(value)}); }
    bool number_unsigned(number_unsigned_t value) override {
        if (value > uint64_t(std::numeric_limits<int64_t>::max())) return put(Json{double(value)});
        return put(Json{int64_t(value)});
    }
    bool number_float(number_float_t value, const string_t&) override {
        return std::isfinite(value) ? put(Json{double(value)}) : refuse("holds a number that is too large");
    }
    bool string(string_t& value) override { return put(Json{std::move(value)}); }
    bool binary(binary_t&) override { return refuse("is no JSON"); }
    bool start_object(std::size_t) override { return open(Json{Json::Object{}}); }
    bool start_array(std::size_t) override { return open(Json{Json::List{}}); }
    bool key(string_t& name) override {
        std::get<Json::Object>(open_.back()->value).emplace_back(std::move(name), Json{});
        return true;
    }
    bool end_array() override {
        open_.pop_back();
        return true;
    }
    bool end_object() override {
        auto& members = std::get<Json::Object>(open_.back()->value);
        open_.pop_back();
        std::sort(members.begin(), members.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        auto same = [](const auto& a, const auto& b) { return a.first == b.first; };
        if (std::adjacent_find(members.begin(), members.end(), same) != members.end()) return refuse("names something twice");
        return true;
    }
    bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception&) override { return refuse("is no JSON"); }

private:
    // The place of the next value. What is open is not moved before it is closed: values are added at the end of the innermost alone.
    Json& place() {
        if (open_.empty()) return root;
        if (auto* members = std::get_if<Json::Object>(&open_.back()->value)) return members->back().second;
        return std::get<Json::List>(open_.back()->value).emplace_back();
    }
    bool put(Json&& value) {
        place() = std::move(value);
        return true;
    }
    bool open(Json&& value) {
        if (int(open_.size()) == kDeepest) return refuse("is nested too deeply");
        Json& here = place();
        here = std::move(value);
        open_.push_back(&here);
        return true;
    }
    bool refuse(const char* why) {
        if (!fault) fault = why;
        return false;
    }

    std::vector<Json*> open_;
};

}  // namespace

int Json::depth() const {
    int deepest = 0;
    if (const List* all = list())
        for (const Json& each : *all) deepest = std::max(deepest, each.depth());
    else if (const Object* own = object())
        for (const auto& [name, each] : *own) deepest = std::max(deepest, each.depth());
    else
        return 0;
    return deepest + 1;
}

const Json* Json::find(std::string_view name) const {
    const Object& members = std::get<Object>(value);
    const auto found =
        std::lower_bound(members.begin(), members.end(), name, [](const auto& member, std::string_view n) { return member.first < n; });
    return found != members.end() && found->first == name ? &found->second : nullptr;
}

std::string Json::shown() const {
    if (is_null()) return "null";
    if (const bool* flag = boolean()) return *flag ? "true" : "false";
    if (const int64_t* number = integer()) return std::to_string(*number);
    if (const double* number = std::get_if<double>(&value)) {
        char digits[32];
        std::snprintf(digits, sizeof digits, "%.17g", *number);
        return digits;
    }
    if (const std::string* words = text()) return in_quotes(*words);
    return list() ? "a list" : "an object";
}

std::string in_quotes(std::string_view text) {
    constexpr size_t kHalf = 25;
    std::string result(text.substr(0, text.size() > 2 * kHalf ? kHalf : text.size()));
    if (text.size() > 2 * kHalf) result.append("...").append(text.substr(text.size() - kHalf));
    // Cut UTF-8 is no text; bytes beyond ASCII and what is not printed become a question mark.
    for (char& c : result)
        if (c < ' ' || c > '~') c = '?';
    return "'" + result + "'";
}

Json parse_json(std::string_view text, const std::string& what) {
    // Both of these the parser passes over.
    if (text.substr(0, 3) == "\xEF\xBB\xBF" || text.find('\0') != std::string_view::npos) throw Error(what + " is no JSON");
    Builder builder;
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder))
        throw Error(what + " " + (builder.fault ? builder.fault : "is no JSON"));
    return std::move(builder.root);
}

}  // namespace fastmaf::record
