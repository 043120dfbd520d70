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

template class Flow<float>;
template class Flow<double>;

}  // namespace device
}  // namespace fastmaf
