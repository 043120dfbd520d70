// The core without Python: what sanitizers run. Every kind of stage in every instruction set against plain loops over the flat weights,
// gradients against differences of these loops, tapes, training, threads, fork, odd sizes.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/backend.hpp"
#include "cpu/isa.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"
#include "batches.hpp"
#ifdef FASTMAF_WARPS
#include "warp.hpp"
#endif

using namespace fastmaf;

namespace {

int passed = 0, failed = 0;
std::string what_runs;  // named by failures

void check(bool ok, const char* what, int line) {
    ++(ok ? passed : failed);
    if (!ok && failed <= 40) std::fprintf(stderr, "line %d: %s (%s)\n", line, what, what_runs.c_str());
}
#define CHECK(condition) check(condition, #condition, __LINE__)

using Reals = std::vector<double>;
using Random = std::mt19937;

Reals normals(size_t n, Random& rng, double scale = 1) {
    Reals values(n);
    std::normal_distribution<double> normal(0, scale);
    for (double& v : values) v = normal(rng);
    return values;
}

template <class T>
std::vector<T> narrowed(const Reals& values) {
    return {values.begin(), values.end()};
}

// ---- flows -----------------------------------------------------------------------------------------------------------------------

Columns plain_columns(int n, double loc = 0.25, double scale = 0.5) {
    Columns columns;
    columns.kind.assign(size_t(n), Bijection::identity);
    columns.lower.assign(size_t(n), -INFINITY);
    columns.upper.assign(size_t(n), INFINITY);
    columns.loc.assign(size_t(n), loc);
    columns.scale.assign(size_t(n), scale);
    return columns;
}

std::vector<int> shuffled(int n, Random& rng) {
    std::vector<int> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    return order;
}

enum class Conditional { none, mixture, bernoulli, categorical, mixed };

struct Network {
    Conditional base = Conditional::none;
    std::vector<int> hidden;
    Activation activation = Activation::tanh;
    bool residual = false;  // hidden: one width per block
    bool skip = false;
    bool late = false;  // the context enters at the final map too
    int components = 1;
    std::vector<int> categories;  // of a mixed one, 0: any number
    Law law = Law::exp_soft;
    Form form = Form::affine;
    bool ties = false;          // variables share ranks
    int beyond = 0;             // degrees are below features + beyond: nobody reads those that are not below features
    bool after = false;         // an Affine follows
    Joins joins = Joins::none;  // how the context enters the hidden maps, every second of them with a bias
    bool grows = false;         // residual blocks end in units of other degrees
    bool normed = false;        // behind every hidden map, but for every third
    bool reads_noise = false;
    double input_clip = 0;
};

StageSpec network(int features, int context, const Network& n, Random& rng) {
    StageSpec stage;
    stage.output = n.base == Conditional::none ? Output::transform : Output::base;
    const bool discrete = n.base > Conditional::mixture;
    stage.variable = shuffled(features, rng);
    if (discrete) std::iota(stage.variable.begin(), stage.variable.end(), 0);
    for (int rank : shuffled(features, rng)) stage.ranks.push_back(1 + (n.ties ? rank / 2 : rank));
    stage.activation = n.activation;
    stage.law = n.law;
    stage.form = n.form;
    stage.constant[0] = n.law == Law::exp_soft ? 2 : n.law == Law::clamp ? -0.3 : 0.01;
    stage.constant[1] = n.law == Law::clamp ? 0.4 : 0.5;
    stage.skip = n.skip;
    stage.reads_noise = n.reads_noise;
    stage.input_clip = n.input_clip;
    stage.components = n.components;
    int inputs = features;
    auto add = [&](int width, std::vector<int64_t> degrees, bool activated, int adds) {
        const bool final = degrees.empty(), reads_context = (stage.maps.empty() && n.joins == Joins::none) || (n.late && final);
        MapSpec map{width, inputs, std::move(degrees), reads_context && context > 0, activated, adds};
        if (!final && n.joins != Joins::none) {
            map.joins = n.joins;
            map.context_bias = stage.maps.size() % 2 == 0;
        }
        if (!final && n.normed && stage.maps.size() % 3 != 2) {
            map.norm_scale = normals(size_t(width), rng, 1.0);
            map.norm_shift = normals(size_t(width), rng, 0.3);
        }
        stage.maps.push_back(std::move(map));
        inputs = width;
    };
    auto degrees = [&](int width) {
        std::vector<int64_t> result;
        for (int u = 0; u < width; ++u) result.push_back(int64_t(rng() % unsigned(features + n.beyond)));
        return result;
    };
    if (n.residual) {
        add(n.hidden[0], degrees(n.hidden[0]), true, -1);
        for (size_t block = 0; block < n.hidden.size(); ++block) {
            std::vector<int64_t> same = stage.maps.back().degrees;
            for (int64_t& degree : same) degree += n.grows ? int64_t(rng() % 2) : 0;
            const int trunk = int(stage.maps.size()) - 1;
            add(n.hidden[block], degrees(n.hidden[block]), true, -1);
            add(n.hidden[block], same, block + 1 < n.hidden.size(), trunk);
        }
    } else {
        for (int width : n.hidden) add(width, degrees(width), true, -1);
    }
    for (int i = 0; i < features; ++i) {
        const int values = n.base >= Conditional::categorical ? n.categories[size_t(i)] : n.base == Conditional::bernoulli ? 2 : 0;
        if (n.base != Conditional::none) stage.values.push_back(values);
        const int rows = n.base == Conditional::none ? 2 : n.base == Conditional::bernoulli ? 1 : values ? values : 3 * n.components;
        stage.rows.push_back(rows);
    }
    add(std::accumulate(stage.rows.begin(), stage.rows.end(), 0), {}, false, -1);
    if (n.after) {
        stage.loc = normals(size_t(features), rng, 0.3);
        for (int i = 0; i < features; ++i) stage.scale.push_back(i % 2 ? -1.25 : 0.75);
    }
    return stage;
}

StageSpec linear(int features, Random& rng) {
    StageSpec stage;
    stage.output = Output::linear;
    stage.variable = shuffled(features, rng);
    return stage;
}

enum class Norm { fixed, of_data, of_batch };
StageSpec norm(int features, Norm kind, Random& rng) {
    StageSpec stage;
    stage.output = Output::norm;
    stage.variable = shuffled(features, rng);
    stage.trainable = kind != Norm::fixed;
    stage.of_batch = kind == Norm::of_batch;
    const Reals loc = normals(size_t(features), rng, 0.3);
    Reals scale;
    for (int i = 0; i < features; ++i) scale.push_back(0.5 + 0.125 * i);
    (stage.trainable ? stage.mean : stage.loc) = loc;
    (stage.trainable ? stage.var : stage.scale) = scale;
    stage.eps = 1e-3;
    return stage;
}

bool discrete(const FlowSpec& spec) {
    return !spec.stages.empty() && std::accumulate(spec.stages.back().values.begin(), spec.stages.back().values.end(), 0) > 0;
}

// Discrete variables get some of the values that they can have.
template <class T>
void set_values(const FlowSpec& spec, std::vector<T>& x, Random& rng, unsigned most = ~0u) {
    if (!discrete(spec)) return;
    const std::vector<int>& values = spec.stages.back().values;
    for (size_t i = 0; i < x.size(); ++i)
        if (const int count = values[i % values.size()]) x[i] = T(rng() % std::min(unsigned(count), most));
}

FlowSpec flow(int features, int context, std::vector<StageSpec> stages, Random& rng) {
    FlowSpec spec;
    spec.features = features;
    spec.context = context;
    spec.stages = std::move(stages);
    spec.columns = plain_columns(features);
    for (size_t i = 0; discrete(spec) && i < size_t(features); ++i)
        if (spec.stages.back().values[i]) spec.columns.loc[i] = 0, spec.columns.scale[i] = 1;
    spec.context_columns = plain_columns(context);
    spec.noise_variable = shuffled(features, rng);
    return spec;
}

struct Case {
    std::string name;
    FlowSpec spec;
};

std::vector<Case> cases() {
    Random rng(1);
    std::vector<Case> all;
    auto add = [&](const std::string& name, int features, int context, const std::vector<Network>& networks) {
        std::vector<StageSpec> stages;
        for (const Network& n : networks) stages.push_back(network(features, context, n, rng));
        all.push_back({name, flow(features, context, stages, rng)});
    };
    auto stages = [&](const char* name, int features, int context, std::vector<StageSpec> list) {
        all.push_back({name, flow(features, context, std::move(list), rng)});
    };
    auto net = [&](int features, int context, const Network& n) { return network(features, context, n, rng); };
    Network n;

    stages("no stages", 2, 0, {});
    add("one variable", 1, 0, {n});
    n.hidden = {5};
    add("one variable given a context", 1, 3, {n, n});
    n.hidden = {};
    n.skip = true;
    n.form = Form::standardize;
    n.after = true;
    add("direct weights alone beside the first map", 2, 2, {n, n});
    n = {};
    n.hidden = {2, 3};
    n.activation = Activation::relu;
    n.law = Law::exp;
    add("narrow", 5, 0, {n, n, n});
    n.hidden = {33, 20};
    n.activation = Activation::gelu;
    n.law = Law::exp_soft;
    for (const auto& [name, law] :
         {std::pair("softplus", Law::softplus), {"sigmoid", Law::sigmoid}, {"log_precision", Law::log_precision}, {"clamp", Law::clamp}}) {
        Network own;
        own.hidden = {7};
        own.law = law;
        Network standard = own, mixture = own;
        standard.form = mixture.form = Form::standardize;
        mixture.base = Conditional::mixture;
        mixture.components = 3;
        add(name, 5, 1, {own, standard, mixture});
    }
    n.ties = n.skip = true;
    add("ties", 9, 2, {n, n});
    n.ties = n.skip = false;
    n.hidden = {12, 7};
    n.beyond = 2;
    add("units that nobody reads", 5, 1, {n, n});
    n.hidden = {0};
    n.beyond = 0;
    add("no units", 5, 1, {n});
    n.hidden = {100, 100};
    n.activation = Activation::relu;
    add("wide", 9, 0, {n, n});
    all.push_back(all.back());
    all.back().name = "bounds";
    Columns columns = all.back().spec.columns;
    columns.kind = {Bijection::logit,    Bijection::log_above, Bijection::log_below, Bijection::identity, Bijection::logit,
                    Bijection::identity, Bijection::log_above, Bijection::log_below, Bijection::logit};
    columns.lower = {-1, 2, -INFINITY, -INFINITY, 0, -INFINITY, -3, -INFINITY, -5};
    columns.upper = {1, INFINITY, 2, INFINITY, 1, INFINITY, INFINITY, 0, 5};
    all.back().spec.columns = columns;

    Network block;
    block.residual = true;
    block.hidden = {19, 19};
    block.activation = Activation::silu;
    stages("residual with Linear and norm of the batch", 5, 1,
           {linear(5, rng), net(5, 1, block), norm(5, Norm::of_batch, rng), net(5, 1, block), norm(5, Norm::of_data, rng)});
    block.hidden = {4};
    block.activation = Activation::elu;
    block.skip = true;
    stages("narrow residual with direct weights", 9, 0,
           {norm(9, Norm::fixed, rng), linear(9, rng), net(9, 0, block), linear(9, rng), norm(9, Norm::of_batch, rng), net(9, 0, block)});
    block.hidden = {70, 70, 70};
    block.activation = Activation::relu;
    stages("wide residual", 9, 2, {net(9, 2, block), net(9, 2, block)});
    block.late = true;
    stages("residual with direct weights from the context", 5, 3, {net(5, 3, block), net(5, 3, block)});
    for (const auto& [name, joins] :
         {std::pair("added to the sums", Joins::added), {"activated", Joins::activated}, {"gates", Joins::gated}}) {
        Network own;
        own.joins = joins;
        own.residual = own.grows = own.normed = true;
        own.late = own.skip = joins != Joins::added;
        own.hidden = {19, 19};
        for (Activation activation : {Activation::relu, Activation::silu}) {
            own.activation = activation;
            add(std::string("a context ") + name, 6, 2, {own, own});
        }
        own.residual = own.normed = false;
        add(std::string("in plain networks a context ") + name, 6, 3, {own, own});
    }
    for (int clips : {0, 1}) {
        Network own, reads_x;
        own.reads_noise = true;
        own.input_clip = clips ? 0.7 : 0;
        const std::string noise = clips ? "the noise, clipped" : "the noise";
        add(noise + " of one variable", 1, 1, {own});
        own.hidden = {2, 3};
        add(noise + " in a narrow network", 5, 0, {own, own, own});
        own.hidden = {33, 20};
        own.activation = Activation::gelu;
        own.ties = own.skip = own.late = true;
        own.form = Form::standardize;
        add(noise + " with ties and direct weights", 9, 2, {own, own});
        own = {};
        own.reads_noise = own.residual = own.grows = own.normed = true;
        own.input_clip = clips ? 0.7 : 0;
        own.joins = Joins::gated;
        own.hidden = {19, 19};
        own.activation = Activation::silu;
        reads_x.hidden = {12};
        reads_x.after = true;
        reads_x.input_clip = own.input_clip;
        stages((noise + " in residual networks, and x").c_str(), 6, 2,
               {linear(6, rng), net(6, 2, own), norm(6, Norm::of_data, rng), net(6, 2, reads_x), linear(6, rng), net(6, 2, own)});
    }
    n.late = n.skip = true;
    n.hidden = {40, 21};
    add("direct weights from the context", 9, 2, {n, n});
    n.skip = false;
    add("direct weights from the context alone", 4, 5, {n, n});
    n.late = false;
    stages("one variable in a Linear and a norm", 1, 0, {norm(1, Norm::of_data, rng), linear(1, rng)});
    stages("Linear and norm alone", 2, 2, {linear(2, rng), norm(2, Norm::of_batch, rng), linear(2, rng)});

    Network base;
    base.base = Conditional::mixture;
    base.components = 3;
    base.hidden = {17};
    n.hidden = {11};
    stages("mixture behind a transform", 5, 2, {net(5, 2, n), norm(5, Norm::fixed, rng), net(5, 2, base)});
    base.residual = base.skip = true;
    base.ties = true;
    base.components = 10;
    stages("residual mixture", 9, 0, {norm(9, Norm::of_batch, rng), net(9, 0, base)});
    base = {};
    base.base = Conditional::mixture;
    base.form = Form::standardize;
    base.law = Law::exp;
    add("mixture of one", 1, 0, {base});
    base = {};
    base.base = Conditional::bernoulli;
    base.hidden = {31, 8};
    base.skip = true;
    add("bernoulli", 9, 0, {base});
    base.hidden = {};
    add("bernoulli of one variable", 1, 1, {base});
    base.base = Conditional::categorical;
    base.hidden = {23, 23};
    base.residual = true;
    base.categories = {2, 3, 2, 7, 4};
    add("categorical", 5, 2, {base});
    base = {};
    base.base = Conditional::categorical;
    base.categories = {300, 5};
    add("many categories", 2, 0, {base});
    base.skip = true;
    base.hidden = {6};
    base.categories = {40, 300, 150, 2, 30};
    add("more categories", 5, 0, {base});
    base.late = true;
    add("more categories given a context", 5, 4, {base});
    base = {};
    base.base = Conditional::mixed;
    base.hidden = {19, 12};
    base.components = 3;
    base.categories = {0, 3, 0, 2, 7};
    add("mixed", 5, 1, {base});
    base.components = 1;
    base.categories = {300, 0, 0};
    base.skip = true;
    add("mixed with many categories", 3, 0, {base});

    n = {};
    n.hidden = {11, 20};
    n.activation = Activation::gelu;
    n.after = true;
    stages("Linears around networks", 5, 2, {linear(5, rng), net(5, 2, n), linear(5, rng), linear(5, rng), net(5, 2, n), linear(5, rng)});
    stages("a Linear in front of a network with bounds", 9, 0, {linear(9, rng), net(9, 0, n)});
    all.back().spec.columns = columns;
    stages("wide Linears", 130, 1, {linear(130, rng), net(130, 1, n), linear(130, rng)});
    stages("Linears of one variable", 1, 1, {linear(1, rng), net(1, 1, n), linear(1, rng)});
    stages("a Linear alone", 6, 0, {linear(6, rng)});
    return all;
}

int64_t parameters_of(const FlowSpec& spec, const StageSpec& stage) {
    const int64_t n = spec.features;
    if (stage.output == Output::norm) return stage.trainable ? 2 * n : 0;
    if (stage.output == Output::linear) return 2 * n * n + n;
    int64_t count = stage.skip ? stage.maps.back().rows * n : 0;
    for (const MapSpec& map : stage.maps)
        count += int64_t(map.rows) * (map.inputs + 1 + (map.context || map.joins != Joins::none ? spec.context : 0) + map.context_bias);
    return count;
}

// Weights of the size that keeps sums of a stage near one; the triangles of a Linear stay near the identity.
Reals random_parameters(const FlowSpec& spec, Random& rng) {
    Reals all;
    for (const StageSpec& stage : spec.stages) {
        int widest = spec.features;
        for (const MapSpec& map : stage.maps) widest = std::max(widest, map.inputs);
        Reals own = normals(size_t(parameters_of(spec, stage)), rng, std::min(0.3, 1 / std::sqrt(double(widest))));
        const size_t n = size_t(spec.features);
        if (stage.output == Output::linear)
            for (size_t i = 0; i < n; ++i) own[n * n + i * n + i] += i % 2 ? -1.5 : 1.5;
        all.insert(all.end(), own.begin(), own.end());
    }
    return all;
}

template <class T>
std::shared_ptr<Weights<T>> make_weights(const FlowSpec& spec, const Reals& parameters) {
    auto packed = std::make_shared<Weights<T>>(spec);
    CHECK(size_t(packed->plan().parameter_count()) == parameters.size());
    packed->set_parameters(narrowed<T>(parameters).data());
    return packed;
}

// ---- tapes -----------------------------------------------------------------------------------------------------------------------

// Every weight that steps read is on each tape once, where the layout says; all else there is zero. The sampler has the triangles of a
// Linear inverted.
template <class T>
void the_tapes_hold(const Weights<T>& packed) {
    const Plan& plan = packed.plan();
    const AlignedVector<T>& master = packed.master();
    std::vector<char> read(master.size(), 0), linear(master.size(), 0);
    // Weights lie in the master row by row, each row as long as its stair; nobody reads rows behind the widths.
    for (size_t k = 0; k < plan.stages(); ++k)
        for (size_t m = 0; m < plan.sorted()[k].maps.size(); ++m)
            for (int64_t e = 0; e < plan.sorted()[k].maps[m].offset[size_t(plan.widths(k)[plan.written(k, m)])]; ++e) {
                read[size_t(plan.weight_offset(k, m) + e)] = 1;
                linear[size_t(plan.weight_offset(k, m) + e)] = plan.spec().stages[k].output == Output::linear;
            }
    for (Direction direction : {Direction::density, Direction::sampler, Direction::backward, Direction::sampler_backward}) {
        const bool inverts = direction == Direction::sampler || direction == Direction::sampler_backward;
        const std::vector<uint32_t> sources = plan.layout(direction).sources();
        const AlignedVector<T>& tape = packed.tape(direction);
        CHECK(tape.size() == sources.size());
        std::vector<char> times(master.size(), 0);
        bool right = true;
        for (size_t e = 0; e < sources.size(); ++e) {
            const uint32_t source = sources[e];
            if (source != kNoSource) ++times[source];
            if (source != kNoSource && linear[source] && inverts) continue;
            right = right && tape[e] == (source == kNoSource ? T(0) : master[source]);
        }
        CHECK(right);
        CHECK(times == read);
    }
}

// So it is for the first weights, for others, and after steps of training; copies stay as they are.
template <class T>
void tapes(const Case& one) {
    what_runs = one.name + ", tapes";
    Random rng(5);
    const auto packed = make_weights<T>(one.spec, random_parameters(one.spec, rng));
    const Plan& plan = packed->plan();
    the_tapes_hold(*packed);
    const Weights<T> copy(*packed);
    CHECK(&copy.plan() == &plan && copy.master() == packed->master() && copy.constant() == packed->constant());
    const auto before = copy.tape(Direction::density);
    packed->set_parameters(narrowed<T>(random_parameters(one.spec, rng)).data());
    the_tapes_hold(*packed);
    packed->master() = make_weights<T>(one.spec, random_parameters(one.spec, rng))->master();
    for (size_t k = 0; k < plan.stages(); ++k)
        for (size_t m = 0; m < plan.sorted()[k].maps.size(); ++m) {
            const int rows = plan.widths(k)[plan.written(k, m)];
            for (int row = 0; row < rows; row += 5) packed->repack_rows(k, m, row, std::min(5, rows - row));
        }
    packed->finish_step();
    the_tapes_hold(*packed);
    the_tapes_hold(copy);
    CHECK(copy.tape(Direction::density) == before);
}

// ---- the same in plain loops -----------------------------------------------------------------------------------------------------

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::relu: return std::max(0.0, x);
        case Activation::tanh: return std::tanh(x);
        case Activation::elu: return x > 0 ? x : std::expm1(x);
        case Activation::gelu: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
        case Activation::silu: return x / (1 + std::exp(-x));
    }
    return NAN;
}

double log_sum_exp(const Reals& terms) {
    const double highest = *std::max_element(terms.begin(), terms.end());
    double sum = 0;
    for (double term : terms) sum += std::exp(term - highest);
    return highest + std::log(sum);
}

double log_scale(const StageSpec& stage, double raw) {
    const double *c = stage.constant, shifted = raw + c[1];
    switch (stage.law) {
        case Law::exp: return raw;
        case Law::exp_soft: return raw / (1 + std::fabs(raw) / c[0]);
        case Law::softplus: return std::log(std::log1p(std::exp(raw)) + c[0]);
        case Law::sigmoid: return std::log(1 / (1 + std::exp(-shifted)) + c[0]);
        case Law::log_precision: return (stage.form == Form::affine ? 0.5 : -0.5) * raw;
        case Law::clamp: return std::min(std::max(raw, c[0]), c[1]);
    }
    return NAN;
}

// The final rows of a masked network with flat weights `w`.
Reals final_rows(const StageSpec& stage, const double* w, Reals x, const Reals& context) {
    for (double& own : x)
        if (stage.input_clip > 0) own = std::clamp(own, -stage.input_clip, stage.input_clip);
    std::vector<Reals> sums;
    std::vector<int64_t> below;  // highest degree that each final row reads
    for (size_t i = 0; i < x.size(); ++i) below.insert(below.end(), size_t(stage.rows[i]), stage.ranks[i] - 1);
    Reals in = x;
    std::vector<int64_t> known = stage.ranks;
    for (const MapSpec& map : stage.maps) {
        const size_t rows = size_t(map.rows), inputs = size_t(map.inputs);
        const std::vector<int64_t>& degrees = map.degrees.empty() && rows ? below : map.degrees;
        const bool joins = map.joins != Joins::none;
        const double *bias = w + rows * inputs, *of_context = bias + rows;
        const double* const behind = of_context + (map.context || joins ? rows * context.size() : 0);
        Reals out(bias, bias + rows);
        for (size_t j = 0; j < rows; ++j) {
            double own = map.context_bias ? behind[j] : 0;
            for (size_t c = 0; (map.context || joins) && c < context.size(); ++c) own += of_context[j * context.size() + c] * context[c];
            for (size_t i = 0; i < inputs; ++i)
                if (known[i] <= degrees[j]) out[j] += w[j * inputs + i] * in[i];
            if (map.joins == Joins::gated)
                out[j] /= 1 + std::exp(-own);
            else
                out[j] += map.joins == Joins::activated ? activated(stage.activation, own) : own;
            if (map.adds >= 0) out[j] += sums[size_t(map.adds)][j];
        }
        w = behind + (map.context_bias ? rows : 0);
        sums.push_back(out);
        for (size_t j = 0; j < map.norm_scale.size(); ++j) out[j] = out[j] * map.norm_scale[j] + map.norm_shift[j];
        if (map.activated)
            for (double& unit : out) unit = activated(stage.activation, unit);
        in = out;
        known = degrees;
    }
    for (size_t j = 0; stage.skip && j < in.size(); ++j)
        for (size_t i = 0; i < x.size(); ++i)
            if (stage.ranks[i] <= below[j]) in[j] += w[j * x.size() + i] * x[i];
    return in;
}

double conditional(const StageSpec& stage, const double* row, int rows, int values, double x) {
    if (rows == 1) return -log_sum_exp({0, x == 1 ? -row[0] : row[0]});
    if (values) return row[size_t(x)] - log_sum_exp(Reals(row, row + rows));
    const int n = stage.components;
    Reals terms;
    for (int c = 0; c < n; ++c) {
        const double raw = log_scale(stage, row[2 * n + c]), a = stage.form == Form::affine ? -raw : raw;
        const double z = (x - row[n + c]) * std::exp(-a);
        terms.push_back(row[c] - a - 0.5 * z * z);
    }
    return log_sum_exp(terms) - log_sum_exp(Reals(row, row + n));
}

double front(const Columns& columns, size_t c, double x, double& log_det) {
    const double above = x - columns.lower[c], below = columns.upper[c] - x;
    double z = x;
    switch (columns.kind[c]) {
        case Bijection::identity: break;
        case Bijection::logit:
            z = std::log(above / below);
            log_det += std::log(1 / above + 1 / below);
            break;
        case Bijection::log_above:
            z = std::log(above);
            log_det -= z;
            break;
        case Bijection::log_below:
            z = -std::log(below);
            log_det += z;
            break;
    }
    log_det += std::log(std::fabs(columns.scale[c]));
    return (z - columns.loc[c]) * columns.scale[c];
}

struct Answer {
    Reals log_prob, noise;
};

// With shares of the rows, norms of the batch take its statistics.
Answer plain(const FlowSpec& spec, const double* w, const Reals& x, const Reals& context, size_t n, const Reals* share = nullptr) {
    const size_t features = size_t(spec.features), width = size_t(spec.context);
    std::vector<Reals> rows(n, Reals(features)), contexts(n, Reals(width));
    Reals log_det(n, 0.0);
    for (size_t r = 0; r < n; ++r) {
        double unused = 0;
        for (size_t v = 0; v < features; ++v) rows[r][v] = front(spec.columns, v, x[r * features + v], log_det[r]);
        for (size_t c = 0; c < width; ++c) contexts[r][c] = front(spec.context_columns, c, context[r * width + c], unused);
    }
    for (const StageSpec& stage : spec.stages) {
        Reals mean = stage.mean, var = stage.var;
        auto own = [&](size_t r) {
            Reals result;
            for (int v : stage.variable) result.push_back(rows[r][size_t(v)]);
            return result;
        };
        if (stage.of_batch && share) {
            mean.assign(features, 0.0);
            var.assign(features, 0.0);
            for (size_t i = 0; i < features; ++i) {
                for (size_t r = 0; r < n; ++r) mean[i] += (*share)[r] * own(r)[i];
                for (size_t r = 0; r < n; ++r) var[i] += (*share)[r] * std::pow(own(r)[i] - mean[i], 2);
            }
        }
        for (size_t r = 0; r < n; ++r) {
            const Reals in = own(r);
            Reals out = in;
            double& sum = log_det[r];
            if (stage.output == Output::norm) {
                for (size_t i = 0; i < features; ++i) {
                    const double scale = stage.trainable ? std::exp(w[i]) / std::sqrt(var[i] + stage.eps) : stage.scale[i];
                    out[i] = (in[i] - (stage.trainable ? mean : stage.loc)[i]) * scale + (stage.trainable ? w[features + i] : 0);
                    sum += std::log(std::fabs(scale));
                }
            } else if (stage.output == Output::linear) {
                const double *upper = w + features * features, *bias = upper + features * features;
                Reals middle(features, 0.0);
                for (size_t i = 0; i < features; ++i) {
                    for (size_t j = i; j < features; ++j) middle[i] += upper[i * features + j] * in[j];
                    sum += std::log(std::fabs(upper[i * features + i]));
                }
                for (size_t i = 0; i < features; ++i) {
                    out[i] = middle[i] + bias[i];
                    for (size_t j = 0; j < i; ++j) out[i] += w[i * features + j] * middle[j];
                }
            } else {
                // The columns of the noise that a rank reads are those of lower ranks: after so many passes all are known.
                const std::set<int64_t> ranks(stage.ranks.begin(), stage.ranks.end());
                for (size_t pass = 0; stage.reads_noise && pass < ranks.size(); ++pass) {
                    const Reals final = final_rows(stage, w, pass ? out : Reals(features, 0.0), contexts[r]);
                    for (size_t i = 0; i < features; ++i) {
                        const double a = log_scale(stage, final[2 * i + 1]), shift = final[2 * i];
                        out[i] = stage.form == Form::affine ? in[i] * std::exp(a) + shift : (in[i] - shift) * std::exp(-a);
                    }
                }
                const Reals final = final_rows(stage, w, stage.reads_noise ? out : in, contexts[r]);
                const double* row = final.data();
                for (size_t i = 0; i < features; row += stage.rows[i++]) {
                    if (stage.output == Output::base) {
                        sum += conditional(stage, row, stage.rows[i], stage.values[i], in[i]);
                        continue;
                    }
                    const double a = log_scale(stage, row[1]);
                    out[i] = stage.form == Form::affine ? in[i] * std::exp(a) + row[0] : (in[i] - row[0]) * std::exp(-a);
                    sum += stage.form == Form::affine ? a : -a;
                    if (stage.scale.empty()) continue;
                    out[i] = (out[i] - stage.loc[i]) * stage.scale[i];
                    sum += std::log(std::fabs(stage.scale[i]));
                }
            }
            for (size_t i = 0; i < features; ++i) rows[r][size_t(stage.variable[i])] = out[i];
        }
        w += parameters_of(spec, stage);
    }
    const bool has_base = !spec.stages.empty() && spec.stages.back().output == Output::base;
    const auto continuous = has_base ? std::count(spec.stages.back().values.begin(), spec.stages.back().values.end(), 0) : spec.features;
    for (size_t r = 0; r < n; ++r) log_det[r] -= 0.91893853320467274178 * double(continuous);
    Answer answer;
    for (size_t r = 0; r < n; ++r)
        for (int v : spec.noise_variable) {
            const double z = rows[r][size_t(v)];
            answer.noise.push_back(z);
            if (!has_base) log_det[r] -= 0.5 * z * z;
        }
    answer.log_prob = log_det;
    return answer;
}

// d f / d t of f(t) at 0.
template <class F>
double difference(F f) {
    constexpr double h = 1e-5;
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h);
}

Reals moved(const Reals& x, double t, const Reals& direction) {
    Reals result = x;
    for (size_t i = 0; i < x.size(); ++i) result[i] += t * direction[i];
    return result;
}

template <class A, class B>
double dot(const A& a, const B& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0, std::plus<>(), [](double x, double y) { return x * y; });
}

// ---- every operation -------------------------------------------------------------------------------------------------------------

template <class T>
Rows rows_of(const std::vector<T>& values, int width) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(values.data());
    rows.dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
    rows.inner = width * int(sizeof(T));
    rows.column = sizeof(T);
    return rows;
}

template <class T>
Batch batch_of(const Weights<T>& packed, const std::vector<T>& x, const std::vector<T>& context, size_t n) {
    Batch batch;
    batch.inner = int64_t(n);
    batch.x = rows_of(x, packed.plan().features());
    batch.context = rows_of(context, packed.plan().context());
    return batch;
}

// Rows and their log-densities for `contexts` contexts, `rows` each.
template <class T>
std::pair<std::vector<T>, std::vector<T>> draw(const Weights<T>& packed, const std::vector<T>& context, int64_t contexts, int64_t rows,
                                               uint64_t offset = 0, uint32_t context_offset = 0) {
    Draw request;
    request.contexts = contexts;
    request.rows = rows;
    request.seed = 11;
    request.offset = offset;
    request.context_offset = context_offset;
    request.context = rows_of(context, packed.plan().context());
    request.context.data += context_offset * request.context.inner;
    std::swap(request.context.outer, request.context.inner);
    std::vector<T> x(size_t(contexts * rows * packed.plan().features())), density(size_t(contexts * rows));
    sample<T>(packed, request, x.data(), density.data(), {});
    return {x, density};
}

template <class T>
struct Results {
    std::vector<T> x, log_prob, noise, sample, sample_log_prob, value, d_x, d_context, d_parameters;
    std::vector<T> of_map[2][3];  // of the maps to the noise and from it: the gradients in what goes in, in the context, in the parameters
    bool operator==(const Results& other) const {
        for (int map = 0; map < 2; ++map)
            for (int i = 0; i < 3; ++i)
                if (of_map[map][i] != other.of_map[map][i]) return false;
        return x == other.x && log_prob == other.log_prob && noise == other.noise && sample == other.sample &&
               sample_log_prob == other.sample_log_prob && value == other.value && d_x == other.d_x && d_context == other.d_context &&
               d_parameters == other.d_parameters;
    }
};

// x: rows, or noise where the variables are not discrete. Three contexts for samples.
template <class T>
Results<T> all_results(const Weights<T>& packed, const std::vector<T>& x, const std::vector<T>& context, const std::vector<T>& cotangent) {
    const size_t n = cotangent.size();
    const bool of_values = discrete(packed.plan().spec());
    Results<T> r;
    r.x = x;
    if (!of_values) from_noise<T>(packed, batch_of(packed, x, context, n), r.x.data(), {});
    const Batch batch = batch_of(packed, r.x, context, n);
    r.log_prob.resize(n);
    log_prob<T>(packed, batch, r.log_prob.data(), {});
    r.noise.resize(of_values ? 0 : x.size());
    if (!of_values) to_noise<T>(packed, batch, r.noise.data(), {});
    std::tie(r.sample, r.sample_log_prob) = draw<T>(packed, context, packed.plan().context() && n > 2 ? 3 : 1, int64_t(n));
    r.value.resize(n);
    r.d_x.resize(of_values ? 0 : x.size());
    r.d_context.resize(n * size_t(packed.plan().context()));
    r.d_parameters.resize(size_t(packed.plan().parameter_count()));
    vjp<T>(packed, batch, cotangent.data(), r.value.data(), of_values ? nullptr : r.d_x.data(),
           packed.plan().context() ? r.d_context.data() : nullptr, r.d_parameters.data(), {});
    for (int map = 0; map < 2 && !of_values; ++map) {
        std::vector<T>(&own)[3] = r.of_map[map];
        own[0].resize(x.size());
        own[1].resize(r.d_context.size());
        own[2].resize(r.d_parameters.size());
        T* const of_context = own[1].empty() ? nullptr : own[1].data();
        if (map == 0)
            to_noise_vjp<T>(packed, batch, x.data(), nullptr, own[0].data(), of_context, own[2].data(), {});
        else
            from_noise_vjp<T>(packed, batch, x.data(), own[0].data(), of_context, own[2].data(), {});
    }
    return r;
}

template <class T>
bool near(const std::vector<T>& values, const Reals& expected, double tolerance) {
    for (size_t i = 0; i < values.size(); ++i)
        if (!(std::fabs(double(values[i]) - expected[i]) <= tolerance * (1 + std::fabs(expected[i])))) return false;
    return values.size() == expected.size();
}

template <class T>
void gradients(const FlowSpec& spec, const Reals& parameters, const Results<T>& r, const std::vector<T>& given,
               const std::vector<T>& context, const std::vector<T>& cotangent, Random& rng) {
    const size_t n = cotangent.size();
    const Reals gz(given.begin(), given.end());
    const Reals g(cotangent.begin(), cotangent.end()), x(r.x.begin(), r.x.end()), c(context.begin(), context.end());
    auto total = [&](const Reals& w, const Reals& x, const Reals& c) { return dot(plain(spec, w.data(), x, c, n).log_prob, g); };
    double tolerance = 1e-6;
    for (const StageSpec& stage : spec.stages)
        if ((stage.activation == Activation::relu && stage.maps.size() > 1) || stage.law == Law::clamp)
            tolerance = 5e-3;  // a difference may lie across a kink
    auto agree = [&](double got, double expected, double size = 0) {
        CHECK(std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected) + size));
    };
    for (int repeat = 0; repeat < 2; ++repeat) {
        const Reals dw = normals(parameters.size(), rng, 0.1), dx = normals(x.size(), rng, 0.1), dc = normals(r.d_context.size(), rng, 0.1);
        Reals all = dc;
        all.resize(c.size());
        agree(dot(r.d_parameters, dw), difference([&](double t) { return total(moved(parameters, t, dw), x, c); }));
        if (!r.d_context.empty()) agree(dot(r.d_context, dc), difference([&](double t) { return total(parameters, x, moved(c, t, all)); }));
        // Steps along x stay inside bounds: rows near one move less.
        const bool bounded = spec.columns.kind[0] != Bijection::identity;
        if (!r.d_x.empty() && !bounded) agree(dot(r.d_x, dx), difference([&](double t) { return total(parameters, moved(x, t, dx), c); }));
        if (discrete(spec)) continue;
        // The map to the noise has g . dz. That from it, by what its gradient in the noise gives: that . dz is g . dx along x, and what the
        // context and the parameters have of it is the negative.
        for (int map = 0; map < 2; ++map) {
            const std::vector<T>(&own)[3] = r.of_map[map];
            const Reals weights = map ? Reals(own[0].begin(), own[0].end()) : gz;
            auto noise = [&](const Reals& w, const Reals& x, const Reals& c) { return dot(plain(spec, w.data(), x, c, n).noise, weights); };
            double size = 0;  // that of the noise's may be large, and what is summed cancels
            for (double weight : weights) size = std::max(size, std::fabs(weight));
            auto same = [&](double sum, auto f) { agree(sum, difference(f), size); };
            const double sign = map ? -1 : 1;
            same(sign * dot(own[2], dw), [&](double t) { return noise(moved(parameters, t, dw), x, c); });
            if (!own[1].empty()) same(sign * dot(own[1], dc), [&](double t) { return noise(parameters, x, moved(c, t, all)); });
            if (!bounded) same(map ? dot(gz, dx) : dot(own[0], dx), [&](double t) { return noise(parameters, moved(x, t, dx), c); });
        }
    }
}

template <class T>
void operations(const Case& one, size_t n, bool alone) {
    Random rng{unsigned(n)};
    const FlowSpec& spec = one.spec;
    const size_t features = size_t(spec.features), width = size_t(spec.context);
    const Reals parameters = [&] {
        const auto narrow = narrowed<T>(random_parameters(spec, rng));
        return Reals(narrow.begin(), narrow.end());
    }();
    const double tolerance = sizeof(T) == 4 ? 2e-3 : 1e-9;
    auto x = narrowed<T>(normals(n * features, rng));
    set_values(spec, x, rng);
    const auto context = narrowed<T>(normals(std::max<size_t>(n * width, 1), rng)), cotangent = narrowed<T>(normals(n, rng));
    std::map<std::string, Results<T>> of;
    for (const std::string& isa : available_isas()) {
        what_runs = one.name + ", " + isa + (sizeof(T) == 4 ? ", float, " : ", double, ") + std::to_string(n) + " rows";
        set_isa(isa);
        set_num_threads(1);
        const auto packed = make_weights<T>(spec, parameters);
        const auto r = all_results(*packed, x, context, cotangent);
        for (int threads : {1, 2, 3}) {  // the scratch holds NaN
            set_num_threads(threads);
            set_poison(true);
            CHECK(all_results(*packed, x, context, cotangent) == r);
            set_poison(false);
        }
        of[isa] = r;

        const Reals c(context.begin(), context.end());
        const Answer answer = plain(spec, parameters.data(), Reals(r.x.begin(), r.x.end()), c, n);
        CHECK(near(r.log_prob, answer.log_prob, tolerance));
        CHECK(near(r.value, answer.log_prob, tolerance));
        if (!discrete(spec)) {
            CHECK(near(r.noise, answer.noise, tolerance));
            CHECK(near(r.noise, Reals(x.begin(), x.end()), tolerance));
        }
        const size_t contexts = r.sample_log_prob.size() / n;
        Reals repeated;
        for (size_t o = 0; o < contexts; ++o)
            for (size_t i = 0; i < n; ++i) repeated.insert(repeated.end(), c.begin() + long(o * width), c.begin() + long((o + 1) * width));
        const Answer of_sample = plain(spec, parameters.data(), Reals(r.sample.begin(), r.sample.end()), repeated, n * contexts);
        CHECK(near(r.sample_log_prob, of_sample.log_prob, 10 * tolerance));
        if (sizeof(T) == 8 && isa == available_isas().back()) gradients(spec, parameters, r, x, context, cotangent, rng);
        if (!alone) continue;

        // Rows alone give the bits that they give among others; so do draws in parts, whether split by row or by context.
        for (size_t rows : {1, 2})
            for (size_t i : {size_t(0), n / 2, n - rows}) {
                Batch batch = batch_of(*packed, r.x, context, rows);
                batch.x.data += int64_t(i) * batch.x.inner;
                batch.context.data += int64_t(i) * batch.context.inner;
                auto part = [&](const std::vector<T>& all) {
                    const long width = long(all.size() / n);
                    return std::vector<T>(all.begin() + long(i) * width, all.begin() + long(i + rows) * width);
                };
                std::vector<T> density(rows), value(rows), noise(part(r.noise)), d_x(part(r.d_x)), d_context(part(r.d_context));
                for (auto* result : {&noise, &d_x, &d_context}) std::fill(result->begin(), result->end(), T(0));
                log_prob<T>(*packed, batch, density.data(), {});
                CHECK(density == part(r.log_prob));
                if (!noise.empty()) to_noise<T>(*packed, batch, noise.data(), {});
                CHECK(noise == part(r.noise));
                vjp<T>(*packed, batch, cotangent.data() + i, value.data(), d_x.empty() ? nullptr : d_x.data(),
                       d_context.empty() ? nullptr : d_context.data(), nullptr, {});
                CHECK(value == part(r.value) && d_x == part(r.d_x) && d_context == part(r.d_context));
            }
        // So does a context that all rows share.
        std::vector<T> repeats;
        for (size_t i = 0; i < n; ++i) repeats.insert(repeats.end(), context.begin(), context.begin() + long(width));
        Batch batch = batch_of(*packed, r.x, repeats, n);
        std::vector<T> by_row(n), shared(n);
        log_prob<T>(*packed, batch, by_row.data(), {});
        batch.context.inner = 0;
        log_prob<T>(*packed, batch, shared.data(), {});
        CHECK(shared == by_row);
        const size_t cut = n / 3;
        const auto first = draw<T>(*packed, context, 1, int64_t(cut)), second = draw<T>(*packed, context, 1, int64_t(n - cut), cut);
        CHECK(std::equal(first.first.begin(), first.first.end(), r.sample.begin()));
        CHECK(std::equal(second.first.begin(), second.first.end(), r.sample.begin() + long(cut * features)));
        CHECK(std::equal(second.second.begin(), second.second.end(), r.sample_log_prob.begin() + long(cut)));
        if (contexts > 1) {
            const auto last = draw<T>(*packed, context, 2, int64_t(n), 0, 1);
            CHECK(std::equal(last.first.begin(), last.first.end(), r.sample.begin() + long(n * features)));
        }
    }
    what_runs = one.name;
    if (of.count("avx2") && of.count("avx512")) CHECK(of["avx2"] == of["avx512"]);
}

// ---- what a GPU computes -----------------------------------------------------------------------------------------------------------

#ifdef FASTMAF_WARPS
template <class T>
bool same(const std::vector<T>& got, const std::vector<T>& expected, size_t count, bool exactly) {
    for (size_t i = 0; i < count; ++i) {
        const double a = double(got[i]), b = double(expected[i]);
        if (std::isnan(a) && std::isnan(b)) continue;
        if (a == b) continue;
        if (exactly || !(std::fabs(a - b) <= (sizeof(T) == 4 ? 2e-3 : 1e-9) * (1 + std::fabs(b)))) return false;
    }
    return true;
}

// The body of the CUDA kernels, run by the host in 32 lanes, against the CPU: to the bit where the CPU has fused multiply-adds.
template <class T>
void warps_of(const Case& one) {
    Random rng{3};
    const FlowSpec& spec = one.spec;
    const size_t features = size_t(spec.features), width = size_t(spec.context), n = 129;
    const bool of_values = discrete(spec), fused = available_isas().size() > 1;
    const auto packed = make_weights<T>(spec, random_parameters(spec, rng));
    set_isa(available_isas().front());
    auto x = narrowed<T>(normals(n * features, rng));
    const auto context = narrowed<T>(normals(n * std::max<size_t>(width, 1), rng));
    set_values(spec, x, rng, 2);
    if (!of_values) from_noise<T>(*packed, batch_of(*packed, x, context, n), x.data(), {});
    auto wrong = x;  // NaN, values on and beyond bounds or that a variable cannot have, and such that overflow
    const double odd[] = {NAN, 1, -7, 0.5, 2, INFINITY, -INFINITY, 1e30, -1e300};
    for (size_t i = 0; i < 45; ++i) wrong[rng() % wrong.size()] = T(odd[i % 9]);
    const auto noise = narrowed<T>(normals(n * features, rng));

    for (int shared = 0; shared < (width ? 3 : 1); ++shared) {  // contexts by row, one for all, one for each of three groups
        auto batch_for = [&](const std::vector<T>& values, size_t rows) {
            Batch batch = batch_of(*packed, values, context, rows);
            if (shared) batch.context.inner = 0;
            if (shared == 2) {
                batch.outer = 3;
                batch.context.outer = int64_t(width * sizeof(T));
            }
            return batch;
        };
        for (const auto* values : {&x, &wrong}) {
            const size_t groups = shared == 2 ? 3 : 1;
            std::vector<T> density(n * groups), z(n * groups * features), back(n * groups * features);
            for (size_t rows : {size_t(1), size_t(31), size_t(32), size_t(33), size_t(127), size_t(128), n}) {
                const Batch batch = batch_for(*values, rows), of_noise = batch_for(noise, rows);
                log_prob<T>(*packed, batch, density.data(), {});
                if (!of_values) to_noise<T>(*packed, batch, z.data(), {});
                if (!of_values) from_noise<T>(*packed, of_noise, back.data(), {});
                for (const Warps& warps : {Warps{1, 4}, Warps{3, rows < 33 ? 1 : 2}}) {
                    if (warps.count > 1 && rows != 33 && rows != n && rows != 1) continue;
                    what_runs = one.name + ", " + std::to_string(warps.count) + " warps" + (sizeof(T) == 4 ? ", float, " : ", double, ") +
                                std::to_string(rows) + " rows, context " + std::to_string(shared);
                    std::vector<T> got(density.size()), got_z(z.size()), got_back(back.size());
                    warp_evaluate<T>(*packed, batch, warps, got.data(), nullptr);
                    CHECK(same(got, density, rows * groups, fused));
                    if (of_values) {
                        std::vector<T> probs(n * groups * features * size_t(packed->plan().most_values())), got_probs(probs.size());
                        conditional_probs<T>(*packed, batch, probs.data(), {});
                        warp_probabilities<T>(*packed, batch, warps, got_probs.data());
                        CHECK(same(got_probs, probs, probs.size() / n * rows, fused));
                        continue;
                    }
                    warp_evaluate<T>(*packed, batch, warps, nullptr, got_z.data());
                    CHECK(same(got_z, z, rows * groups * features, fused));
                    warp_generate<T>(*packed, of_noise, nullptr, warps, got_back.data(), nullptr);
                    CHECK(same(got_back, back, rows * groups * features, fused));
                }
            }
        }
    }

    Draw request;
    request.seed = 11;
    request.offset = (uint64_t(1) << 32) - 40;
    request.context_offset = 5;
    request.context = rows_of(context, int(width));
    std::swap(request.context.outer, request.context.inner);
    for (int64_t contexts : {1, 3}) {
        what_runs = one.name + (sizeof(T) == 4 ? ", float, draws" : ", double, draws");
        request.contexts = contexts;
        request.rows = 37;
        const size_t rows = size_t(37 * contexts);
        std::vector<T> draws(rows * features), density(rows), got(draws.size()), got_density(rows);
        sample<T>(*packed, request, draws.data(), density.data(), {});
        for (const Warps& warps : {Warps{1, 4}, Warps{2, 1}}) {
            warp_generate<T>(*packed, {}, &request, warps, got.data(), got_density.data());
            CHECK(same(got, draws, got.size(), fused) && same(got_density, density, rows, fused));
        }
        std::vector<Other<T>> other(draws.size()), got_other(draws.size());
        sample<T>(*packed, request, other.data(), density.data(), {});
        warp_generate<T>(*packed, {}, &request, Warps{2, 1}, nullptr, got_density.data(), got_other.data());
        CHECK(same(got_other, other, other.size(), fused) && same(got_density, density, rows, fused));
        CHECK(same(std::vector<float>(other.begin(), other.end()), std::vector<float>(draws.begin(), draws.end()), draws.size(), true));
    }
    Draw part = request;  // the last rows of a call
    part.contexts = 1;
    part.rows = 7;
    std::vector<T> last(7 * features);
    warp_generate<T>(*packed, {}, &part, Warps{2, 2, 30}, last.data(), nullptr);
    request.contexts = 1;
    std::vector<T> all(37 * features);
    sample<T>(*packed, request, all.data(), static_cast<T*>(nullptr), {});
    CHECK(same(last, std::vector<T>(all.end() - long(7 * features), all.end()), last.size(), fused));

    std::vector<uint64_t> index, group;  // scattered rows
    for (size_t i = 0; i < n; ++i) {
        index.push_back((uint64_t(rng()) << 20) + i);
        group.push_back(rng());
    }
    Draw scattered;
    scattered.rows = int64_t(n);
    scattered.seed = 5;
    scattered.index = index.data();
    scattered.group = group.data();
    scattered.context = rows_of(context, int(width));
    std::vector<T> expected(n * features), got(n * features);
    sample<T>(*packed, scattered, expected.data(), static_cast<T*>(nullptr), {});
    warp_generate<T>(*packed, {}, &scattered, Warps{1, 4}, got.data(), nullptr);
    CHECK(same(got, expected, got.size(), fused));
}

// Rows of every dtype, with strides of either sign.
template <class S>
void warps_read(DType dtype) {
    Random rng{4};
    const FlowSpec spec = flow(3, 0, {norm(3, Norm::fixed, rng)}, rng);
    const auto packed = make_weights<double>(spec, random_parameters(spec, rng));
    const size_t n = 45;
    std::vector<S> values(3 * n * 2);
    for (S& v : values) v = S(sizeof(S) == 1 && dtype == DType::boolean ? rng() % 2 : rng() % 100);
    Batch batch;
    batch.inner = int64_t(n);
    batch.x.dtype = dtype;
    batch.x.data = reinterpret_cast<const char*>(values.data() + 3 * n);
    batch.x.inner = 3 * int64_t(sizeof(S));
    batch.x.column = -int64_t(sizeof(S));
    Reals got(n), expected(n);
    log_prob<double>(*packed, batch, expected.data(), {});
    warp_evaluate<double>(*packed, batch, Warps{1, 2}, got.data(), nullptr);
    CHECK(same(got, expected, n, available_isas().size() > 1));
}

#endif

// Values that a discrete variable cannot have.
void impossible() {
    Random rng(2);
    Network base;
    base.base = Conditional::categorical;
    base.hidden = {9};
    base.categories = {2, 3, 4};
    const FlowSpec spec = flow(3, 0, {network(3, 0, base, rng)}, rng);
    const auto packed = make_weights<double>(spec, random_parameters(spec, rng));
    const Reals x = {0, 3, 1, 0.5, 1, 1, 1, -1, 2, 1, 2, 3}, none, ones(4, 1.0);
    const Batch batch = batch_of(*packed, x, none, 4);
    Reals value(4), density(4), gradient(size_t(packed->plan().parameter_count())), expected(gradient.size());
    log_prob<double>(*packed, batch, density.data(), {});
    vjp<double>(*packed, batch, ones.data(), value.data(), nullptr, nullptr, gradient.data(), {});
    for (size_t i = 0; i < 3; ++i) CHECK(density[i] == -INFINITY && value[i] == -INFINITY);
    CHECK(std::isfinite(density[3]) && std::isfinite(value[3]));
    Batch last = batch;
    last.x.data += 3 * last.x.inner;
    last.inner = 1;
    vjp<double>(*packed, last, ones.data(), value.data(), nullptr, nullptr, expected.data(), {});
    CHECK(near(gradient, expected, 1e-12));
}

// More weights than a cache holds, so that sub-tiles share a pass; more rows than a chunk of gradients.
void large() {
    what_runs = "large";
    Random rng(3);
    Network n;
    n.hidden = {900, 900};
    n.activation = Activation::relu;
    n.residual = n.skip = true;
    const FlowSpec spec = flow(9, 1, {linear(9, rng), network(9, 1, n, rng), norm(9, Norm::of_data, rng)}, rng);
    const Reals parameters = random_parameters(spec, rng);
    const size_t rows = 230, some = 12;
    const auto context = normals(rows, rng), u = normals(9 * rows, rng), ones = Reals(rows, 1.0);
    set_num_threads(2);
    const auto packed = make_weights<double>(spec, parameters);
    const auto r = all_results(*packed, u, context, ones);
    const Answer answer = plain(spec, parameters.data(), r.x, context, some);
    CHECK(near(Reals(r.log_prob.begin(), r.log_prob.begin() + some), answer.log_prob, 1e-9));
    CHECK(near(r.value, r.log_prob, 1e-9));
    CHECK(near(r.noise, u, 1e-9));
    set_num_threads(1);
    CHECK(all_results(*packed, u, context, ones) == r);

    n.hidden = {};
    n.residual = false;
    const FlowSpec small = flow(2, 0, {linear(2, rng), network(2, 0, n, rng), norm(2, Norm::of_data, rng)}, rng);
    const auto little = make_weights<double>(small, random_parameters(small, rng));
    const size_t many = 66000, half = many / 2;
    const Reals x = normals(2 * many, rng), none, g(many, 1.0);
    Reals whole(size_t(little->plan().parameter_count())), first(whole.size()), second(whole.size());
    Batch batch = batch_of(*little, x, none, many);
    vjp<double>(*little, batch, g.data(), nullptr, nullptr, nullptr, whole.data(), {});
    batch.inner = int64_t(half);
    vjp<double>(*little, batch, g.data(), nullptr, nullptr, nullptr, first.data(), {});
    batch.x.data += int64_t(half) * batch.x.inner;
    vjp<double>(*little, batch, g.data(), nullptr, nullptr, nullptr, second.data(), {});
    CHECK(near(whole, moved(first, 1, second), 1e-9));
}

// ---- training --------------------------------------------------------------------------------------------------------------------

struct Course {
    std::string name;
    std::vector<FlowSpec> members;
    bool weighted = false;
    AdamSettings settings;
};

std::vector<Course> courses() {
    Random rng(5);
    std::vector<Course> all;
    auto net = [&](int context, const Network& n) { return network(5, context, n, rng); };
    AdamSettings careful;
    careful.l2 = 1e-4;
    careful.clip_norm = 5;
    Network n, block, base;
    n.hidden = {30, 17};
    n.activation = Activation::silu;
    block.hidden = {14, 14};
    block.activation = Activation::elu;
    block.residual = block.skip = true;
    all.push_back({"transforms", {flow(5, 2, {net(2, n), net(2, n)}, rng)}, false, careful});
    all.push_back({"norms of the batch",
                   {flow(5, 0,
                         {norm(5, Norm::of_batch, rng), linear(5, rng), net(0, block), norm(5, Norm::of_batch, rng), net(0, n),
                          norm(5, Norm::of_data, rng)},
                         rng)},
                   true,
                   {}});
    // Members that differ in ranks and degrees, the second with units that nobody reads.
    auto members = [&](const char* name, int context, const Network& network, bool with_norm, const AdamSettings& settings) {
        Course course{name, {}, with_norm, settings};
        const StageSpec own = norm(5, Norm::of_batch, rng);
        const FlowSpec like = flow(5, context, {net(context, network)}, rng);
        for (int beyond : {0, 1, 0}) {
            Network mine = network;
            mine.beyond = beyond;
            FlowSpec spec = like;
            spec.stages = {net(context, mine)};
            spec.stages[0].variable = like.stages[0].variable;
            if (with_norm) spec.stages.insert(spec.stages.begin(), own);
            course.members.push_back(spec);
        }
        all.push_back(course);
    };
    n.skip = n.late = true;
    members("members", 2, n, false, {});
    members("residual members with a norm of the batch", 0, block, true, careful);
    base = n;
    base.base = Conditional::mixture;
    base.components = 4;
    all.push_back({"mixture behind a norm of the batch", {flow(5, 0, {norm(5, Norm::of_batch, rng), net(0, base)}, rng)}, false, {}});
    members("members with mixtures", 0, base, false, careful);
    base.base = Conditional::bernoulli;
    members("members with bernoullis", 1, base, false, {});
    base.base = Conditional::categorical;
    base.categories = {2, 3, 4, 2, 6};
    all.push_back({"categorical", {flow(5, 2, {net(2, base)}, rng)}, true, {}});
    base.base = Conditional::mixed;
    base.components = 2;
    base.categories = {2, 0, 4, 0, 0};
    all.push_back({"mixed", {flow(5, 2, {net(2, base)}, rng)}, true, careful});
    return all;
}

template <class T>
struct Session {
    size_t n = 230;
    std::vector<T> x, context;
    Reals weights, parameters;
    std::vector<std::shared_ptr<Weights<T>>> members;
    std::vector<int64_t> order;
    std::unique_ptr<Trainer<T>> trainer;

    explicit Session(const Course& course) : order(n) {
        Random rng(8);
        const FlowSpec& spec = course.members[0];
        x = narrowed<T>(normals(n * size_t(spec.features), rng, 2));
        set_values(spec, x, rng, 2);
        context = narrowed<T>(normals(n * size_t(spec.context), rng));
        for (size_t i = 0; i < n; ++i) weights.push_back(course.weighted ? 0.5 + double(i % 4) : 1);
        const auto narrow = narrowed<T>(random_parameters(spec, rng));
        parameters.assign(narrow.begin(), narrow.end());
        for (const FlowSpec& member : course.members) members.push_back(make_weights<T>(member, parameters));
        trainer = std::make_unique<Trainer<T>>(members, members.size() > 1, course.settings);
        trainer->set_parameters(narrow.data());  // members keep what their masks keep
        shuffle(9, 3, 0, int64_t(n), order.data());
    }

    double epoch(int64_t batch_size, double rate, int64_t& done) {
        Batch batch = batch_of(*members[0], x, context, n);
        batch.index = order.data();
        const double mean = std::accumulate(weights.begin(), weights.end(), 0.0) / double(n);
        return trainer->epoch(batch, weights.data(), Batches(int64_t(n), batch_size, Reals(n, rate), mean), done, {});
    }

    std::vector<T> weights_after() const {
        std::vector<T> result(parameters.size());
        trainer->get_parameters(result.data());
        return result;
    }
};

template <class T>
std::vector<T> train(const Course& course, int threads, const std::string& isa) {
    what_runs = course.name + ", " + isa + (sizeof(T) == 4 ? ", float, " : ", double, ") + std::to_string(threads) + " threads";
    set_num_threads(threads);
    set_isa(isa);
    Session<T> of(course);
    double first = 0, last = 0;
    int64_t done = 0;
    for (int epoch = 0; epoch < 12; ++epoch) {
        last = of.epoch(50, 5e-3, done);
        if (epoch == 0) first = last;
        CHECK(done == 5 && std::isfinite(last));
    }
    CHECK(last < first);
    // New members keep the weights.
    const auto weights = of.weights_after();
    if (of.members.size() > 1) {
        std::vector<std::shared_ptr<Weights<T>>> fewer;
        for (size_t m : {2, 1}) fewer.push_back(make_weights<T>(course.members[m], of.parameters));
        of.trainer->set_members(fewer);
        CHECK(of.weights_after() == weights);
        of.epoch(50, 5e-3, done);
        CHECK(done == 5 && of.weights_after() != weights);
    }
    return of.weights_after();
}

// Sums arrays of several threads, each of which waits for the others.
class Meeting {
public:
    explicit Meeting(int threads) : threads_(threads) {}

    template <class T>
    void sum(T* values, int64_t size) {
        std::unique_lock<std::mutex> lock(mutex_);
        ended_.wait(lock, [&] { return left_ == 0; });
        sum_.resize(size_t(size));
        for (int64_t i = 0; i < size; ++i) sum_[size_t(i)] += double(values[i]);
        if (++come_ == threads_) {
            left_ = threads_;
            all_.notify_all();
        }
        all_.wait(lock, [&] { return left_ > 0; });
        for (int64_t i = 0; i < size; ++i) values[i] = T(sum_[size_t(i)]);
        if (--left_ > 0) return;
        come_ = 0;
        sum_.clear();
        ended_.notify_all();
    }

private:
    const int threads_;
    int come_ = 0, left_ = 0;
    Reals sum_;
    std::mutex mutex_;
    std::condition_variable all_, ended_;
};

// Three trainers with parts of each batch, one of them without any in the first and the last step, are one with all of it.
void together(const Course& course) {
    what_runs = course.name + ", together";
    Session<double> whole(course);
    const Batches batches(int64_t(whole.n), 50, Reals(whole.n, 5e-3), 1.5);
    const Steps steps = batches;
    const auto rows = [](Session<double>& of, const int64_t* order) {
        Batch batch = batch_of(*of.members[0], of.x, of.context, of.n);
        batch.index = order;
        return batch;
    };
    constexpr int trainers = 3, epochs = 4;
    Meeting gradients(trainers), losses(trainers);
    std::vector<std::unique_ptr<Session<double>>> parts;
    Reals sums(trainers, 0.0);
    std::vector<std::thread> threads;
    for (int k = 0; k < trainers; ++k) parts.push_back(std::make_unique<Session<double>>(course));
    for (int k = 0; k < trainers; ++k)
        threads.emplace_back([&, k] {
            Session<double>& of = *parts[size_t(k)];
            std::vector<int64_t> order, ends;
            for (int64_t s = 0; s < steps.count; ++s) {
                const int64_t begin = s ? steps.ends[s - 1] : 0, end = steps.ends[s], none = s == 0 || s + 1 == steps.count;
                const int64_t third = (end - begin) / (none ? 2 : 3);
                const int64_t first = begin + k * third, last = none && k == 2 ? first : k == (none ? 1 : 2) ? end : first + third;
                order.insert(order.end(), of.order.begin() + std::min(first, end), of.order.begin() + std::min(last, end));
                ends.push_back(int64_t(order.size()));
            }
            int64_t done = 0;
            for (int epoch = 0; epoch < epochs; ++epoch)
                sums[size_t(k)] =
                    of.trainer->epoch(rows(of, order.data()), of.weights.data(), {steps.count, ends.data(), steps.mass, steps.rates}, done,
                                      {}, [&](double* gradient, int64_t size, double* loss) {
                                          gradients.sum(gradient, size);
                                          losses.sum(loss, 1);
                                      });
        });
    for (auto& thread : threads) thread.join();
    int64_t done = 0;
    double sum = 0;
    for (int epoch = 0; epoch < epochs; ++epoch)
        sum = whole.trainer->epoch(rows(whole, whole.order.data()), whole.weights.data(), steps, done, {});
    const Reals end = whole.weights_after();
    CHECK(done == steps.count && whole.trainer->steps() == epochs * steps.count);
    for (int k = 0; k < trainers; ++k) {
        const Reals own = parts[size_t(k)]->weights_after();
        double apart = 0;
        for (size_t i = 0; i < end.size(); ++i) apart = std::max(apart, std::fabs(own[i] - end[i]));
        CHECK(apart < 1e-9 && std::fabs(sums[size_t(k)] - sum) < 1e-7 && own == parts[0]->weights_after());
        CHECK(parts[size_t(k)]->trainer->steps() == epochs * steps.count);
    }
}

// The gradient of each step, read off the first moments, against differences.
void gradients_of_training(const Course& given) {
    Course course = given;
    course.settings = {};
    Session<double> of(course);
    const size_t count = of.parameters.size();
    const Reals zeros(count, 0.0);
    Reals x, context, share;
    const size_t features = size_t(course.members[0].features), width = size_t(course.members[0].context);
    double total = 0;
    for (int64_t i : of.order) {
        for (size_t v = 0; v < features; ++v) x.push_back(of.x[size_t(i) * features + v]);
        for (size_t c = 0; c < width; ++c) context.push_back(of.context[size_t(i) * width + c]);
        share.push_back(of.weights[size_t(i)]);
        total += share.back();
    }
    for (double& s : share) s /= total;
    Random rng(10);
    for (size_t step = 0; step < 2 * course.members.size(); ++step) {
        const size_t member = step % course.members.size();
        what_runs = course.name + ", gradient of step " + std::to_string(step);
        int64_t done = 0;
        of.trainer->set_moments(zeros.data(), zeros.data());
        of.trainer->set_steps(int64_t(step));
        of.epoch(int64_t(of.n), 0, done);
        Reals gradient(count), second(count);
        of.trainer->get_moments(gradient.data(), second.data());
        for (double& g : gradient) g /= 1 - course.settings.beta1;
        std::vector<char> live(count, 0);
        for (int64_t i : of.members[member]->plan().index()) live[size_t(i)] = 1;
        bool masked = true;
        for (size_t i = 0; i < count; ++i) masked = masked && (live[i] || (gradient[i] == 0 && second[i] == 0));
        CHECK(masked);
        const Reals direction = normals(count, rng, 0.1);
        const double expected = difference([&](double t) {
            return -dot(plain(course.members[member], moved(of.parameters, t, direction).data(), x, context, of.n, &share).log_prob, share);
        });
        CHECK(std::fabs(dot(gradient, direction) - expected) <= 1e-6 * (1 + std::fabs(expected)));
    }
}

// ---- threads and processes -------------------------------------------------------------------------------------------------------

// One flow, packed on first use, called by several threads at once.
void many_callers() {
    what_runs = "many callers";
    Random rng(3);
    Network n, base;
    n.hidden = {24, 24};
    n.residual = n.skip = true;
    base.base = Conditional::mixture;
    base.hidden = {33};
    base.components = 3;
    const FlowSpec spec = flow(6, 2, {linear(6, rng), network(6, 2, n, rng), norm(6, Norm::of_batch, rng), network(6, 2, base, rng)}, rng);
    const Reals parameters = random_parameters(spec, rng);
    const auto x = narrowed<float>(normals(6 * 300, rng)), context = narrowed<float>(normals(2 * 300, rng));
    const auto g = narrowed<float>(normals(300, rng));
    const auto expected = all_results(*make_weights<float>(spec, parameters), x, context, g);
    const auto packed = make_weights<float>(spec, parameters);
    std::vector<std::thread> threads;
    std::vector<int> equal(6, 0);
    for (size_t t = 0; t < equal.size(); ++t)
        threads.emplace_back([&, t] {
            bool same = true;
            for (int repeat = 0; repeat < 5; ++repeat) same = same && all_results(*packed, x, context, g) == expected;
            equal[t] = same;
        });
    for (auto& thread : threads) thread.join();
    for (int same : equal) CHECK(same == 1);
}

// A call keeps the instruction set and the number of threads that it began with.
void settings_change() {
    what_runs = "settings";
    Random rng(6);
    Network n;
    n.hidden = {24, 24};
    const FlowSpec spec = flow(6, 2, {network(6, 2, n, rng), network(6, 2, n, rng)}, rng);
    const auto packed = make_weights<float>(spec, random_parameters(spec, rng));
    const auto x = narrowed<float>(normals(6 * 100, rng)), context = narrowed<float>(normals(2 * 100, rng));
    auto densities = [&] {
        std::vector<float> out(100);
        log_prob<float>(*packed, batch_of(*packed, x, context, 100), out.data(), {});
        return out;
    };
    const std::string before = isa();
    std::vector<std::vector<float>> allowed;
    for (const std::string& isa : available_isas()) {
        set_isa(isa);
        allowed.push_back(densities());
    }
    std::atomic<bool> done{false};
    std::thread changing([&] {
        while (!done)
            for (const std::string& isa : available_isas()) {
                set_isa(isa);
                set_num_threads(1 + int(isa.size() % 4));
            }
    });
    bool known = true;
    for (int repeat = 0; repeat < 200; ++repeat) known = known && std::count(allowed.begin(), allowed.end(), densities());
    done = true;
    changing.join();
    CHECK(known);
    set_isa(before);
    set_num_threads(2);
}

// Which flows the path of a single row runs.
void row_paths() {
    std::map<std::string, bool> runs;
    for (const Case& one : cases()) runs[one.name] = Plan(one.spec).row_path();
    for (const char* name : {"narrow", "bounds", "Linears around networks", "a Linear in front of a network with bounds", "wide Linears",
                             "Linears of one variable", "a Linear alone"}) {
        what_runs = name;
        CHECK(runs.at(name));
    }
    for (const char* name : {"ties", "residual with Linear and norm of the batch", "bernoulli", "wide residual"}) {
        what_runs = name;
        CHECK(!runs.at(name));
    }
}

// A row alone whose weights are enough for several threads.
void crew() {
    Random rng(5);
    Network n;
    n.hidden = {301, 299};
    constexpr int features = 70;
    std::vector<StageSpec> stages(1, linear(features, rng));
    for (int k = 0; k < 5; ++k) stages.push_back(network(features, 2, n, rng));
    stages.insert(stages.begin() + 3, linear(features, rng));
    const FlowSpec spec = flow(features, 2, stages, rng);
    const Reals parameters = random_parameters(spec, rng), x = normals(features * 5, rng), context = normals(2 * 5, rng);
    for (const std::string& isa : available_isas()) {
        what_runs = "crew, " + isa;
        set_isa(isa);
        set_num_threads(1);
        const auto packed = make_weights<double>(spec, parameters);
        Reals expected(5);
        log_prob<double>(*packed, batch_of(*packed, x, context, 5), expected.data(), {});
        auto each_alone = [&] {
            bool same = true;
            for (size_t i = 0; i < 5; ++i) {
                double value = 0;
                log_prob<double>(*packed,
                                 batch_of(*packed, Reals(x.begin() + features * long(i), x.end()),
                                          Reals(context.begin() + 2 * long(i), context.end()), 1),
                                 &value, {});
                same = same && value == expected[i];
            }
            return same;
        };
        for (int threads : {1, 2, 3, 7}) {
            set_num_threads(threads);
            set_poison(true);
            for (int repeat = 0; repeat < 20; ++repeat) CHECK(each_alone());
            set_poison(false);
        }
        std::vector<std::thread> callers;
        std::vector<int> equal(4, 0);
        for (size_t t = 0; t < equal.size(); ++t) callers.emplace_back([&, t] { equal[t] = each_alone() && each_alone(); });
        for (auto& caller : callers) caller.join();
        for (int same : equal) CHECK(same == 1);
    }
}

void after_fork() {
    what_runs = "fork";
    Random rng(4);
    Network n;
    n.hidden = {20};
    const FlowSpec spec = flow(5, 0, {network(5, 0, n, rng), network(5, 0, n, rng)}, rng);
    const auto packed = make_weights<double>(spec, random_parameters(spec, rng));
    const Reals none;
    const auto expected = draw(*packed, none, 1, 300);
    const pid_t child = fork();
    if (child == 0) _exit(draw(*packed, none, 1, 300) == expected ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void errors() {
    int caught = 0;
    try {
        set_num_threads(0);
    } catch (const std::invalid_argument&) { ++caught; }
    try {
        set_isa("sse9");
    } catch (const std::invalid_argument&) { ++caught; }
    try {
        parallel_for(2, 100, [](int64_t task) {
            if (task == 57) throw std::runtime_error("57");
        });
    } catch (const std::runtime_error& error) { caught += std::string(error.what()) == "57"; }
    CHECK(caught == 3);
}

}  // namespace

// "few": of every kind, but fewer sizes, and no fork, which emulators do not survive.
int main(int argc, char** argv) {
    const bool few = argc > 1 && std::string(argv[1]) == "few";
    for (const Case& one : cases()) {
        tapes<float>(one);
        tapes<double>(one);
    }
    for (const Case& one : cases())
        for (size_t n : few ? std::vector<size_t>{37} : std::vector<size_t>{1, 2, 37, 131}) {
            operations<float>(one, n, n == 37);
            operations<double>(one, n, n == 37);
        }
    set_num_threads(2);
#ifdef FASTMAF_WARPS
    for (const Case& one : cases()) {
        warps_of<float>(one);
        warps_of<double>(one);
    }
    warps_read<uint16_t>(DType::f16);
    warps_read<float>(DType::f32);
    warps_read<double>(DType::f64);
    warps_read<int8_t>(DType::i8);
    warps_read<int16_t>(DType::i16);
    warps_read<int32_t>(DType::i32);
    warps_read<int64_t>(DType::i64);
    warps_read<uint8_t>(DType::u8);
    warps_read<uint16_t>(DType::u16);
    warps_read<uint32_t>(DType::u32);
    warps_read<uint64_t>(DType::u64);
    warps_read<uint8_t>(DType::boolean);
#endif
    impossible();
    large();
    set_num_threads(2);
    many_callers();
    settings_change();
    row_paths();
    crew();
    set_num_threads(2);
    if (!few) after_fork();
    for (const Course& course : courses()) {
        gradients_of_training(course);
        const auto& stages = course.members[0].stages;
        if (std::none_of(stages.begin(), stages.end(), [](const StageSpec& stage) { return stage.of_batch; })) together(course);
        std::map<std::string, std::vector<float>> of;
        for (const std::string& isa : available_isas()) {
            const auto expected = train<float>(course, 1, isa);
            for (int threads : {2, 3}) CHECK(train<float>(course, threads, isa) == expected);
            of[isa] = expected;
        }
        if (of.count("avx2") && of.count("avx512")) CHECK(of["avx2"] == of["avx512"]);
        const auto expected = train<double>(course, 1, isa());
        CHECK(train<double>(course, 3, isa()) == expected);
    }
    errors();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
