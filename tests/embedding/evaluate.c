/* evaluate FLOW FOLDER f|d ROWS: every call of fastmaf.h on the arrays in FOLDER, raw numbers; what comes out goes there too. */
#include <fastmaf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DRAWS = 5, GROUPS = 3 };

static const char *folder;
static fastmaf_dtype dtype;
static size_t size;

static void fail(const char *text) {
    fprintf(stderr, "%s\n", text);
    exit(1);
}

static FILE *file(const char *name, const char *mode) {
    char path[4096];
    FILE *stream;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    stream = fopen(path, mode);
    if (!stream) fail(path);
    return stream;
}

static void *zeros(int64_t count) {
    void *numbers = calloc((size_t)count + 1, size);
    if (!numbers) fail("out of memory");
    return numbers;
}

static void *load(const char *name, int64_t count) {
    void *numbers = zeros(count);
    FILE *stream = file(name, "rb");
    if (fread(numbers, size, (size_t)count, stream) != (size_t)count) fail(name);
    fclose(stream);
    return numbers;
}

static void save(const char *name, void *numbers, int64_t count) {
    FILE *stream = file(name, "wb");
    if (fwrite(numbers, size, (size_t)count, stream) != (size_t)count) fail(name);
    fclose(stream);
    free(numbers);
}

int main(int argc, char **argv) {
    char text[200];
    fastmaf_model *model;
    fastmaf_evaluator *flow;
    fastmaf_array x, each, shared;
    const fastmaf_array *contexts = NULL, *one = NULL;
    fastmaf_output out, d_x, d_context;
    int64_t rows, D, C, most, members;
    void *data, *context = NULL, *a, *b, *c;
    if (argc != 5) fail("evaluate FLOW FOLDER f|d ROWS");
    folder = argv[2];
    dtype = argv[3][0] == 'f' ? FASTMAF_FLOAT32 : FASTMAF_FLOAT64;
    size = dtype == FASTMAF_FLOAT32 ? sizeof(float) : sizeof(double);
    rows = atol(argv[4]);
    if (fastmaf_abi_version() != FASTMAF_ABI_VERSION) fail("another ABI");
    if (fastmaf_model_open(argv[1], &model, text, sizeof text) || fastmaf_evaluator_create(model, 1, &flow, text, sizeof text)) fail(text);
    D = fastmaf_model_features(model);
    C = fastmaf_model_context_features(model);
    most = fastmaf_model_most_values(model);
    members = fastmaf_model_members(model);
    data = load("x", rows * D);
    x = fastmaf_rows(data, dtype, rows, D);
    if (C) {
        context = load("context", rows * C);
        each = fastmaf_rows(context, dtype, rows, C);
        shared = fastmaf_shared_row(context, dtype);
        contexts = &each;
        one = &shared;
    }
#define TRY(call) \
    if (call) fail(fastmaf_message(flow))

    out = fastmaf_into(a = zeros(rows), dtype, 1);
    TRY(fastmaf_log_prob(flow, 1, rows, &x, contexts, &out));
    save("log_prob", a, rows);
    out = fastmaf_into(a = zeros(rows), dtype, 1);
    TRY(fastmaf_log_prob(flow, 1, rows, &x, one, &out));
    save("log_prob_shared", a, rows);

    if (most && !members) {
        out = fastmaf_into(a = zeros(rows * D * most), dtype, D * most);
        TRY(fastmaf_conditional_probs(flow, 1, rows, &x, contexts, &out));
        save("probabilities", a, rows * D * most);
    }
    if (!most) {
        out = fastmaf_into(a = zeros(rows), dtype, 1);
        d_x = fastmaf_into(b = zeros(rows * D), dtype, D);
        d_context = fastmaf_into(c = zeros(rows * C), dtype, C);
        TRY(fastmaf_log_prob_and_grad(flow, 1, rows, &x, contexts, &out, &d_x, C ? &d_context : NULL));
        save("value", a, rows);
        save("d_x", b, rows * D);
        save("d_context", c, rows * C);
        out = fastmaf_into(a = zeros(rows), dtype, 1);
        d_context = fastmaf_into(c = zeros(C), dtype, C);
        TRY(fastmaf_log_prob_and_grad(flow, 1, rows, &x, one, &out, NULL, C ? &d_context : NULL));
        free(a);
        save("d_context_shared", c, C);
    }
    if (!most && !members) {
        out = fastmaf_into(a = zeros(rows * D), dtype, D);
        TRY(fastmaf_to_noise(flow, 1, rows, &x, contexts, &out));
        save("noise", a, rows * D);
        out = fastmaf_into(a = zeros(rows * D), dtype, D);
        TRY(fastmaf_from_noise(flow, 1, rows, &x, contexts, &out)); /* rows are as good as any noise */
        save("from_noise", a, rows * D);
    }

    out = fastmaf_into(a = zeros(DRAWS * D), dtype, D);
    d_x = fastmaf_into(b = zeros(DRAWS), dtype, 1);
    TRY(fastmaf_sample(flow, 1, DRAWS, one, UINT64_MAX, 7, 2, &out, &d_x));
    save("samples", a, DRAWS * D);
    save("density", b, DRAWS);
    if (C) {
        out = fastmaf_into(a = zeros(GROUPS * DRAWS * D), dtype, D);
        each = fastmaf_rows(context, dtype, 1, C); /* groups of one row */
        TRY(fastmaf_sample(flow, GROUPS, DRAWS, contexts, 1, 0, 0, &out, NULL));
        save("samples_of_groups", a, GROUPS * DRAWS * D);
        each.row_stride = 0;
        x.group_stride = 0; /* all rows under each of the contexts */
        out = fastmaf_into(a = zeros(GROUPS * rows), dtype, 1);
        TRY(fastmaf_log_prob(flow, GROUPS, rows, &x, contexts, &out));
        save("log_prob_of_groups", a, GROUPS * rows);
    }
    free(data);
    free(context);
    fastmaf_model_free(model);
    fastmaf_evaluator_free(flow);
    return 0;
}
