#!/bin/sh
# Builds build/nf4_linear for Hopper and says whether a kernel spills or has its wgmmas serialised.
cd "$(dirname "$0")" || exit 1
mkdir -p build
core=../../csrc/cuda
for source in $core/nf4.cu $core/nf4_linear_tiles.cu $core/nf4_linear_tiles_adapter.cu $core/nf4_linear_fragments.cu $core/lora.cu $core/lora_beside.cu $core/dropout.cu \
  nf4_linear.cu lora.cu; do
  case $source in $core/*) object=build/core_$(basename "$source" .cu).o ;; *) object=build/$(basename "$source" .cu).o ;; esac
  if [ -f "$object" ] && [ -z "$(find ../../csrc lab.cuh "$source" -newer "$object")" ]; then continue; fi
  nvcc -gencode=arch=compute_90a,code=sm_90a -DFASTPEFT_WITH_SM_90A=1 -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr \
    -Xptxas -v -I../../csrc -I../../csrc/include -c -o "$object" "$source" 2> "${object%.o}.log" ||
    { cat "${object%.o}.log"; exit 1; }
  grep -E "C75|warning" "${object%.o}.log"
  grep -B1 -A1 -E "[1-9][0-9]* bytes (stack frame|spill)" "${object%.o}.log"
done
nvcc -cudart static -o build/nf4_linear build/*.o -ldl && echo "built $(pwd)/build/nf4_linear"
