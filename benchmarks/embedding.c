/* Loops around calls, so that what calls them is not timed. */
#include <fastmaf.h>

int repeat_log_prob(fastmaf_evaluator *evaluator, int64_t times, int64_t rows, int64_t features, const float *x, float *out) {
    const fastmaf_array in = fastmaf_rows(x, FASTMAF_FLOAT32, rows, features);
    const fastmaf_output to = fastmaf_into(out, FASTMAF_FLOAT32, 1);
    int status = 0;
    int64_t i;
    for (i = 0; i < times && !status; ++i) status = fastmaf_log_prob(evaluator, 1, rows, &in, NULL, &to);
    return status;
}

int repeat_gradient(fastmaf_evaluator *evaluator, int64_t times, int64_t rows, int64_t features, const float *x, float *out, float *d_x) {
    const fastmaf_array in = fastmaf_rows(x, FASTMAF_FLOAT32, rows, features);
    const fastmaf_output to = fastmaf_into(out, FASTMAF_FLOAT32, 1), of = fastmaf_into(d_x, FASTMAF_FLOAT32, features);
    int status = 0;
    int64_t i;
    for (i = 0; i < times && !status; ++i) status = fastmaf_log_prob_and_grad(evaluator, 1, rows, &in, NULL, &to, &of, NULL);
    return status;
}

/* Reads so many numbers, as fast as a core can: a multiple of 64. */
float read_once(int64_t count, const float *numbers) {
    float sum[64] = {0}, total = 0;
    int64_t i, k;
    for (i = 0; i < count; i += 64)
        for (k = 0; k < 64; ++k) sum[k] += numbers[i + k];
    for (k = 0; k < 64; ++k) total += sum[k];
    return total;
}

float repeat_reading(int64_t times, int64_t count, const float *numbers) {
    float total = 0;
    int64_t i;
    for (i = 0; i < times; ++i) total += read_once(count, numbers + (i & 1) * 64);
    return total;
}
