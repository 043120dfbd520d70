// In place of the CUDA backend where it was not built.
#include "../core/device.hpp"

namespace fastmaf {
namespace device {

namespace {
#ifdef FASTMAF_RETRY
const char* const kReason = "the CUDA kernels did not compile when fastmaf was installed; pip install -v . shows why";
#else
const char* const kReason = "this build of fastmaf has no CUDA kernels";
#endif
}

State state() {
    State state;
    state.reason = kReason;
    return state;
}

int device_of(uintptr_t) { return -1; }
void synchronize(int, uintptr_t) {}
void copy_to_host(int, uintptr_t, void*, int64_t, uintptr_t) {}
void copy_from_host(int, const void*, uintptr_t, int64_t, uintptr_t) {}

template <class T>
struct FlowState {};

template <class T>
Flow<T>::Flow(std::shared_ptr<const Weights<T>>, int, Precision) {
    throw Error(kReason);
}
template <class T>
Flow<T>::~Flow() = default;
template <class T>
const Weights<T>& Flow<T>::weights() const {
    throw Error(kReason);
}
template <class T>
void Flow<T>::log_prob(const Batch&, T*, const Place&, const Poll&) const {}
template <class T>
void Flow<T>::to_noise(const Batch&, T*, const Place&, const Poll&, T*) const {}
template <class T>
void Flow<T>::conditional_probs(const Batch&, T*, const Place&, const Poll&) const {}
template <class T>
void Flow<T>::from_noise(const Batch&, const Samples&, const Place&, const Poll&, T*) const {}
template <class T>
void Flow<T>::sample(const Draw&, const Samples&, T*, const Place&, const Poll&) const {}
template <class T>
void Flow<T>::vjp(const Batch&, const Rows&, const Gradients<T>&, const Place&, const Poll&) const {}

template <class T>
struct TrainerState {};

template <class T>
Trainer<T>::Trainer(const std::vector<std::shared_ptr<Weights<T>>>&, bool, int, const AdamSettings&) {
    throw Error(kReason);
}
template <class T>
Trainer<T>::~Trainer() = default;
template <class T>
void Trainer<T>::set_rows(const Batch&, const double*, const Poll&, int64_t) {}
template <class T>
double Trainer<T>::epoch(const int64_t*, int64_t, const Steps&, int64_t&, const Poll&, const Total&) {
    return 0;
}
template <class T>
void Trainer<T>::set_order(const int64_t*, int64_t) {}
template <class T>
void Trainer<T>::grad(int64_t, int64_t, double) {}
template <class T>
StepArrays<T> Trainer<T>::arrays() const {
    return {};
}
template <class T>
void Trainer<T>::apply(double) {}
template <class T>
int64_t Trainer<T>::look(double&) {
    return 0;
}
template <class T>
void Trainer<T>::log_prob(size_t, const Batch&, T*, const Poll&) {}
template <class T>
void Trainer<T>::set_members(const std::vector<std::shared_ptr<Weights<T>>>&) {}
template <class T>
int Trainer<T>::features() const {
    return 0;
}
template <class T>
int64_t Trainer<T>::parameter_count() const {
    return 0;
}
template <class T>
void Trainer<T>::get_parameters(T*) const {}
template <class T>
void Trainer<T>::set_parameters(const T*) {}
template <class T>
void Trainer<T>::set_statistics(size_t, const double*, const double*) {}
template <class T>
void Trainer<T>::get_moments(T*, T*) const {}
template <class T>
void Trainer<T>::set_moments(const T*, const T*) {}
template <class T>
int64_t Trainer<T>::steps() const {
    return 0;
}
template <class T>
void Trainer<T>::set_steps(int64_t) {}

template class Flow<float>;
template class Flow<double>;
template class Trainer<float>;
template class Trainer<double>;

}  // namespace device
}  // namespace fastmaf
