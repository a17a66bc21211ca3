// add_column_noise_ on a CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "codec/doors.h"
#include "common/cpu.h"
#include "common/philox.h"

namespace fastunlearn {
namespace {

// Rows 4 block to 4 block + 3, as far as there are.
template <typename T>
FASTUNLEARN_INLINE void add_noise(T* values, const T* scales, int64_t rows, int64_t columns,
                                  uint64_t seed, int64_t block) {
  constexpr int kChunk = 64;  // the four rows of a chunk of columns, so that the loop is a vector's
  const int64_t first = 4 * block;
  const auto count = static_cast<int>(std::min<int64_t>(4, rows - first));
  for (int64_t start = 0; start < columns; start += kChunk) {
    float noise[4][kChunk];
    for (int c = 0; c < kChunk; ++c) {
      const NormalBlock normal =
          normal_block(seed, static_cast<uint64_t>(block), static_cast<uint64_t>(start + c));
      for (int r = 0; r < 4; ++r) noise[r][c] = normal.value[r];
    }
    const auto width = static_cast<int>(std::min<int64_t>(kChunk, columns - start));
    for (int r = 0; r < count; ++r) {
      T* row = values + (first + r) * columns + start;
      for (int c = 0; c < width; ++c) row[c] = fused(scales[start + c], T{noise[r][c]}, row[c]);
    }
  }
}

FASTUNLEARN_CPU_CLONES
void add_noise_rows(float* values, const float* scales, int64_t rows, int64_t columns,
                    uint64_t seed, int64_t block) {
  add_noise(values, scales, rows, columns, seed, block);
}

FASTUNLEARN_CPU_CLONES
void add_noise_rows(double* values, const double* scales, int64_t rows, int64_t columns,
                    uint64_t seed, int64_t block) {
  add_noise(values, scales, rows, columns, seed, block);
}

void add_column_noise_cpu(const Tensor& values, const Tensor& scales, int64_t seed) {
  const ColumnNoiseDoor door(values, scales);
  auto add = [&]<typename T>() {
    auto* data = static_cast<T*>(values.mutable_data_ptr());
    const auto* scale = static_cast<const T*>(door.scales.const_data_ptr());
    torch::stable::parallel_for(0, (door.rows + 3) / 4, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        add_noise_rows(data, scale, door.rows, door.columns, static_cast<uint64_t>(seed), block);
    });
  };
  values.scalar_type() == ScalarType::Double ? add.operator()<double>() : add.operator()<float>();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("add_column_noise_", TORCH_BOX(&add_column_noise_cpu));
}

}  // namespace fastunlearn
