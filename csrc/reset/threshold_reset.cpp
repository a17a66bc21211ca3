// threshold_reset_ and mask_grads_ on a CPU: threads over mask words, so that no two write the same
// one.
#include "reset/threshold_reset.h"

#include <torch/csrc/stable/library.h>

#include <bit>
#include <cstring>

#include "common/cpu.h"
#include "reset/doors.h"

namespace fastunlearn {
namespace {

constexpr int64_t kWordsPerTask = 2048;

inline void write_zero(void* data, size_t element_bytes, int64_t i) {
  std::memset(static_cast<char*>(data) + i * element_bytes, 0, element_bytes);
}

// Bit j of the word: forget[j] > gamma * retain[j], for the `size` <= 32 elements of one word.
template <typename Importance>
FASTUNLEARN_INLINE uint32_t reset_word(const Importance* forget, const Importance* retain,
                                       Importance gamma, int size) {
  uint32_t word = 0;
  for (int j = 0; j < size; ++j) {
    const Importance limit = gamma * retain[j];
    word |= static_cast<uint32_t>(forget[j] > limit) << j;
  }
  return word;
}

template <typename Importance>
FASTUNLEARN_INLINE void reset_words(const void* forget, const void* retain, double gamma,
                                    int64_t size, int64_t begin, int64_t end, uint32_t* mask) {
  for (int64_t w = begin; w < end; ++w) {
    const int64_t first = 32 * w;
    mask[w] =
        reset_word(static_cast<const Importance*>(forget) + first,
                   static_cast<const Importance*>(retain) + first, static_cast<Importance>(gamma),
                   static_cast<int>(std::min<int64_t>(32, size - first)));
  }
}

FASTUNLEARN_CPU_CLONES
void reset_words_float(const void* forget, const void* retain, double gamma, int64_t size,
                       int64_t begin, int64_t end, uint32_t* mask) {
  reset_words<float>(forget, retain, gamma, size, begin, end, mask);
}

FASTUNLEARN_CPU_CLONES
void reset_words_double(const void* forget, const void* retain, double gamma, int64_t size,
                        int64_t begin, int64_t end, uint32_t* mask) {
  reset_words<double>(forget, retain, gamma, size, begin, end, mask);
}

void threshold_reset_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget,
                         const std::vector<Tensor>& retain, double gamma,
                         const std::vector<Tensor>& masks, const Tensor& counts) {
  const ThresholdDoor door(weights, forget, retain, gamma, masks, counts);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (size_t i = 0; i < weights.size(); ++i) {
    auto* mask = static_cast<uint32_t*>(masks[i].mutable_data_ptr());
    void* weight = weights[i].mutable_data_ptr();
    const size_t bytes = weights[i].element_size();
    const auto words =
        door.forget[i].scalar_type() == ScalarType::Double ? reset_words_double : reset_words_float;
    const void* f = door.forget[i].const_data_ptr();
    const void* r = door.retain[i].const_data_ptr();
    torch::stable::parallel_for(0, mask_words(door.sizes[i]), kWordsPerTask,
                                [&](int64_t begin, int64_t end) {
                                  words(f, r, gamma, door.sizes[i], begin, end, mask);
                                  for (int64_t w = begin; w < end; ++w) {
                                    for (uint32_t left = mask[w]; left != 0; left &= left - 1) {
                                      write_zero(weight, bytes, 32 * w + std::countr_zero(left));
                                    }
                                  }
                                });
    count[i] = 0;
    for (int64_t w = 0; w < mask_words(door.sizes[i]); ++w) count[i] += std::popcount(mask[w]);
  }
}

void mask_grads_cpu(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks) {
  const MaskGradsDoor door(grads, masks);
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto* mask = static_cast<const uint32_t*>(door.masks[i].const_data_ptr());
    char* grad = static_cast<char*>(grads[i].mutable_data_ptr());
    const size_t bytes = grads[i].element_size();
    const int64_t size = door.sizes[i];
    torch::stable::parallel_for(0, mask_words(size), kWordsPerTask,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t w = begin; w < end; ++w) {
                                    const int64_t first = 32 * w;
                                    const int64_t last = std::min(size, first + 32);
                                    if (mask[w] == 0) {  // most words of a sparse mask
                                      std::memset(grad + first * bytes, 0, (last - first) * bytes);
                                      continue;
                                    }
                                    for (int64_t e = first; e < last; ++e) {
                                      if (!(mask[w] >> (e - first) & 1)) write_zero(grad, bytes, e);
                                    }
                                  }
                                });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("threshold_reset_", TORCH_BOX(&threshold_reset_cpu));
  m.impl("mask_grads_", TORCH_BOX(&mask_grads_cpu));
}

}  // namespace fastunlearn
