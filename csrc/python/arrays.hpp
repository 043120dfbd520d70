// NumPy arrays to the core's descriptions. Shapes were judged in Python (fastmaf/_arrays.py); here only what would be unsafe.
#pragma once

#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

#include "../cpu/backend.hpp"
#include "../cpu/threads.hpp"

namespace fastmaf {

namespace py = pybind11;

inline DType dtype_of(const py::array& array) {
    const py::dtype dtype = array.dtype();
    const char kind = dtype.kind();
    const auto size = dtype.itemsize();
    if (dtype.byteorder() != '>') {
        if (kind == 'f' && size == 2) return DType::f16;
        if (kind == 'f' && size == 4) return DType::f32;
        if (kind == 'f' && size == 8) return DType::f64;
        if (kind == 'b') return DType::boolean;
        if (kind == 'i') return size == 1 ? DType::i8 : size == 2 ? DType::i16 : size == 4 ? DType::i32 : DType::i64;
        if (kind == 'u') return size == 1 ? DType::u8 : size == 2 ? DType::u16 : size == 4 ? DType::u32 : DType::u64;
    }
    throw std::invalid_argument("an array has dtype " + std::string(py::str(dtype)) + ", which the compiled core does not read");
}

// An array (n, w), (c, n, w), or (w,) for a row that all share; grows outer and inner to what it spans.
inline Rows rows_of(const py::array& array, int64_t& outer, int64_t& inner) {
    Rows rows;
    rows.data = static_cast<const char*>(array.data());
    rows.dtype = dtype_of(array);
    const auto ndim = array.ndim();
    if (ndim < 1 || ndim > 3) throw std::invalid_argument("an array has " + std::to_string(ndim) + " dimensions");
    rows.column = array.strides(ndim - 1);
    auto axis = [&](py::ssize_t back, int64_t& extent, int64_t& stride) {
        if (ndim < back) return;
        const int64_t size = array.shape(ndim - back);
        if (size != 1) {
            extent = size;
            stride = array.strides(ndim - back);
        }
    };
    axis(2, inner, rows.inner);
    axis(3, outer, rows.outer);
    return rows;
}

inline Batch batch_of(const py::array& x, const py::object& context) {
    Batch batch;
    batch.outer = batch.inner = 1;
    batch.x = rows_of(x, batch.outer, batch.inner);
    if (!context.is_none()) batch.context = rows_of(py::reinterpret_borrow<py::array>(context), batch.outer, batch.inner);
    return batch;
}

// Rows numbered from the offsets on. The context, (C,) or (contexts, C), is the caller's to add.
inline Draw numbered_draw(int64_t contexts, int64_t rows, uint64_t seed, uint64_t offset, uint64_t context_offset) {
    Draw draw;
    draw.contexts = contexts;
    draw.rows = rows;
    draw.seed = seed;
    draw.offset = offset;
    draw.context_offset = uint32_t(context_offset);
    return draw;
}

// Rows with counters and contexts of their own.
inline Draw scattered_draw(const py::array_t<uint64_t, py::array::c_style>& index, const py::array_t<uint64_t, py::array::c_style>& group,
                           const py::object& context, uint64_t seed) {
    Draw draw;
    draw.rows = index.size();
    draw.seed = seed;
    draw.index = index.data();
    draw.group = group.data();
    int64_t outer = 1, inner = 1;
    if (!context.is_none()) draw.context = rows_of(py::reinterpret_borrow<py::array>(context), outer, inner);
    if (group.size() != index.size() || (inner != 1 && inner != draw.rows))
        throw std::invalid_argument(std::to_string(index.size()) + " rows are drawn, of " + std::to_string(group.size()) +
                                    " groups under " + std::to_string(inner) + " contexts");
    return draw;
}

// The elements of an output that Python allocated: C-contiguous, of dtype T, `count` long; null for None.
template <class T>
T* output(const py::object& object, int64_t count) {
    if (object.is_none()) return nullptr;
    auto array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<T>>(object) || !(array.flags() & py::array::c_style) || !array.writeable() || array.size() != count)
        throw std::invalid_argument("an output of " + std::to_string(array.size()) + " elements does not fit " + std::to_string(count) +
                                    " contiguous ones of its dtype");
    return static_cast<T*>(array.mutable_data());
}

// f with the elements of an output of floats or doubles.
template <class F>
void with_output(const py::object& object, int64_t count, F f) {
    if (py::isinstance<py::array_t<float>>(object))
        f(output<float>(object, count));
    else
        f(output<double>(object, count));
}

template <class T>
const T* input(const py::array& array, int64_t count) {
    if (!py::isinstance<py::array_t<T>>(array) || !(array.flags() & py::array::c_style) || array.size() != count)
        throw std::invalid_argument("an input of " + std::to_string(array.size()) + " elements does not fit " + std::to_string(count) +
                                    " contiguous ones of the flow's dtype");
    return static_cast<const T*>(array.data());
}

// f asks for the interpreter's lock. While an interpreter goes down, a daemon thread that does so is ended by an unwinding which no
// destructor survives; once it is gone, the lock is too. Such a thread rests here instead, until the process is over.
template <class F>
void or_rest(F f) {
    auto rest = [] {
        for (;;) pause();
    };
    if (!Py_IsInitialized()) rest();
#ifdef __GLIBCXX__
    try {
        f();
    } catch (abi::__forced_unwind&) { rest(); }
#else
    f();
#endif
}

// The contextvars.ContextVar with the number of threads that the running Python code asks for. It lives as long as the process.
inline PyObject* threads_of_context() {
    static PyObject* const variable = PyContextVar_New("fastmaf.num_threads", nullptr);
    return variable;
}

// 0 where nothing is asked for.
inline int wanted_threads() {
    PyObject* value = nullptr;
    if (PyContextVar_Get(threads_of_context(), nullptr, &value) != 0) throw py::error_already_set();
    const py::object number = py::reinterpret_steal<py::object>(value);
    return number && !number.is_none() ? number.cast<int>() : 0;
}

// Whether this thread takes the interpreter down, and computes with the lock in its hand.
inline thread_local bool keeps_lock = false;

// Without the interpreter's lock for the time of a scope: what computes, with the number of threads of the Python code that calls. The
// thread that takes the interpreter down (it calls us from destructors of Python objects) keeps the lock: nobody else will take it.
class Unlocked {
public:
    explicit Unlocked(int threads = wanted_threads())
        : threads_(threads), state_(Py_IsInitialized() ? PyEval_SaveThread() : nullptr), outer_(keeps_lock) {
        keeps_lock = state_ == nullptr;
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;
    ~Unlocked() {
        keeps_lock = outer_;
        if (state_) or_rest([&] { PyEval_RestoreThread(state_); });
    }

private:
    const ThreadsOfScope threads_;
    PyThreadState* state_;
    const bool outer_;
};

// The end of what lies on a device waits for it, and other Python threads must not wait with it.
struct DeleteUnlocked {
    template <class F>
    void operator()(F* object) const {
        const Unlocked unlocked(0);
        delete object;
    }
};

// Lets Ctrl-C through during long calls.
inline void check_signals() {
    if (keeps_lock) return;
    or_rest([] {
        py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    });
}

}  // namespace fastmaf
