// Hamiltonian Monte Carlo (Neal 2011) on the density of a flow and its gradient: many chains side by side, which share every call.
//
//     hmc FLOW [steps] [chains]
//
// Chains begin at samples of the flow and move in units of its standard deviations. The moments of the chains are compared with those of
// samples; standard errors of chains come from the spread between them.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <vector>

#include <fastmaf.hpp>

namespace {

using Reals = std::vector<double>;

struct Chains {
    std::size_t count, features;
    Reals scale, x, log_prob, gradient;
};

// One trajectory of all chains; returns how many were accepted.
template <class Generator>
std::size_t move(fastmaf::Evaluator& flow, Chains& chains, double step, int leaps, Generator& random) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    Reals x = chains.x, momentum(x.size()), log_prob = chains.log_prob, gradient = chains.gradient, before(chains.count), after(chains.count);
    for (double& p : momentum) p = normal(random);
    auto energy = [&](const Reals& density, Reals& out) {
        for (std::size_t c = 0; c < chains.count; ++c) {
            out[c] = -density[c];
            for (std::size_t d = 0; d < chains.features; ++d) out[c] += 0.5 * momentum[c * chains.features + d] * momentum[c * chains.features + d];
        }
    };
    auto kick = [&](double size) {
        for (std::size_t i = 0; i < x.size(); ++i) momentum[i] += size * step * chains.scale[i % chains.features] * gradient[i];
    };
    energy(log_prob, before);
    kick(0.5);
    for (int leap = 0; leap < leaps; ++leap) {
        for (std::size_t i = 0; i < x.size(); ++i) x[i] += step * chains.scale[i % chains.features] * momentum[i];
        flow.log_prob_and_grad(x, fastmaf::none, log_prob, gradient);
        kick(leap + 1 < leaps ? 1 : 0.5);
    }
    energy(log_prob, after);
    std::size_t accepted = 0;
    for (std::size_t c = 0; c < chains.count; ++c) {
        if (!(std::log(uniform(random)) < before[c] - after[c])) continue;
        ++accepted;
        const auto first = std::ptrdiff_t(c * chains.features), last = first + std::ptrdiff_t(chains.features);
        std::copy(x.begin() + first, x.begin() + last, chains.x.begin() + first);
        std::copy(gradient.begin() + first, gradient.begin() + last, chains.gradient.begin() + first);
        chains.log_prob[c] = log_prob[c];
    }
    return accepted;
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 2) return std::puts("usage: hmc FLOW [steps] [chains]"), 2;
    const int steps = argc > 2 ? std::atoi(argv[2]) : 1000;
    const auto count = std::size_t(argc > 3 ? std::atoi(argv[3]) : 64);
    constexpr int leaps = 10, warmup = 200;
    const fastmaf::Model model(argv[1]);
    if (model.context_features() > 0) return std::puts("a flow without context is needed"), 2;
    fastmaf::Evaluator flow(model);
    const auto features = std::size_t(model.features());

    // Where the flow lies: means and standard deviations of its own samples.
    constexpr std::size_t draws = 100000;
    const Reals samples = flow.sample(std::int64_t(draws), 1);
    Reals mean(features), deviation(features);
    for (std::size_t i = 0; i < samples.size(); ++i) mean[i % features] += samples[i] / draws;
    for (std::size_t i = 0; i < samples.size(); ++i) deviation[i % features] += (samples[i] - mean[i % features]) * (samples[i] - mean[i % features]) / draws;
    for (double& d : deviation) d = std::sqrt(d);

    Chains chains{count, features, deviation, Reals(samples.begin(), samples.begin() + std::ptrdiff_t(count * features)), Reals(count), {}};
    chains.gradient.resize(count * features);
    flow.log_prob_and_grad(chains.x, fastmaf::none, chains.log_prob, chains.gradient);
    std::mt19937_64 random(1);
    double step = 0.1;
    for (int i = 0; i < warmup; ++i) step *= double(move(flow, chains, step, leaps, random)) / double(count) > 0.8 ? 1.05 : 0.95;

    // Of each chain and variable: sums of z and z^2, z in standard deviations; and the products of neighbours, for the effective size.
    Reals first(count * features), second(count * features), last(count * features), lagged(count * features);
    std::size_t accepted = 0;
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < steps; ++i) {
        accepted += move(flow, chains, step, leaps, random);
        for (std::size_t k = 0; k < count * features; ++k) {
            const double z = (chains.x[k] - mean[k % features]) / deviation[k % features];
            first[k] += z;
            second[k] += z * z;
            if (i) lagged[k] += z * last[k];
            last[k] = z;
        }
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%zu chains of %d steps, step size %.3f, accepted %.2f, %.0f gradients per second\n", count, steps, step,
                double(accepted) / double(count) / steps, double(count) * steps * leaps / seconds);
    bool right = true;
    for (std::size_t d = 0; d < features; ++d) {
        double moment[2] = {}, error[2] = {}, variance = 0, correlation = 0;
        for (int m = 0; m < 2; ++m) {
            const Reals& sums = m ? second : first;
            for (std::size_t c = 0; c < count; ++c) moment[m] += sums[c * features + d] / steps / double(count);
            for (std::size_t c = 0; c < count; ++c) error[m] += std::pow(sums[c * features + d] / steps - moment[m], 2);
            error[m] = std::sqrt(error[m] / double(count) / double(count - 1) + (m ? 2.0 : 1.0) / draws);
        }
        for (std::size_t c = 0; c < count; ++c) {
            variance += second[c * features + d] / steps / double(count);
            correlation += lagged[c * features + d] / (steps - 1) / double(count);
        }
        const double rho = std::clamp(correlation / variance, 0.0, 0.999), size = double(count) * steps * (1 - rho) / (1 + rho);
        const bool agrees = std::fabs(moment[0]) < 5 * error[0] && std::fabs(moment[1] - 1) < 5 * error[1];
        right = right && agrees;
        const char* name = fastmaf_model_name(model.handle(), std::int64_t(d));
        std::printf("%-12s mean %+.4f +- %.4f, mean square %.4f +- %.4f of the samples', effective sample size %.0f%s\n", name ? name : "", moment[0],
                    error[0], moment[1], error[1], size, agrees ? "" : "  <- differs");
    }
    return right ? 0 : 1;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
