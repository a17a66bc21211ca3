// The doors of the reset operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <bit>
#include <vector>

#include "common/list_door.h"
#include "reset/masked_step.h"
#include "reset/ratio_histogram.h"
#include "reset/threshold_reset.h"

namespace fastunlearn {

inline int64_t mask_words(int64_t elements) { return (elements + 31) / 32; }

// Of a tensor that is_storage_type().
inline ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::Double:
      return kDouble;
    default:
      return kFloat;
  }
}

inline void check_mask(const char* op, size_t i, const Tensor& mask, const Tensor& masked) {
  check(mask.scalar_type() == ScalarType::Int && mask.dim() == 1 &&
            mask.size(0) == mask_words(masked.numel()) && same_device(mask, masked),
        op, ": masks[", i, "] is ", describe(mask), ", expected Int [", mask_words(masked.numel()),
        "] beside ", describe(masked));
}

// A small table that an operator reads or writes: `type` [rows, columns], or [rows] for 0 columns.
inline void check_table(const char* op, const char* name, const Tensor& table, ScalarType type,
                        int64_t rows, int64_t columns = 0) {
  const bool shaped = columns == 0
                          ? table.dim() == 1 && table.size(0) == rows
                          : table.dim() == 2 && table.size(0) == rows && table.size(1) == columns;
  check(shaped && table.scalar_type() == type && table.is_contiguous(), op, ": ", name, " is ",
        describe(table), ", expected contiguous ", torch::headeronly::toString(type), " [", rows,
        columns ? ", " : "", columns ? std::to_string(columns) : "", "]");
}

inline void check_floating(const char* op, const char* name, size_t i, const Tensor& tensor,
                           const Tensor& beside) {
  check(is_storage_type(tensor.scalar_type()), op, ": ", name, "[", i, "] is ", describe(tensor),
        "; float32, bfloat16, float16 or float64 is needed");
  check(same_device(tensor, beside), op, ": ", name, "[", i, "] is ", describe(tensor), " but ",
        name, "[0] or its table is ", describe(beside), "; pass one list per device");
}

// Pairs of importances, contiguous, each pair of one shape and type.
struct Importances {
  std::vector<Tensor> forget, retain;
  std::vector<int64_t> sizes;

  Importances(const char* op, const std::vector<Tensor>& forget_,
              const std::vector<Tensor>& retain_, const Tensor& beside) {
    check_list(op, "retain importances", retain_, "forget importances", forget_);
    for (size_t i = 0; i < forget_.size(); ++i) {
      const Tensor &f = forget_[i], &r = retain_[i];
      check(same_shape(f, r) && f.scalar_type() == r.scalar_type() && same_device(f, r), op,
            ": forget[", i, "] is ", describe(f), " but retain[", i, "] is ", describe(r));
      check(same_device(f, beside), op, ": forget[", i, "] is ", describe(f), " beside ",
            describe(beside), "; pass one list per device");
      check(f.scalar_type() == ScalarType::Float || f.scalar_type() == ScalarType::BFloat16 ||
                f.scalar_type() == ScalarType::Double,
            op, ": forget[", i, "] is ", describe(f),
            "; importances are float32, bfloat16 or float64");
      forget.push_back(readable(op, "forget", f, beside));
      retain.push_back(readable(op, "retain", r, beside));
      sizes.push_back(f.numel());
    }
  }
};

struct ThresholdDoor {
  Importances importances;
  std::vector<Tensor> initial;

  ThresholdDoor(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget,
                const std::vector<Tensor>& retain, const Tensor& rules, int64_t mode,
                const std::vector<Tensor>& initial_, const std::vector<Tensor>& masks,
                const Tensor& counts)
      : importances(kOp, forget, retain, counts) {
    check_list(kOp, "forget importances", forget, "weights", weights);
    check_list(kOp, "masks", masks, "weights", weights);
    check(mode == kFill || mode == kInit || mode == kDampen, kOp, ": mode is ", mode,
          "; 0 fills, 1 takes initial values, 2 dampens");
    if (mode == kInit) check_list(kOp, "initial values", initial_, "weights", weights);
    const auto n = static_cast<int64_t>(weights.size());
    check_table(kOp, "rules", rules, ScalarType::Double, n, kResetRules);
    check(same_device(rules, counts), kOp, ": rules and counts must be on one device");
    check_table(kOp, "counts", counts, ScalarType::Long, n);
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& weight = weights[i];
      check_output(kOp, "weight", weight);
      check_floating(kOp, "weights", i, weight, counts);
      check(same_shape(weight, forget[i]), kOp, ": forget[", i, "] is ", describe(forget[i]),
            " but the weight is ", describe(weight));
      check_mask(kOp, i, masks[i], weight);
      check_output(kOp, "mask", masks[i]);
      if (mode != kInit) continue;
      check(same_shape(initial_[i], weight) && same_device(initial_[i], weight) &&
                initial_[i].scalar_type() == weight.scalar_type(),
            kOp, ": initial[", i, "] is ", describe(initial_[i]), " but the weight is ",
            describe(weight));
      initial.push_back(torch::stable::contiguous(initial_[i]));
    }
    check_apart(
        kOp, {{"weights", &weights}, {"masks", &masks}},
        {{"forget", &importances.forget}, {"retain", &importances.retain}, {"initial", &initial}});
  }

 private:
  static constexpr const char* kOp = "threshold_reset_";
};

struct RatioHistogramDoor {
  Importances importances;
  RatioHistogramParams params{};

  RatioHistogramDoor(const Tensor& counts, const std::vector<Tensor>& forget,
                     const std::vector<Tensor>& retain, const Tensor& eps, const Tensor& prefix,
                     int64_t level)
      : importances(kOp, forget, retain, counts) {
    const auto n = static_cast<int64_t>(forget.size());
    const int64_t rows = counts.dim() == 2 ? counts.size(0) : 0;
    check(rows == 1 || rows == n, kOp, ": counts is ", describe(counts), ", expected [1, ",
          kRatioBins, "] or one row for each of ", n, " tensors");
    check(level >= 0 && level < kRatioLevels, kOp, ": level is ", level, ", expected 0, 1 or 2");
    check_table(kOp, "counts", counts, ScalarType::Long, rows, kRatioBins);
    check_table(kOp, "eps", eps, ScalarType::Double, n);
    check_table(kOp, "prefix", prefix, ScalarType::Int, rows);
    check(same_device(eps, counts) && same_device(prefix, counts), kOp,
          ": eps, prefix and counts must be on one device");
    params.eps = static_cast<const double*>(eps.const_data_ptr());
    params.prefix = static_cast<const int32_t*>(prefix.const_data_ptr());
    params.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
    params.per_tensor = rows == n;
    params.level = static_cast<int32_t>(level);
  }

 private:
  static constexpr const char* kOp = "ratio_histogram_";
};

// What mask_grads_ and the masked steps write, and the masks that say where.
struct MaskDoor {
  std::vector<Tensor> masks;
  std::vector<int64_t> sizes;

  MaskDoor(const char* op, const char* name, const std::vector<Tensor>& written,
           const std::vector<Tensor>& masks_) {
    check_list(op, "masks", masks_, name, written);
    for (size_t i = 0; i < written.size(); ++i) {
      check_output(op, name, written[i]);
      check_floating(op, name, i, written[i], written[0]);
      check_mask(op, i, masks_[i], written[i]);
      masks.push_back(torch::stable::contiguous(masks_[i]));
      sizes.push_back(written[i].numel());
    }
    check_apart(op, {{name, &written}}, {{"masks", &masks}});
  }
};

// Whether starts[block] bits are set before each block of words, and as many in all as the last
// says.
inline bool starts_fit(const Tensor& mask, const Tensor& starts, int64_t elements) {
  const auto* word = static_cast<const uint32_t*>(mask.const_data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.const_data_ptr());
  int64_t bits = 0;
  for (int64_t w = 0; w < mask_words(elements); ++w) {
    if (w % (kStartBlock / 32) == 0 && *start++ != bits) return false;
    bits += std::popcount(word[w] & valid_bits(elements - 32 * w));
  }
  return *start == bits;
}

struct MaskedStepDoor : MaskDoor {
  std::vector<Tensor> grads;

  // States are as long as the mask has bits, the last of `starts`; looking there on a GPU would
  // wait for it, so there the caller is trusted. A step that keeps no state may leave it empty.
  MaskedStepDoor(const char* op, const std::vector<Tensor>& weights,
                 const std::vector<Tensor>& grads_, const std::vector<Tensor>& masks_,
                 const std::vector<Tensor>& starts, std::vector<NamedList> states,
                 bool stateless = false)
      : MaskDoor(op, "weights", weights, masks_) {
    check_list(op, "gradients", grads_, "weights", weights);
    check_list(op, "starts", starts, "weights", weights);
    for (const NamedList& list : states) {
      check_list(op, list.name, *list.tensors, "weights", weights);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor &weight = weights[i], &grad = grads_[i];
      check(same_shape(grad, weight) && same_device(grad, weight) &&
                grad.scalar_type() == weight.scalar_type(),
            op, ": grads[", i, "] is ", describe(grad), " but the weight is ", describe(weight));
      grads.push_back(torch::stable::contiguous(grad));
      check_table(op, "starts", starts[i], ScalarType::Long, mask_starts(sizes[i]) + 1);
      check(same_device(starts[i], weight), op, ": starts[", i, "] is ", describe(starts[i]),
            " but the weight is ", describe(weight));
      const bool seen = weight.is_cpu();
      check(!seen || starts_fit(masks[i], starts[i], sizes[i]), op, ": starts[", i,
            "] is not that of masks[", i, "]; call mask_starts again");
      for (const NamedList& list : states) {
        const Tensor& state = (*list.tensors)[i];
        const int64_t bits =
            seen ? static_cast<const int64_t*>(starts[i].const_data_ptr())[mask_starts(sizes[i])]
                 : (*states[0].tensors)[i].numel();
        check(state.dim() == 1 && (state.numel() == bits || (stateless && state.numel() == 0)) &&
                  state.is_contiguous() &&
                  state.scalar_type() == accumulator_of(weight.scalar_type()) &&
                  same_device(state, weight),
              op, ": ", list.name, "[", i, "] is ", describe(state), ", expected contiguous ",
              torch::headeronly::toString(accumulator_of(weight.scalar_type())),
              " [bits of the mask] beside ", describe(weight));
      }
    }
    states.push_back({"weights", &weights});
    check_apart(op, states, {{"grads", &grads}, {"masks", &masks}, {"starts", &starts}});
  }
};

}  // namespace fastunlearn
