// libFuzzer: the reader on any bytes, and one density of what it accepts.
//
//     cmake --preset fuzz && cmake --build build/fuzz --target fuzz && build/fuzz/tests/native/fuzz -max_total_time=600 corpus tests/native/flows
#include <cstdint>
#include <vector>

#include <fastmaf.h>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fastmaf_model* model = nullptr;
    char message[300];
    if (fastmaf_model_from_memory(data, size, &model, message, sizeof message)) return 0;
    const int64_t features = fastmaf_model_features(model), context = fastmaf_model_context_features(model);
    fastmaf_evaluator* evaluator = nullptr;
    if (features < 10000 && context < 10000 && !fastmaf_evaluator_create(model, 1, &evaluator, message, sizeof message)) {
        const std::vector<double> numbers(size_t(features + context), 0.5);
        double value = 0;
        std::vector<double> sample(static_cast<size_t>(features));
        const fastmaf_array row = fastmaf_shared_row(numbers.data(), FASTMAF_FLOAT64);
        const fastmaf_output to_value = fastmaf_into(&value, FASTMAF_FLOAT64, 1), to_sample = fastmaf_into(sample.data(), FASTMAF_FLOAT64, features);
        fastmaf_log_prob(evaluator, 1, 1, &row, context ? &row : nullptr, &to_value);
        fastmaf_sample(evaluator, 1, 1, context ? &row : nullptr, 0, 0, 0, &to_sample, nullptr);
        fastmaf_evaluator_free(evaluator);
    }
    fastmaf_model_free(model);
    return 0;
}
