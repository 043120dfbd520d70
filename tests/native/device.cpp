// The host's side of the CUDA backend over the runtime of runtime.cpp: chunks, streams, memory, errors.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "device.hpp"

namespace {

bool same(const Reals& a, const Reals& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (a[i] != b[i] && !(std::fabs(a[i] - b[i]) <= 1e-10 * (1 + std::fabs(b[i])))) return false;
    return a.size() == b.size();
}

// Sums over axes of (outer, inner, width) numbers.
Reals summed(const Reals& values, const Batch& batch, device::Summed axes) {
    const size_t outer = size_t(batch.outer), inner = size_t(batch.inner), width = values.size() / (outer * inner);
    Reals result((axes.outer ? 1 : outer) * (axes.inner ? 1 : inner) * width);
    for (size_t o = 0; o < outer; ++o)
        for (size_t i = 0; i < inner; ++i)
            for (size_t w = 0; w < width; ++w)
                result[((axes.outer ? 0 : o) * (axes.inner ? 1 : inner) + (axes.inner ? 0 : i)) * width + w] +=
                    values[(o * inner + i) * width + w];
    return result;
}

struct Results {
    Reals value, x, context, parameters;
    device::Gradients<double> out(device::Summed of_x = {}, device::Summed of_context = {}) {
        return {value.data(), x.data(), context.data(), parameters.data(), of_x, of_context};
    }
    bool operator==(const Results& o) const { return value == o.value && x == o.x && context == o.context && parameters == o.parameters; }
};

// Gradients of arrays of the host and of the device, with and without what rows share summed up, in parts as small as memory asks for.
void check_gradients(const Weights<double>& packed, const device::Flow<double>& flow, const Batch& batch, const Reals& weights,
                     std::initializer_list<int64_t> limits) {
    const size_t rows = size_t(batch.rows()), features = size_t(packed.plan().features()), width = size_t(packed.plan().context());
    const Results empty{Reals(rows), Reals(rows * features), Reals(rows * width), Reals(size_t(packed.plan().parameter_count()))};
    Results expected = empty, got = empty;
    const Poll none;
    vjp<double>(packed, batch, weights.data(), expected.value.data(), expected.x.data(), expected.context.data(),
                expected.parameters.data(), none);
    Rows cotangent = rows_of(weights.data(), 1);
    cotangent.outer = batch.inner * cotangent.inner;
    auto good = [&](const Results& results) {
        return same(results.value, expected.value) && same(results.x, expected.x) && same(results.context, expected.context) &&
               same(results.parameters, expected.parameters);
    };
    flow.vjp(batch, cotangent, got.out(), {}, none);
    CHECK(good(got));
    Results alone = empty;
    flow.vjp(batch, cotangent, {alone.value.data(), nullptr, alone.context.data(), nullptr, {}, {}}, {}, none);
    CHECK(alone.value == got.value && alone.context == got.context);
    flow.vjp(batch, cotangent, {nullptr, nullptr, nullptr, alone.parameters.data(), {}, {}}, {}, none);
    CHECK(alone.parameters == got.parameters);
    for (int axes = 0; axes < 16; ++axes) {
        const device::Summed of_x{(axes & 1) != 0, (axes & 2) != 0}, of_context{(axes & 4) != 0, (axes & 8) != 0};
        Results there{Reals(rows), summed(empty.x, batch, of_x), summed(empty.context, batch, of_context), empty.parameters};
        const Results before = there;
        flow.vjp(batch, cotangent, there.out(of_x, of_context), {true, 0}, none);
        CHECK(there == before);  // it is only enqueued
        device::synchronize(0, 0);
        CHECK(same(there.value, expected.value) && same(there.x, summed(expected.x, batch, of_x)));
        CHECK(same(there.context, summed(expected.context, batch, of_context)));
        CHECK(batch.outer > 1 ? same(there.parameters, expected.parameters) : there.parameters == got.parameters);
        Results parts = before;
        for (int64_t bytes : limits) {  // of one allocation, in MB
            runtime_limit(bytes << 20);
            flow.vjp(batch, cotangent, parts.out(of_x, of_context), {true, 0}, none);
            device::synchronize(0, 0);
            CHECK(parts.value == there.value && same(parts.x, there.x) && same(parts.context, there.context));
            CHECK(batch.outer > 1 ? same(parts.parameters, there.parameters) : parts.parameters == there.parameters);
        }
        runtime_limit(int64_t(1) << 40);
    }
    Results ones = empty, of_ones = empty;
    vjp<double>(packed, batch, Reals(rows, 1.0).data(), ones.value.data(), ones.x.data(), ones.context.data(), ones.parameters.data(),
                none);
    flow.vjp(batch, {}, of_ones.out(), {true, 0}, none);
    device::synchronize(0, 0);
    CHECK(same(of_ones.x, ones.x) && same(of_ones.parameters, ones.parameters));
}

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
    Reals weights(static_cast<size_t>(n));
    for (double& v : weights) v = normal(rng);

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
            check_gradients(*packed, first, batch, weights, {3, 2});
        }
        {
            auto mixture = std::make_shared<Weights<double>>(rich(features, width));
            Reals own(size_t(mixture->plan().parameter_count()));
            for (double& p : own) p = 0.4 * normal(rng);
            mixture->set_parameters(own.data());
            Batch batch;
            batch.inner = 700;
            batch.x = rows_of(x.data(), features);
            batch.context = rows_of(context.data(), width);
            Reals spoilt = x;
            spoilt[2 * features] = -20;         // outside a bound
            spoilt[40 * features + 2] = 1e300;  // no density
            batch.x.data = reinterpret_cast<const char*>(spoilt.data());
            check_gradients(*mixture, device::Flow<double>(mixture, 0), batch, weights, {3});
        }
        {
            Batch nothing;
            nothing.outer = 3;
            nothing.inner = 0;
            Reals of_context(3 * width, 1.0), of_parameters(parameters.size(), 1.0);
            device::Gradients<double> out;
            out.context = of_context.data();
            out.of_context.inner = true;
            out.parameters = of_parameters.data();
            first.vjp(nothing, {}, out, {true, 0}, none);
            device::synchronize(0, 0);
            CHECK(of_context == Reals(3 * width) && of_parameters == Reals(parameters.size()));
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
        device::Gradients<double> gradients;
        gradients.parameters = parameters.data();
        polls = 0;
        CHECK(error_of([&] { first.vjp(batch, rows_of(weights.data(), 1), gradients, {}, impatient); }) == "enough");
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
        runtime_limit(100000);
        CHECK(contains(error_of([&] { first.vjp(batch, {}, gradients, {true, 0}, none); }), "the scratch of gradients"));
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
    std::printf("%d passed, %d failed\n", passed.load(), failed.load());
    return failed ? 1 : 0;
}
