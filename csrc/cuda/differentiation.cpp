// Gradients on a GPU: parts of the rows forward and backward, and the sums over them.
#include "flow.hpp"

#include <algorithm>

#include "../core/floats.hpp"

namespace fastmaf {
namespace device {

template <class T>
void FlowState<T>::launch_gradients(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, double* sums, bool begins,
                                    cudaStream_t stream) {
    const GradientView<T>& view = gradient_view();
    const WeightsView<T>* const of_weights = sums ? &weights_view() : nullptr;
    const int64_t outer = batch.outer, inner = batch.inner, all = outer * inner, master = sums ? of_weights->size + 1 : 0;
    struct Part {
        T* out;
        Summed summed;
        int64_t width, rows, slices, each;  // rows, slices, each: where in the memory; `each`: the gradients by row
    } parts[2] = {{out.x, out.of_x, view.flow.features, 0, 0, 0}, {out.context, out.of_context, view.flow.context, 0, 0, 0}};
    auto own_rows = [&](const Part& part) { return (part.summed.outer ? 1 : outer) * (part.summed.inner ? 1 : inner); };
    const int vectors = all >= int64_t(128) * station->processors ? 4 : all >= int64_t(64) * station->processors ? 2 : 1;
    const int64_t width = 32 * vectors;
    int64_t per_row = sums ? view.scratch / width + master * int64_t(sizeof(T)) / kGroup + 1 : 0;
    for (Part& part : parts) {
        if (!part.out) part.summed = {};
        if (part.summed.outer || part.summed.inner) per_row += part.width * int64_t(sizeof(T) + sizeof(double));
    }
    int resident = 0;
    check(cuda::resident_gradient_blocks<T>(&resident), "preparing a kernel");
    const int64_t at_once = int64_t(std::max(1, resident)) * station->processors;
    int64_t most_blocks = std::min(at_once, std::max<int64_t>(1, kScratch / view.scratch));
    int64_t most = per_row ? std::max<int64_t>(kGroup, std::min(all, kScratch / per_row)) : all;

    constexpr int64_t slice = 256;
    Lent memory(*station, stream);
    int64_t groups_of_rows = 0, length = 0, blocks = 0, partial = 0, of_weights_size = 0;
    for (;; most = std::max<int64_t>(kGroup, most / 2), most_blocks = std::max<int64_t>(1, most_blocks / 2)) {
        // As many groups of inner rows as may go together, or a part of one.
        groups_of_rows = inner <= most ? std::min(outer, most / inner) : 1;
        length = inner <= most ? inner : most / kGroup * kGroup;
        const int64_t rows = groups_of_rows * length, tiles = (rows + width - 1) / width;
        blocks = std::min(tiles, most_blocks);
        Room room;
        room.take((sums ? tiles : blocks) * view.scratch);
        of_weights_size = (rows + kGroup - 1) / kGroup * master * int64_t(sizeof(T));
        partial = room.take(of_weights_size);
        for (Part& part : parts) {
            if (!part.summed.outer && !part.summed.inner) continue;
            part.each = room.take(rows * part.width * int64_t(sizeof(T)));
            part.slices = room.take((rows / slice + std::max(groups_of_rows, length)) * part.width * int64_t(sizeof(double)));
            part.rows = room.take(own_rows(part) * part.width * int64_t(sizeof(double)));
        }
        if (memory.take(room.size(), "scratch")) break;
        if ((!per_row || most <= kGroup) && most_blocks <= 1) out_of_memory(room.size(), "the scratch of gradients");
    }
    auto real = [&](int64_t byte) { return reinterpret_cast<T*>(memory.at(byte)); };
    auto wide = [&](int64_t byte) { return reinterpret_cast<double*>(memory.at(byte)); };
    cudaError_t error = cudaSuccess;
    auto then = [&](auto call) {
        if (error == cudaSuccess) error = call();
    };
    // No task writes units that nobody reads.
    if (sums) then([&] { return cudaMemsetAsync(real(partial), 0, size_t(of_weights_size), stream); });
    for (const Part& part : parts) {
        if (!part.summed.outer && !part.summed.inner) continue;
        const size_t bytes = size_t(own_rows(part) * part.width) * sizeof(double);
        then([&] { return cudaMemsetAsync(wide(part.rows), 0, bytes, stream); });
    }
    for (int64_t i = 0; i < inner; i += length)
        for (int64_t o = 0; o < outer; o += groups_of_rows) {
            const int64_t count = std::min(groups_of_rows, outer - o), here = std::min(length, inner - i), rows = count * here;
            auto moved = [&](const Rows& given) {
                Source source{given, here};
                if (given.data) source.rows.data += o * given.outer + i * given.inner;
                return source;
            };
            GradientJob<T> job;
            job.rows.rows = rows;
            job.rows.vectors = vectors;
            job.rows.x = moved(batch.x);
            job.rows.context = moved(batch.context);
            job.rows.scratch = memory.at(0);
            job.rows.log_prob = out.value ? out.value + o * inner + i : nullptr;
            job.cotangent = moved(cotangent);
            job.keeps = sums != nullptr;
            auto target = [&](const Part& part) {
                if (part.summed.outer || part.summed.inner) return real(part.each);
                return part.out ? part.out + (o * inner + i) * part.width : nullptr;
            };
            job.d_x = target(parts[0]);
            job.d_context = target(parts[1]);
            then([&] { return cuda::launch_gradient<T>(view, job, int(std::min(blocks, (rows + width - 1) / width)), stream); });
            for (const Part& part : parts) {
                if (!part.summed.outer && !part.summed.inner) continue;
                const bool both = part.summed.outer && part.summed.inner;
                const int64_t a = both || part.summed.outer ? 1 : count, b = both ? rows : part.summed.outer ? count : here;
                const int64_t c = part.width * (part.summed.inner ? 1 : here), slices = (b + slice - 1) / slice;
                double* const total = wide(part.rows) + part.width * (both ? 0 : part.summed.outer ? i : o);
                then([&] { return cuda::launch_sum<T>({real(part.each), wide(part.slices), a, b, c, slice, false}, stream); });
                then([&] { return cuda::launch_sum<double>({wide(part.slices), total, a, slices, c, slices, true}, stream); });
            }
            if (!sums) continue;
            const int64_t groups = (rows + kGroup - 1) / kGroup;
            then([&] { return cuda::launch_weights<T>(view, *of_weights, memory.at(0), rows, vectors, real(partial), stream); });
            then([&] { return cuda::launch_sum<T>({real(partial), sums, 1, groups, master, groups, !begins || i + o > 0}, stream); });
        }
    for (const Part& part : parts) {
        if (!part.summed.outer && !part.summed.inner) continue;
        then([&] { return cuda::launch_narrow<T>(wide(part.rows), part.out, own_rows(part) * part.width, stream); });
    }
    check(error, "launching a kernel");
    check(memory.release(), "freeing scratch");
}

template <class T>
void FlowState<T>::no_gradients(const Batch& batch, const Gradients<T>& out, const Place& place) const {
    const Plan& plan = weights->plan();
    auto zero = [&](T* values, int64_t count) {
        if (!values || count == 0) return;
        if (place.on_device)
            check(cudaMemsetAsync(values, 0, size_t(count) * sizeof(T), reinterpret_cast<cudaStream_t>(place.stream)),
                  "setting gradients to zero");
        else
            std::fill_n(values, count, T(0));
    };
    auto own = [&](const Summed& summed) { return (summed.outer ? 1 : batch.outer) * (summed.inner ? 1 : batch.inner); };
    zero(out.x, own(out.of_x) * plan.features());
    zero(out.context, own(out.of_context) * plan.context());
    zero(out.parameters, plan.parameter_count());
}

template <class T>
void FlowState<T>::differentiate(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, const Place& place, const Poll& poll) {
    check_process(*station);
    const Current current(station->device);
    const PlainFloats floats;
    const int64_t rows = batch.rows(), parameters = weights->plan().parameter_count();
    if (rows == 0) return no_gradients(batch, out, place);
    auto finish = [&](const double* sums, T* to, cudaStream_t stream) {
        check(cudaMemsetAsync(to, 0, size_t(parameters) * sizeof(T), stream), "setting gradients to zero");
        check(cuda::launch_parameters<T>(weights_view(), sums, to, stream), "launching a kernel");
    };
    auto sums_of = [&](Lent& memory, bool outside) {
        if (!out.parameters || parameters == 0) return static_cast<double*>(nullptr);
        const int64_t bytes = padded((weights_view().size + 1) * int64_t(sizeof(double)));
        const int64_t all = bytes + (outside ? 0 : parameters * int64_t(sizeof(T)));
        if (!memory.take(all, "sums")) out_of_memory(all, "the sums of gradients");
        return reinterpret_cast<double*>(memory.at(0));
    };
    if (place.on_device) {
        const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
        Lent memory(*station, stream);
        double* const sums = sums_of(memory, true);
        launch_gradients(batch, cotangent, out, sums, true, stream);
        if (sums) finish(sums, out.parameters, stream);
        return check(memory.release(), "freeing scratch");
    }
    const Plan& plan = weights->plan();
    const bool shared = plan.context() > 0 && shares_context(batch.context, batch.outer, batch.inner);
    const std::vector<RowsIn> inputs = {{{batch.x, batch.inner}, plan.features(), false},
                                        {{batch.context, batch.inner}, plan.context(), shared},
                                        {{cotangent, batch.inner}, cotangent.data ? 1 : 0, false}};
    const std::vector<RowsOut> outputs = {{reinterpret_cast<char*>(out.value), int64_t(sizeof(T))},
                                          {reinterpret_cast<char*>(out.x), plan.features() * int64_t(sizeof(T))},
                                          {reinterpret_cast<char*>(out.context), plan.context() * int64_t(sizeof(T))}};
    const Stream own;
    Lent memory(*station, own);
    double* const sums = sums_of(memory, false);
    check(cudaStreamSynchronize(own), "allocating memory");
    T* const results = sums ? reinterpret_cast<T*>(memory.at(padded((weights_view().size + 1) * int64_t(sizeof(double))))) : nullptr;
    stream_rows(*station, rows, inputs, outputs, kGroup, sums ? 1 : 2, poll,
                [&](const std::vector<Source>& in, const std::vector<char*>& back, int64_t begin, int64_t count, cudaStream_t stream) {
                    Batch part;
                    part.inner = count;
                    part.x = in[0].rows;
                    part.context = in[1].rows;
                    Gradients<T> own_part;
                    own_part.value = reinterpret_cast<T*>(back[0]);
                    own_part.x = reinterpret_cast<T*>(back[1]);
                    own_part.context = reinterpret_cast<T*>(back[2]);
                    launch_gradients(part, in[2].rows, own_part, sums, begin == 0, stream);
                    if (!sums || begin + count < rows) return;
                    finish(sums, results, stream);
                    check(cudaMemcpyAsync(out.parameters, results, size_t(parameters) * sizeof(T), cudaMemcpyDeviceToHost, stream),
                          "copying gradients from the device");
                });
}

#define FASTMAF_INSTANTIATE(T) \
    template void FlowState<T>::differentiate(const Batch&, const Rows&, const Gradients<T>&, const Place&, const Poll&); \
    template void FlowState<T>::launch_gradients(const Batch&, const Rows&, const Gradients<T>&, double*, bool, cudaStream_t);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace device
}  // namespace fastmaf
