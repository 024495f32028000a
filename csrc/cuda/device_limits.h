// What the choice of a kernel and its tiles depends on besides the sizes; pure host code.
#pragma once

namespace fastpeft::cuda {

struct DeviceLimits {
  int architecture;  // compute capability: 90 for Hopper
  int sms;           // multiprocessors
  int smem_bytes;    // of shared memory that one thread block may have
  bool wgmma;        // a Hopper, and this build has code of sm_90a
};

}  // namespace fastpeft::cuda
