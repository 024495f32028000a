#!/bin/sh
# Builds build/nf4_linear for Hopper and says whether a kernel spills or has its wgmmas serialised.
cd "$(dirname "$0")" || exit 1
mkdir -p build
for source in ../../csrc/cuda/nf4.cu ../../csrc/cuda/nf4_linear_tiles.cu ../../csrc/cuda/nf4_linear_fragments.cu nf4_linear.cu; do
  object=build/$(basename "$source" .cu).o
  if [ -z "$(find ../../csrc "$source" -newer "$object" 2> /dev/null)" ] && [ -f "$object" ]; then continue; fi
  nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -Xptxas -v -I../../csrc \
    -I../../csrc/include -c -o "$object" "$source" 2> "${object%.o}.log" || { cat "${object%.o}.log"; exit 1; }
  grep -E "C75|warning" "${object%.o}.log"
  grep -B1 -A1 -E "[1-9][0-9]* bytes (stack frame|spill)" "${object%.o}.log"
done
nvcc -cudart static -o build/nf4_linear build/*.o -ldl && echo "built $(pwd)/build/nf4_linear"
