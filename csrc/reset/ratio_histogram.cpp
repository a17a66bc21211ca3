// ratio_histogram_ on a CPU: a histogram per chunk, then its full bins to the result.
#include "reset/ratio_histogram.h"

#include <torch/csrc/stable/library.h>

#include <bit>
#include <cstring>

#include "common/tensor_list_cpu.h"
#include "reset/doors.h"
#include "reset/ratio_cpu.h"

namespace fastunlearn {
namespace {

// Histograms that neighbouring elements take in turn: two increments of one counter in a row would
// wait for each other's store.
constexpr int kLanes = 4;
constexpr int32_t kNotCounted = INT32_MAX;  // as bits, a NaN in the last bin

struct HistogramChunk {
  const void *forget, *retain;
  int64_t begin, end;
  double eps;
  int32_t prefix;
  int level;
};

template <typename Importance>
FASTUNLEARN_INLINE void count_chunk(const HistogramChunk& chunk, uint32_t* counts) {
  const auto* forget = static_cast<const Importance*>(chunk.forget);
  const auto* retain = static_cast<const Importance*>(chunk.retain);
  const auto eps = static_cast<CpuAccumulator<Importance>>(chunk.eps);
  const RatioDigit digit(chunk.level);
  for (int64_t first = chunk.begin; first < chunk.end; first += kWordBits) {
    float ratios[kWordBits];
    importance_ratios(forget + first, retain + first, eps, chunk.end - first, ratios);
    int32_t bits[kWordBits];
    for (int j = 0; j < kWordBits; ++j) {
      const int32_t magnitude = std::bit_cast<int32_t>(ratios[j]) & INT32_MAX;  // -0 is 0
      bits[j] = ratios[j] >= 0.0f ? magnitude : kNotCounted;
    }
    if (chunk.level == 0) {
      for (int j = 0; j < kWordBits; ++j) {
        ++counts[kRatioBins * (j % kLanes) + digit.digit(bits[j])];
      }
      continue;
    }
    uint32_t found = 0;
    for (int j = 0; j < kWordBits; ++j) {
      found |= static_cast<uint32_t>(digit.matches(bits[j], chunk.prefix)) << j;
    }
    for (; found != 0; found &= found - 1) {
      const int j = std::countr_zero(found);
      ++counts[kRatioBins * (j % kLanes) + digit.digit(bits[j])];
    }
  }
}

FASTUNLEARN_CPU_CLONES
void count_chunk_float(const HistogramChunk& chunk, uint32_t* counts) {
  count_chunk<float>(chunk, counts);
}

FASTUNLEARN_CPU_CLONES
void count_chunk_bfloat16(const HistogramChunk& chunk, uint32_t* counts) {
  count_chunk<c10::BFloat16>(chunk, counts);
}

FASTUNLEARN_CPU_CLONES
void count_chunk_double(const HistogramChunk& chunk, uint32_t* counts) {
  count_chunk<double>(chunk, counts);
}

void ratio_histogram_cpu(Tensor counts, const std::vector<Tensor>& forget,
                         const std::vector<Tensor>& retain, const Tensor& eps, const Tensor& prefix,
                         int64_t level) {
  const RatioHistogramDoor door(counts, forget, retain, eps, prefix, level);
  const RatioHistogramParams& params = door.params;
  const Importances& importances = door.importances;
  std::vector<void (*)(const HistogramChunk&, uint32_t*)> count;
  for (const Tensor& importance : importances.forget) {
    const ElementType type = element_type(importance);
    count.push_back(type == kDouble     ? count_chunk_double
                    : type == kBFloat16 ? count_chunk_bfloat16
                                        : count_chunk_float);
  }
  for_each_chunk(importances.sizes, [&](const ListChunk& part) {
    const int64_t row = params.per_tensor ? part.entry : 0;
    uint32_t counted[kLanes * kRatioBins] = {};
    count[part.entry]({importances.forget[part.entry].const_data_ptr(),
                       importances.retain[part.entry].const_data_ptr(), part.begin, part.end,
                       params.eps[part.entry], params.prefix[row], params.level},
                      counted);
    const int last =
        params.level == 0 ? kRatioBins - 1 : kRatioBins;  // without what kNotCounted is in
    for (int bin = 0; bin < last; ++bin) {
      int64_t sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += counted[kRatioBins * lane + bin];
      // Integers add up to the same total in any order.
      if (sum) __atomic_fetch_add(params.counts + kRatioBins * row + bin, sum, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("ratio_histogram_", TORCH_BOX(&ratio_histogram_cpu));
}

}  // namespace fastunlearn
