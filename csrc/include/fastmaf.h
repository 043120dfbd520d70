/* fastmaf: densities and samples of masked autoregressive flows, from files that `flow.save` writes in Python.
 *
 * A model is immutable and may be shared by threads. An evaluator holds what a calling thread needs; each thread makes its own. With one
 * thread, calls run in the caller's thread, take no lock, leave its floating-point state as it is, and allocate nothing once a call of that
 * kind and size has been made. The same calls give the same bits as Python on the same instruction set, whatever the number of threads.
 *
 * Arrays. A fastmaf_array is one of rows of columns, in float or double whatever the dtype of the flow, with strides counted in numbers.
 * A call evaluates groups x rows of them: row j of group i begins i * group_stride + j * row_stride numbers behind data, and its column k
 * lies k * column_stride further. A stride of 0 repeats: a context with group_stride = row_stride = 0 is shared by all rows, one with
 * row_stride = 0 by the rows of a group. With one group, group_stride is not read. A model without context takes NULL for it.
 *
 * Errors. Every call returns a fastmaf_status. fastmaf_message() has the text of the last error of an evaluator; calls without an
 * evaluator write theirs into a buffer of the caller. What a failed call has written to its outputs is undefined.
 *
 * Numbers. log_prob is in nats. A row with a value at or outside a bound, or infinite, has log_prob -inf and gradient 0; a NaN in a row or its
 * context gives NaN. */
#ifndef FASTMAF_H
#define FASTMAF_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FASTMAF_API
#elif defined(__GNUC__)
#define FASTMAF_API __attribute__((visibility("default")))
#else
#define FASTMAF_API
#endif

/* The ABI that this header describes; fastmaf_abi_version() is that of the library. Equal numbers fit together. Functions and values of an
 * enumeration may be added under the same number; a function that an older library lacks shows when the program is linked or loaded. */
#define FASTMAF_ABI_VERSION 0

FASTMAF_API int32_t fastmaf_abi_version(void);
FASTMAF_API const char *fastmaf_version(void); /* of the library, "0.1.0" */

typedef enum fastmaf_status {
    FASTMAF_OK = 0,
    FASTMAF_INVALID_ARGUMENT = 1, /* a null pointer, a negative count, an array that does not fit the model */
    FASTMAF_CANNOT_READ = 2,      /* the file cannot be opened or read */
    FASTMAF_INVALID_FILE = 3,     /* it is no flow, or a damaged one */
    FASTMAF_UNSUPPORTED = 4,      /* the model has no such thing, or this library no code for the model; the text names it */
    FASTMAF_OUT_OF_MEMORY = 5,
    FASTMAF_INTERNAL = 6,
    FASTMAF_DEVICE_ERROR = 7 /* there is no such GPU here, or CUDA failed on it */
} fastmaf_status;

typedef enum fastmaf_dtype { FASTMAF_FLOAT32 = 0, FASTMAF_FLOAT64 = 1 } fastmaf_dtype;

/* Of products of matrices on a GPU, for models in float: in float; on tensor cores with about its errors; on tensor cores with those of half
 * precision. Where tensor cores are of no use all three are the first. */
typedef enum fastmaf_precision { FASTMAF_HIGHEST = 0, FASTMAF_HIGH = 1, FASTMAF_MEDIUM = 2 } fastmaf_precision;

/* An array that is read. Initialise it with all its fields, or with fastmaf_rows(). */
typedef struct fastmaf_array {
    const void *data;
    int32_t dtype; /* a fastmaf_dtype */
    int64_t group_stride, row_stride, column_stride;
} fastmaf_array;

/* An array that is written: groups x rows rows, one after the other. */
typedef struct fastmaf_output {
    void *data;
    int32_t dtype;
    int64_t row_stride, column_stride;
} fastmaf_output;

typedef struct fastmaf_model fastmaf_model;
typedef struct fastmaf_evaluator fastmaf_evaluator;

/* Models. `message` (may be NULL) takes the text of an error, cut to `size` bytes with its closing zero. */

FASTMAF_API fastmaf_status fastmaf_model_open(const char *path, fastmaf_model **model, char *message, size_t size);
/* From the bytes of a file, which are not needed afterwards. */
FASTMAF_API fastmaf_status fastmaf_model_from_memory(const void *bytes, size_t count, fastmaf_model **model, char *message, size_t size);
/* Evaluators keep what they need: a model may be freed before them. NULL is nothing. */
FASTMAF_API void fastmaf_model_free(fastmaf_model *model);

FASTMAF_API int64_t fastmaf_model_features(const fastmaf_model *model);
FASTMAF_API int64_t fastmaf_model_context_features(const fastmaf_model *model);
/* Networks, linear maps and norms between data and noise, base included. */
FASTMAF_API int64_t fastmaf_model_layers(const fastmaf_model *model);
/* Of an ensemble; 0 for a flow. Ensembles have densities, gradients and samples. */
FASTMAF_API int64_t fastmaf_model_members(const fastmaf_model *model);
/* Of all members; those that differ in their masks share theirs. */
FASTMAF_API int64_t fastmaf_model_parameters(const fastmaf_model *model);
/* Of a discrete variable: 1 for Bernoulli variables; 0 where all variables are continuous. */
FASTMAF_API int64_t fastmaf_model_most_values(const fastmaf_model *model);
/* That the model computes in. */
FASTMAF_API fastmaf_dtype fastmaf_model_dtype(const fastmaf_model *model);
/* Of a column, or NULL; lives as long as the model. */
FASTMAF_API const char *fastmaf_model_name(const fastmaf_model *model, int64_t feature);
/* Bytes of the host that weights take now; each kind of call adds a copy of its own once. */
FASTMAF_API size_t fastmaf_model_memory(const fastmaf_model *model);

/* Evaluators. `threads`: at most so many compute together, the caller being one; they belong to one pool per process. 1 for ranks of MPI and
 * for threads that evaluate side by side. */

FASTMAF_API fastmaf_status fastmaf_evaluator_create(const fastmaf_model *model, int32_t threads, fastmaf_evaluator **evaluator,
                                                    char *message, size_t size);
FASTMAF_API void fastmaf_evaluator_free(fastmaf_evaluator *evaluator);       /* NULL is nothing */
FASTMAF_API const char *fastmaf_message(const fastmaf_evaluator *evaluator); /* of its last error; valid until its next call */

/* Evaluators on a GPU, in a library that was built with CUDA; in others FASTMAF_UNSUPPORTED, and no devices. `device` counts as
 * cudaSetDevice does, `precision` is a fastmaf_precision (FASTMAF_HIGH is Python's choice; gradients are always of the highest). They take
 * the same calls; those of ensembles take arrays of the host alone. All evaluators of a model on one device in one precision share the
 * weights there, which the first call of a kind copies, and which go with the model and its last evaluator.
 *
 * The arrays of a call lie all in memory of that device (managed memory counts as such) or all in that of the host. With arrays of the
 * device a call enqueues its work on the evaluator's stream and returns: arrays stay as they are until the stream has come that far, which
 * the caller waits for, and where errors of kernels show. Inputs may have any strides; outputs have none but those of fastmaf_into(), in the
 * dtype of the model, samples and x in either; others are FASTMAF_UNSUPPORTED. Arrays of the host, with any strides and dtype, are
 * streamed: the call returns when results are there. Such calls may take locks, and memory of the host. */

FASTMAF_API int32_t fastmaf_devices(char *message, size_t size); /* how many GPUs there are; where 0, the message says why */
FASTMAF_API fastmaf_status fastmaf_evaluator_create_on_device(const fastmaf_model *model, int32_t device, int32_t precision,
                                                              fastmaf_evaluator **evaluator, char *message, size_t size);
/* A cudaStream_t of that device, for the calls that follow; NULL, as at first: the default stream. */
FASTMAF_API fastmaf_status fastmaf_evaluator_set_stream(fastmaf_evaluator *evaluator, void *stream);

/* Densities. x [features], context [context features] or NULL; log_prob [1]. */
FASTMAF_API fastmaf_status fastmaf_log_prob(fastmaf_evaluator *evaluator, int64_t groups, int64_t rows, const fastmaf_array *x,
                                            const fastmaf_array *context, const fastmaf_output *log_prob);

/* And their gradients: d_x [features]; d_context [context features], one row for each row of x, or, where the context has row_stride 0, for
 * each group: the sum over its rows. Each output but the first may be NULL. */
FASTMAF_API fastmaf_status fastmaf_log_prob_and_grad(fastmaf_evaluator *evaluator, int64_t groups, int64_t rows, const fastmaf_array *x,
                                                     const fastmaf_array *context, const fastmaf_output *log_prob,
                                                     const fastmaf_output *d_x, const fastmaf_output *d_context);

/* Samples: `rows` for each of `groups` contexts, of which `context` has a row each, group_stride apart:
 * fastmaf_rows(data, dtype, 1, context_features); its row_stride is not read. Sample j of context i is a
 * function of seed, offset + j and context_offset + i alone, so parts of one long stream may be drawn anywhere, in any order.
 * samples [features]; log_prob [1], may be NULL. */
FASTMAF_API fastmaf_status fastmaf_sample(fastmaf_evaluator *evaluator, int64_t groups, int64_t rows, const fastmaf_array *context,
                                          uint64_t seed, uint64_t offset, uint32_t context_offset, const fastmaf_output *samples,
                                          const fastmaf_output *log_prob);

/* Between data and noise, of continuous variables; in front of a mixture base. [features] both. */
FASTMAF_API fastmaf_status fastmaf_to_noise(fastmaf_evaluator *evaluator, int64_t groups, int64_t rows, const fastmaf_array *x,
                                            const fastmaf_array *context, const fastmaf_output *noise);
FASTMAF_API fastmaf_status fastmaf_from_noise(fastmaf_evaluator *evaluator, int64_t groups, int64_t rows, const fastmaf_array *noise,
                                              const fastmaf_array *context, const fastmaf_output *x);

/* Probabilities of the values of discrete variables given those before them: [features] that each is 1, or [features * most values], NaN for
   variables beside them that may have any number. What is no value of its variable makes those of the variables behind it NaN, and no
   others; in arrays of a GPU it is not looked for, and may spoil its row. */
FASTMAF_API fastmaf_status fastmaf_conditional_probs(fastmaf_evaluator *evaluator, int64_t groups, int64_t rows, const fastmaf_array *x,
                                                     const fastmaf_array *context, const fastmaf_output *probabilities);

/* Groups of `rows` rows of `columns` numbers, one after the other. */
static inline fastmaf_array fastmaf_rows(const void *data, fastmaf_dtype dtype, int64_t rows, int64_t columns) {
    fastmaf_array array;
    array.data = data;
    array.dtype = (int32_t)dtype;
    array.group_stride = rows * columns;
    array.row_stride = columns;
    array.column_stride = 1;
    return array;
}

/* One row for all. */
static inline fastmaf_array fastmaf_shared_row(const void *data, fastmaf_dtype dtype) {
    fastmaf_array array;
    array.data = data;
    array.dtype = (int32_t)dtype;
    array.group_stride = 0;
    array.row_stride = 0;
    array.column_stride = 1;
    return array;
}

static inline fastmaf_output fastmaf_into(void *data, fastmaf_dtype dtype, int64_t columns) {
    fastmaf_output output;
    output.data = data;
    output.dtype = (int32_t)dtype;
    output.row_stride = columns;
    output.column_stride = 1;
    return output;
}

#ifdef __cplusplus
}
#endif

#endif
