// fastmaf for C++17: fastmaf.h with owners, arrays of any kind and exceptions. Header-only; link the C library (fastmaf::fastmaf).
//
//     fastmaf::Model model("flow.safetensors");           // immutable, shared by threads
//     fastmaf::Evaluator flow(model);                     // one per calling thread
//     std::vector<double> log_p = flow.log_prob(x);       // x: std::vector<double> of n * features numbers, an Eigen matrix, an mdspan ...
//     flow.log_prob(x, fastmaf::none, out);               // into an array of the caller; nothing is allocated
//
// Arrays. Taken are, in float or double whatever the dtype of the flow: views (below), containers and arrays of numbers or of rows
// (std::vector<double>, std::span<float>, double[5][3], std::vector<std::array<double, 3>>), a single number, and what has the members of a
// matrix of Eigen (rows, cols, data, rowStride, colStride) or of an mdspan (rank, extent, stride, data_handle or data). Strides are kept, so
// matrices may be row-major or column-major, and nothing is copied.
//
// Shapes. x is (n, D), D features, or (c, n, D): n rows for each of c groups; numbers without shape are rows one after the other. A context is
//     none                   for a model that takes none;
//     (C) or (1, C)          one for all rows;
//     (n, C)                 one for each row of x (n, D);
//     (c, C)                 one for each group of x (c, n, D);
//     (c, 1, C), (c, n, C)   one for each group or row; where x is (n, D), its rows are evaluated under each of c contexts.
// `for_each_of(contexts)` makes (c, 1, C) of (c, C). Outputs have groups x rows rows, groups first; they may be flat or shaped, but groups
// must lie one behind the other. An array that does not fit throws before anything is computed.
#ifndef FASTMAF_HPP
#define FASTMAF_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastmaf.h"

namespace fastmaf {

/// What went wrong, in the words of the library.
/// `status()` is one of fastmaf.h; what a failed call has written to its outputs is undefined.
class Error : public std::runtime_error {
public:
    Error(fastmaf_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
    fastmaf_status status() const noexcept { return status_; }

private:
    fastmaf_status status_;
};

/// No context, or an output that is not wanted.
/// Write it as `fastmaf::none`.
struct None {};
inline constexpr None none{};

/// Numbers in memory: up to three axes, each with its length and the distance of its steps, counted in numbers.
/// T is float or double, const for what is only read. Make one with `view`; it owns nothing.
template <class T>
struct View {
    static_assert(std::is_same_v<std::remove_const_t<T>, float> || std::is_same_v<std::remove_const_t<T>, double>, "float or double");
    T* data = nullptr;
    int rank = 0;
    std::int64_t extent[3] = {}, stride[3] = {};
};

namespace detail {

template <class T>
constexpr bool is_real = std::is_same_v<std::remove_cv_t<T>, float> || std::is_same_v<std::remove_cv_t<T>, double>;

template <class T>
struct Row : std::false_type {};
template <class T, std::size_t N>
struct Row<std::array<T, N>> : std::bool_constant<is_real<T> && sizeof(std::array<T, N>) == N * sizeof(T)> {
    using Number = T;
    static constexpr std::size_t size = N;
};
template <class T, std::size_t N>
struct Row<const std::array<T, N>> : Row<std::array<T, N>> {
    using Number = const T;
};
template <class T, std::size_t N>
struct Row<T[N]> : std::bool_constant<is_real<T>> {
    using Number = T;
    static constexpr std::size_t size = N;
};

template <class T>
struct IsView : std::false_type {};
template <class T>
struct IsView<View<T>> : std::true_type {};

template <class A, class = void>
struct IsMdspan : std::false_type {};
template <class A>
struct IsMdspan<
    A, std::void_t<decltype(std::declval<A&>().extent(0)), decltype(std::declval<A&>().stride(0)), decltype(std::declval<A&>().rank())>>
    : std::true_type {};

template <class A, class = void>
struct HasHandle : std::false_type {};
template <class A>
struct HasHandle<A, std::void_t<decltype(std::declval<A&>().data_handle())>> : std::true_type {};

template <class A, class = void>
struct IsMatrix : std::false_type {};
template <class A>
struct IsMatrix<A,
                std::void_t<decltype(std::declval<A&>().data()), decltype(std::declval<A&>().rows()), decltype(std::declval<A&>().cols()),
                            decltype(std::declval<A&>().rowStride()), decltype(std::declval<A&>().colStride())>> : std::true_type {};

template <class A, class = void>
struct IsVector : std::false_type {};
template <class A>
struct IsVector<A, std::void_t<decltype(A::IsVectorAtCompileTime)>> : std::bool_constant<bool(A::IsVectorAtCompileTime)> {};

template <class A, class = void>
struct IsContainer : std::false_type {};
template <class A>
struct IsContainer<A, std::void_t<decltype(std::data(std::declval<A&>())), decltype(std::size(std::declval<A&>()))>> : std::true_type {};

template <class A>
constexpr bool unknown = false;

}  // namespace detail

/// Numbers by their address: `size` of them without shape, or rows of columns, or groups of rows of columns, one after the other.
/// They must stay where they are while the view is used.
template <class T>
View<T> view(T* data, std::int64_t size) {
    return {data, 1, {size, 0, 0}, {1, 0, 0}};
}
template <class T>
View<T> view(T* data, std::int64_t rows, std::int64_t columns) {
    return {data, 2, {rows, columns, 0}, {columns, 1, 0}};
}
template <class T>
View<T> view(T* data, std::int64_t groups, std::int64_t rows, std::int64_t columns) {
    return {data, 3, {groups, rows, columns}, {rows * columns, columns, 1}};
}

/// The same with strides: `view(data, {rows, columns}, {1, rows})` is column-major.
/// One to three axes; strides count numbers, may be negative, and 0 repeats.
template <class T>
View<T> view(T* data, std::initializer_list<std::int64_t> extents, std::initializer_list<std::int64_t> strides) {
    if (extents.size() != strides.size() || extents.size() < 1 || extents.size() > 3)
        throw Error(FASTMAF_INVALID_ARGUMENT, "a view has one to three axes, and as many strides");
    View<T> result{data, static_cast<int>(extents.size()), {}, {}};
    std::copy(extents.begin(), extents.end(), result.extent);
    std::copy(strides.begin(), strides.end(), result.stride);
    return result;
}

/// Any array that this header takes, as a view; methods of `Evaluator` do this for their arguments.
/// The view lives as long as the array does.
template <class A>
auto view(A& array) {
    using namespace detail;
    if constexpr (IsView<std::remove_const_t<A>>::value) {
        return array;
    } else if constexpr (is_real<A>) {
        return View<A>{&array, 1, {1, 0, 0}, {1, 0, 0}};
    } else if constexpr (IsMdspan<A>::value) {
        auto* const data = [&array] {
            if constexpr (HasHandle<A>::value)
                return array.data_handle();
            else
                return array.data();
        }();
        View<std::remove_pointer_t<decltype(+data)>> result{data, static_cast<int>(array.rank()), {}, {}};
        if (result.rank < 1 || result.rank > 3) throw Error(FASTMAF_INVALID_ARGUMENT, "arrays have one to three axes");
        for (int axis = 0; axis < result.rank; ++axis) {
            using Axis = decltype(array.rank());
            result.extent[axis] = static_cast<std::int64_t>(array.extent(static_cast<Axis>(axis)));
            result.stride[axis] = static_cast<std::int64_t>(array.stride(static_cast<Axis>(axis)));
        }
        return result;
    } else if constexpr (IsMatrix<A>::value) {
        using T = std::remove_pointer_t<decltype(array.data())>;
        const std::int64_t rows = array.rows(), columns = array.cols(), down = array.rowStride(), right = array.colStride();
        if constexpr (IsVector<A>::value)
            return View<T>{array.data(), 1, {rows * columns, 0, 0}, {columns == 1 ? down : right, 0, 0}};
        else
            return View<T>{array.data(), 2, {rows, columns, 0}, {down, right, 0}};
    } else if constexpr (IsContainer<A>::value) {
        using E = std::remove_pointer_t<decltype(std::data(array))>;
        const auto size = static_cast<std::int64_t>(std::size(array));
        if constexpr (is_real<E>) {
            return View<E>{std::data(array), 1, {size, 0, 0}, {1, 0, 0}};
        } else {
            static_assert(Row<E>::value, "fastmaf takes numbers in float or double, or rows of them as std::array");
            constexpr auto columns = static_cast<std::int64_t>(Row<E>::size);
            return View<typename Row<E>::Number>{size ? std::data(*std::data(array)) : nullptr, 2, {size, columns, 0}, {columns, 1, 0}};
        }
    } else {
        static_assert(unknown<A>, "fastmaf does not know this kind of array; make a view: fastmaf::view(data, rows, columns)");
    }
}

/// Contexts (c, C) as (c, 1, C): rows of x are evaluated under each of them.
/// The view lives as long as the array does.
template <class A>
auto for_each_of(A& contexts) {
    const auto result = view(contexts);
    if (result.rank != 2) throw Error(FASTMAF_INVALID_ARGUMENT, "for_each_of takes contexts (c, C), a matrix");
    return std::remove_const_t<decltype(result)>{
        result.data, 3, {result.extent[0], 1, result.extent[1]}, {result.stride[0], 0, result.stride[1]}};
}

namespace detail {

// The type of numbers of an array that a method was given.
template <class A>
using Number = std::remove_const_t<std::remove_pointer_t<decltype(view(std::declval<A&>()).data)>>;

// A view of either dtype; rank 0 where there is none.
struct Any {
    const void* data = nullptr;
    void* target = nullptr;  // the same, where it may be written
    fastmaf_dtype dtype = FASTMAF_FLOAT64;
    int rank = 0;
    std::int64_t extent[3] = {}, stride[3] = {};

    std::int64_t product(int begin, int end) const {
        std::int64_t result = 1;
        for (int axis = begin; axis < end; ++axis) result *= extent[axis];
        return result;
    }
    // Whether these axes are one with a single stride, which is 0 where there is one number.
    bool merges(int begin, int end, std::int64_t& step) const {
        step = 0;
        std::int64_t length = 1;
        for (int axis = end - 1; axis >= begin; --axis) {
            if (extent[axis] == 1) continue;
            if (length == 1)
                step = stride[axis];
            else if (stride[axis] != length * step)
                return false;
            length *= extent[axis];
        }
        return true;
    }
    std::string shape() const {
        std::string text = "(";
        for (int axis = 0; axis < rank; ++axis) text += (axis ? ", " : "") + std::to_string(extent[axis]);
        return text + (rank == 1 ? ",)" : ")");
    }
};

template <class A>
Any erased(A& array) {
    if constexpr (std::is_same_v<std::remove_const_t<A>, None>) {
        return {};
    } else {
        const auto from = view(array);
        using T = std::remove_pointer_t<decltype(from.data)>;
        Any any;
        any.data = from.data;
        if constexpr (!std::is_const_v<T>) any.target = from.data;
        any.dtype = std::is_same_v<std::remove_const_t<T>, float> ? FASTMAF_FLOAT32 : FASTMAF_FLOAT64;
        any.rank = from.rank;
        for (int axis = 0; axis < from.rank; ++axis) {
            any.extent[axis] = from.extent[axis];
            any.stride[axis] = from.stride[axis];
        }
        return any;
    }
}

template <class A>
Any target(A& array) {
    const Any any = erased(array);
    if constexpr (!std::is_same_v<std::remove_const_t<A>, None>)
        static_assert(!std::is_const_v<std::remove_pointer_t<decltype(view(array).data)>>, "an output cannot be const");
    return any;
}

[[noreturn]] inline void misfit(const char* name, const Any& array, const std::string& remedy) {
    throw Error(FASTMAF_INVALID_ARGUMENT, std::string(name) + " has shape " + array.shape() + "; " + remedy);
}

inline fastmaf_array strided(const Any& array, std::int64_t group, std::int64_t row, std::int64_t column) {
    fastmaf_array result;
    result.data = array.data;
    result.dtype = array.dtype;
    result.group_stride = group;
    result.row_stride = row;
    result.column_stride = column;
    return result;
}

// An output of `rows` rows of `columns` numbers.
inline fastmaf_output output(const char* name, const Any& array, std::int64_t rows, std::int64_t columns) {
    fastmaf_output result;
    result.data = array.target;
    result.dtype = array.dtype;
    if (array.rank == 1 && array.extent[0] == rows * columns) {
        result.row_stride = columns * array.stride[0];
        result.column_stride = array.stride[0];
        return result;
    }
    const std::string needed = "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
    bool fits = false;
    for (int split = array.rank; split >= 0; --split) {
        if (array.product(0, split) != rows || array.product(split, array.rank) != columns) continue;
        fits = true;
        if (array.merges(0, split, result.row_stride) && array.merges(split, array.rank, result.column_stride)) return result;
    }
    misfit(name, array, fits ? "its groups must lie one behind the other in memory" : "rows and columns " + needed + " are needed");
}

// What the shapes of x and context say about a call.
struct Call {
    std::int64_t groups = 1, rows = 0;
    fastmaf_array x{}, context{};
    bool has_context = false;

    const fastmaf_array* context_or_null() const { return has_context ? &context : nullptr; }
    std::int64_t total() const { return groups * rows; }
    std::int64_t contexts() const { return context.row_stride == 0 ? groups : groups * rows; }
};

inline Call call(const char* name, const Any& x, const Any& context, std::int64_t features, std::int64_t context_features) {
    Call result;
    if (x.rank == 1) {
        if (x.extent[0] % features != 0) misfit(name, x, "rows of " + std::to_string(features) + " numbers are needed");
        result.rows = x.extent[0] / features;
        result.x = strided(x, 0, features * x.stride[0], x.stride[0]);
    } else {
        if (x.rank == 0 || x.extent[x.rank - 1] != features) misfit(name, x, "the flow has " + std::to_string(features) + " features");
        result.rows = x.extent[x.rank - 2];
        if (x.rank == 3) result.groups = x.extent[0];
        result.x = strided(x, x.rank == 3 ? x.stride[0] : 0, x.stride[x.rank - 2], x.stride[x.rank - 1]);
    }
    if (context.rank == 0) return result;
    result.has_context = true;
    const std::int64_t C = context_features;
    if (C == 0) misfit("context", context, "the flow takes none");
    const auto& length = context.extent;
    const auto& step = context.stride;
    if (context.rank == 1) {
        const std::int64_t s = step[0];
        if (length[0] == C) {
            result.context = strided(context, 0, 0, s);
            return result;
        }
        if (x.rank == 3 && length[0] == result.groups * C) {
            result.context = strided(context, C * s, 0, s);
            return result;
        }
        if (length[0] == result.total() * C) {
            result.context = strided(context, result.rows * C * s, C * s, s);
            return result;
        }
    } else if (length[context.rank - 1] == C) {
        if (context.rank == 2) {
            if (length[0] == 1) {
                result.context = strided(context, 0, 0, step[1]);
                return result;
            }
            if (length[0] == (x.rank == 3 ? result.groups : result.rows)) {
                result.context = x.rank == 3 ? strided(context, step[0], 0, step[1]) : strided(context, 0, step[0], step[1]);
                return result;
            }
        } else {
            if (x.rank != 3) result.groups = length[0];
            if ((length[0] == result.groups || length[0] == 1) && (length[1] == result.rows || length[1] == 1)) {
                result.context = strided(context, length[0] == 1 ? 0 : step[0], length[1] == 1 ? 0 : step[1], step[2]);
                return result;
            }
        }
    }
    misfit("context", context,
           "it fits neither all rows, nor groups, nor each row of " + std::string(name) + " " + x.shape() + ", for " + std::to_string(C) +
               " context features");
}

// What is drawn: rows for each of the contexts (c, C), or without one.
inline Call draws(const Any& context, std::int64_t context_features) {
    Call result;
    if (context.rank == 0) return result;
    result.has_context = true;
    const std::int64_t C = context_features;
    if (C == 0) misfit("context", context, "the flow takes none");
    if (context.rank == 1 && context.extent[0] % C == 0) {
        result.groups = context.extent[0] / C;
        result.context = strided(context, C * context.stride[0], 0, context.stride[0]);
    } else if (context.rank == 2 && context.extent[1] == C) {
        result.groups = context.extent[0];
        result.context = strided(context, context.stride[0], 0, context.stride[1]);
    } else if (context.rank == 3 && context.extent[1] == 1 && context.extent[2] == C) {
        result.groups = context.extent[0];
        result.context = strided(context, context.stride[0], 0, context.stride[2]);
    } else {
        misfit("context", context, "contexts (c, " + std::to_string(C) + ") are needed");
    }
    return result;
}

}  // namespace detail

/// A flow: immutable, to be shared by threads. Copies share one and the same.
/// It stays in memory as long as a copy or an evaluator of it is alive; one that was moved from may only be assigned to or destroyed.
class Model {
public:
    /// From a file that `flow.save` wrote in Python.
    /// Throws `Error` where it cannot be read, is damaged, or holds what the library has no code for.
    explicit Model(const std::string& path) {
        open([&path](fastmaf_model** model, char* text, std::size_t size) { return fastmaf_model_open(path.c_str(), model, text, size); });
    }

    /// From the bytes of such a file, which are not needed afterwards.
    /// Also from a container of bytes: a std::string, std::vector<char>, std::span<const std::byte> ...
    static Model from_memory(const void* bytes, std::size_t count) {
        Model model;
        model.open(
            [=](fastmaf_model** out, char* text, std::size_t size) { return fastmaf_model_from_memory(bytes, count, out, text, size); });
        return model;
    }
    template <class Bytes>
    static Model from_memory(const Bytes& bytes) {
        static_assert(sizeof(*std::data(bytes)) == 1, "a container of bytes");
        return from_memory(std::data(bytes), std::size(bytes));
    }

    /// Number of variables, D, and of context variables, C.
    /// C is 0 for a flow that takes no context.
    std::int64_t features() const noexcept { return fastmaf_model_features(handle()); }
    std::int64_t context_features() const noexcept { return fastmaf_model_context_features(handle()); }

    /// Layers between data and noise, base included, and trainable numbers.
    /// Both as the library counts them.
    std::int64_t layers() const noexcept { return fastmaf_model_layers(handle()); }
    std::int64_t parameters() const noexcept { return fastmaf_model_parameters(handle()); }

    /// Members of an ensemble of masks, which has densities, gradients and samples.
    /// 0 for a flow.
    std::int64_t members() const noexcept { return fastmaf_model_members(handle()); }

    /// Most values of a discrete variable: 1 for Bernoulli variables.
    /// 0 where all variables are continuous.
    std::int64_t most_values() const noexcept { return fastmaf_model_most_values(handle()); }

    /// The dtype that the model computes in.
    /// Arrays may have the other one.
    fastmaf_dtype dtype() const noexcept { return fastmaf_model_dtype(handle()); }

    /// Names of the variables.
    /// Empty where the flow has none.
    std::vector<std::string> names() const {
        std::vector<std::string> result;
        for (std::int64_t feature = 0; feature < features(); ++feature)
            if (const char* name = fastmaf_model_name(handle(), feature)) result.emplace_back(name);
        return result;
    }

    /// Bytes that weights take now.
    /// Each kind of call adds a copy of its own once.
    std::size_t memory() const noexcept { return fastmaf_model_memory(handle()); }

    /// For calls of fastmaf.h.
    /// The model stays the owner.
    const fastmaf_model* handle() const noexcept { return handle_.get(); }

private:
    Model() = default;

    template <class Open>
    void open(const Open& open) {
        if (fastmaf_abi_version() != FASTMAF_ABI_VERSION)
            throw Error(FASTMAF_UNSUPPORTED, "the library has ABI " + std::to_string(fastmaf_abi_version()) + ", fastmaf.h has " +
                                                 std::to_string(FASTMAF_ABI_VERSION) + "; compile against the header of the library");
        char text[512] = "";
        fastmaf_model* model = nullptr;
        const fastmaf_status status = open(&model, text, sizeof text);
        if (status != FASTMAF_OK) throw Error(status, text);
        handle_.reset(model, fastmaf_model_free);
    }

    std::shared_ptr<fastmaf_model> handle_;
};

/// Log-densities and their gradients, as `Evaluator::log_prob_and_grad` returns them.
/// `d_context` is empty where the flow takes no context.
template <class T>
struct Gradients {
    std::vector<T> log_prob, d_x, d_context;
};

/// Samples and their log-densities, as `Evaluator::sample_and_log_prob` returns them.
/// Rows one after the other.
template <class T>
struct Samples {
    std::vector<T> samples, log_prob;
};

/// How products of matrices are made on a GPU, for flows in float: in float, on tensor cores with about its errors, or with those of halves.
/// Where tensor cores are of no use all three are the first.
enum class Precision : std::int32_t { highest = FASTMAF_HIGHEST, high = FASTMAF_HIGH, medium = FASTMAF_MEDIUM };

/// A GPU, counted as cudaSetDevice does: `Evaluator(model, Device{0})`.
/// The library must have been built with CUDA.
struct Device {
    std::int32_t number = 0;
    Precision precision = Precision::high;
};

/// Number of GPUs that evaluators can be made for.
/// Where it is 0, `fastmaf_devices` of fastmaf.h says why.
inline std::int32_t devices() noexcept { return fastmaf_devices(nullptr, 0); }

/// Evaluates a model. It holds what a calling thread needs, so each thread has its own, and its methods are not const.
/// Moved, never copied. Methods that return vectors give the type of numbers of x; those that take outputs allocate nothing of their own.
class Evaluator {
public:
    /// At most `threads` compute together, the caller being one; they belong to one pool per process.
    /// Leave it at 1 for ranks of MPI and for threads that evaluate side by side.
    explicit Evaluator(const Model& model, int threads = 1)
        : model_(model), features_(model.features()), context_features_(model.context_features()) {
        char text[512] = "";
        fastmaf_evaluator* evaluator = nullptr;
        const fastmaf_status status = fastmaf_evaluator_create(model.handle(), threads, &evaluator, text, sizeof text);
        if (status != FASTMAF_OK) throw Error(status, text);
        handle_.reset(evaluator);
    }

    /// On a GPU. Arrays of a call lie all in its memory, given by `view(pointer, rows, columns)`, or all in that of the host. With arrays of the
    /// GPU calls enqueue their work on the stream and return, and outputs must be there already: see fastmaf.h. Gradients are not computed there.
    explicit Evaluator(const Model& model, const Device& device)
        : model_(model), features_(model.features()), context_features_(model.context_features()) {
        char text[512] = "";
        fastmaf_evaluator* evaluator = nullptr;
        const auto precision = static_cast<std::int32_t>(device.precision);
        const fastmaf_status status =
            fastmaf_evaluator_create_on_device(model.handle(), device.number, precision, &evaluator, text, sizeof text);
        if (status != FASTMAF_OK) throw Error(status, text);
        handle_.reset(evaluator);
    }

    /// A cudaStream_t of the GPU for the calls that follow; before, it is the default stream.
    /// An evaluator on the CPU takes none.
    void set_stream(void* stream) { check(fastmaf_evaluator_set_stream(handle(), stream)); }

    /// The model that is evaluated.
    /// A copy of it shares its weights.
    const Model& model() const noexcept { return model_; }

    /// For calls of fastmaf.h.
    /// The evaluator stays the owner.
    fastmaf_evaluator* handle() const noexcept { return handle_.get(); }

    /// Log-densities of rows, in nats, into `log_prob`: a number for each row.
    /// -inf at or outside a bound and at infinity; NaN for a row with a NaN, in its context too.
    template <class X, class C, class Out>
    void log_prob(const X& x, const C& context, Out&& log_prob) {
        const detail::Call call = resolve("x", x, context);
        const fastmaf_output out = detail::output("log_prob", detail::target(log_prob), call.total(), 1);
        if (call.total()) check(fastmaf_log_prob(handle(), call.groups, call.rows, &call.x, call.context_or_null(), &out));
    }

    /// Log-densities as a vector, a number for each row.
    /// In the type of numbers of x.
    template <class X, class C = None>
    auto log_prob(const X& x, const C& context = {}) {
        std::vector<detail::Number<const X>> result(count(resolve("x", x, context).total()));
        log_prob(x, context, result);
        return result;
    }

    /// Log-densities and their gradients: `d_x` a row for each row; `d_context` a row for each row of x, or, where rows of a group share their
    /// context, for each group: the sum over its rows. Either may be `none`.
    template <class X, class C, class Out, class DX, class DC = const None&>
    void log_prob_and_grad(const X& x, const C& context, Out&& log_prob, DX&& d_x, DC&& d_context = none) {
        const detail::Call call = resolve("x", x, context);
        const fastmaf_output value = detail::output("log_prob", detail::target(log_prob), call.total(), 1);
        fastmaf_output dx{}, dc{};
        constexpr bool with_dx = !is_none<DX>, with_dc = !is_none<DC>;
        if constexpr (with_dx) dx = detail::output("d_x", detail::target(d_x), call.total(), features_);
        if constexpr (with_dc) dc = detail::output("d_context", detail::target(d_context), call.contexts(), context_features_);
        if (call.total())
            check(fastmaf_log_prob_and_grad(handle(), call.groups, call.rows, &call.x, call.context_or_null(), &value,
                                            with_dx ? &dx : nullptr, with_dc ? &dc : nullptr));
    }

    /// The same as vectors.
    /// In the type of numbers of x.
    template <class X, class C = None>
    auto log_prob_and_grad(const X& x, const C& context = {}) {
        const detail::Call call = resolve("x", x, context);
        Gradients<detail::Number<const X>> result;
        result.log_prob.resize(count(call.total()));
        result.d_x.resize(count(call.total() * features_));
        if constexpr (is_none<C>) {
            log_prob_and_grad(x, context, result.log_prob, result.d_x);
        } else {
            result.d_context.resize(count(call.contexts() * context_features_));
            log_prob_and_grad(x, context, result.log_prob, result.d_x, result.d_context);
        }
        return result;
    }

    /// Fills `samples`: as many rows as fit in, the same number for each of the contexts (c, C), those of the first context first.
    /// Row j of context i is a function of seed, offset + j and context_offset + i alone: parts of one stream may be drawn anywhere.
    template <class Out, class C = None, class = std::enable_if_t<!std::is_integral_v<std::remove_reference_t<Out>>>>
    void sample(Out&& samples, std::uint64_t seed, const C& context = {}, std::uint64_t offset = 0, std::uint32_t context_offset = 0) {
        draw(detail::target(samples), {}, seed, detail::erased(context), offset, context_offset);
    }

    /// n samples for each of the contexts (c, C), or without one, as a vector of rows; those of the first context first.
    /// The type of numbers is yours: `flow.sample<float>(1000, seed)`.
    template <class T = double, class C = None>
    std::vector<T> sample(std::int64_t n, std::uint64_t seed, const C& context = {}, std::uint64_t offset = 0,
                          std::uint32_t context_offset = 0) {
        std::vector<T> result(count(draws_of(n, context) * features_));
        sample(result, seed, context, offset, context_offset);
        return result;
    }

    /// Fills `samples` as `sample` does, and `log_prob` with the log-density of each at no further cost.
    /// A number for each row.
    template <class Out, class Value, class C = None, class = std::enable_if_t<!std::is_integral_v<std::remove_reference_t<Out>>>>
    void sample_and_log_prob(Out&& samples, Value&& log_prob, std::uint64_t seed, const C& context = {}, std::uint64_t offset = 0,
                             std::uint32_t context_offset = 0) {
        draw(detail::target(samples), detail::target(log_prob), seed, detail::erased(context), offset, context_offset);
    }

    /// The same as vectors, n samples for each of the contexts.
    /// The type of numbers is yours.
    template <class T = double, class C = None>
    Samples<T> sample_and_log_prob(std::int64_t n, std::uint64_t seed, const C& context = {}, std::uint64_t offset = 0,
                                   std::uint32_t context_offset = 0) {
        const std::int64_t total = draws_of(n, context);
        Samples<T> result{std::vector<T>(count(total * features_)), std::vector<T>(count(total))};
        sample_and_log_prob(result.samples, result.log_prob, seed, context, offset, context_offset);
        return result;
    }

    /// The noise that rows come from, into `noise`: standard normal where the flow fits.
    /// Of continuous variables; in front of a mixture base.
    template <class X, class C, class Out>
    void to_noise(const X& x, const C& context, Out&& noise) {
        const detail::Call call = resolve("x", x, context);
        const fastmaf_output out = detail::output("noise", detail::target(noise), call.total(), features_);
        if (call.total()) check(fastmaf_to_noise(handle(), call.groups, call.rows, &call.x, call.context_or_null(), &out));
    }

    /// The same as a vector of rows.
    /// In the type of numbers of x.
    template <class X, class C = None>
    auto to_noise(const X& x, const C& context = {}) {
        std::vector<detail::Number<const X>> result(count(resolve("x", x, context).total() * features_));
        to_noise(x, context, result);
        return result;
    }

    /// The rows that noise turns into, into `x`: the inverse of `to_noise`.
    /// Strictly inside the bounds.
    template <class U, class C, class Out>
    void from_noise(const U& noise, const C& context, Out&& x) {
        const detail::Call call = resolve("noise", noise, context);
        const fastmaf_output out = detail::output("x", detail::target(x), call.total(), features_);
        if (call.total()) check(fastmaf_from_noise(handle(), call.groups, call.rows, &call.x, call.context_or_null(), &out));
    }

    /// The same as a vector of rows.
    /// In the type of numbers of the noise.
    template <class U, class C = None>
    auto from_noise(const U& noise, const C& context = {}) {
        std::vector<detail::Number<const U>> result(count(resolve("noise", noise, context).total() * features_));
        from_noise(noise, context, result);
        return result;
    }

    /// Probabilities of the values of discrete variables given those before them: (n, D) that each is 1, or (n, D, most_values), NaN for others.
    /// Continuous flows have none: FASTMAF_UNSUPPORTED.
    template <class X, class C, class Out>
    void conditional_probs(const X& x, const C& context, Out&& probabilities) {
        const detail::Call call = resolve("x", x, context);
        const fastmaf_output out = detail::output("probabilities", detail::target(probabilities), call.total(), probabilities_of_row());
        if (call.total()) check(fastmaf_conditional_probs(handle(), call.groups, call.rows, &call.x, call.context_or_null(), &out));
    }

    /// The same as a vector.
    /// In the type of numbers of x.
    template <class X, class C = None>
    auto conditional_probs(const X& x, const C& context = {}) {
        std::vector<detail::Number<const X>> result(count(resolve("x", x, context).total() * probabilities_of_row()));
        conditional_probs(x, context, result);
        return result;
    }

private:
    struct Free {
        void operator()(fastmaf_evaluator* evaluator) const noexcept { fastmaf_evaluator_free(evaluator); }
    };

    template <class A>
    static constexpr bool is_none = std::is_same_v<std::remove_cv_t<std::remove_reference_t<A>>, None>;

    static std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }

    std::int64_t probabilities_of_row() const noexcept {
        const std::int64_t most = model_.most_values();
        return features_ * (most > 1 ? most : 1);
    }

    void check(fastmaf_status status) const {
        if (status != FASTMAF_OK) throw Error(status, fastmaf_message(handle()));
    }

    template <class X, class C>
    detail::Call resolve(const char* name, const X& x, const C& context) const {
        return detail::call(name, detail::erased(x), detail::erased(context), features_, context_features_);
    }

    template <class C>
    std::int64_t draws_of(std::int64_t n, const C& context) const {
        if (n < 0) throw Error(FASTMAF_INVALID_ARGUMENT, "n is negative");
        return n * detail::draws(detail::erased(context), context_features_).groups;
    }

    void draw(const detail::Any& samples, const detail::Any& log_prob, std::uint64_t seed, const detail::Any& context, std::uint64_t offset,
              std::uint32_t context_offset) {
        detail::Call call = detail::draws(context, context_features_);
        const std::int64_t numbers = samples.product(0, samples.rank), row = call.groups * features_;
        if (row == 0 ? numbers != 0 : numbers % row != 0)
            detail::misfit("samples", samples, "as many rows of " + std::to_string(features_) + " numbers are needed for each context");
        call.rows = row == 0 ? 0 : numbers / row;
        const fastmaf_output out = detail::output("samples", samples, call.total(), features_);
        fastmaf_output value{};
        if (log_prob.rank) value = detail::output("log_prob", log_prob, call.total(), 1);
        if (call.total())
            check(fastmaf_sample(handle(), call.groups, call.rows, call.context_or_null(), seed, offset, context_offset, &out,
                                 log_prob.rank ? &value : nullptr));
    }

    Model model_;
    std::int64_t features_, context_features_;
    std::unique_ptr<fastmaf_evaluator, Free> handle_;
};

/// Version of the library that runs, such as "0.1.0".
/// The header's ABI is checked against it when a model is opened.
inline std::string version() { return fastmaf_version(); }

}  // namespace fastmaf

#endif
