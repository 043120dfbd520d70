/* The log-density of the origin. */
#include <fastmaf.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    char message[300];
    fastmaf_model *model;
    fastmaf_evaluator *flow;
    double *zeros, log_prob;
    if (argc < 2) return puts("usage: density FLOW"), 2;
    if (fastmaf_model_open(argv[1], &model, message, sizeof message) ||
        fastmaf_evaluator_create(model, 1, &flow, message, sizeof message)) {
        fprintf(stderr, "%s\n", message);
        return 1;
    }
    zeros = calloc((size_t)(fastmaf_model_features(model) + fastmaf_model_context_features(model)), sizeof *zeros);
    {
        const fastmaf_array x = fastmaf_shared_row(zeros, FASTMAF_FLOAT64);
        const fastmaf_output out = fastmaf_into(&log_prob, FASTMAF_FLOAT64, 1);
        if (fastmaf_log_prob(flow, 1, 1, &x, fastmaf_model_context_features(model) ? &x : NULL, &out)) {
            fprintf(stderr, "%s\n", fastmaf_message(flow));
            return 1;
        }
    }
    printf("log_prob %.17g\n", log_prob);
    free(zeros);
    fastmaf_evaluator_free(flow);
    fastmaf_model_free(model);
    return 0;
}
