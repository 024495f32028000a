// Where a shared function can be called: nothing for the host compiler.
#pragma once

#ifdef __CUDACC__
#define FASTPEFT_HOST_DEVICE __host__ __device__
// Device code under nvcc, host code elsewhere: for functions over what each side has of its own.
#define FASTPEFT_THIS_SIDE __device__
#else
#define FASTPEFT_HOST_DEVICE
#define FASTPEFT_THIS_SIDE
#endif
