#!/bin/sh
# Builds build/nf4_linear, or build/NAME for `make.sh NAME` (nf4_linear, adamw), for Hopper and says whether a kernel
# spills or has its wgmmas serialised.
cd "$(dirname "$0")" || exit 1
mkdir -p build
name=${1:-nf4_linear}
core=../../csrc/cuda
case $name in
  nf4_linear) sources="$core/nf4.cu $core/nf4_linear_tiles.cu $core/nf4_linear_tiles_adapter.cu
    $core/nf4_linear_fragments.cu $core/lora.cu $core/lora_beside.cu $core/dropout.cu nf4_linear.cu lora.cu" ;;
  adamw) sources="$core/adamw.cu $core/adamw_norm.cu $core/adamw_far.cu $core/arena.cu adamw.cu adamw_time.cu" ;;
  *) echo "make.sh nf4_linear | adamw"; exit 2 ;;
esac
objects=
for source in $sources; do
  case $source in $core/*) object=build/core_$(basename "$source" .cu).o ;; *) object=build/$(basename "$source" .cu).o ;; esac
  objects="$objects $object"
  if [ -f "$object" ] && [ -z "$(find ../../csrc ./*.cuh "$source" -newer "$object")" ]; then continue; fi
  nvcc -gencode=arch=compute_90a,code=sm_90a -DFASTPEFT_WITH_SM_90A=1 -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr \
    -Xptxas -v -I../../csrc -I../../csrc/include -c -o "$object" "$source" 2> "${object%.o}.log" ||
    { cat "${object%.o}.log"; exit 1; }
  grep -E "C75|warning" "${object%.o}.log"
  grep -B1 -A1 -E "[1-9][0-9]* bytes (stack frame|spill)" "${object%.o}.log"
done
# shellcheck disable=SC2086
nvcc -cudart static -o "build/$name" $objects -ldl && echo "built $(pwd)/build/$name"
