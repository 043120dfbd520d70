// What is wrong with a file. The texts are short and hold no more of the file than a name of it.
#pragma once

#include <stdexcept>
#include <string>

namespace fastmaf::record {

class Error : public std::invalid_argument {
public:
    using std::invalid_argument::invalid_argument;
};

}  // namespace fastmaf::record
