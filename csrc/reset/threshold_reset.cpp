// threshold_reset_ on a CPU: threads over chunks, vectors over the 32 elements of a mask word.
#include "reset/threshold_reset.h"

#include <torch/csrc/stable/library.h>

#include <bit>

#include "common/dispatch.h"
#include "common/tensor_list_cpu.h"
#include "reset/doors.h"
#include "reset/ratio_cpu.h"

namespace fastunlearn {
namespace {

struct ResetChunk {
  const void *forget, *retain, *initial;
  void* weight;
  uint32_t* mask;
  int64_t begin, end;
  const double* rule;
  double dampening;
  ResetMode mode;
  ElementType type;
};

// Replaces the weights whose bit is set; the others are written back as they were, a vector at a
// time, because memory moves whole cache lines anyway.
template <typename Weight>
FASTUNLEARN_INLINE void replace_word(const ResetChunk& chunk, int64_t first, int size,
                                     uint32_t word, const float* ratios) {
  using Acc = CpuAccumulator<Weight>;
  auto* weight = static_cast<Weight*>(chunk.weight) + first;
  if (chunk.mode == kFill) {
    const Weight fill(static_cast<Acc>(chunk.rule[kFillValue]));
    for (int j = 0; j < size; ++j) weight[j] = word >> j & 1 ? fill : weight[j];
  } else if (chunk.mode == kInit) {
    const auto* initial = static_cast<const Weight*>(chunk.initial) + first;
    for (int j = 0; j < size; ++j) weight[j] = word >> j & 1 ? initial[j] : weight[j];
  } else {
    const auto dampening = static_cast<Acc>(chunk.dampening);
    for (int j = 0; j < size; ++j) {
      const Acc factor = std::min(Acc(1), dampening / static_cast<Acc>(ratios[j]));
      weight[j] = word >> j & 1 ? Weight(widen(weight[j]) * factor) : weight[j];
    }
  }
}

template <typename Weight, typename Importance>
FASTUNLEARN_INLINE int64_t reset_chunk(const ResetChunk& chunk) {
  const auto* forget = static_cast<const Importance*>(chunk.forget);
  const auto* retain = static_cast<const Importance*>(chunk.retain);
  const auto gamma = static_cast<float>(chunk.rule[kGamma]);
  const auto eps = static_cast<CpuAccumulator<Importance>>(chunk.rule[kEps]);
  int64_t count = 0;
  for (int64_t first = chunk.begin; first < chunk.end; first += kWordBits) {
    const int64_t size = std::min<int64_t>(kWordBits, chunk.end - first);
    float ratios[kWordBits];
    importance_ratios(forget + first, retain + first, eps, size, ratios);
    uint32_t word = 0;
    for (int j = 0; j < kWordBits; ++j) word |= static_cast<uint32_t>(ratios[j] > gamma) << j;
    chunk.mask[first / kWordBits] = word;
    count += std::popcount(word);
    if (word == 0) continue;
    if (size == kWordBits) {
      replace_word<Weight>(chunk, first, kWordBits, word, ratios);
    } else {
      replace_word<Weight>(chunk, first, static_cast<int>(size), word, ratios);
    }
  }
  return count;
}

template <typename Importance>
FASTUNLEARN_INLINE int64_t reset_chunk_of(const ResetChunk& chunk) {
  switch (chunk.type) {
    case kBFloat16:
      return reset_chunk<c10::BFloat16, Importance>(chunk);
    case kHalf:
      return reset_chunk<c10::Half, Importance>(chunk);
    case kDouble:
      return reset_chunk<double, Importance>(chunk);
    default:
      return reset_chunk<float, Importance>(chunk);
  }
}

FASTUNLEARN_CPU_CLONES
int64_t reset_chunk_float(const ResetChunk& chunk) { return reset_chunk_of<float>(chunk); }

FASTUNLEARN_CPU_CLONES
int64_t reset_chunk_bfloat16(const ResetChunk& chunk) {
  return reset_chunk_of<c10::BFloat16>(chunk);
}

FASTUNLEARN_CPU_CLONES
int64_t reset_chunk_double(const ResetChunk& chunk) { return reset_chunk_of<double>(chunk); }

void threshold_reset_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget,
                         const std::vector<Tensor>& retain, const Tensor& rules, int64_t mode,
                         double dampening, const std::vector<Tensor>& initial,
                         const std::vector<Tensor>& masks, Tensor counts) {
  const ThresholdDoor door(weights, forget, retain, rules, mode, initial, masks, counts);
  torch::stable::zero_(counts);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  const auto* rule = static_cast<const double*>(rules.const_data_ptr());
  std::vector<ResetChunk> whole;
  std::vector<int64_t (*)(const ResetChunk&)> reset;
  for (size_t i = 0; i < weights.size(); ++i) {
    whole.push_back(
        {door.importances.forget[i].const_data_ptr(), door.importances.retain[i].const_data_ptr(),
         mode == kInit ? door.initial[i].const_data_ptr() : nullptr, weights[i].mutable_data_ptr(),
         static_cast<uint32_t*>(masks[i].mutable_data_ptr()), 0, 0, rule + kResetRules * i,
         dampening, static_cast<ResetMode>(mode), element_type(weights[i])});
    const ElementType importance = element_type(door.importances.forget[i]);
    reset.push_back(importance == kDouble     ? reset_chunk_double
                    : importance == kBFloat16 ? reset_chunk_bfloat16
                                              : reset_chunk_float);
  }
  for_each_chunk(door.importances.sizes, [&](const ListChunk& part) {
    ResetChunk chunk = whole[part.entry];
    chunk.begin = part.begin;
    chunk.end = part.end;
    // Integers add up to the same total in any order.
    __atomic_fetch_add(count + part.entry, reset[part.entry](chunk), __ATOMIC_RELAXED);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("threshold_reset_", TORCH_BOX(&threshold_reset_cpu));
}

}  // namespace fastunlearn
