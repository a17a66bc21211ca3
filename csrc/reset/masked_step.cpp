// mask_grads_ and the masked optimizer steps on a CPU: threads over chunks, set bits one by one.
#include "reset/masked_step.h"

#include <torch/csrc/stable/library.h>

#include <bit>
#include <cstring>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/tensor_list_cpu.h"
#include "reset/doors.h"

namespace fastunlearn {
namespace {

template <typename Grad>
void mask_chunk(Grad* grad, const uint32_t* mask, const ListChunk& chunk) {
  for (int64_t first = chunk.begin; first < chunk.end; first += 32) {
    const uint32_t word = mask[first / 32];
    const int64_t size = std::min<int64_t>(32, chunk.end - first);
    if (word == 0) {  // most words of a sparse mask
      std::memset(static_cast<void*>(grad + first), 0, size * sizeof(Grad));
      continue;
    }
    for (int64_t j = 0; j < size; ++j) {
      grad[first + j] = word >> j & 1 ? grad[first + j] : Grad(0.0f);
    }
  }
}

void mask_grads_cpu(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks) {
  const MaskDoor door("mask_grads_", "gradients", grads, masks);
  for_each_chunk(door.sizes, [&](const ListChunk& chunk) {
    const auto* mask = static_cast<const uint32_t*>(door.masks[chunk.entry].const_data_ptr());
    dispatch_storage<CpuTypes>(grads[chunk.entry].scalar_type(), [&]<typename Grad>() {
      mask_chunk(static_cast<Grad*>(grads[chunk.entry].mutable_data_ptr()), mask, chunk);
    });
  });
}

template <typename Weight, typename Rule>
void step_chunk(const Rule& rule, Weight* weight, const Weight* grad, const uint32_t* mask,
                const int64_t* starts, CpuAccumulator<Weight>* first,
                CpuAccumulator<Weight>* second, const ListChunk& chunk) {
  int64_t k = starts[chunk.begin / kStartBlock];
  for (int64_t word = chunk.begin; word < chunk.end; word += 32) {
    uint32_t left = mask[word / 32] & valid_bits(chunk.end - word);
    for (; left != 0; left &= left - 1, ++k) {
      const int64_t i = word + std::countr_zero(left);
      weight[i] = Weight(rule.template step<CpuAccumulator<Weight>>(
          widen(weight[i]), widen(grad[i]), first + k, second + k));
    }
  }
}

template <typename Rule>
void masked_step(const MaskedStepDoor& door, const std::vector<Tensor>& weights,
                 const std::vector<Tensor>& starts, const std::vector<Tensor>& first,
                 const std::vector<Tensor>& second, const Rule& rule) {
  for_each_chunk(door.sizes, [&](const ListChunk& chunk) {
    const int64_t i = chunk.entry;
    dispatch_storage<CpuTypes>(weights[i].scalar_type(), [&]<typename Weight>() {
      using Acc = CpuAccumulator<Weight>;
      step_chunk(rule, static_cast<Weight*>(weights[i].mutable_data_ptr()),
                 static_cast<const Weight*>(door.grads[i].const_data_ptr()),
                 static_cast<const uint32_t*>(door.masks[i].const_data_ptr()),
                 static_cast<const int64_t*>(starts[i].const_data_ptr()),
                 static_cast<Acc*>(first[i].mutable_data_ptr()),
                 static_cast<Acc*>(second[i].mutable_data_ptr()), chunk);
    });
  });
}

void masked_sgd_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& masks, const std::vector<Tensor>& starts,
                    const std::vector<Tensor>& buffers, double lr, double momentum,
                    double weight_decay, bool nesterov) {
  const MaskedStepDoor door("masked_sgd_", weights, grads, masks, starts,
                            {{"momentum_buffers", &buffers}}, momentum == 0);
  masked_step(door, weights, starts, buffers, buffers,
              SgdRule{lr, momentum, weight_decay, nesterov});
}

void masked_adamw_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                      const std::vector<Tensor>& masks, const std::vector<Tensor>& starts,
                      const std::vector<Tensor>& means, const std::vector<Tensor>& squares,
                      double lr, double beta1, double beta2, double eps, double weight_decay,
                      int64_t step) {
  const MaskedStepDoor door("masked_adamw_", weights, grads, masks, starts,
                            {{"means", &means}, {"squares", &squares}});
  masked_step(door, weights, starts, means, squares,
              adamw_rule(lr, beta1, beta2, eps, weight_decay, step));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("mask_grads_", TORCH_BOX(&mask_grads_cpu));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_cpu));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_cpu));
}

}  // namespace fastunlearn
