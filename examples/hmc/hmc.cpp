// hmc FLOW: Hamiltonian Monte Carlo on the density of a flow and its gradient, checked against samples of the flow itself.
//
// Chains move together, one call for the gradients of all. Steps are standardised: x moves by the Cholesky factor of the covariance of samples
// of the flow, so one step size does for all variables. The exit status is 1 where a mean or a variance of the chains is more than five
// standard errors from that of the flow's own samples, or where the chains have moved too little to tell.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fastmaf.hpp>
#include <random>
#include <string>
#include <vector>

namespace {

using Vector = std::vector<double>;

constexpr std::size_t kChains = 64, kWarmup = 300, kDraws = 1500, kSamples = 100000;
constexpr double kStep = 0.15, kLength = 1.5;  // in standard deviations; every trajectory has a step of its own around kStep
constexpr double kLeast = 1000;                // effective samples of each variable

double kinetic(const double* p, std::size_t features) {
    double sum = 0;
    for (std::size_t j = 0; j < features; ++j) sum += 0.5 * p[j] * p[j];
    return sum;
}

// Lower triangle of the Cholesky factor of the covariance of rows.
Vector cholesky(const Vector& rows, std::size_t D) {
    Vector mean(D), factor(D * D);
    const std::size_t n = rows.size() / D;
    for (std::size_t i = 0; i < rows.size(); ++i) mean[i % D] += rows[i] / static_cast<double>(n);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < D; ++j)
            for (std::size_t k = 0; k <= j; ++k)
                factor[j * D + k] += (rows[i * D + j] - mean[j]) * (rows[i * D + k] - mean[k]) / static_cast<double>(n);
    for (std::size_t j = 0; j < D; ++j)
        for (std::size_t k = 0; k <= j; ++k) {
            double sum = factor[j * D + k];
            for (std::size_t l = 0; l < k; ++l) sum -= factor[j * D + l] * factor[k * D + l];
            factor[j * D + k] = j == k ? std::sqrt(sum) : sum / factor[k * D + k];
        }
    return factor;
}

// x += step * L p, and p += step * L^T g, for all chains.
void drift(Vector& x, const Vector& p, const Vector& L, std::size_t D, double step) {
    for (std::size_t c = 0; c < x.size(); c += D)
        for (std::size_t j = 0; j < D; ++j)
            for (std::size_t k = 0; k <= j; ++k) x[c + j] += step * L[j * D + k] * p[c + k];
}
void kick(Vector& p, const Vector& g, const Vector& L, std::size_t D, double step) {
    for (std::size_t c = 0; c < p.size(); c += D)
        for (std::size_t j = 0; j < D; ++j)
            for (std::size_t k = 0; k <= j; ++k) p[c + k] += step * L[j * D + k] * g[c + j];
}

// Effective sample size of chains (draws, chains), by Geyer's initial positive sequence, chains pooled.
double effective(const Vector& values, std::size_t draws, std::size_t chains, double mean, double variance) {
    double time = -1;
    for (std::size_t lag = 0; lag + 1 < draws; lag += 2) {
        double pair = 0;
        for (std::size_t both = lag; both < lag + 2; ++both) {
            double sum = 0;
            for (std::size_t t = 0; t + both < draws; ++t)
                for (std::size_t c = 0; c < chains; ++c) sum += (values[t * chains + c] - mean) * (values[(t + both) * chains + c] - mean);
            pair += sum / (static_cast<double>((draws - both) * chains) * variance);
        }
        if (pair < 0) break;
        time += 2 * pair;
    }
    return static_cast<double>(draws * chains) / std::max(time, 1e-3);
}

struct Moments {
    double mean, variance, mean_error, variance_error;
};

// Moments of a column, with standard errors for `count` independent values among them.
template <class Count>
Moments moments(const Vector& values, Count count) {
    double mean = 0, second = 0, fourth = 0;
    for (const double v : values) mean += v / static_cast<double>(values.size());
    for (const double v : values) {
        const double square = (v - mean) * (v - mean);
        second += square / static_cast<double>(values.size());
        fourth += square * square / static_cast<double>(values.size());
    }
    Vector squares(values.size());
    std::transform(values.begin(), values.end(), squares.begin(), [&](double v) { return (v - mean) * (v - mean); });
    return {mean, second, std::sqrt(second / count(values, mean, second)),
            std::sqrt((fourth - second * second) / count(squares, second, fourth - second * second))};
}

Vector column(const Vector& rows, std::size_t features, std::size_t j) {
    Vector result(rows.size() / features);
    for (std::size_t i = 0; i < result.size(); ++i) result[i] = rows[i * features + j];
    return result;
}

int run(const char* path) {
    const fastmaf::Model model(path);
    if (model.context_features() > 0) throw fastmaf::Error(FASTMAF_INVALID_ARGUMENT, "a flow without context is needed");
    fastmaf::Evaluator flow(model);
    const auto features = static_cast<std::size_t>(model.features());

    const Vector samples = flow.sample(kSamples, 1);
    const Vector factor = cholesky(samples, features);
    std::mt19937_64 random(1);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    Vector x(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(kChains * features));
    Vector log_p(kChains), gradient(x.size()), next, next_log_p(kChains), next_gradient(x.size()), p(x.size()), before(kChains), draws;
    for (double& v : p) v = normal(random);
    drift(x, p, factor, features, 0.1);  // no exact draws to begin with
    flow.log_prob_and_grad(x, fastmaf::none, log_p, gradient);
    std::size_t accepted = 0, gradients = 0;
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t t = 0; t < kWarmup + kDraws; ++t) {
        const double step = kStep * (0.7 + 0.6 * uniform(random));
        const int steps = std::max(1, static_cast<int>(kLength / step));
        for (double& v : p) v = normal(random);
        for (std::size_t c = 0; c < kChains; ++c) before[c] = log_p[c] - kinetic(&p[c * features], features);
        next = x;
        next_gradient = gradient;
        for (int s = 0; s < steps; ++s) {
            kick(p, next_gradient, factor, features, 0.5 * step);
            drift(next, p, factor, features, step);
            flow.log_prob_and_grad(next, fastmaf::none, next_log_p, next_gradient);
            gradients += kChains;
            kick(p, next_gradient, factor, features, 0.5 * step);
        }
        for (std::size_t c = 0; c < kChains; ++c) {
            const double change = next_log_p[c] - kinetic(&p[c * features], features) - before[c];
            if (!(std::log(uniform(random)) < change)) continue;
            accepted += t >= kWarmup;
            log_p[c] = next_log_p[c];
            for (std::size_t j = c * features; j < (c + 1) * features; ++j) {
                x[j] = next[j];
                gradient[j] = next_gradient[j];
            }
        }
        if (t >= kWarmup) draws.insert(draws.end(), x.begin(), x.end());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

    std::printf("%zu chains, %zu draws each, accepted %.2f, %.3g gradients/s\n", kChains, kDraws,
                static_cast<double>(accepted) / (kChains * kDraws), static_cast<double>(gradients) / seconds);
    const std::vector<std::string> names = model.names();
    const auto all = [](const Vector& values, double, double) { return static_cast<double>(values.size()); };
    const auto independent = [](const Vector& values, double mean, double variance) {
        return effective(values, kDraws, kChains, mean, variance);
    };
    bool agree = true;
    for (std::size_t j = 0; j < features; ++j) {
        const Vector chain = column(draws, features, j);
        const Moments own = moments(chain, independent), exact = moments(column(samples, features, j), all);
        const double off = (own.mean - exact.mean) / std::hypot(own.mean_error, exact.mean_error);
        const double off_variance = (own.variance - exact.variance) / std::hypot(own.variance_error, exact.variance_error);
        const double count = independent(chain, own.mean, own.variance);
        agree = agree && count > kLeast && std::abs(off) < 5 && std::abs(off_variance) < 5;
        std::printf("%-10s effective sample size %.0f, mean %.4f (flow %.4f, %+.1f errors), variance %.4f (flow %.4f, %+.1f errors)\n",
                    names.empty() ? std::to_string(j).c_str() : names[j].c_str(), count, own.mean, exact.mean, off, own.variance,
                    exact.variance, off_variance);
    }
    std::printf(agree ? "moments agree\n" : "moments DISAGREE\n");
    return agree ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: hmc flow.safetensors\n");
        return 2;
    }
    try {
        return run(argv[1]);
    } catch (const fastmaf::Error& error) {
        std::fprintf(stderr, "hmc: %s\n", error.what());
        return 2;
    }
}
