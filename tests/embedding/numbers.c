/* numbers FLOW INPUT OUTPUT N: N rows of x and contexts from INPUT; what every call makes of them, as doubles, to OUTPUT. */
#include <fastmaf.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *output;

static void put(const double *values, int64_t count) { fwrite(values, sizeof *values, (size_t)count, output); }

static void check(fastmaf_status status, const char *message) {
    if (status == FASTMAF_OK) return;
    fprintf(stderr, "%d: %s\n", (int)status, message);
    exit(1);
}

int main(int argc, char **argv) {
    char message[300];
    fastmaf_model *model;
    fastmaf_evaluator *flow;
    const int64_t n = argc == 5 ? atol(argv[4]) : 0;
    int64_t D, C;
    double *x, *context, *log_prob, *d_x, *d_context;
    FILE *input;
    if (argc != 5) return 2;
    check(fastmaf_model_open(argv[1], &model, message, sizeof message), message);
    check(fastmaf_evaluator_create(model, 1, &flow, message, sizeof message), message);
    D = fastmaf_model_features(model);
    C = fastmaf_model_context_features(model);
    x = malloc(sizeof *x * (size_t)(n * D));
    context = malloc(sizeof *context * (size_t)(n * C + 1));
    log_prob = malloc(sizeof *log_prob * (size_t)n);
    d_x = malloc(sizeof *d_x * (size_t)(n * D));
    d_context = malloc(sizeof *d_context * (size_t)(n * C + 1));
    input = fopen(argv[2], "rb");
    output = fopen(argv[3], "wb");
    if (!input || !output || !x || !context || !log_prob || !d_x || !d_context) return 3;
    if (fread(x, sizeof *x, (size_t)(n * D), input) + fread(context, sizeof *context, (size_t)(n * C), input) != (size_t)(n * (D + C))) return 4;
    {
        const fastmaf_array rows = fastmaf_rows(x, FASTMAF_FLOAT64, n, D), contexts = fastmaf_rows(context, FASTMAF_FLOAT64, n, C);
        const fastmaf_array groups = fastmaf_rows(context, FASTMAF_FLOAT64, 1, C);
        const fastmaf_array *each = C ? &contexts : NULL, noise = fastmaf_rows(d_x, FASTMAF_FLOAT64, n, D);
        const fastmaf_output value = fastmaf_into(log_prob, FASTMAF_FLOAT64, 1), of_x = fastmaf_into(d_x, FASTMAF_FLOAT64, D);
        const fastmaf_output of_context = fastmaf_into(d_context, FASTMAF_FLOAT64, C), to_x = fastmaf_into(x, FASTMAF_FLOAT64, D);
        check(fastmaf_log_prob(flow, 1, n, &rows, each, &value), fastmaf_message(flow));
        put(log_prob, n);
        check(fastmaf_log_prob_and_grad(flow, 1, n, &rows, each, &value, &of_x, C ? &of_context : NULL), fastmaf_message(flow));
        put(log_prob, n);
        put(d_x, n * D);
        put(d_context, n * C);
        check(fastmaf_to_noise(flow, 1, n, &rows, each, &of_x), fastmaf_message(flow));
        put(d_x, n * D);
        check(fastmaf_from_noise(flow, 1, n, &noise, each, &to_x), fastmaf_message(flow));
        put(x, n * D);
        check(fastmaf_sample(flow, n, 1, C ? &groups : NULL, 7, 5, 3, &to_x, &value), fastmaf_message(flow));
        put(x, n * D);
        put(log_prob, n);
    }
    fclose(input);
    fclose(output);
    fastmaf_evaluator_free(flow);
    fastmaf_model_free(model);
    free(x);
    free(context);
    free(log_prob);
    free(d_x);
    free(d_context);
    return 0;
}
