#if defined(FP_FAST_FMA@BIG@)
#define MADD(a, b, c) fma@(a, b, c)
#else
#define MADD(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__GNUC__) || defined(_MSC_VER)
#define RESTRICT __restrict
#elif defined(__cplusplus)
#define RESTRICT
#else
#define RESTRICT restrict
#endif
#define K(x) ((real)(x))
/* Clang would undo short loops, rather than make vectors of them. */
#if defined(__clang__)
#define EACH_ROW _Pragma("clang loop unroll(disable)") for (r = 0; r < ROWS; ++r)
#else
#define EACH_ROW for (r = 0; r < ROWS; ++r)
#endif

/* Weights: of `width` neighbouring rows, the inputs [begin, begin + count), input by input. Units are sorted by degree, so that these
   are all that the rows read, and nothing masked is stored. */
struct panel { int width, row, begin, count; long weights; };
/* A column of data: kind 1 above lower, 2 below upper, 3 between both, 0 free. */
struct column { int kind; double lower, upper, loc, scale; real low, high; };

/* e^x and log x from IEEE operations, so that compilers make vectors of rows of them. NaN stays NaN. */
//network
static real exp_of(real x) {
    real t = x < EXP_LOW ? EXP_LOW : x, shifted, n, r, q, scale;
    word bits;
    t = t > EXP_HIGH ? EXP_HIGH : t;
    shifted = MADD(t, K(1.4426950408889634), SHIFTER);
    n = shifted - SHIFTER;
    r = MADD(n, -LN2_HIGH, t);
    r = MADD(n, -LN2_LOW, r);
    q = MADD(EXP_POLY(r), r * r, r);
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + BIAS) << MANTISSA;
    memcpy(&scale, &bits, sizeof bits);
    return MADD(scale, q, scale);
}
/* The same, infinite or zero beyond the normal numbers. */
static real scale_of(real x) {
    const real e = exp_of(x);
    return x > EXP_HIGH ? K(INFINITY) : x < EXP_LOW ? K(0) : e;
}
//end
/* Of positive normal numbers. */
static real log_of(real x) {
    const real one = 1, half_root = K(0.70710678118654752), shifter = SHIFTER;
    real m, n, f, s, s2;
    word bits, unit, half, shift, exponent;
    memcpy(&bits, &x, sizeof bits);
    memcpy(&unit, &one, sizeof unit);
    memcpy(&half, &half_root, sizeof half);
    memcpy(&shift, &shifter, sizeof shift);
    bits += unit - half;
    exponent = (bits >> MANTISSA) + shift;
    memcpy(&n, &exponent, sizeof n);
    n -= SHIFTER + K(BIAS);
    bits = (bits & (((word)1 << MANTISSA) - 1)) + half;
    memcpy(&m, &bits, sizeof m);
    f = m - 1;
    s = f / (m + 1);
    s2 = s * s;
    return MADD(n, LN2_HIGH, MADD(n, LN2_LOW, f - s * (f - s2 * LOG_POLY(s2))));
}

/* What a block of rows needs; rows are the last index. z: variables, u: contexts, variables as a network reads them, hidden units. */
struct room {
    double log_det[ROWS];
    int state[ROWS]; /* 1: without meaning, NaN; 2: density zero */
    real z[FEATURES * ROWS];
    real u[UNITS * ROWS];
#if KEEPS
    real raw[UNITS * ROWS]; /* sums of units before their activation */
#endif
    real p[OUTPUTS * ROWS]; /* the last rows of a network, of one rank */
};
//net
static void panel_4(const real *RESTRICT w, const real *RESTRICT in, int n, real *RESTRICT a) {
    real *RESTRICT b = a + ROWS, *RESTRICT c = b + ROWS, *RESTRICT d = c + ROWS;
    int k = 0, r;
    for (; k + 4 <= n; k += 4, w += 16, in += 4 * ROWS)
        EACH_ROW {
            const real x = in[r], y = in[ROWS + r], s = in[2 * ROWS + r], t = in[3 * ROWS + r];
            a[r] = MADD(w[12], t, MADD(w[8], s, MADD(w[4], y, MADD(w[0], x, a[r]))));
            b[r] = MADD(w[13], t, MADD(w[9], s, MADD(w[5], y, MADD(w[1], x, b[r]))));
            c[r] = MADD(w[14], t, MADD(w[10], s, MADD(w[6], y, MADD(w[2], x, c[r]))));
            d[r] = MADD(w[15], t, MADD(w[11], s, MADD(w[7], y, MADD(w[3], x, d[r]))));
        }
    for (; k < n; ++k, w += 4, in += ROWS)
        EACH_ROW {
            const real x = in[r];
            a[r] = MADD(w[0], x, a[r]);
            b[r] = MADD(w[1], x, b[r]);
            c[r] = MADD(w[2], x, c[r]);
            d[r] = MADD(w[3], x, d[r]);
        }
}
static void panel_2(const real *RESTRICT w, const real *RESTRICT in, int n, real *RESTRICT a) {
    real *RESTRICT b = a + ROWS;
    int k = 0, r;
    for (; k + 4 <= n; k += 4, w += 8, in += 4 * ROWS)
        EACH_ROW {
            const real x = in[r], y = in[ROWS + r], s = in[2 * ROWS + r], t = in[3 * ROWS + r];
            a[r] = MADD(w[6], t, MADD(w[4], s, MADD(w[2], y, MADD(w[0], x, a[r]))));
            b[r] = MADD(w[7], t, MADD(w[5], s, MADD(w[3], y, MADD(w[1], x, b[r]))));
        }
    for (; k < n; ++k, w += 2, in += ROWS)
        EACH_ROW {
            a[r] = MADD(w[0], in[r], a[r]);
            b[r] = MADD(w[1], in[r], b[r]);
        }
}
static void panel_1(const real *RESTRICT w, const real *RESTRICT in, int n, real *RESTRICT a) {
    int k = 0, r;
    for (; k + 4 <= n; k += 4, w += 4, in += 4 * ROWS)
        EACH_ROW
            a[r] = MADD(w[3], in[3 * ROWS + r], MADD(w[2], in[2 * ROWS + r], MADD(w[1], in[ROWS + r], MADD(w[0], in[r], a[r]))));
    for (; k < n; ++k, ++w, in += ROWS)
        EACH_ROW a[r] = MADD(w[0], in[r], a[r]);
}
/* out += W in, for the panels [p, end). */
static void multiply(const struct panel *p, const struct panel *end, const real *weights, const real *in, real *out) {
    for (; p < end; ++p) {
        const real *w = weights + p->weights, *from = in + p->begin * ROWS;
        if (p->width == 4) panel_4(w, from, p->count, out + p->row * ROWS);
        else if (p->width == 2) panel_2(w, from, p->count, out + p->row * ROWS);
        else panel_1(w, from, p->count, out + p->row * ROWS);
    }
}
//end
//net gradient
static void back_4(const real *RESTRICT w, const real *RESTRICT a, int n, real *RESTRICT to) {
    const real *b = a + ROWS, *c = b + ROWS, *d = c + ROWS;
    int k = 0, r;
    for (; k + 4 <= n; k += 4, w += 16, to += 4 * ROWS)
        EACH_ROW {
            const real x = a[r], y = b[r], s = c[r], t = d[r];
            to[r] = MADD(w[3], t, MADD(w[2], s, MADD(w[1], y, MADD(w[0], x, to[r]))));
            to[ROWS + r] = MADD(w[7], t, MADD(w[6], s, MADD(w[5], y, MADD(w[4], x, to[ROWS + r]))));
            to[2 * ROWS + r] = MADD(w[11], t, MADD(w[10], s, MADD(w[9], y, MADD(w[8], x, to[2 * ROWS + r]))));
            to[3 * ROWS + r] = MADD(w[15], t, MADD(w[14], s, MADD(w[13], y, MADD(w[12], x, to[3 * ROWS + r]))));
        }
    for (; k < n; ++k, w += 4, to += ROWS)
        EACH_ROW to[r] = MADD(w[3], d[r], MADD(w[2], c[r], MADD(w[1], b[r], MADD(w[0], a[r], to[r]))));
}
static void back_2(const real *RESTRICT w, const real *RESTRICT a, int n, real *RESTRICT to) {
    const real *b = a + ROWS;
    int k = 0, r;
    for (; k + 2 <= n; k += 2, w += 4, to += 2 * ROWS)
        EACH_ROW {
            const real x = a[r], y = b[r];
            to[r] = MADD(w[1], y, MADD(w[0], x, to[r]));
            to[ROWS + r] = MADD(w[3], y, MADD(w[2], x, to[ROWS + r]));
        }
    for (; k < n; ++k, w += 2, to += ROWS)
        EACH_ROW to[r] = MADD(w[1], b[r], MADD(w[0], a[r], to[r]));
}
static void back_1(const real *RESTRICT w, const real *RESTRICT a, int n, real *RESTRICT to) {
    int k, r;
    for (k = 0; k < n; ++k, ++w, to += ROWS)
        EACH_ROW to[r] = MADD(w[0], a[r], to[r]);
}
/* in += W^T out, for the panels [p, end). */
static void multiply_back(const struct panel *p, const struct panel *end, const real *weights, const real *out, real *in) {
    for (; p < end; ++p) {
        const real *w = weights + p->weights, *from = out + p->row * ROWS;
        if (p->width == 4) back_4(w, from, p->count, in + p->begin * ROWS);
        else if (p->width == 2) back_2(w, from, p->count, in + p->begin * ROWS);
        else back_1(w, from, p->count, in + p->begin * ROWS);
    }
}
//end
//net
static void set_bias(const real *bias, int rows, real *out) {
    int i, r;
    for (i = 0; i < rows; ++i)
        EACH_ROW out[i * ROWS + r] = bias[i];
}
//end
//network
/* A map of a network: panels and rows by the step at which all that they read is known. */
struct map {
    const struct panel *panels;
    const int *starts, *rows; /* step g: panels [starts[g], starts[g + 1]), rows [rows[g], rows[g + 1]) */
    long bias;
    int in, out; /* where in the units */
    int activated, adds, keep;
};
/* kind 0: x -> z by a shift and a log-scale; 1: a base, whose variables are mixtures where they may have any number, bernoulli ones where
   they have a lone row, and else categorical. affine: z = x e^a + m, else (x - m) e^-a. */
struct net {
    const real *weights;
    const struct map *maps; /* hidden ones, the final one, what the final rows read of the inputs */
    const int *group, *slot, *first; /* variables of step g; where a variable lies; its first final row */
    int hidden, direct, groups, units, activation, kind, components, affine, soft;
    real clip, input_clip;
};

static void activate(int kind, real *u, int n) {
    int i;
    if (kind == 0)
        for (i = 0; i < n; ++i) u[i] = u[i] < 0 ? K(0) : u[i];
    else if (kind == 1)
        for (i = 0; i < n; ++i) u[i] = tanh@(u[i]);
    else if (kind == 2)
        for (i = 0; i < n; ++i) u[i] = u[i] > 0 ? u[i] : expm1@(u[i]);
    else if (kind == 3)
        for (i = 0; i < n; ++i) u[i] *= K(0.5) * erfc@(K(-0.70710678118654752) * u[i]);
    else
        for (i = 0; i < n; ++i) u[i] /= 1 + exp_of(-u[i]);
}
/* What the maps read of the variables [begin, end). */
static void read_variables(const struct net *s, struct room *m, int begin, int end) {
    int v, r;
    for (v = begin; v < end; ++v) {
        const real *z = m->z + s->slot[v] * ROWS;
        real *to = m->u + (CONTEXT + v) * ROWS;
        EACH_ROW {
            const real x = z[r] < -s->input_clip ? -s->input_clip : z[r];
            to[r] = x > s->input_clip ? s->input_clip : x;
        }
    }
}
/* Everything that becomes known at step g: hidden units, and the final rows of its variables. */
static void step(const struct net *s, struct room *m, int g) {
    int l, i;
    for (l = 0; l <= s->hidden; ++l) {
        const struct map *a = s->maps + l;
        const int first = a->rows[g], rows = a->rows[g + 1] - first, last = l == s->hidden;
        real *out = last ? m->p - first * ROWS : m->u + a->out * ROWS, *own = out + first * ROWS;
        set_bias(s->weights + a->bias + first, rows, own);
        multiply(a->panels + a->starts[g], a->panels + a->starts[g + 1], s->weights, m->u + a->in * ROWS, out);
        if (last) {
            if (s->direct) multiply(a[1].panels + a[1].starts[g], a[1].panels + a[1].starts[g + 1], s->weights, m->u, out);
            continue;
        }
#if KEEPS
        if (a->adds >= 0) {
            const struct map *b = s->maps + a->adds;
            const real *from = (b->keep ? m->raw : m->u) + (b->out + first) * ROWS;
            for (i = 0; i < rows * ROWS; ++i) own[i] += from[i];
        }
        if (a->keep) memcpy(m->raw + (a->out + first) * ROWS, own, (size_t)(rows * ROWS) * sizeof(real));
#else
        (void)i;
#endif
        if (a->activated) activate(s->activation, own, rows * ROWS);
    }
}
static real log_scale(const struct net *s, real r) { return s->soft ? r / MADD(fabs@(r), 1 / s->clip, K(1)) : r; }
//end
//transform
static void to_noise(const struct net *s, struct room *m, int g) {
    int v, r;
    for (v = s->group[g]; v < s->group[g + 1]; ++v) {
        real *z = m->z + s->slot[v] * ROWS;
        const real *p = m->p + 2 * (v - s->group[g]) * ROWS;
        if (s->affine)
            EACH_ROW {
                const real a = log_scale(s, p[ROWS + r]);
                z[r] = MADD(z[r], scale_of(a), p[r]);
                m->log_det[r] += a;
            }
        else
            EACH_ROW {
                const real a = log_scale(s, p[ROWS + r]);
                z[r] = (z[r] - p[r]) * scale_of(-a);
                m->log_det[r] -= a;
            }
    }
}
static void to_data(const struct net *s, struct room *m, int g) {
    int v, r;
    for (v = s->group[g]; v < s->group[g + 1]; ++v) {
        real *z = m->z + s->slot[v] * ROWS;
        const real *p = m->p + 2 * (v - s->group[g]) * ROWS;
        if (s->affine)
            EACH_ROW z[r] = (z[r] - p[r]) * scale_of(-log_scale(s, p[ROWS + r]));
        else
            EACH_ROW z[r] = MADD(z[r], scale_of(log_scale(s, p[ROWS + r])), p[r]);
    }
}
//end
//base
/* log sum e^t over n terms. */
static real log_sum_exp(const real *t, int n) {
    real highest = t[0], sum = 0;
    int c;
    for (c = 1; c < n; ++c) highest = t[c] > highest ? t[c] : highest;
    if (highest == -INFINITY) return highest;
    for (c = 0; c < n; ++c) sum += exp_of(t[c] - highest);
    return highest + log_of(sum);
}
/* Of a mixture: log of w N(x; m, e^a) for each component, up to the logarithm of the sum of weights; l: its logits. */
static void terms_of(const struct net *s, const real *p, int r, real x, real *t, real *l) {
    const int n = s->components;
    int c;
    for (c = 0; c < n; ++c) {
        const real a = log_scale(s, p[(2 * n + c) * ROWS + r]), z = (x - p[(n + c) * ROWS + r]) * scale_of(-a);
        l[c] = p[c * ROWS + r];
        t[c] = l[c] - a - K(0.5) * z * z;
    }
}
static void base_log_prob(const struct net *s, struct room *m, int g) {
    real t[TERMS], l[TERMS];
    int v, r, c;
    for (v = s->group[g]; v < s->group[g + 1]; ++v) {
        const real *x = m->z + s->slot[v] * ROWS, *p = m->p + (s->first[v] - s->first[s->group[g]]) * ROWS;
        const int n = s->first[v + 1] - s->first[v];
        EACH_ROW {
            if (!VALUES(s->slot[v])) {
                terms_of(s, p, r, x[r], t, l);
                m->log_det[r] += log_sum_exp(t, s->components) - log_sum_exp(l, s->components);
            } else if (n == 1) {
                const real q = x[r] == 0 ? p[r] : -p[r];
                m->log_det[r] -= (q > 0 ? q : K(0)) + log1p@(exp_of(-fabs@(q)));
            } else {
                for (c = 0; c < n; ++c) l[c] = p[c * ROWS + r];
                m->log_det[r] += (x[r] == x[r] ? l[(int)x[r]] : x[r]) - log_sum_exp(l, n);
            }
        }
    }
}
static void base_draw(const struct net *s, struct room *m, int g, const real *uniforms) {
    int v, r, c;
    for (v = s->group[g]; v < s->group[g + 1]; ++v) {
        real *x = m->z + s->slot[v] * ROWS;
        const real *u = uniforms + s->slot[v] * ROWS, *p = m->p + (s->first[v] - s->first[s->group[g]]) * ROWS;
        const int any = !VALUES(s->slot[v]), n = any ? s->components : s->first[v + 1] - s->first[v];
        EACH_ROW {
            real highest = p[r], total = 0, sum = 0;
            int index = 0;
            if (!any && n == 1) {
                const real zero = 1 / (1 + exp_of(p[r]));
                x[r] = zero != zero ? zero : zero <= u[r] ? K(1) : K(0);
                continue;
            }
            for (c = 1; c < n; ++c) highest = p[c * ROWS + r] > highest ? p[c * ROWS + r] : highest;
            for (c = 0; c < n; ++c) total += exp_of(p[c * ROWS + r] - highest);
            for (c = 0; c + 1 < n; ++c) {
                sum += exp_of(p[c * ROWS + r] - highest);
                index += sum <= u[r] * total;
            }
            if (total != total) x[r] = total;
            else if (any) x[r] = MADD(x[r], scale_of(log_scale(s, p[(2 * n + index) * ROWS + r])), p[(n + index) * ROWS + r]);
            else x[r] = K(index);
        }
    }
}
//end
//network
static void density(const struct net *s, struct room *m) {
    int g;
    read_variables(s, m, 0, FEATURES);
    for (g = 0; g < s->groups; ++g) {
        step(s, m, g);
        LAW(to_noise(s, m, g), base_log_prob(s, m, g));
    }
}
/* From noise to data, one rank after the other: every weight is used once. */
static void sampler(const struct net *s, struct room *m, const real *uniforms) {
    int g;
    (void)uniforms;
    for (g = 0; g < s->groups; ++g) {
        step(s, m, g);
        LAW(to_data(s, m, g), base_draw(s, m, g, uniforms));
        read_variables(s, m, s->group[g], s->group[g + 1]);
    }
}
//end
//affine
/* z = (z - loc) scale + shift, and back. */
static void affine(const real *a, real *z) {
    int v, r;
    for (v = 0; v < FEATURES; ++v)
        EACH_ROW z[v * ROWS + r] = (z[v * ROWS + r] - a[v]) * a[FEATURES + v] + a[2 * FEATURES + v];
}
static void affine_back(const real *a, real *z) {
    int v, r;
    for (v = 0; v < FEATURES; ++v)
        EACH_ROW z[v * ROWS + r] = (z[v * ROWS + r] - a[2 * FEATURES + v]) / a[FEATURES + v] + a[v];
}
//end
//affine gradient
static void affine_gradient(const real *a, real *dz) {
    int v, r;
    for (v = 0; v < FEATURES; ++v)
        EACH_ROW dz[v * ROWS + r] *= a[FEATURES + v];
}
//end
//linear
/* Two triangular maps, one after the other. */
struct linear { const real *weights; const struct panel *panels; const int *slot; int count[2]; long bias[2]; };
static void linear(const struct linear *s, real *z) {
    real a[FEATURES * ROWS], b[FEATURES * ROWS];
    int v;
    for (v = 0; v < FEATURES; ++v) memcpy(a + v * ROWS, z + s->slot[v] * ROWS, ROWS * sizeof(real));
    set_bias(s->weights + s->bias[0], FEATURES, b);
    multiply(s->panels, s->panels + s->count[0], s->weights, a, b);
    set_bias(s->weights + s->bias[1], FEATURES, a);
    multiply(s->panels + s->count[0], s->panels + s->count[0] + s->count[1], s->weights, b, a);
    for (v = 0; v < FEATURES; ++v) memcpy(z + s->slot[v] * ROWS, a + v * ROWS, ROWS * sizeof(real));
}
//end
//linear gradient
static void linear_gradient(const struct linear *s, real *dz) {
    real a[FEATURES * ROWS], b[FEATURES * ROWS];
    int v;
    for (v = 0; v < FEATURES; ++v) memcpy(a + v * ROWS, dz + s->slot[v] * ROWS, ROWS * sizeof(real));
    memset(b, 0, sizeof b);
    multiply_back(s->panels + s->count[0], s->panels + s->count[0] + s->count[1], s->weights, a, b);
    memset(a, 0, sizeof a);
    multiply_back(s->panels, s->panels + s->count[0], s->weights, b, a);
    for (v = 0; v < FEATURES; ++v) memcpy(dz + s->slot[v] * ROWS, a + v * ROWS, ROWS * sizeof(real));
}
//end

/* A column to the real line, in double whatever the type of the rest; returns log|dz/dx|, -inf at or outside a bound. */
static double to_line(const struct column *c, double x, double *z) {
    const double below = c->kind & 1 ? x - c->lower : 1, above = c->kind & 2 ? c->upper - x : 1;
    double slope = 0;
    *z = x;
    if (c->kind) {
        if (below <= 0 || above <= 0 || below == INFINITY || above == INFINITY) {
            *z = 0;
            return -INFINITY;
        }
        *z = log(below) - log(above);
        slope = (c->kind == 3 ? log(c->upper - c->lower) : 0) - log(below) - log(above);
    }
    *z = (*z - c->loc) * c->scale;
    return slope;
}
static real from_line(const struct column *c, double z) {
    double x = z / c->scale + c->loc;
    real y;
    if (c->kind == 3) {
        const double tail = exp(-fabs(x)), part = (c->upper - c->lower) * (tail / (1 + tail));
        x = x < 0 ? c->lower + part : x == x ? c->upper - part : x;
    } else if (c->kind == 1) x = c->lower + exp(x);
    else if (c->kind == 2) x = c->upper - exp(-x);
    y = (real)x;
    y = y < c->low ? c->low : y;
    return y > c->high ? c->high : y;
}
/* Rows of the data, and of the contexts; lanes behind the last row repeat it. */
static void load_rows(struct room *m, int rows, const real *x) {
    int v, r;
    EACH_ROW {
        const real *row = x + (size_t)(r < rows ? r : rows - 1) * FEATURES;
        m->log_det[r] = 0;
        for (v = 0; v < FEATURES; ++v) {
            double z;
            m->log_det[r] += to_line(columns + v, row[v], &z);
            m->z[v * ROWS + r] = (real)z;
            if (row[v] != row[v]) m->state[r] |= 1;
            else if (VALUES(v) && !(row[v] >= 0 && row[v] < VALUES(v) && row[v] == floor@(row[v]))) m->state[r] |= 2;
        }
        if (m->log_det[r] == -INFINITY) m->state[r] |= 2;
        if (m->state[r])
            for (v = 0; v < FEATURES; ++v) m->z[v * ROWS + r] = 0;
    }
}
static void load_context(struct room *m, int rows, const real *context, size_t stride) {
#if CONTEXT
    int v, r;
    EACH_ROW {
        const real *row = context + (size_t)(r < rows ? r : rows - 1) * stride;
        m->state[r] = 0;
        for (v = 0; v < CONTEXT; ++v) {
            double c;
            if (to_line(context_columns + v, row[v], &c) == -INFINITY || row[v] != row[v]) c = NAN;
            m->u[v * ROWS + r] = (real)c;
            if (c != c) m->state[r] |= 1;
        }
    }
#else
    (void)rows;
    (void)context;
    (void)stride;
    memset(m->state, 0, sizeof m->state);
#endif
}
static void finish(const struct room *m, int rows, real *out) {
    int v, r;
    (void)v;
    for (r = 0; r < rows; ++r) {
        double value = m->log_det[r] + CONSTANT;
#if NORMAL
        for (v = 0; v < FEATURES; ++v) value -= 0.5 * (double)m->z[v * ROWS + r] * (double)m->z[v * ROWS + r];
#endif
        out[r] = (real)value;
        if (!(out[r] < INFINITY) || m->state[r]) out[r] = m->state[r] & 1 ? K(NAN) : -K(INFINITY);
    }
}

/* Philox4x32-10 (Salmon et al. 2011): counter = row of the stream, row of the contexts, stream and block of four columns; key = seed. */
static void random_words(const uint64_t *index, const uint32_t *group, uint32_t last, uint64_t seed, uint32_t out[4][ROWS]) {
    int r, round;
    EACH_ROW {
        uint32_t c0 = (uint32_t)index[r], c1 = (uint32_t)(index[r] >> 32), c2 = group[r], c3 = last;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (round = 0; round < 10; ++round) {
            const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)b;
            c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        out[0][r] = c0;
        out[1][r] = c1;
        out[2][r] = c2;
        out[3][r] = c3;
    }
}
/* The normal quantile of p in (0, 1/2], AS241 (Wichura 1988). */
static real quantile(real p) {
    const real q = p - K(0.5);
    real r, s;
    if (q >= K(-0.425)) {
        r = K(0.180625) - q * q;
        return q * QUANTILE_CENTRE(r);
    }
    r = sqrt@(-log_of(p));
    if (r <= 5) {
        s = r - K(1.6);
        return -QUANTILE_MIDDLE(s);
    }
    s = r - 5;
    return -QUANTILE_TAIL(s);
}
/* Noise, column by column to where it belongs. */
static void noise(const uint64_t *index, const uint32_t *group, uint64_t seed, real *z, real *uniforms) {
    uint32_t words[4][ROWS], others[4][ROWS];
    uint32_t block;
    int v, r;
    (void)others;
    (void)uniforms;
    for (block = 0; 4 * block < FEATURES; ++block) {
        random_words(index, group, block, seed, words);
#if DOUBLE
        random_words(index, group, block | 1u << 24, seed, others);
#endif
        for (v = 0; v < 4 && 4 * (int)block + v < FEATURES; ++v)
            EACH_ROW {
                const uint32_t word = words[v][r];
#if DOUBLE
                const double p = ((word >> 1) + (others[v][r] + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10;
#else
                const float p = (float)((double)(float)(int32_t)(word >> 1) * 2.3283064365386963e-10 + 1.1641532182693481e-10);
#endif
                const real y = quantile(p);
                z[noise_slot[4 * (int)block + v] * ROWS + r] = word & 1 ? -y : y;
            }
#if !NORMAL
        random_words(index, group, block | 2u << 24, seed, others);
        for (v = 0; v < 4 && 4 * (int)block + v < FEATURES; ++v)
            EACH_ROW {
                const double u = (others[v][r] + 0.5) * 2.3283064365386963e-10;
                uniforms[noise_slot[4 * (int)block + v] * ROWS + r] = (real)(u < MOST ? u : MOST);
            }
#endif
    }
}
//network gradient
/* d *= act', from the units, or of gelu and silu from the sums in front of them. */
static void times_slope(int kind, const real *u, const real *raw, real *d, int n) {
    int i;
    (void)raw;
    if (kind == 0)
        for (i = 0; i < n; ++i) d[i] = u[i] > 0 ? d[i] : u[i] == u[i] ? K(0) : u[i];
    else if (kind == 1)
        for (i = 0; i < n; ++i) d[i] *= 1 - u[i] * u[i];
    else if (kind == 2)
        for (i = 0; i < n; ++i) d[i] *= u[i] > 0 ? K(1) : u[i] + 1;
#if KEEPS
    else if (kind == 3)
        for (i = 0; i < n; ++i) {
            const real x = raw[i], cdf = K(0.5) * erfc@(K(-0.70710678118654752) * x);
            d[i] *= cdf + x * K(0.39894228040143268) * exp_of(K(-0.5) * x * x);
        }
    else
        for (i = 0; i < n; ++i) {
            const real x = raw[i], q = 1 / (1 + exp_of(-x));
            d[i] *= q * (1 + x * (1 - q));
        }
#endif
}
static real slope_of(const struct net *s, real r) {
    const real bend = 1 / MADD(fabs@(r), 1 / s->clip, K(1));
    return s->soft ? bend * bend : K(1);
}
//end
//transform gradient
/* Parameters become the gradients in them, gradients in z those at fixed parameters in x. */
static void law_gradient(const struct net *s, struct room *m, int g, real *dz) {
    int v, r;
    for (v = s->group[g]; v < s->group[g + 1]; ++v) {
        const real *x = m->z + s->slot[v] * ROWS;
        real *p = m->p + 2 * (v - s->group[g]) * ROWS, *d = dz + s->slot[v] * ROWS;
        EACH_ROW {
            const real raw = p[ROWS + r], a = log_scale(s, raw), e = scale_of(s->affine ? a : -a), direct = d[r] * e;
            if (s->affine) {
                p[ROWS + r] = (direct * x[r] + 1) * slope_of(s, raw);
                p[r] = d[r];
            } else {
                p[ROWS + r] = (-d[r] * ((x[r] - p[r]) * e) - 1) * slope_of(s, raw);
                p[r] = -direct;
            }
            d[r] = direct;
        }
    }
}
//end
//base gradient
static void shares_of(real *t, int n) {
    real highest = t[0], sum = 0;
    int c;
    for (c = 1; c < n; ++c) highest = t[c] > highest ? t[c] : highest;
    for (c = 0; c < n; ++c) sum += t[c] = scale_of(t[c] - highest);
    for (c = 0; c < n; ++c) t[c] /= sum;
}
static void base_gradient(const struct net *s, struct room *m, int g, real *dz) {
    real t[TERMS], l[TERMS];
    int v, r, c;
    for (v = s->group[g]; v < s->group[g + 1]; ++v) {
        const real *x = m->z + s->slot[v] * ROWS;
        real *p = m->p + (s->first[v] - s->first[s->group[g]]) * ROWS, *d = dz + s->slot[v] * ROWS;
        const int n = s->components;
        EACH_ROW {
            terms_of(s, p, r, x[r], t, l);
            shares_of(t, n);
            shares_of(l, n);
            d[r] = 0;
            for (c = 0; c < n; ++c) {
                const real raw = p[(2 * n + c) * ROWS + r], e = scale_of(-log_scale(s, raw)), z = (x[r] - p[(n + c) * ROWS + r]) * e;
                const real pull = t[c] == 0 ? K(0) : t[c] * z;
                p[c * ROWS + r] = t[c] - l[c];
                p[(n + c) * ROWS + r] = t[c] == 0 ? K(0) : pull * e;
                p[(2 * n + c) * ROWS + r] = t[c] == 0 ? K(0) : (pull * z - t[c]) * slope_of(s, raw);
                d[r] -= p[(n + c) * ROWS + r];
            }
        }
    }
}
//end
//network gradient
/* Units are computed once more; dz: from the gradient behind the network to that in front of it. */
static void gradient(const struct net *s, struct room *m, real *delta, real *dz, real *dcontext) {
    int g, l, i, r, v;
    (void)dcontext;
    memset(delta, 0, (size_t)s->units * ROWS * sizeof(real));
    read_variables(s, m, 0, FEATURES);
    for (g = 0; g < s->groups; ++g) {
        const struct map *a = s->maps + s->hidden;
        const real *p = m->p - a->rows[g] * ROWS;
        step(s, m, g);
        LAW(law_gradient(s, m, g, dz), base_gradient(s, m, g, dz));
        multiply_back(a->panels + a->starts[g], a->panels + a->starts[g + 1], s->weights, p, delta + a->in * ROWS);
        if (s->direct) multiply_back(a[1].panels + a[1].starts[g], a[1].panels + a[1].starts[g + 1], s->weights, p, delta);
    }
    for (l = s->hidden - 1; l >= 0; --l) {
        const struct map *a = s->maps + l;
        const int rows = a->rows[s->groups];
        real *d = delta + a->out * ROWS;
#if KEEPS
        if (a->activated) times_slope(s->activation, m->u + a->out * ROWS, m->raw + a->out * ROWS, d, rows * ROWS);
#else
        if (a->activated) times_slope(s->activation, m->u + a->out * ROWS, m->u, d, rows * ROWS);
#endif
        for (g = l + 1; g < s->hidden; ++g)
            if (s->maps[g].adds == l)
                for (i = 0; i < rows * ROWS; ++i) d[i] += delta[s->maps[g].out * ROWS + i];
        multiply_back(a->panels, a->panels + a->starts[s->groups], s->weights, d, delta + a->in * ROWS);
    }
#if CONTEXT
    for (i = 0; i < CONTEXT * ROWS; ++i) dcontext[i] += delta[i];
#endif
    for (v = 0; v < FEATURES; ++v) {
        const real *x = m->z + s->slot[v] * ROWS, *d = delta + (CONTEXT + v) * ROWS;
        real *to = dz + s->slot[v] * ROWS;
        EACH_ROW to[r] += fabs@(x[r]) <= s->input_clip ? d[r] : K(0);
    }
}
//end

static void forward(struct room *m) {
    (void)m;
$FORWARD
}
static void backward(struct room *m, const real *uniforms) {
    (void)m;
    (void)uniforms;
$BACKWARD
}

void $N_log_prob(size_t n, const $N_real *x, const $N_real *context, $N_real *out) {
    struct room m;
    size_t i;
    for (i = 0; i < n; i += ROWS) {
        const int rows = n - i < ROWS ? (int)(n - i) : ROWS;
        load_context(&m, rows, CONTEXT ? context + i * CONTEXT : context, CONTEXT);
        load_rows(&m, rows, x + i * FEATURES);
        forward(&m);
        finish(&m, rows, out + i);
    }
}

/* Row i: of the stream offset + step i, of the contexts group + turn i. */
static void draw(size_t n, const real *context, size_t stride, uint64_t seed, uint64_t offset, uint64_t step_of_row, uint64_t group,
                 uint64_t turn, real *out) {
    struct room m;
    real uniforms[NORMAL ? 1 : FEATURES * ROWS];
    uint64_t index[ROWS];
    uint32_t groups[ROWS];
    size_t i;
    int r, v;
    for (i = 0; i < n; i += ROWS) {
        const int rows = n - i < ROWS ? (int)(n - i) : ROWS;
        EACH_ROW {
            index[r] = offset + (i + (size_t)r) * step_of_row;
            groups[r] = (uint32_t)(group + (i + (size_t)r) * turn);
        }
        load_context(&m, rows, CONTEXT ? context + i * stride : context, stride);
        noise(index, groups, seed, m.z, uniforms);
        backward(&m, uniforms);
        for (r = 0; r < rows; ++r)
            for (v = 0; v < FEATURES; ++v) out[(i + (size_t)r) * FEATURES + v] = from_line(columns + v, m.z[v * ROWS + r]);
    }
}
void $N_sample(size_t n, const $N_real *context, uint64_t seed, uint64_t offset, $N_real *out) {
    draw(n, context, 0, seed, offset, 1, 0, 0, out);
}
#if CONTEXT
void $N_sample_rows(size_t n, const $N_real *context, uint64_t seed, uint64_t offset, uint64_t context_offset, $N_real *out) {
    draw(n, context, CONTEXT, seed, offset, 0, context_offset, 1, out);
}
#endif
//whole gradient
/* dx/dz of a column in front of its gradient, and what its log det adds. */
static double to_line_gradient(const struct column *c, double x, double dz, double g) {
    const double up = c->kind & 1 ? 1 / (x - c->lower) : 0, down = c->kind & 2 ? 1 / (c->upper - x) : 0;
    return c->kind ? dz * c->scale * (up + down) + g * (down - up) : dz * c->scale;
}
static void settle(double value, int width, real *d) {
    int v, lost = 0;
    if (value != value)
        for (v = 0; v < width; ++v) d[v] = K(NAN);
    else {
        for (v = 0; v < width; ++v) lost |= !(fabs@(d[v]) < INFINITY);
        if (lost || value == -INFINITY) memset(d, 0, (size_t)width * sizeof(real));
    }
}
void $N_log_prob_and_grad(size_t n, const $N_real *x, const $N_real *context, $N_real *out, $N_real *dx, $N_real *dcontext) {
    struct room m;
    real dz[FEATURES * ROWS], delta[UNITS * ROWS], dc[(CONTEXT + 1) * ROWS], kept[STAGES + 1][FEATURES * ROWS];
    size_t i;
    int r, v;
    (void)delta;
    (void)kept;
    for (i = 0; i < n; i += ROWS) {
        const int rows = n - i < ROWS ? (int)(n - i) : ROWS;
        load_context(&m, rows, CONTEXT ? context + i * CONTEXT : context, CONTEXT);
        load_rows(&m, rows, x + i * FEATURES);
$KEEPING
        finish(&m, rows, out + i);
        memset(dc, 0, sizeof dc);
        for (v = 0; v < FEATURES * ROWS; ++v) dz[v] = NORMAL ? -m.z[v] : K(0);
$GRADIENT
        for (r = 0; r < rows; ++r) {
            const size_t row = i + (size_t)r;
            for (v = 0; v < FEATURES; ++v)
                dx[row * FEATURES + v] = (real)to_line_gradient(columns + v, x[row * FEATURES + v], dz[v * ROWS + r], 1);
            settle(out[row], FEATURES, dx + row * FEATURES);
#if CONTEXT
            if (!dcontext) continue;
            for (v = 0; v < CONTEXT; ++v)
                dcontext[row * CONTEXT + v] = (real)to_line_gradient(context_columns + v, context[row * CONTEXT + v], dc[v * ROWS + r], 0);
            settle(out[row], CONTEXT, dcontext + row * CONTEXT);
#endif
        }
    }
    (void)dcontext;
}
//end
