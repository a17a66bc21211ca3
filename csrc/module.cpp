// fastunlearn._C: importing it registers the operators. What Python sees of it is how it was built,
// and the launch planners, so that they can be tested without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "codec/codec_scores.h"
#include "common/tensor_list.h"
#include "fisher/sq_grad_channels.h"
#include "fisher/sq_grad_cpu_plan.h"
#include "fisher/sq_grad_tile.h"
#include "fisher/sq_grad_wgmma.h"
#include "subspace/gram_conv2d.h"
#include "subspace/grouped_mm.h"
#include "subspace/jacobi.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict build_info() {
  return py::dict("compiler"_a = FASTUNLEARN_COMPILER, "cuda"_a = FASTUNLEARN_CUDA_VERSION,
                  "cuda_architectures"_a = FASTUNLEARN_CUDA_ARCHITECTURES,
                  "torch_built_with"_a = FASTUNLEARN_TORCH_VERSION, "torch_target"_a = "2.11",
                  "python"_a = PY_VERSION, "system"_a = FASTUNLEARN_SYSTEM);
}

py::dict plan_sq_grad(int64_t groups, int64_t samples, int64_t positions, int64_t out_features,
                      int64_t in_features, bool convolution, bool tensor_cores,
                      int64_t multiprocessors, int64_t max_shared_bytes) {
  constexpr const char* kKernels[] = {"simt", "pointwise", "direct", "mma", "mma_tall", "mma_wide"};
  const auto plan =
      fastunlearn::plan_sq_grad({groups, samples, positions, out_features, in_features},
                                convolution, tensor_cores, {multiprocessors, max_shared_bytes});
  return py::dict("kernel"_a = kKernels[static_cast<int>(plan.kernel)],
                  "tiles_out"_a = plan.tiles_out, "tiles_in"_a = plan.tiles_in,
                  "splits"_a = plan.splits, "samples_per_split"_a = plan.samples_per_split,
                  "blocks"_a = plan.blocks);
}

py::dict plan_sq_grad_wgmma(int64_t samples, int64_t positions, int64_t out_features,
                            int64_t in_features, int64_t multiprocessors) {
  const auto plan = fastunlearn::plan_sq_grad_wgmma(
      {1, samples, positions, out_features, in_features}, multiprocessors);
  return py::dict("tile_in"_a = plan.tile_in, "cluster"_a = plan.cluster,
                  "tiles_out"_a = plan.tiles_out, "tiles_in"_a = plan.tiles_in,
                  "splits"_a = plan.splits, "samples_per_split"_a = plan.samples_per_split,
                  "blocks"_a = plan.blocks, "shared_bytes"_a = plan.shared_bytes);
}

py::dict plan_sq_grad_channels(int64_t samples, int64_t outer, int64_t channels, int64_t inner,
                               int64_t multiprocessors) {
  const auto plan =
      fastunlearn::plan_sq_grad_channels({samples, outer, channels, inner}, multiprocessors);
  return py::dict("tiles"_a = plan.tiles, "splits"_a = plan.splits,
                  "samples_per_split"_a = plan.samples_per_split, "blocks"_a = plan.blocks);
}

py::dict plan_gram_conv2d(int64_t groups, int64_t features, int64_t samples, int64_t positions,
                          int64_t multiprocessors) {
  const auto plan =
      fastunlearn::plan_gram_conv2d({groups, features, samples, positions}, multiprocessors);
  return py::dict("tiles"_a = plan.tiles, "splits"_a = plan.splits,
                  "patches_per_split"_a = plan.patches_per_split, "blocks"_a = plan.blocks);
}

py::dict plan_sq_grad_cpu(int64_t groups, int64_t samples, int64_t positions, int64_t rows,
                          int64_t lanes, int64_t packed_per_sample, int64_t element_bytes,
                          int64_t threads) {
  const auto plan = fastunlearn::plan_sq_grad_cpu({groups, samples, positions, 0, 0}, rows, lanes,
                                                  packed_per_sample, element_bytes, threads);
  return py::dict("row_tiles"_a = plan.row_tiles, "lane_tiles"_a = plan.lane_tiles,
                  "subtiles"_a = plan.subtiles, "panels"_a = plan.panels, "chunk"_a = plan.chunk,
                  "block"_a = plan.block);
}

py::tuple upper_tile(int64_t index) {
  const auto tile = fastunlearn::upper_tile(index);
  return py::make_tuple(tile.row, tile.column);
}

py::list plan_tensor_list(const std::vector<int64_t>& sizes, int64_t max_blocks) {
  py::list launches;
  for (const auto& launch : fastunlearn::plan_tensor_list(sizes, max_blocks)) {
    launches.append(py::dict("tensors"_a = launch.tensors, "blocks"_a = launch.blocks));
  }
  return launches;
}

py::list plan_grouped(const std::vector<std::array<int64_t, 3>>& shapes) {
  std::vector<fastunlearn::GroupedShape> grouped;
  for (const auto& [rows, depth, columns] : shapes) grouped.push_back({rows, depth, columns});
  py::list launches;
  for (const auto& launch : fastunlearn::plan_grouped(grouped)) {
    launches.append(py::dict("members"_a = launch.members, "first_block"_a = launch.first_block));
  }
  return launches;
}

py::dict plan_jacobi(int64_t size, int64_t element_bytes, bool with_rotation,
                     int64_t max_shared_bytes) {
  const auto plan = fastunlearn::plan_jacobi(size, element_bytes, with_rotation, max_shared_bytes);
  return py::dict("warps"_a = plan.warps, "shared_bytes"_a = plan.shared_bytes);
}

py::dict plan_line(int64_t rows, int64_t candidates, int64_t element_bytes, int64_t multiprocessors,
                   int64_t max_shared_bytes) {
  const auto plan =
      fastunlearn::plan_line(rows, candidates, element_bytes, multiprocessors, max_shared_bytes);
  return py::dict("padded"_a = plan.padded, "blocks"_a = plan.blocks,
                  "shared_bytes"_a = plan.shared_bytes, "workspace_bytes"_a = plan.workspace_bytes);
}

py::tuple tournament_pair(int32_t round, int32_t index, int32_t players) {
  const auto pair = fastunlearn::tournament_pair(round, index, players);
  return py::make_tuple(pair.first, pair.second);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled operators of fastunlearn (torch.ops.fastunlearn) and their launch planners.";
  m.def("build_info", &build_info, "How this library was built.");
  m.def("plan_sq_grad", &plan_sq_grad, "groups"_a, "samples"_a, "positions"_a, "out_features"_a,
        "in_features"_a, "convolution"_a, "tensor_cores"_a, "multiprocessors"_a,
        "max_shared_bytes"_a, "Kernel, tiles and splits of sq_grad_linear and sq_grad_conv2d.");
  m.def("plan_sq_grad_wgmma", &plan_sq_grad_wgmma, "samples"_a, "positions"_a, "out_features"_a,
        "in_features"_a, "multiprocessors"_a,
        "Tile, cluster and splits of sq_grad_linear on Hopper; tile_in = 0: not for that kernel.");
  m.def("plan_sq_grad_cpu", &plan_sq_grad_cpu, "groups"_a, "samples"_a, "positions"_a, "rows"_a,
        "lanes"_a, "packed_per_sample"_a, "element_bytes"_a, "threads"_a,
        "Tiles, chunks and blocks of sq_grad_linear and sq_grad_conv2d on a CPU.");
  m.def("plan_sq_grad_channels", &plan_sq_grad_channels, "samples"_a, "outer"_a, "channels"_a,
        "inner"_a, "multiprocessors"_a, "Blocks and splits of sq_grad_affine and sq_grad_bias.");
  m.def("plan_gram_conv2d", &plan_gram_conv2d, "groups"_a, "features"_a, "samples"_a, "positions"_a,
        "multiprocessors"_a, "Tiles and splits of gram_accumulate_conv2d_.");
  m.def("upper_tile", &upper_tile, "index"_a,
        "Row and column of a tile of gram_accumulate_conv2d_.");
  m.def("plan_tensor_list", &plan_tensor_list, "sizes"_a, "max_blocks"_a = INT32_MAX,
        "Launches of the operators over a list of tensors.");
  m.def("plan_grouped", &plan_grouped, "shapes"_a,
        "Launches of grouped_mm_ and sketch_ over (rows, depth, columns).");
  m.def("plan_jacobi", &plan_jacobi, "size"_a, "element_bytes"_a, "with_rotation"_a,
        "max_shared_bytes"_a, "Warps and shared memory of orthogonal_rows_.");
  m.def("plan_line", &plan_line, "rows"_a, "candidates"_a, "element_bytes"_a, "multiprocessors"_a,
        "max_shared_bytes"_a, "Where codec_scores sorts a feature, and how many blocks do.");
  m.def("tournament_pair", &tournament_pair, "round"_a, "index"_a, "players"_a,
        "The rows that orthogonal_rows_ rotates together.");
}
