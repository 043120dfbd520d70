// See streaming.hpp.
#include "streaming.hpp"

#include <algorithm>
#include <cstring>

namespace fastmaf {
namespace device {

namespace {

// `count` rows of a host array from row r on, which lie one behind the other if they are several, to one behind the other.
void copy_rows(const Source& source, int64_t r, int64_t count, int width, char* out) {
    const Rows& rows = source.rows;
    const int64_t element = size_of(rows.dtype);
    const char* const p = rows.data + r / source.inner * rows.outer + r % source.inner * rows.inner;
    if (rows.column == element)
        std::memcpy(out, p, size_t(count * width * element));
    else
        for (int c = 0; c < width; ++c) std::memcpy(out + c * element, p + c * rows.column, size_t(element));
}

// Rows [begin, begin + count) of a host array, one behind the other.
void gather_rows(const Source& source, int64_t begin, int64_t count, int width, char* out) {
    const Rows& rows = source.rows;
    const int64_t element = size_of(rows.dtype), row = width * element;
    for (int64_t r = begin, end = begin + count; r < end;) {
        const int64_t run = rows.column == element && rows.inner == row ? std::min(end - r, source.inner - r % source.inner) : 1;
        copy_rows(source, r, run, width, out);
        out += run * row;
        r += run;
    }
}

}  // namespace

int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64:
        case DType::u64: return 8;
        case DType::f32:
        case DType::i32:
        case DType::u32: return 4;
        case DType::f16:
        case DType::i16:
        case DType::u16: return 2;
        default: return 1;
    }
}

void stream_rows(Station& station, int64_t rows, const std::vector<RowsIn>& inputs, const std::vector<RowsOut>& outputs, int64_t together,
                 int slots_used, const Poll& poll, const Launch& launch) {
    int64_t row = 0;
    for (const RowsIn& input : inputs) row += input.once ? 0 : input.row();
    for (const RowsOut& output : outputs) row += output.rows ? output.row : 0;
    const int64_t chunk = std::min(rows, std::max<int64_t>(together, kChunk / std::max<int64_t>(1, row) / together * together));
    std::vector<int64_t> of_input, of_output;
    int64_t in_size = 0, out_size = 0;
    for (const RowsIn& input : inputs) {
        of_input.push_back(in_size);
        in_size += padded((input.once ? 1 : chunk) * input.row());
    }
    for (const RowsOut& output : outputs) {
        of_output.push_back(out_size);
        out_size += output.rows ? padded(chunk * output.row) : 0;
    }

    struct Settled {  // nothing is under way when a call ends, however it ends
        Station& station;
        std::unique_ptr<Slots> slots;
        ~Settled() {
            for (auto& slot : slots->of)
                if (slot) cudaStreamSynchronize(slot->stream);
            station.give_back(std::move(slots));
        }
    } settled{station, station.take_slots()};
    Slots& slots = *settled.slots;
    int64_t waiting[2] = {-1, -1};
    auto collect = [&](int s) {
        if (waiting[s] < 0) return;
        Slot& slot = slots.at(s);
        check(cudaStreamSynchronize(slot.stream), "computing rows " + std::to_string(waiting[s]) + " and on");
        const int64_t count = std::min(chunk, rows - waiting[s]);
        const char* const results = slot.host_out.at_least(out_size);
        for (size_t i = 0; i < outputs.size(); ++i)
            if (outputs[i].rows)
                std::memcpy(outputs[i].rows + waiting[s] * outputs[i].row, results + of_output[i], size_t(count * outputs[i].row));
        waiting[s] = -1;
    };
    int s = 0;
    for (int64_t begin = 0; begin < rows; begin += chunk, s = (s + 1) % slots_used) {
        if (poll) poll();
        Slot& slot = slots.at(s);
        collect(s);
        const int64_t count = std::min(chunk, rows - begin);
        char *const host = slot.host_in.at_least(in_size), *const in = slot.in.at_least(in_size);
        char *const results = slot.host_out.at_least(out_size), *const out = slot.out.at_least(out_size);
        auto travel = [&](char* to, const char* from, int64_t bytes, cudaMemcpyKind kind) {
            if (bytes) check(cudaMemcpyAsync(to, from, size_t(bytes), kind, slot.stream), "copying rows to the device or from it");
        };
        std::vector<Source> there;
        for (size_t i = 0; i < inputs.size(); ++i) {
            const RowsIn& input = inputs[i];
            const int64_t here = input.once ? 1 : count;
            Source moved = input.source;
            moved.rows.column = size_of(moved.rows.dtype);
            moved.rows.inner = input.once ? 0 : input.row();
            moved.rows.outer = 0;
            moved.inner = count;
            if (moved.rows.data) {
                gather_rows(input.source, input.once ? 0 : begin, here, input.width, host + of_input[i]);
                travel(in + of_input[i], host + of_input[i], here * input.row(), cudaMemcpyHostToDevice);
                moved.rows.data = in + of_input[i];
            }
            there.push_back(moved);
        }
        std::vector<char*> back;
        for (size_t i = 0; i < outputs.size(); ++i) back.push_back(outputs[i].rows ? out + of_output[i] : nullptr);
        launch(there, back, begin, count, cudaStream_t(slot.stream));
        for (size_t i = 0; i < outputs.size(); ++i)
            if (back[i]) travel(results + of_output[i], back[i], count * outputs[i].row, cudaMemcpyDeviceToHost);
        waiting[s] = begin;
    }
    collect(s);
    collect(1 - s);
}

void Windows::set_order(const int64_t* order, int64_t rows) {
    check(cudaStreamSynchronize(travel_), "copying rows to train on");
    order_.assign(order, order + rows);
    for (Window& window : of_) window.count = 0;
}

void Windows::bring(Window& window, int64_t begin, int64_t count) {
    int64_t size = 0;
    window.at.clear();
    for (const RowsIn& input : inputs_) {
        window.at.push_back(size);
        size += padded(count * input.row());
    }
    window.count = 0;
    char *const host = window.host.at_least(size), *const there = window.there.at_least(size);
    for (size_t i = 0; i < inputs_.size(); ++i) {
        const RowsIn& input = inputs_[i];
        if (!input.source.rows.data) continue;
        char* to = host + window.at[i];
        for (int64_t place = begin; place < begin + count; ++place, to += input.row())
            copy_rows(input.source, order_[size_t(place)], 1, input.width, to);
    }
    check(cudaMemcpyAsync(there, host, size_t(size), cudaMemcpyHostToDevice, travel_), "copying rows to train on");
    window.begin = begin;
    window.count = count;
}

void Windows::enter(int64_t begin, int64_t count, cudaStream_t reader) {
    if (of_[current_].holds(begin, count)) return;
    if (of_[1 - current_].holds(begin, count)) {
        current_ = 1 - current_;
    } else {
        check(cudaStreamSynchronize(reader), "waiting for a batch");
        check(cudaStreamSynchronize(travel_), "copying rows to train on");
        bring(of_[current_], begin, count);
    }
    check(cudaStreamSynchronize(travel_), "copying rows to train on");
}

void Windows::prepare(int64_t begin, int64_t count) {
    Window& next = of_[1 - current_];
    if (count <= 0 || next.holds(begin, count)) return;
    check(cudaStreamSynchronize(travel_), "copying rows to train on");
    bring(next, begin, count);
}

const char* Windows::at(size_t input, int64_t place) const {
    const Window& window = of_[current_];
    return window.there.data() + window.at[input] + (place - window.begin) * inputs_[input].row();
}

}  // namespace device
}  // namespace fastmaf
