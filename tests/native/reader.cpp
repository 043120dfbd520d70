// The reader of files against what is no flow: nothing it is given may do more than raise its error, and what it reads has a density.
// Arguments: files; those whose names begin with "bad" must be refused, the others read. Each is then damaged in many places, its digest
// aside. Built with FASTMAF_FUZZ, libFuzzer does the damage.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "cpu/backend.hpp"
#include "record/lower.hpp"

using namespace fastmaf;

namespace {

template <class T>
void evaluate(const record::Record& record, size_t member) {
    Weights<T> packed(record::lower(record, member));
    packed.set_parameters(record::parameters(record));
    const std::vector<double> x(size_t(packed.plan().features()), 0.5), context(size_t(packed.plan().context()), -0.25);
    Batch batch;
    batch.inner = 1;
    batch.x = {reinterpret_cast<const char*>(x.data()), DType::f64, 0, 0, sizeof(double)};
    batch.context = {reinterpret_cast<const char*>(context.data()), DType::f64, 0, 0, sizeof(double)};
    T density = 0;
    log_prob(packed, batch, &density, Poll());
}

// Whether the bytes are a flow.
bool reads(std::string_view data) {
    try {
        const record::Record record = record::read(data);
        if (!record::unsupported(record).empty()) return true;
        for (size_t member : {size_t(0), record.members.size()}) {
            if (member && member == record.members.size()) --member;
            record.is_double ? evaluate<double>(record, member) : evaluate<float>(record, member);
        }
    } catch (const record::Error& error) {
        if (std::string(error.what()).size() > 300) std::abort();  // messages are short
        return false;
    }
    return true;
}

}  // namespace

#ifdef FASTMAF_FUZZ

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    reads({reinterpret_cast<const char*>(data), size});
    return 0;
}

#else

namespace {

// The name of the digest written over, so that damage to the tensors is not found by it.
std::string without_digest(std::string data) {
    const size_t place = data.find(record::kDigest);
    if (place != std::string::npos) data[place] = 'x';
    return data;
}

}  // namespace

int main(int argc, char** argv) {
    int failed = 0, files = 0, refused = 0, read = 0;
    std::mt19937 rng(1);
    for (int k = 1; k < argc; ++k, ++files) {
        const std::string path = argv[k], name = path.substr(path.rfind('/') + 1);
        std::ifstream file(path, std::ios::binary);
        const std::string data{std::istreambuf_iterator<char>(file), {}};
        const bool bad = name.rfind("bad", 0) == 0;
        if (!file || reads(data) == bad) {
            std::fprintf(stderr, "%s is %s\n", path.c_str(), bad ? "read" : "refused");
            ++failed;
        }
        const std::string plain = without_digest(data);
        for (int round = 0; round < 300 && !plain.empty(); ++round) {
            std::string damaged = plain;
            const size_t place = rng() % (round % 3 ? std::min<size_t>(damaged.size(), 3000) : damaged.size());
            if (round % 10 == 0)
                damaged.resize(place);
            else
                damaged[place] = char(rng());
            ++(reads(damaged) ? read : refused);
        }
    }
    std::printf("%d files, and %d more like them: %d read, %d refused\n", files, read + refused, read, refused);
    if (!files || !read || !refused) ++failed;
    return failed ? 1 : 0;
}

#endif
