// What the choice of a kernel and its tiles depends on besides the sizes; pure host code.
#pragma once

namespace fastpeft::cuda {

struct DeviceLimits {
  int architecture;  // 90 for Hopper
  int sms;           // multiprocessors
  int smem_bytes;    // of shared memory that one thread block may have
};

}  // namespace fastpeft::cuda
