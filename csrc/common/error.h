// The two ways a native call can fail, and the check that raises the first.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastpeft {

// What was passed cannot be computed on; becomes ValueError in Python.
class ArgumentError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A CUDA call or launch failed; becomes fastpeft.CudaError in Python.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Without iostreams: a module that carries its own copy of libstdc++ crashed in them, in a process that had another
// (bench/LOG.md).
template <typename Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
    text += digits;
  } else if constexpr (std::is_integral_v<Part>) {
    text += std::to_string(part);
  } else {
    text += part;
  }
}

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

// check(k > 0, "nf4_linear: k is ", k, "; it must be positive")
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) throw ArgumentError(concat(parts...));
}

}  // namespace fastpeft
