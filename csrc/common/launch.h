// The only place that launches a kernel, so that the emulated build can put its own launcher here.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <limits>

#include "common/check.h"

#ifndef FASTUNLEARN_EMULATED
// A CPU build of torch has no CUDA streams; the library must still load there.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace fastunlearn {

inline void check_cuda(const char* what, cudaError_t error) {
  check(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// torch's current stream on the device of `tensor`, which is the current device while this lives.
class DeviceStream {
 public:
  explicit DeviceStream(const Tensor& tensor) {
#ifndef FASTUNLEARN_EMULATED
    check_cuda("cudaGetDevice", cudaGetDevice(&previous_));
    const int32_t device = tensor.get_device_index();
    check_cuda("cudaSetDevice", cudaSetDevice(device));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
#else
    (void)tensor;
    check_cuda("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, 0));
#endif
  }
  ~DeviceStream() {
#ifndef FASTUNLEARN_EMULATED
    cudaSetDevice(previous_);
#endif
  }
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  int multiprocessors() const { return multiprocessors_; }

  // The dynamic shared memory that a block may ask for.
  int64_t max_shared_bytes() const {
    int device = 0, bytes = 0;
    check_cuda("cudaGetDevice", cudaGetDevice(&device));
    check_cuda("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }

  // 90 for 9.0.
  int compute_capability() const {
    int device = 0, major = 0, minor = 0;
    check_cuda("cudaGetDevice", cudaGetDevice(&device));
    check_cuda("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check_cuda("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return 10 * major + minor;
  }

  // One launch; raises what the runtime says of it.
  template <typename... Params, typename... Args>
  void launch(const char* name, void (*kernel)(Params...), int64_t blocks, dim3 threads,
              Args... args) const {
    launch_shared(name, kernel, blocks, threads, 0, args...);
  }

  // The same with dynamic shared memory.
  template <typename... Params, typename... Args>
  void launch_shared(const char* name, void (*kernel)(Params...), int64_t blocks, dim3 threads,
                     int64_t shared_bytes, Args... args) const {
    const dim3 grid = prepare(name, reinterpret_cast<const void*>(kernel), blocks, shared_bytes);
#ifdef FASTUNLEARN_EMULATED
    emulator::launch(grid, threads, shared_bytes, [=] { kernel(Params(args)...); });
#else
    kernel<<<grid, threads, shared_bytes, stream_>>>(Params(args)...);
#endif
    check_cuda(name, cudaGetLastError());
  }

  // The same in clusters of `cluster` neighbouring blocks (Hopper and later).
  template <typename... Params, typename... Args>
  void launch_cluster(const char* name, void (*kernel)(Params...), int64_t blocks, dim3 threads,
                      int64_t shared_bytes, int cluster, Args... args) const {
    const dim3 grid = prepare(name, reinterpret_cast<const void*>(kernel), blocks, shared_bytes);
#ifdef FASTUNLEARN_EMULATED
    emulator::launch(
        grid, threads, shared_bytes, [=] { kernel(Params(args)...); },
        static_cast<unsigned>(cluster));
    check_cuda(name, cudaGetLastError());
#else
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(name, cudaLaunchKernelEx(&config, kernel, Params(args)...));
#endif
  }

 private:
  static dim3 prepare(const char* name, const void* kernel, int64_t blocks, int64_t shared_bytes) {
    check(blocks > 0 && blocks <= std::numeric_limits<int32_t>::max(), name, ": a grid of ", blocks,
          " blocks can not be launched; split the batch");
    if (shared_bytes > 48 * 1024) {  // more than that must be asked for
      check_cuda(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes)));
    }
    return dim3(static_cast<unsigned>(blocks));
  }

  int previous_ = 0;
  int multiprocessors_ = 1;
  cudaStream_t stream_ = nullptr;
};

}  // namespace fastunlearn
