// What the tests of the device's side share: flows, arrays, and how they count.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/device.hpp"
#include "cpu/backend.hpp"
#include "cpu/isa.hpp"
#include "runtime.hpp"

using namespace fastmaf;

namespace {

std::atomic<int> passed{0}, failed{0};  // threads check, too
#define CHECK(condition) check(condition, #condition, __LINE__)
inline void check(bool ok, const char* what, int line) {
    ++(ok ? passed : failed);
    if (!ok) std::fprintf(stderr, "line %d: %s\n", line, what);
}

using Reals = std::vector<double>;

inline FlowSpec small(int features, int context) {
    FlowSpec spec;
    spec.features = features;
    spec.context = context;
    auto columns = [](int n) {
        Columns columns;
        columns.kind.assign(size_t(n), Bijection::identity);
        columns.lower.assign(size_t(n), -INFINITY);
        columns.upper.assign(size_t(n), INFINITY);
        columns.loc.assign(size_t(n), 0.25);
        columns.scale.assign(size_t(n), 0.5);
        return columns;
    };
    spec.columns = columns(features);
    spec.columns.kind[0] = Bijection::log_above;
    spec.columns.lower[0] = -9;
    spec.context_columns = columns(context);
    for (int k = 0; k < 2; ++k) {
        StageSpec stage;
        stage.constant[0] = 2;
        for (int i = 0; i < features; ++i) {
            stage.variable.push_back(i);
            stage.ranks.push_back(k ? features - i : i + 1);
            stage.rows.push_back(2);
        }
        MapSpec hidden{9, features, {}, context > 0, true, -1};
        for (int u = 0; u < 9; ++u) hidden.degrees.push_back(u % features);
        stage.maps = {hidden, {2 * features, 9, {}, false, false, -1}};
        spec.stages.push_back(stage);
    }
    for (int i = 0; i < features; ++i) spec.noise_variable.push_back(i);
    return spec;
}

// With what gradients meet beside plain maps: a clip, sums that are added, gates, activations that keep their arguments, a mixture.
inline FlowSpec rich(int features, int context) {
    FlowSpec spec = small(features, context);
    for (StageSpec& stage : spec.stages) {
        const MapSpec hidden = stage.maps[0];
        stage.activation = Activation::gelu;
        stage.input_clip = 1;
        stage.maps = {hidden,
                      {9, 9, hidden.degrees, false, true, -1, Joins::gated, true},
                      {9, 9, hidden.degrees, false, true, 0, Joins::gated},
                      {9, 9, hidden.degrees, false, true, -1, Joins::activated},
                      stage.maps[1]};
    }
    StageSpec& base = spec.stages.back();
    base.output = Output::base;
    base.values.assign(size_t(features), 0);
    base.components = 2;
    base.rows.assign(size_t(features), 6);
    base.maps.back().rows = 6 * features;
    return spec;
}

inline Rows rows_of(const double* values, int width) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(values);
    rows.inner = width * int(sizeof(double));
    rows.column = sizeof(double);
    return rows;
}

inline std::string error_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const std::runtime_error& error) { return error.what(); }
    return "";
}

inline bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace
