// As numbers.c, through fastmaf.hpp.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include <fastmaf.hpp>

int main(int argc, char** argv) try {
    if (argc != 5) return 2;
    fastmaf::Model model(argv[1]);
    fastmaf::Evaluator flow(model);
    const auto n = std::size_t(std::atol(argv[4])), D = std::size_t(model.features()), C = std::size_t(model.context_features());
    std::vector<double> x(n * D), context(n * C);
    std::FILE *input = std::fopen(argv[2], "rb"), *output = std::fopen(argv[3], "wb");
    if (!input || !output || std::fread(x.data(), 8, n * D, input) + std::fread(context.data(), 8, n * C, input) != n * (D + C)) return 4;
    auto put = [&](const std::vector<double>& values) { std::fwrite(values.data(), 8, values.size(), output); };
    const auto rows = fastmaf::view(x.data(), std::int64_t(n), std::int64_t(D));
    auto run = [&](const auto& contexts) {
        put(flow.log_prob(rows, contexts));
        const auto gradients = flow.log_prob_and_grad(rows, contexts);
        put(gradients.log_prob);
        put(gradients.d_x);
        put(gradients.d_context);
        const std::vector<double> noise = flow.to_noise(rows, contexts);
        put(noise);
        put(flow.from_noise(fastmaf::view(noise.data(), std::int64_t(n), std::int64_t(D)), contexts));
    };
    fastmaf::Samples<double> drawn;
    if (C) {
        const auto contexts = fastmaf::view(context.data(), std::int64_t(n), std::int64_t(C));
        run(contexts);
        drawn = flow.sample_and_log_prob(1, 7, contexts, 5, 3);
    } else {
        run(fastmaf::none);
        drawn.samples.resize(n * D);
        drawn.log_prob.resize(n);
        // Sample 5 of "contexts" 3, 4, ...: one call each, as C does with groups.
        for (std::size_t i = 0; i < n; ++i) {
            const auto one = flow.sample_and_log_prob(1, 7, fastmaf::none, 5, std::uint32_t(3 + i));
            std::copy(one.samples.begin(), one.samples.end(), drawn.samples.begin() + std::ptrdiff_t(i * D));
            drawn.log_prob[i] = one.log_prob[0];
        }
    }
    put(drawn.samples);
    put(drawn.log_prob);
    std::fclose(output);
    std::fclose(input);
    try {
        flow.log_prob(std::vector<double>(D + 1));
    } catch (const fastmaf::Error& error) {
        return error.status() == FASTMAF_INVALID_ARGUMENT ? 0 : 5;
    }
    return 6;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
