// add_rounded_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "fisher/add_rounded.cuh"
#include "fisher/add_rounded_door.h"

namespace fastunlearn {
namespace {

void add_rounded_cuda(const std::vector<Tensor>& sums, const std::vector<Tensor>& addends,
                      int64_t seed, int64_t step, const std::vector<int64_t>& offsets) {
  const AddRoundedDoor door(sums, addends, offsets);
  if (sums.empty()) return;
  const DeviceStream device(sums[0]);
  for (const ListLaunch& launch : plan_tensor_list(door.sizes)) {
    AddRoundedParams params{};
    params.seed = static_cast<uint64_t>(seed);
    params.step = static_cast<uint64_t>(step);
    params.list =
        pack<kAddRoundedPointers>(launch, [&](int64_t i) -> ListEntry<kAddRoundedPointers> {
          return {{sums[i].mutable_data_ptr(), door.addends[i].data_ptr()},
                  door.sizes[i],
                  kBFloat16,
                  kFloat};
        });
    for (int32_t i = 0; i < params.list.count; ++i) {
      params.offsets[i] = offsets[params.list.tensor[i]];
    }
    device.launch("add_rounded_", add_rounded_kernel, launch.blocks, dim3(kListThreads), params);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("add_rounded_", TORCH_BOX(&add_rounded_cuda));
}

}  // namespace fastunlearn
