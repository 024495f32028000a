#!/bin/sh
# Builds build/nf4_gemm and says whether a kernel spills or has its wgmmas serialised.
cd "$(dirname "$0")" || exit 1
mkdir -p build
nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++20 -O3 -lineinfo -Xptxas -v -cudart static -I../../csrc \
  -o build/nf4_gemm nf4_gemm.cu -ldl 2> build/build.log || { cat build/build.log; exit 1; }
grep -E "C75|warning" build/build.log
grep -B1 -A1 -E "[1-9][0-9]* bytes (stack frame|spill)" build/build.log
echo "built; $(grep -c 'Compiling entry' build/build.log) kernels, see $(pwd)/build/build.log"
