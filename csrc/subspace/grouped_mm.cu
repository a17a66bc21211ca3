// grouped_mm_ and sketch_ on CUDA.
#include <torch/csrc/stable/library.h>

#include <array>

#include "common/launch.h"
#include "subspace/grouped_mm.cuh"
#include "subspace/lowrank_doors.h"

namespace fastunlearn {
namespace {

template <typename Scalar, typename Acc>
void launch_grouped(const char* op, const std::vector<Tensor>& out, const GroupedDoor& door,
                    const std::vector<int64_t>* seeds, bool transpose) {
  const DeviceStream device(out[0]);
  auto kernel = seeds ? (transpose ? grouped_mm_kernel<Scalar, Acc, true, true>
                                   : grouped_mm_kernel<Scalar, Acc, false, true>)
                      : (transpose ? grouped_mm_kernel<Scalar, Acc, true, false>
                                   : grouped_mm_kernel<Scalar, Acc, false, false>);
  for (const GroupedLaunch& launch : plan_grouped(door.shapes)) {
    GroupedParams params{};
    PiecesParams sums{};
    std::vector<Tensor> workspaces;  // freed after the launches, which is safe in stream order
    for (const int64_t i : launch.members) {
      const GroupedShape& shape = door.shapes[i];
      const int64_t pieces = grouped_pieces(shape);
      void* target = out[i].mutable_data_ptr();
      if (pieces > 1) {
        const std::array<int64_t, 3> size{pieces, shape.rows, shape.columns};
        workspaces.push_back(torch::stable::new_empty(out[i], {size.data(), size.size()}));
        const int64_t count = shape.rows * shape.columns;
        sums.members[sums.count] = {workspaces.back().data_ptr(), target, count, pieces};
        sums.first_block[sums.count + 1] =
            sums.first_block[sums.count] +
            static_cast<int32_t>((count + kGroupedThreads - 1) / kGroupedThreads);
        ++sums.count;
        target = workspaces.back().data_ptr();
      }
      params.members[params.count] = {door.a[i].const_data_ptr(),
                                      seeds ? nullptr : door.b[i].const_data_ptr(),
                                      target,
                                      shape.rows,
                                      shape.depth,
                                      seeds ? static_cast<uint64_t>((*seeds)[i]) : 0,
                                      static_cast<int32_t>(shape.columns)};
      ++params.count;
      params.first_block[params.count] = launch.first_block[params.count];
    }
    device.launch(op, kernel, launch.first_block.back(), dim3(kGroupedThreads), params);
    if (sums.count > 0) {
      device.launch(op, sum_pieces_kernel<Acc>, sums.first_block[sums.count], dim3(kGroupedThreads),
                    sums);
    }
  }
}

void grouped(const char* op, const std::vector<Tensor>& out, const GroupedDoor& door,
             const std::vector<int64_t>* seeds, bool transpose) {
  if (out.empty()) return;
  if (door.widened) return launch_grouped<float, double>(op, out, door, seeds, transpose);
  if (out[0].scalar_type() == ScalarType::Double)
    return launch_grouped<double, double>(op, out, door, seeds, transpose);
  launch_grouped<float, float>(op, out, door, seeds, transpose);
}

void grouped_mm_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& a,
                     const std::vector<Tensor>& b, bool transpose) {
  grouped("grouped_mm_", out, GroupedDoor("grouped_mm_", out, a, &b, nullptr, transpose), nullptr,
          transpose);
}

void sketch_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& matrices,
                 const std::vector<int64_t>& seeds, bool transpose) {
  grouped("sketch_", out, GroupedDoor("sketch_", out, matrices, nullptr, &seeds, transpose), &seeds,
          transpose);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("grouped_mm_", TORCH_BOX(&grouped_mm_cuda));
  m.impl("sketch_", TORCH_BOX(&sketch_cuda));
}

}  // namespace fastunlearn
