// Loops around a flow of torch, as people put one into C++ today: TorchScript, and what AOTInductor compiles.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

namespace {

using Model = std::function<at::Tensor(const at::Tensor&)>;

std::string message;

}  // namespace

extern "C" {

const char* torch_message() { return message.c_str(); }

// A file of torch.jit.save, or one of aoti_compile_and_package, to the end of the process; null if it cannot be opened.
void* torch_open(const char* path, int compiled) {
    try {
        if (compiled) {
            auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
            return new Model([loader](const at::Tensor& x) { return loader->run({x})[0]; });
        }
        auto module = std::make_shared<torch::jit::Module>(torch::jit::load(path));
        return new Model([module](const at::Tensor& x) { return module->forward({x}).toTensor(); });
    } catch (const std::exception& error) {
        message = error.what();
        return nullptr;
    }
}

int torch_repeat(void* model, int64_t times, int64_t rows, int64_t features, float* x, float* out) {
    try {
        const c10::InferenceMode without_gradients;
        const at::Tensor in = at::from_blob(x, {rows, features});
        for (int64_t i = 0; i < times; ++i) {
            const at::Tensor result = (*static_cast<Model*>(model))(in).contiguous();
            std::memcpy(out, result.data_ptr<float>(), size_t(rows) * sizeof(float));
        }
        return 0;
    } catch (const std::exception& error) {
        message = error.what();
        return 1;
    }
}
}
