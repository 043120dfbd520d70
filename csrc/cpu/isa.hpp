// Which instruction set runs: the widest that the CPU and the operating system offer, FASTMAF_ISA, or the one set last.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastmaf {

std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument naming what is there

template <class T>
const Kernels<T>& kernels();

}  // namespace fastmaf
