// The squared per-sample gradient on a CPU: the loop shared by Linear and Conv2d.
//
// A thread owns an output tile. It packs a stretch of positions of both operands into panels that
// stay in the L1/L2 cache (converting to the accumulator's type and unfolding patches on the way)
// and runs a register micro-kernel over them; a sample's product is squared into the tile at the
// sample's end.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "common/block_sum.h"
#include "common/cpu.h"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {

inline constexpr int kPanelOut = 32;
inline constexpr int kPanelIn = 64;
inline constexpr int kPanelDepth = 128;  // both panels: 48 KB in fp32
inline constexpr int kMicroOut = 4;  // 4 x 2 vectors: 8 of AVX-512's 32 registers hold the product
inline constexpr int kMicroVectors = 2;

// What becomes of a product that has been accumulated over one panel.
enum class PanelEnd { kKeep, kSquare };

// grads [depth, kPanelOut], inputs [depth, kPanelIn], product and squares [kPanelOut, kPanelIn].
// The product of one sample is carried from panel to panel until it is squared; with kPointwise the
// depth runs over samples, every product is squared at once, and blocks of kSumBlock samples are
// added to `squares`.
template <typename T, bool kPointwise>
FASTUNLEARN_INLINE void multiply_panels(const T* grads, const T* inputs, int depth, int rows,
                                        int columns, bool start, PanelEnd end, T* product,
                                        T* squares) {
  using Vector = typename VectorOf<T>::type;
  constexpr int kLanes = VectorOf<T>::kLanes;
  constexpr int kMicroIn = kMicroVectors * kLanes;
  auto at = [](T* tile, int p, int d) {
    return reinterpret_cast<Vector*>(tile + p * kPanelIn + d);
  };
  for (int p = 0; p < rows; p += kMicroOut) {
    for (int d = 0; d < columns; d += kMicroIn) {
      Vector sum[kMicroOut][kMicroVectors] = {};
      for (int i = 0; !start && i < kMicroOut; ++i) {
        for (int v = 0; v < kMicroVectors; ++v) sum[i][v] = *at(product, p + i, d + v * kLanes);
      }
      for (int k = 0; k < depth; ++k) {
        const T* g = grads + k * kPanelOut + p;
        const T* a = inputs + k * kPanelIn + d;
        Vector row[kMicroVectors];
        for (int v = 0; v < kMicroVectors; ++v)
          row[v] = *reinterpret_cast<const Vector*>(a + v * kLanes);
        for (int i = 0; i < kMicroOut; ++i) {
          for (int v = 0; v < kMicroVectors; ++v) {
            const Vector value = row[v] * g[i];
            sum[i][v] += kPointwise ? value * value : value;
          }
        }
        if (kPointwise && (k % kSumBlock == kSumBlock - 1 || k == depth - 1)) {
          for (int i = 0; i < kMicroOut; ++i) {
            for (int v = 0; v < kMicroVectors; ++v) {
              *at(squares, p + i, d + v * kLanes) += sum[i][v];
              sum[i][v] = Vector{};
            }
          }
        }
      }
      for (int i = 0; !kPointwise && i < kMicroOut; ++i) {
        for (int v = 0; v < kMicroVectors; ++v) {
          if (end == PanelEnd::kKeep) {
            *at(product, p + i, d + v * kLanes) = sum[i][v];
          } else {
            *at(squares, p + i, d + v * kLanes) += sum[i][v] * sum[i][v];
          }
        }
      }
    }
  }
}

// The clones: multiply_panels in its four forms, each compiled for three instruction sets.
void multiply_panels_cpu(const float* grads, const float* inputs, int depth, int rows, int columns,
                         bool start, PanelEnd end, float* product, float* squares);
void multiply_panels_cpu(const double* grads, const double* inputs, int depth, int rows,
                         int columns, bool start, PanelEnd end, double* product, double* squares);
void square_panels_cpu(const float* grads, const float* inputs, int depth, int rows, int columns,
                       float* squares);
void square_panels_cpu(const double* grads, const double* inputs, int depth, int rows, int columns,
                       double* squares);

// What a packer is asked for: `depth` positions from `position` on of one sample, or, with one
// position per sample, `depth` samples from `sample` on; `features` features from `feature` on.
struct PanelRequest {
  int64_t group;
  int64_t sample, position;
  int depth;
  bool along_samples;
  int64_t feature;
  int features;
};

template <typename T>
struct PanelScratch {
  alignas(64) T grads[kPanelDepth * kPanelOut];
  alignas(64) T inputs[kPanelDepth * kPanelIn];
  alignas(64) T product[kPanelOut * kPanelIn];
  alignas(64) T squares[kPanelOut * kPanelIn];  // of a block of samples
  alignas(64) T total[kPanelOut * kPanelIn];    // of all blocks before

  void end_block() {
    for (int i = 0; i < kPanelOut * kPanelIn; ++i) total[i] += squares[i];
    std::memset(squares, 0, sizeof squares);
  }
};

// pack.operator()<kWidth>(request, panel) fills panel [depth, kWidth]; columns past the request's
// features may hold anything, because they only reach outputs that are never stored.
template <typename Acc, typename GradPacker, typename InputPacker>
void sq_grad_cpu(const SqGradShape& shape, const GradPacker& pack_grads,
                 const InputPacker& pack_inputs, Acc* out) {
  const int64_t tiles_out = ceil_div(shape.out_features, kPanelOut);
  const int64_t tiles_in = ceil_div(shape.in_features, kPanelIn);
  const bool pointwise = shape.positions == 1;
  torch::stable::parallel_for(
      0, shape.groups * tiles_out * tiles_in, 1, [&](int64_t begin, int64_t end) {
        // Value-initialised: columns that no packer writes must not hold signalling garbage.
        const auto scratch = std::make_unique<PanelScratch<Acc>>();
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first_in = task % tiles_in * kPanelIn;
          const int64_t first_out = task / tiles_in % tiles_out * kPanelOut;
          const int64_t group = task / tiles_in / tiles_out;
          const int rows =
              static_cast<int>(std::min<int64_t>(kPanelOut, shape.out_features - first_out));
          const int columns =
              static_cast<int>(std::min<int64_t>(kPanelIn, shape.in_features - first_in));
          auto pack = [&](int64_t sample, int64_t position, int depth) {
            pack_grads.template operator()<kPanelOut>(
                PanelRequest{group, sample, position, depth, pointwise, first_out, rows},
                scratch->grads);
            pack_inputs.template operator()<kPanelIn>(
                PanelRequest{group, sample, position, depth, pointwise, first_in, columns},
                scratch->inputs);
          };
          std::memset(scratch->squares, 0, sizeof scratch->squares);
          std::memset(scratch->total, 0, sizeof scratch->total);
          if (pointwise) {
            for (int64_t n = 0; n < shape.samples; n += kPanelDepth) {
              const int depth = static_cast<int>(std::min<int64_t>(kPanelDepth, shape.samples - n));
              pack(n, 0, depth);
              square_panels_cpu(scratch->grads, scratch->inputs, depth, rows, columns,
                                scratch->squares);
            }
          } else {
            for (int64_t n = 0; n < shape.samples; ++n) {
              for (int64_t t = 0; t < shape.positions; t += kPanelDepth) {
                const int depth =
                    static_cast<int>(std::min<int64_t>(kPanelDepth, shape.positions - t));
                pack(n, t, depth);
                multiply_panels_cpu(
                    scratch->grads, scratch->inputs, depth, rows, columns, t == 0,
                    t + depth == shape.positions ? PanelEnd::kSquare : PanelEnd::kKeep,
                    scratch->product, scratch->squares);
              }
              if (n % kSumBlock == kSumBlock - 1) scratch->end_block();
            }
          }
          scratch->end_block();
          for (int p = 0; p < rows; ++p) {
            Acc* target =
                out + (group * shape.out_features + first_out + p) * shape.in_features + first_in;
            for (int d = 0; d < columns; ++d) target[d] += scratch->total[p * kPanelIn + d];
          }
        }
      });
}

}  // namespace fastunlearn
