// What the CPU at hand can do, asked once. FASTPEFT_CPU=scalar or avx2 in the environment hides the wider units.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

namespace fastpeft::cpu {

struct Features {
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // F, BW and VL
};

inline Features cpu_features() {
  static const Features features = [] {
    Features found;
    const char* chosen = std::getenv("FASTPEFT_CPU");
    const std::string limit = chosen == nullptr ? "" : chosen;
#if defined(__x86_64__)
    __builtin_cpu_init();
    found.avx2 = limit != "scalar" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c");
    found.avx512 = found.avx2 && limit != "avx2" && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return found;
  }();
  return features;
}

inline std::vector<std::string> feature_names() {
  std::vector<std::string> names;
  if (cpu_features().avx2) names.push_back("avx2");
  if (cpu_features().avx512) names.push_back("avx512");
  return names;
}

}  // namespace fastpeft::cpu
