// The mean log-density of a flow's own samples, which is minus its entropy.
#include <cstdio>
#include <exception>

#include <fastmaf.hpp>

int main(int argc, char** argv) try {
    if (argc < 2) return std::puts("usage: density FLOW"), 2;
    const fastmaf::Model model(argv[1]);
    fastmaf::Evaluator flow(model);
    const std::vector<double> context(static_cast<std::size_t>(model.context_features()));
    const auto drawn = context.empty() ? flow.sample_and_log_prob(10000, 1) : flow.sample_and_log_prob(10000, 1, context);
    double sum = 0;
    for (double value : drawn.log_prob) sum += value;
    std::printf("entropy %.4f nats\n", -sum / 10000);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
