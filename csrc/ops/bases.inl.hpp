// Bases: the conditional density of a variable x given the final rows of a MADE, its draw, and the gradient of its logarithm.
//
//     mixture      rows: M logits l, M means m, M raw log-scales;  log sum_c w_c N(x; m_c, e^a_c), w = softmax(l)
//     bernoulli    row: logit l of x = 1;                          -log(1 + e^(-l)) at 1, -log(1 + e^l) at 0
//     categorical  rows: K logits l;                               l_x - log sum e^l
//
// Each variable has its own: a mixture where it may have any number, else a bernoulli where it has a lone row.
// Sums of exponentials are taken relative to the largest term. With u uniform, a value or component c is the first whose
// cumulative probability exceeds u. The normal's log(2 pi) / 2 is left to the flow's constant.
#pragma once

#include "laws.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T, class F>
FASTMAF_INLINE Vec<T> highest_of(int n, F term) {
    Vec<T> highest = term(0);
    for (int c = 1; c < n; ++c) {
        const Vec<T> t = term(c);
        highest = t > highest ? t : highest;
    }
    return highest;
}

// log sum_c e^term(c), c < n.
template <class T, class F>
FASTMAF_INLINE Vec<T> log_sum_exp(int n, F term) {
    const Vec<T> highest = highest_of<T>(n, term);
    const Vec<T> never = splat<T>(-T(__builtin_inf()));
    Vec<T> sum{};
    for (int c = 0; c < n; ++c) sum += exp<T>(term(c) - highest);
    return highest == never ? never : highest + log<T>(sum);
}

// The rows of the s-th variable, `lanes` apart.
template <class T>
struct Conditional {
    const StageView<T>& stage;
    const T* rows;
    int count;
    bool continuous;

    FASTMAF_MEMBER Conditional(const StageView<T>& stage, int s, const T* rows)
        : stage(stage), rows(rows), count(stage.first[s + 1] - stage.first[s]), continuous(stage.values[s] == 0) {}
    FASTMAF_MEMBER bool bernoulli() const { return count == 1; }

    FASTMAF_MEMBER Vec<T> row(int r) const { return at(rows + r * lanes_of<T>()); }
    FASTMAF_MEMBER Vec<T> mean(int c) const { return row(stage.components + c); }
    FASTMAF_MEMBER Vec<T> scale(int c) const { return log_scale<T>(stage, row(2 * stage.components + c)); }
    // log of w_c N(x; m_c, e^a_c), up to the logarithm of sum e^(l - highest): the logits may be so large that nothing can be added to them.
    FASTMAF_MEMBER Vec<T> term(Vec<T> x, int c, Vec<T> highest) const {
        const Vec<T> a = scale(c), z = (x - mean(c)) * scale_of<T>(-a);
        return (row(c) - highest) - a - T(0.5) * z * z;
    }
};

template <class T>
FASTMAF_FN Vec<T> conditional_log_prob(const Conditional<T>& p, Vec<T> x) {
    const Vec<T> never = splat<T>(-T(__builtin_inf()));
    if (p.continuous) {
        const int n = p.stage.components;
        const Vec<T> highest = highest_of<T>(n, [&](int c) { return p.row(c); });
        return log_sum_exp<T>(n, [&](int c) { return p.term(x, c, highest); }) -
               log_sum_exp<T>(n, [&](int c) { return p.row(c) - highest; });
    }
    if (p.bernoulli()) {
        const Vec<T> value = -softplus<T>(x == 1 ? -p.row(0) : p.row(0));
        return x == 0 ? value : x == 1 ? value : x == x ? never : x;
    }
    Vec<T> chosen = x == x ? never : x;
    for (int c = 0; c < p.count; ++c) chosen = x == T(c) ? p.row(c) : chosen;
    return chosen - log_sum_exp<T>(p.count, [&](int c) { return p.row(c); });
}

// Probability of value c of a discrete variable, of a bernoulli that of 1; `all`: log_total.
template <class T>
FASTMAF_INLINE Vec<T> log_total(const Conditional<T>& p) {
    return log_sum_exp<T>(p.count, [&](int c) { return p.row(c); });
}
template <class T>
FASTMAF_INLINE Vec<T> probability(const Conditional<T>& p, Vec<T> all, int c) {
    return p.bernoulli() ? sigmoid<T>(p.row(0)) : exp<T>(p.row(c) - all);
}

// The first c < n whose cumulative weight exceeds u times that of all, which are summed in the same order: nothing of weight zero is drawn.
template <class T>
FASTMAF_INLINE Vec<T> draw_index(const Conditional<T>& p, int n, Vec<T> u) {
    Vec<T> highest = p.row(0), total{}, sum{}, index{};
    for (int c = 1; c < n; ++c) highest = p.row(c) > highest ? p.row(c) : highest;
    for (int c = 0; c < n; ++c) total += exp<T>(p.row(c) - highest);
    const Vec<T> threshold = u * total;
    for (int c = 0; c + 1 < n; ++c) {
        sum += exp<T>(p.row(c) - highest);
        index += sum <= threshold ? splat<T>(1) : Vec<T>{};
    }
    return total == total ? index : total;
}

template <class T>
FASTMAF_FN Vec<T> conditional_draw(const Conditional<T>& p, Vec<T> noise, Vec<T> u) {
    if (p.bernoulli()) {
        const Vec<T> zero = sigmoid<T>(-p.row(0));
        return zero == zero ? (zero <= u ? splat<T>(1) : Vec<T>{}) : zero;
    }
    if (!p.continuous) return draw_index<T>(p, p.count, u);
    const int n = p.stage.components;
    const Vec<T> index = draw_index<T>(p, n, u);
    Vec<T> mean = index == index ? p.mean(0) : index, raw = p.row(2 * n);
    for (int c = 1; c < n; ++c) {
        mean = index == T(c) ? p.mean(c) : mean;
        raw = index == T(c) ? p.row(2 * n + c) : raw;
    }
    return fma(noise, scale_of<T>(log_scale<T>(p.stage, raw)), mean);
}

// e^x of a negative logarithm, and zero where a product with it might be subnormal, which is slow.
template <class T>
FASTMAF_INLINE Vec<T> share_of(Vec<T> x) {
    return x < Constants<T>::exp_low + 40 ? Vec<T>{} : exp<T>(x);
}

// e^term(c) / sum_c e^term(c), c < n. Not from log_sum_exp: beside a large term the logarithm of the sum would be lost.
template <class T>
struct Shares {
    Vec<T> highest, inverse;

    template <class F>
    FASTMAF_MEMBER Shares(int n, F term) : highest(highest_of<T>(n, term)), inverse{} {
        for (int c = 0; c < n; ++c) inverse += share_of<T>(term(c) - highest);
        inverse = 1 / inverse;
    }
    FASTMAF_MEMBER Vec<T> operator()(Vec<T> term) const { return share_of<T>(term - highest) * inverse; }
};

// Writes g d log p / d row to the rows of `delta`, and returns g d log p / dx (0 for discrete values); zeros where g is zero.
template <class T>
FASTMAF_FN Vec<T> conditional_gradient(const Conditional<T>& p, Vec<T> x, Vec<T> g, T* delta) {
    constexpr int lanes = lanes_of<T>();
    if (p.bernoulli()) {
        at(delta) = g * ((x == 1 ? splat<T>(1) : Vec<T>{}) - sigmoid<T>(p.row(0)));
        return Vec<T>{};
    }
    if (!p.continuous) {
        const Shares<T> shares(p.count, [&](int c) { return p.row(c); });
        for (int c = 0; c < p.count; ++c) at(delta + c * lanes) = g * ((x == T(c) ? splat<T>(1) : Vec<T>{}) - shares(p.row(c)));
        return Vec<T>{};
    }
    const int n = p.stage.components;
    const Vec<T> highest = highest_of<T>(n, [&](int c) { return p.row(c); });
    const Shares<T> prior(n, [&](int c) { return p.row(c); }), posterior(n, [&](int c) { return p.term(x, c, highest); });
    Vec<T> dx{};
    for (int c = 0; c < n; ++c) {
        const Vec<T> a = p.scale(c), inverse = scale_of<T>(-a), z = (x - p.mean(c)) * inverse;
        // A component far away has no share; its slopes may not be finite.
        const Vec<T> share = g * posterior(p.term(x, c, highest));
        const Vec<T> pull = share == 0 ? share : share * z * inverse;
        at(delta + c * lanes) = g == 0 ? g : share - g * prior(p.row(c));
        at(delta + (n + c) * lanes) = pull;
        at(delta + (2 * n + c) * lanes) =
            share == 0 ? share : share * fma(z, z, splat<T>(-1)) * log_scale_slope<T>(p.stage, p.row(2 * n + c));
        dx -= pull;
    }
    return dx;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
