// device FLOW: an evaluator on GPU 0 through fastmaf.hpp. Without a GPU the status and why; else the largest difference from the CPU.
#include <cmath>
#include <fastmaf.hpp>
#include <iostream>

int main(int, char** argv) {
    using namespace fastmaf;
    const Model model(argv[1]);
    Evaluator cpu(model);
    try {
        Evaluator gpu(model, Device{0, Precision::high});
        gpu.set_stream(nullptr);
        const std::vector<double> x = cpu.sample(1000, 1), there = gpu.sample(1000, 1), value = cpu.log_prob(x),
                                  value_there = gpu.log_prob(x);
        double difference = 0;
        for (std::size_t i = 0; i < x.size(); ++i) difference = std::fmax(difference, std::fabs(there[i] - x[i]));
        for (std::size_t i = 0; i < value.size(); ++i) difference = std::fmax(difference, std::fabs(value_there[i] - value[i]));
        const auto gradient = cpu.log_prob_and_grad(x), gradient_there = gpu.log_prob_and_grad(x);
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double d_x = gradient.d_x[i], error = std::fabs(gradient_there.d_x[i] - d_x);
            difference = std::fmax(difference, error / (1 + std::fabs(d_x)));
        }
        std::cout << devices() << " 0 " << difference << '\n';
    } catch (const Error& error) { std::cout << devices() << ' ' << error.status() << ' ' << error.what() << '\n'; }
}
