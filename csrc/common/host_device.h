// Marks a function as callable from host and device code; nothing for the host compiler.
#pragma once

#ifdef __CUDACC__
#define FASTPEFT_HOST_DEVICE __host__ __device__
#else
#define FASTPEFT_HOST_DEVICE
#endif
