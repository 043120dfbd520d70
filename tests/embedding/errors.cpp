// errors FLOW CONDITIONAL DISCRETE: misuse of fastmaf.hpp, one line for each: the status and the text.
#include <fastmaf.hpp>
#include <iostream>

template <class F>
void misuse(F f) {
    try {
        f();
        std::cout << "0 nothing was wrong\n";
    } catch (const fastmaf::Error& error) { std::cout << error.status() << ' ' << error.what() << '\n'; }
}

int main(int, char** argv) {
    using namespace fastmaf;
    const Model model(argv[1]), conditional(argv[2]), discrete(argv[3]);
    Evaluator flow(model), given(conditional), values(discrete);
    const auto D = static_cast<std::size_t>(model.features()), C = static_cast<std::size_t>(conditional.context_features());
    std::vector<double> x(5 * D), out(5), few(4), context(C), odd(5 * D + 1), samples(30 * D);
    misuse([&] { Model("/nowhere/to/be.found"); });
    misuse([&] { Model::from_memory(std::string("no flow")); });
    misuse([&] { Evaluator(model, 0); });
    misuse([&] { flow.log_prob(odd); });
    misuse([&] { flow.log_prob(view(x.data(), 5, 1)); });
    misuse([&] { flow.log_prob(x, none, few); });
    misuse([&] { flow.log_prob(x, context); });
    misuse([&] { given.log_prob(x); });
    misuse([&] { given.log_prob(x, few); });
    misuse([&] { given.sample(3, 1); });
    misuse([&] { given.sample(3, 1, odd); });
    misuse([&] { flow.sample(-1, 1); });
    misuse([&] { flow.sample(odd, 1); });
    misuse([&] {
        given.sample(view(samples.data(), {2, 3, static_cast<std::int64_t>(D)}, {40, static_cast<std::int64_t>(D), 1}), 1,
                     view(samples.data(), 2, static_cast<std::int64_t>(C)));
    });
    misuse([&] { flow.conditional_probs(x); });
    misuse([&] { values.to_noise(view(x.data(), 1, discrete.features())); });
    misuse([&] { values.log_prob_and_grad(view(x.data(), 1, discrete.features())); });
    misuse([&] { flow.sample(x, 1, none, ~std::uint64_t(0)); });
}
