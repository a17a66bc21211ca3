// Dynamic shared memory, on a GPU and in the emulated build.
#pragma once

#include <cuda_runtime.h>

namespace fastunlearn {
namespace {  // unnamed: see "what it cannot catch" in tests/emulator/README.md

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef FASTUNLEARN_EMULATED
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

}  // namespace
}  // namespace fastunlearn
