/* device FLOW: an evaluator on GPU 0 through fastmaf.h. Without a GPU the status and why; else the largest difference from the CPU. */
#include <fastmaf.h>
#include <math.h>
#include <stdio.h>

enum { ROWS = 1000, MOST = 8 };

int main(int argc, char **argv) {
    static double x[ROWS * MOST], there[ROWS * MOST], log_prob[2][ROWS], d_x[2][ROWS * MOST];
    char text[300] = "";
    fastmaf_model *model = NULL;
    fastmaf_evaluator *cpu = NULL, *gpu = NULL;
    fastmaf_array rows;
    fastmaf_output samples, on_gpu, value, value_on_gpu, gradient, gradient_on_gpu;
    double difference = 0;
    int64_t i, d;
    int status;
    if (argc != 2 || fastmaf_model_open(argv[1], &model, text, sizeof text) || fastmaf_evaluator_create(model, 1, &cpu, text, sizeof text))
        return 2;
    d = fastmaf_model_features(model);
    status = fastmaf_evaluator_create_on_device(model, 0, FASTMAF_HIGH, &gpu, text, sizeof text);
    if (status) {
        printf("%d %d %s\n", (int)fastmaf_devices(NULL, 0), status, text);
        fastmaf_evaluator_free(cpu);
        fastmaf_model_free(model);
        return 0;
    }
    rows = fastmaf_rows(x, FASTMAF_FLOAT64, ROWS, d);
    samples = fastmaf_into(x, FASTMAF_FLOAT64, d);
    on_gpu = fastmaf_into(there, FASTMAF_FLOAT64, d);
    value = fastmaf_into(log_prob[0], FASTMAF_FLOAT64, 1);
    value_on_gpu = fastmaf_into(log_prob[1], FASTMAF_FLOAT64, 1);
    gradient = fastmaf_into(d_x[0], FASTMAF_FLOAT64, d);
    gradient_on_gpu = fastmaf_into(d_x[1], FASTMAF_FLOAT64, d);
    if (fastmaf_evaluator_set_stream(gpu, NULL) || fastmaf_sample(cpu, 1, ROWS, NULL, 1, 0, 0, &samples, NULL) ||
        fastmaf_sample(gpu, 1, ROWS, NULL, 1, 0, 0, &on_gpu, NULL) || fastmaf_log_prob(cpu, 1, ROWS, &rows, NULL, &value) ||
        fastmaf_log_prob(gpu, 1, ROWS, &rows, NULL, &value_on_gpu)) {
        fprintf(stderr, "%s%s\n", fastmaf_message(cpu), fastmaf_message(gpu));
        return 1;
    }
    for (i = 0; i < ROWS * d; ++i) difference = fmax(difference, fabs(there[i] - x[i]));
    for (i = 0; i < ROWS; ++i) difference = fmax(difference, fabs(log_prob[1][i] - log_prob[0][i]));
    status = fastmaf_log_prob_and_grad(cpu, 1, ROWS, &rows, NULL, &value, &gradient, NULL);
    if (!status) status = fastmaf_log_prob_and_grad(gpu, 1, ROWS, &rows, NULL, &value_on_gpu, &gradient_on_gpu, NULL);
    for (i = 0; i < ROWS * d; ++i) difference = fmax(difference, fabs(d_x[1][i] - d_x[0][i]) / (1 + fabs(d_x[0][i])));
    for (i = 0; i < ROWS; ++i) difference = fmax(difference, fabs(log_prob[1][i] - log_prob[0][i]));
    printf("%d %d %.9g\n", (int)fastmaf_devices(NULL, 0), status, difference);
    fastmaf_evaluator_free(gpu);
    fastmaf_evaluator_free(cpu);
    fastmaf_model_free(model);
    return 0;
}
