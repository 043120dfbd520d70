// evaluate FLOW FOLDER f|d ROWS: every method of fastmaf.hpp on the arrays in FOLDER, raw numbers; what comes out goes there too.
#include <cstring>
#include <fastmaf.hpp>
#include <fstream>
#include <iostream>
#include <string>
#include <utility>

namespace {

constexpr int kDraws = 5, kGroups = 3;

template <class T>
std::vector<T> load(const std::string& path, std::int64_t count) {
    std::vector<T> numbers(static_cast<std::size_t>(count));
    const auto bytes = static_cast<std::streamsize>(numbers.size() * sizeof(T));
    if (!std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(numbers.data()), bytes)) throw std::runtime_error(path);
    return numbers;
}

template <class T>
void save(const std::string& path, const std::vector<T>& numbers) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(numbers.data()), static_cast<std::streamsize>(numbers.size() * sizeof(T)));
}

// A matrix as those of Eigen are, column-major.
template <class T>
struct Matrix {
    std::int64_t n, d;
    std::vector<T> numbers;
    Matrix(std::int64_t rows, std::int64_t columns) : n(rows), d(columns), numbers(static_cast<std::size_t>(rows * columns)) {}
    std::int64_t rows() const { return n; }
    std::int64_t cols() const { return d; }
    std::int64_t rowStride() const { return 1; }
    std::int64_t colStride() const { return n; }
    T* data() { return numbers.data(); }
    const T* data() const { return numbers.data(); }
    T& operator()(std::int64_t i, std::int64_t j) { return numbers[static_cast<std::size_t>(i + j * n)]; }
    std::vector<T> by_rows() {
        std::vector<T> result;
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < d; ++j) result.push_back((*this)(i, j));
        return result;
    }
};

// And one as an mdspan is, of three axes.
template <class T>
struct Span {
    T* numbers;
    std::size_t extents[3];
    static constexpr std::size_t rank() { return 3; }
    std::size_t extent(std::size_t axis) const { return extents[axis]; }
    std::size_t stride(std::size_t axis) const { return axis == 2 ? 1 : extents[2] * (axis == 1 ? 1 : extents[1]); }
    T* data_handle() const { return numbers; }
};

void require(bool so, const char* what) {
    if (!so) throw std::runtime_error(what);
}

template <class T>
void run(const fastmaf::Model& model, const std::string& folder, std::int64_t rows) {
    fastmaf::Evaluator made(model);
    fastmaf::Evaluator flow(std::move(made));
    const std::int64_t D = model.features(), C = model.context_features(), most = model.most_values();
    const auto in = [&](const char* name) { return folder + "/" + name; };
    const std::vector<T> x = load<T>(in("x"), rows * D);
    Matrix<T> turned(rows, D);
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < D; ++j) turned(i, j) = x[static_cast<std::size_t>(i * D + j)];

    const auto everything = [&](const auto& contexts, const auto& one) {
        save(in("log_prob"), flow.log_prob(x, contexts));
        save(in("log_prob_shared"), flow.log_prob(turned, one));
        if (most && !model.members()) {
            const std::vector<T> flat = flow.conditional_probs(x, contexts);
            std::vector<T> shaped(flat.size());
            flow.conditional_probs(turned, contexts, fastmaf::view(shaped.data(), rows, D, most));
            const bool same = std::memcmp(shaped.data(), flat.data(), flat.size() * sizeof(T)) == 0;  // NaN equals no NaN
            require(same, "conditional_probs");
            save(in("probabilities"), flat);
        }
        if (!most) {
            const auto gradients = flow.log_prob_and_grad(x, contexts);
            save(in("value"), gradients.log_prob);
            save(in("d_x"), gradients.d_x);
            save(in("d_context"), gradients.d_context);
            Matrix<T> d_x(rows, D);
            std::vector<T> value(static_cast<std::size_t>(rows)), d_context(static_cast<std::size_t>(C));
            if (C)
                flow.log_prob_and_grad(turned, one, value, fastmaf::none, d_context);
            else
                flow.log_prob_and_grad(turned, one, value, d_x);
            require(C || d_x.by_rows() == gradients.d_x, "gradients into a matrix");
            save(in("d_context_shared"), d_context);
        }
        if (!most && !model.members()) {
            Matrix<T> d_x(rows, D);
            flow.to_noise(turned, contexts, d_x);
            require(d_x.by_rows() == flow.to_noise(x, contexts), "to_noise into a matrix");
            save(in("noise"), d_x.by_rows());
            flow.from_noise(turned, contexts, d_x);
            require(d_x.by_rows() == flow.from_noise(x, contexts), "from_noise into a matrix");
            save(in("from_noise"), d_x.by_rows());
        }
        const auto drawn = flow.sample_and_log_prob<T>(kDraws, ~std::uint64_t(0), one, 7, 2);
        save(in("samples"), drawn.samples);
        save(in("density"), drawn.log_prob);
        Matrix<T> samples(kDraws, D);
        flow.sample(samples, ~std::uint64_t(0), one, 7, 2);
        require(samples.by_rows() == drawn.samples, "sample into a matrix");
    };
    if (!C) return everything(fastmaf::none, fastmaf::none);
    const std::vector<T> contexts = load<T>(in("context"), rows * C);
    const std::vector<T> first(contexts.begin(), contexts.begin() + C);
    everything(contexts, first);
    const auto few = fastmaf::view(contexts.data(), kGroups, C);
    const std::vector<T> samples = flow.sample<T>(kDraws, 1, few);
    save(in("samples_of_groups"), samples);
    const std::vector<T> crossed = flow.log_prob(turned, fastmaf::for_each_of(few));
    save(in("log_prob_of_groups"), crossed);
    const Span<const T> grouped{samples.data(), {kGroups, kDraws, static_cast<std::size_t>(D)}};
    const std::vector<T> of_groups = flow.log_prob(grouped, few);
    for (int g = 0; g < kGroups; ++g) {
        const auto own =
            flow.log_prob(fastmaf::view(samples.data() + g * kDraws * D, kDraws, D), fastmaf::view(contexts.data() + g * C, C));
        require(std::equal(own.begin(), own.end(), of_groups.begin() + g * kDraws), "groups of rows, each with a context");
    }
    T single = 0;
    flow.log_prob(fastmaf::view(x.data(), D), first, single);
    require(single == flow.log_prob(fastmaf::view(x.data(), 1, D), first)[0], "one row into a number");
}

}  // namespace

int main(int argc, char** argv) {
    try {
        require(argc == 5, "evaluate FLOW FOLDER f|d ROWS");
        const fastmaf::Model opened(argv[1]);
        std::ifstream stream(argv[1], std::ios::binary);
        const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
        fastmaf::Model model = fastmaf::Model::from_memory(bytes);
        require(model.features() == opened.features() && model.names() == opened.names(), "from_memory");
        if (argv[3][0] == 'f')
            run<float>(model, argv[2], std::stol(argv[4]));
        else
            run<double>(model, argv[2], std::stol(argv[4]));
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
