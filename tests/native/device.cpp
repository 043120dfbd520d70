// The host's side of the CUDA backend over the runtime of runtime.cpp: chunks, streams, memory, errors.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/device.hpp"
#include "cpu/backend.hpp"
#include "cpu/isa.hpp"
#include "runtime.hpp"

using namespace fastmaf;

namespace {

int passed = 0, failed = 0;
#define CHECK(condition) check(condition, #condition, __LINE__)
void check(bool ok, const char* what, int line) {
    ++(ok ? passed : failed);
    if (!ok) std::fprintf(stderr, "line %d: %s\n", line, what);
}

using Reals = std::vector<double>;

FlowSpec small(int features, int context) {
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

Rows rows_of(const double* values, int width) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(values);
    rows.inner = width * int(sizeof(double));
    rows.column = sizeof(double);
    return rows;
}

bool same(const Reals& a, const Reals& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (!(std::fabs(a[i] - b[i]) <= 1e-10 * (1 + std::fabs(b[i])))) return false;
    return a.size() == b.size();
}

std::string error_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

int main() {
    const int features = 5, width = 2;
    const int64_t n = 3001;  // several chunks
    std::mt19937 rng(1);
    std::normal_distribution<double> normal;
    auto packed = std::make_shared<Weights<double>>(small(features, width));
    Reals parameters(size_t(packed->plan().parameter_count()));
    for (double& p : parameters) p = 0.4 * normal(rng);
    packed->set_parameters(parameters.data());
    Reals x(size_t(n) * features), context(size_t(n) * width);
    for (double& v : x) v = normal(rng);
    for (double& v : context) v = normal(rng);

    CHECK(runtime_blocks() == 0);
    {
        const device::Flow<double> first(packed, 0), second(packed, 1);
        const Poll none;
        for (int kind = 0; kind < 4; ++kind) {  // contexts by row, shared, by group; then rows with gaps
            Batch batch;
            batch.inner = kind == 2 ? n / 3 : n;
            batch.outer = kind == 2 ? 3 : 1;
            batch.x = rows_of(x.data(), features);
            batch.context = rows_of(context.data(), width);
            if (kind == 2) batch.x.outer = 0;
            if (kind == 1 || kind == 2) batch.context.inner = 0;
            if (kind == 2) batch.context.outer = width * int(sizeof(double));
            if (kind == 3) {
                batch.inner = n / 2;
                batch.x.inner *= 2;
                batch.x.data += (features - 1) * sizeof(double);
                batch.x.column = -int64_t(sizeof(double));
            }
            const size_t rows = size_t(batch.rows());
            Reals expected(rows), got(rows), z(rows * features), got_z(rows * features);
            for (const auto* flow : {&first, &second}) {
                log_prob<double>(*packed, batch, expected.data(), none);
                flow->log_prob(batch, got.data(), {}, none);
                CHECK(same(got, expected));
                to_noise<double>(*packed, batch, z.data(), none, nullptr, expected.data());
                flow->to_noise(batch, got_z.data(), {}, none);
                CHECK(same(got_z, z));
                flow->to_noise(batch, got_z.data(), {}, none, got.data());
                CHECK(same(got_z, z) && same(got, expected));
                from_noise<double>(*packed, batch, z.data(), none, nullptr, expected.data());
                flow->from_noise(batch, got_z.data(), {}, none);
                CHECK(same(got_z, z));
                flow->from_noise(batch, got_z.data(), {}, none, got.data());
                CHECK(same(got_z, z) && same(got, expected));
                log_prob<double>(*packed, batch, expected.data(), none);
            }
            // In place: nothing has happened until the stream is waited for.
            std::fill(got.begin(), got.end(), 0.0);
            first.log_prob(batch, got.data(), {true, 0}, none);
            CHECK(got == Reals(rows));
            device::synchronize(0, 0);
            CHECK(same(got, expected));
        }
        for (int contexts : {1, 3}) {
            Draw draw;
            draw.contexts = contexts;
            draw.rows = n / contexts;
            draw.seed = 3;
            draw.offset = 70;
            draw.context_offset = 2;
            draw.context = rows_of(context.data(), width);
            std::swap(draw.context.outer, draw.context.inner);
            const size_t rows = size_t(draw.contexts * draw.rows);
            Reals expected(rows * features), density(rows), got(rows * features), got_density(rows);
            sample<double>(*packed, draw, expected.data(), density.data(), none);
            first.sample(draw, got.data(), got_density.data(), {}, none);
            CHECK(same(got, expected) && same(got_density, density));
            std::vector<float> single(got.size()), got_single(got.size());
            sample<double>(*packed, draw, single.data(), density.data(), none);
            first.sample(draw, got_single.data(), got_density.data(), {}, none);
            CHECK(got_single == single && same(got_density, density));
            second.sample(draw, got.data(), nullptr, {}, none);
            CHECK(same(got, expected));
        }
        std::vector<uint64_t> index, group;
        for (int64_t i = 0; i < n; ++i) {
            index.push_back(uint64_t(rng()) << 8);
            group.push_back(rng());
        }
        Draw scattered;
        scattered.rows = n;
        scattered.index = index.data();
        scattered.group = group.data();
        scattered.context = rows_of(context.data(), width);
        Reals expected(size_t(n) * features), got(size_t(n) * features);
        sample<double>(*packed, scattered, expected.data(), static_cast<double*>(nullptr), none);
        first.sample(scattered, got.data(), nullptr, {}, none);
        CHECK(same(got, expected));

        Batch batch;
        batch.inner = n;
        batch.x = rows_of(x.data(), features);
        batch.context = rows_of(context.data(), width);
        Reals out(static_cast<size_t>(n));
        int polls = 0;
        const Poll impatient = [&] {
            if (++polls == 3) throw std::runtime_error("enough");
        };
        CHECK(error_of([&] { first.log_prob(batch, out.data(), {}, impatient); }) == "enough");
        first.log_prob(batch, out.data(), {}, none);
        CHECK(polls == 3 && std::isfinite(out.back()));
        // A call in the middle of another one, as from a signal handler; and from another thread that it waits for.
        const Reals alone = out;
        std::fill(out.begin(), out.end(), 0.0);
        Reals inner(out), other(out);
        polls = 0;
        const Poll calls = [&] {
            if (++polls != 2) return;
            first.log_prob(batch, inner.data(), {}, none);
            std::thread([&] { first.log_prob(batch, other.data(), {}, none); }).join();
        };
        first.log_prob(batch, out.data(), {}, calls);
        CHECK(polls > 2 && out == alone && inner == alone && other == alone);
        runtime_break(cudaErrorIllegalAddress);
        const std::string lost = error_of([&] { first.log_prob(batch, out.data(), {}, none); });
        CHECK(contains(lost, "while computing rows 0 and on") && contains(lost, "the device is lost to this process"));
        runtime_limit(1000);
        const std::string full = error_of([&] { first.log_prob(batch, out.data(), {}, none); });
        CHECK(contains(full, "cuda:0 is out of memory") && contains(full, "the scratch of one block"));
        CHECK(contains(full, "1000 B of 1.0 GiB are free"));
        const device::Flow<double> third(packed, 0);
        CHECK(contains(error_of([&] { third.log_prob(batch, out.data(), {}, none); }), "the weights of a flow"));
        runtime_limit(int64_t(1) << 40);
        CHECK(contains(error_of([&] { device::Flow<double>(packed, 2); }), "there is no cuda:2 here; GPUs: 2"));
    }
    CHECK(runtime_blocks() == 0);  // nothing stays
    {
        runtime_pools(false);
        const device::Flow<double> flow(packed, 1);
        Batch batch;
        batch.inner = n;
        batch.x = rows_of(x.data(), features);
        batch.context = rows_of(context.data(), width);
        Reals expected(static_cast<size_t>(n)), got(expected);
        log_prob<double>(*packed, batch, expected.data(), {});
        flow.log_prob(batch, got.data(), {}, {});
        CHECK(same(got, expected));
        runtime_pools(true);
    }
    CHECK(runtime_blocks() == 0);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
