/* errors FLOW: every status that a caller can provoke, one line for each with its text. */
#include <fastmaf.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

int main(int argc, char **argv) {
    static char bytes[1 << 24];
    char text[200] = "", few[8] = "";
    double x[64] = {0}, y = 0;
    fastmaf_model *model = NULL, *none = NULL;
    fastmaf_evaluator *flow = NULL;
    fastmaf_array row = fastmaf_shared_row(x, FASTMAF_FLOAT64);
    fastmaf_output out = fastmaf_into(&y, FASTMAF_FLOAT64, 1);
    FILE *stream;
    size_t count;
    int status;
    struct rlimit limit = {1, 1};
    if (argc != 2 || !(stream = fopen(argv[1], "rb"))) return 1;
    count = fread(bytes, 1, sizeof bytes, stream);
    fclose(stream);
    status = fastmaf_model_from_memory(bytes, count, &model, text, sizeof text);
    printf("%d %s\n", status, text);
    status = fastmaf_evaluator_create(model, 1, &flow, NULL, 0);
    printf("%d %s\n", status, "");
    status = fastmaf_log_prob(flow, 1, 1, &row, NULL, &out);
    printf("%d %s\n", status, fastmaf_message(flow));
    status = fastmaf_log_prob(flow, 1, 1, NULL, NULL, &out);
    printf("%d %s\n", status, fastmaf_message(flow));
    status = fastmaf_log_prob(flow, 1, -1, &row, NULL, &out);
    printf("%d %s\n", status, fastmaf_message(flow));
    status = fastmaf_log_prob(NULL, 1, 1, &row, NULL, &out);
    printf("%d %s\n", status, fastmaf_message(NULL));
    status = fastmaf_model_open("/nowhere/to/be.found", &none, text, sizeof text);
    printf("%d %s\n", status, text);
    status = fastmaf_model_open("/nowhere/to/be.found", &none, few, sizeof few);
    printf("%d %s\n", status, few);
    status = fastmaf_model_from_memory(bytes, count / 2, &none, text, sizeof text);
    printf("%d %s\n", status, text);
    status = fastmaf_conditional_probs(flow, 1, 1, &row, NULL, &out);
    printf("%d %s\n", status, fastmaf_message(flow));
    fflush(stdout);
    if (setrlimit(RLIMIT_AS, &limit)) return 1;
    status = fastmaf_model_from_memory(bytes, count, &none, text, sizeof text);
    printf("%d %s\n", status, text);
    fastmaf_evaluator_free(flow);
    fastmaf_model_free(model);
    return none != NULL;
}
