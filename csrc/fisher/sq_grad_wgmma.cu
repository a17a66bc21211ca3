// Host side of the Hopper kernel of sq_grad_linear: tensor maps, plan, launch.
#include <cudaTypedefs.h>

#include <cstdlib>
#include <cstring>

#include "common/launch.h"
#include "common/splits.cuh"
#include "fisher/sq_grad_wgmma.cuh"
#include "fisher/sq_grad_wgmma_launch.h"

namespace fastunlearn {

namespace {

// No GPU has run this kernel yet, so it waits to be asked for; benchmarks/results/README.md.
bool asked_for() {
  const auto is_set = [] {
    const char* value = std::getenv("FASTUNLEARN_WGMMA");
    return value != nullptr && std::strcmp(value, "1") == 0;
  };
#ifdef FASTUNLEARN_EMULATED
  return is_set();  // tests change it
#else
  static const bool set = is_set();
  return set;
#endif
}

bool is_aligned(const Tensor& tensor, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// The driver's function that makes tensor maps, found at run time: the library links no libcuda.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda("cudaGetDriverEntryPointByVersion",
               cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found));
    check(found == cudaDriverEntryPointSuccess && function != nullptr,
          "sq_grad_linear: the driver has no cuTensorMapEncodeTiled; update it, or unset "
          "FASTUNLEARN_WGMMA");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// Boxes of kWgmmaPanel features by `rows` positions of one sample. `tensor` [N, T, features] keeps
// its three axes, so that a box past a sample's last position reads zeros and not the next sample.
CUtensorMap rows_map(const Tensor& tensor, const SqGradShape& shape, int64_t features, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(features),
                              static_cast<cuuint64_t>(shape.positions),
                              static_cast<cuuint64_t>(shape.samples)};
  const cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};  // bytes; the first is 2
  const cuuint32_t box[] = {kWgmmaPanel, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto type = tensor.scalar_type() == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type, 3, const_cast<void*>(tensor.const_data_ptr()), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "sq_grad_linear: cuTensorMapEncodeTiled returned ", result, " for ",
        describe(tensor));
  return map;
}

template <typename Scalar, int kTileIn>
void launch_tile(const DeviceStream& device, const Tensor& out, const LinearDoor& door,
                 const SqGradWgmmaPlan& plan) {
  constexpr int kRows = WgmmaTile<kTileIn>::kStageRows;
  const SqGradShape& s = door.shape;
  const CUtensorMap grad = rows_map(door.grad, s, s.out_features, kRows);
  const CUtensorMap input = rows_map(door.input, s, s.in_features, kRows / plan.cluster);
  with_splits<float>(device, out, plan.splits, [&](float* target) {
    device.launch_cluster("sq_grad_wgmma", sq_grad_wgmma_kernel<Scalar, kTileIn>, plan.blocks,
                          dim3(kWgmmaThreads), plan.shared_bytes, plan.cluster, grad, input, s,
                          plan, target);
  });
}

template <typename Scalar>
void launch_type(const DeviceStream& device, const Tensor& out, const LinearDoor& door,
                 const SqGradWgmmaPlan& plan) {
  if (plan.tile_in == 128) return launch_tile<Scalar, 128>(device, out, door, plan);
  if (plan.tile_in == 192) return launch_tile<Scalar, 192>(device, out, door, plan);
  launch_tile<Scalar, 256>(device, out, door, plan);
}

}  // namespace

bool launch_sq_grad_wgmma(const Tensor& out, const LinearDoor& door) {
  const ScalarType type = door.input.scalar_type();
  if (!asked_for() || (type != ScalarType::BFloat16 && type != ScalarType::Half)) return false;
  // The copy engine wants 16-byte rows; pairs of results are written at once.
  if (!is_aligned(door.grad, 16) || !is_aligned(door.input, 16) || !is_aligned(out, 8))
    return false;
  const DeviceStream device(out);
  const SqGradWgmmaPlan plan = plan_sq_grad_wgmma(door.shape, device.multiprocessors());
  if (plan.tile_in == 0 || device.compute_capability() != 90 ||
      plan.shared_bytes > device.max_shared_bytes())
    return false;
  if (type == ScalarType::BFloat16) {
    launch_type<__nv_bfloat16>(device, out, door, plan);
  } else {
    launch_type<__half>(device, out, door, plan);
  }
  return true;
}

}  // namespace fastunlearn
