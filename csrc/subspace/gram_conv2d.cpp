// gram_accumulate_conv2d_ on a CPU: patches are unfolded into panels that stay in the caches.
//
// With many features, all threads pack a stretch of patches and then share out the tiles of their
// product. With few, a thread packs and multiplies a slice of the patches alone, and the slices are
// summed in order. Neither cut depends on the number of threads, so the bits do not either.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <memory>

#include "common/dispatch.h"
#include "common/tasks_cpu.h"
#include "common/workspace.h"
#include "subspace/doors.h"
#include "subspace/gram_panel_cpu.h"

namespace fastunlearn {
namespace {

// Bytes packed at once for all threads, which read them from the L3 cache. Twice as many gained
// nothing measurable, though a Gram matrix of 2,304 features then passes through memory half as
// often.
constexpr int64_t kPackedBytes = int64_t{8} << 20;
// What one thread packs and sums alone: 3 x 3 tiles, half a megabyte of its L2 cache.
constexpr int kAloneTiles = 3;
// Slices of the patches when few groups leave threads idle: enough for 16 of them, each worth its
// share of the sum that follows.
constexpr int64_t kSlices = 16;
constexpr int64_t kShortestSlice = 4 * kPanelDepth;

// The patches of an image [N, G C, H, W]; feature = (c, i, j).
template <typename Scalar>
struct PatchPacker {
  using Acc = CpuAccumulator<Scalar>;
  static constexpr int kWidth = kPanelWidth<Acc>;
  static constexpr int kLanes = VectorOf<Acc>::kLanes;

  const Scalar* images;
  int64_t groups;
  Conv2dGeometry geometry;

  // panel [depth, kWidth]: `depth` patches from `patch` on, counted over all images, and the
  // features from `first` on; after the last, zeros fill a vector and the rest is never read.
  void operator()(int64_t group, int64_t first, int64_t patch, int depth, Acc* panel) const {
    const Conv2dGeometry& g = geometry;
    const int taps = g.kernel_h * g.kernel_w;
    const int64_t plane = int64_t{g.height} * g.width;
    const int64_t features = int64_t{g.channels} * taps;
    const int64_t positions = int64_t{g.out_h} * g.out_w;
    const int64_t sample_stride = groups * g.channels * plane;
    const int valid = static_cast<int>(std::min<int64_t>(kWidth, features - first));
    for (int j = 0; j < ceil_div(valid, kLanes) * kLanes; ++j) {
      const int64_t feature = first + j;
      if (j >= valid) {
        for (int k = 0; k < depth; ++k) panel[k * kWidth + j] = 0;
        continue;
      }
      const int tap = static_cast<int>(feature % taps);
      const int row_offset = tap / g.kernel_w * g.dilation_h - g.padding_h;
      const int column_offset = tap % g.kernel_w * g.dilation_w - g.padding_w;
      // Output columns [inside, outside) meet the image, the others its padding.
      const int inside = first_at_least(-column_offset, g.stride_w, g.out_w);
      const int outside = first_at_least(g.width - column_offset, g.stride_w, g.out_w);
      const Scalar* channel = images + patch / positions * sample_stride +
                              (group * g.channels + feature / taps) * plane;
      int out_row = static_cast<int>(patch % positions / g.out_w);
      int out_column = static_cast<int>(patch % positions % g.out_w);
      Acc* to = panel + j;
      for (int left = depth; left > 0;) {  // one output row, or the part of it in the panel
        const int end = std::min(g.out_w, out_column + left);
        left -= end - out_column;
        const int row = out_row * g.stride_h + row_offset;
        const bool row_inside = row >= 0 && row < g.height;
        const int from = std::clamp(row_inside ? inside : end, out_column, end);
        const int until = std::clamp(outside, from, end);
        for (; out_column < from; ++out_column, to += kWidth) *to = 0;
        const int64_t pixel = int64_t{row} * g.width + column_offset;
        for (; out_column < until; ++out_column, to += kWidth)
          *to = widen(channel[pixel + out_column * g.stride_w]);
        for (; out_column < end; ++out_column, to += kWidth) *to = 0;
        if (out_column == g.out_w) {
          out_column = 0;
          if (++out_row == g.out_h) {
            out_row = 0;
            channel += sample_stride;
          }
        }
      }
    }
  }

 private:
  // The first column in [0, last] with column * stride >= value.
  static int first_at_least(int value, int stride, int last) {
    return value <= 0 ? 0 : static_cast<int>(std::min<int64_t>(ceil_div(value, stride), last));
  }
};

template <typename Scalar, typename Master>
class GramConv2d {
 public:
  GramConv2d(const GramConv2dDoor& door, const Tensor& gram)
      : shape_(door.shape),
        patches_(door.shape.samples * door.shape.positions),
        panels_(ceil_div(door.shape.features, kPanelWidth<Acc>)),
        side_(ceil_div(panels_, kTilePanels)),
        pack_{static_cast<const Scalar*>(door.images.const_data_ptr()), door.shape.groups,
              door.geometry},
        weights_(door.weights ? static_cast<const Acc*>(door.weights->const_data_ptr()) : nullptr),
        tensor_(gram),
        gram_(static_cast<Master*>(gram.mutable_data_ptr())) {}

  void run() const { side_ <= kAloneTiles ? run_alone() : run_together(); }

 private:
  using Acc = CpuAccumulator<Scalar>;

  // Packs [panels, kPanelDepth, kPanelWidth] in parallel, then multiplies tiles in parallel.
  void run_together() const {
    struct None {};
    struct Tile {
      alignas(64) Acc sums[kTileSize<Acc>];
    };
    const int64_t layer_size = panels_ * kPanelSize<Acc>;
    const int64_t fit = kPackedBytes / (layer_size * int64_t{sizeof(Acc)});
    const int64_t most = std::clamp<int64_t>(fit, 1, kGramFlush / kPanelDepth);
    const int64_t stretch = std::min(most, ceil_div(patches_, kPanelDepth)) * kPanelDepth;
    const Tensor workspace =
        fastunlearn::workspace<Acc>(tensor_, stretch / kPanelDepth * layer_size);
    Acc* packed = static_cast<Acc*>(workspace.mutable_data_ptr());
    for (int64_t group = 0; group < shape_.groups; ++group) {
      for (int64_t first = 0; first < patches_; first += stretch) {
        const int64_t last = std::min(patches_, first + stretch);
        const int64_t layers = ceil_div(last - first, kPanelDepth);
        for_each_task<None>(layers * panels_, [&](None&, int64_t task) {
          const int64_t patch = first + task / panels_ * kPanelDepth;
          pack_(group, task % panels_ * kPanelWidth<Acc>, patch, depth(patch, last),
                packed + task * kPanelSize<Acc>);
        });
        for_each_task<Tile>(upper_tiles(side_), [&](Tile& tile, int64_t task) {
          const TileIndex index = upper_tile(task);
          std::memset(tile.sums, 0, sizeof tile.sums);
          for (int64_t layer = 0; layer < layers; ++layer) {
            const int64_t patch = first + layer * kPanelDepth;
            multiply_tile(packed + layer * layer_size, index, patch, depth(patch, last), tile.sums);
          }
          add_tile(tile.sums, index, gram_ + group * matrix());
        });
      }
    }
  }

  // Each thread packs and multiplies slices of the patches alone, all tiles of a group at once.
  void run_alone() const {
    struct Matrix {
      alignas(64) Acc packed[kAloneTiles * kTilePanels * kPanelSize<Acc>];
      alignas(64) Acc sums[kAloneTiles * (kAloneTiles + 1) / 2][kTileSize<Acc>];
    };
    const int64_t wanted =
        std::min(ceil_div(kSlices, shape_.groups), ceil_div(patches_, kShortestSlice));
    const int64_t slice_size = ceil_div(ceil_div(patches_, wanted), kPanelDepth) * kPanelDepth;
    const int64_t slices = ceil_div(patches_, slice_size);
    const int64_t count = shape_.groups * matrix();
    Tensor workspace = tensor_;
    if (slices > 1) {
      workspace = fastunlearn::workspace<Master>(tensor_, slices * count);
      torch::stable::zero_(workspace);
    }
    Master* partial = static_cast<Master*>(workspace.mutable_data_ptr());
    for_each_task<Matrix>(slices * shape_.groups, [&](Matrix& own, int64_t task) {
      const int64_t group = task % shape_.groups;
      const int64_t first = task / shape_.groups * slice_size;
      const int64_t last = std::min(patches_, first + slice_size);
      for (int64_t patch = first; patch < last; patch += kPanelDepth) {
        const bool start = (patch - first) % kGramFlush == 0;
        const bool end =
            (patch - first + kPanelDepth) % kGramFlush == 0 || patch + kPanelDepth >= last;
        for (int64_t panel = 0; panel < panels_; ++panel) {
          pack_(group, panel * kPanelWidth<Acc>, patch, depth(patch, last),
                own.packed + panel * kPanelSize<Acc>);
        }
        for (int64_t index = 0; index < upper_tiles(side_); ++index) {
          if (start) std::memset(own.sums[index], 0, sizeof own.sums[index]);
          multiply_tile(own.packed, upper_tile(index), patch, depth(patch, last), own.sums[index]);
          if (end) add_tile(own.sums[index], upper_tile(index), partial + task * matrix());
        }
      }
    });
    if (slices == 1) return;
    torch::stable::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Master sum = partial[i];
        for (int64_t s = 1; s < slices; ++s) sum += partial[s * count + i];
        gram_[i] += sum;
      }
    });
  }

  // Adds the product of one layer of panels, `depth` patches from `patch` on, to a tile.
  void multiply_tile(const Acc* packed, TileIndex tile, int64_t patch, int depth, Acc* sums) const {
    Acc of_patch[kPanelDepth];
    for (int k = 0; weights_ != nullptr && k < depth; ++k)
      of_patch[k] = weights_[(patch + k) / shape_.positions];
    for (int64_t j = tile.column * kTilePanels; j < last_panel(tile.column); ++j) {
      for (int64_t i = tile.row * kTilePanels; i < std::min(j + 1, last_panel(tile.row)); ++i) {
        const int64_t corner = i % kTilePanels * kTileWidth<Acc> + j % kTilePanels;
        multiply_panels_cpu(packed + i * kPanelSize<Acc>, packed + j * kPanelSize<Acc>,
                            weights_ != nullptr ? of_patch : nullptr, depth, width(i), width(j),
                            i == j, sums + corner * kPanelWidth<Acc>);
      }
    }
  }

  // Adds a tile to a matrix [features, features], mirrored below the diagonal.
  void add_tile(const Acc* sums, TileIndex tile, Master* matrix) const {
    const int64_t row = tile.row * kTileWidth<Acc>;
    const int64_t column = tile.column * kTileWidth<Acc>;
    const int rows = static_cast<int>(std::min<int64_t>(kTileWidth<Acc>, shape_.features - row));
    const int columns =
        static_cast<int>(std::min<int64_t>(kTileWidth<Acc>, shape_.features - column));
    for (int i = 0; i < rows; ++i) {
      Master* upper = matrix + (row + i) * shape_.features + column;
      for (int j = row == column ? i : 0; j < columns; ++j)
        upper[j] += sums[i * kTileWidth<Acc> + j];
    }
    for (int j = 0; j < columns; ++j) {
      Master* lower = matrix + (column + j) * shape_.features + row;
      for (int i = 0; i < (row == column ? j : rows); ++i)
        lower[i] += sums[i * kTileWidth<Acc> + j];
    }
  }

  int64_t matrix() const { return shape_.features * shape_.features; }
  int64_t last_panel(int64_t tile) const { return std::min(panels_, (tile + 1) * kTilePanels); }
  // Features of a panel, and patches of a layer.
  int width(int64_t panel) const {
    return static_cast<int>(
        std::min<int64_t>(kPanelWidth<Acc>, shape_.features - panel * kPanelWidth<Acc>));
  }
  static int depth(int64_t patch, int64_t last) {
    return static_cast<int>(std::min<int64_t>(kPanelDepth, last - patch));
  }

  GramShape shape_;
  int64_t patches_;  // of all samples
  int64_t panels_;   // of one layer: kPanelWidth features each
  int64_t side_;     // tiles along one side of the matrix
  PatchPacker<Scalar> pack_;
  const Acc* weights_;  // one per sample, or null
  Tensor tensor_;
  Master* gram_;  // [G, D, D]
};

void gram_accumulate_conv2d_cpu(const Tensor& gram, const Tensor& images,
                                const std::vector<int64_t>& kernel_size,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation,
                                std::optional<Tensor> weights) {
  const GramConv2dDoor door(gram, images, kernel_size, stride, padding, dilation, weights);
  if (gram.numel() == 0 || door.shape.samples == 0) return;
  dispatch_storage<CpuTypes>(door.images.scalar_type(), [&]<typename Scalar>() {
    if (gram.scalar_type() == ScalarType::Double) {
      GramConv2d<Scalar, double>(door, gram).run();
    } else if constexpr (sizeof(Scalar) < sizeof(double)) {  // the door refuses the others
      GramConv2d<Scalar, float>(door, gram).run();
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("gram_accumulate_conv2d_", TORCH_BOX(&gram_accumulate_conv2d_cpu));
}

}  // namespace fastunlearn
