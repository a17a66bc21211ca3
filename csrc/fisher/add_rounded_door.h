// The door of add_rounded_.
#pragma once

#include "common/list_door.h"

namespace fastunlearn {

struct AddRoundedDoor {
  std::vector<Tensor> addends;
  std::vector<int64_t> sizes;

  AddRoundedDoor(const std::vector<Tensor>& sums, const std::vector<Tensor>& addends_,
                 const std::vector<int64_t>& offsets) {
    check_list(kOp, "addends", addends_, "sums", sums);
    check(offsets.size() == sums.size(), kOp, ": ", sums.size(), " sums but ", offsets.size(),
          " offsets; one of each per tensor is needed");
    for (size_t i = 0; i < sums.size(); ++i) {
      const Tensor &sum = sums[i], &addend = addends_[i];
      check(sum.scalar_type() == ScalarType::BFloat16, kOp, ": sums[", i, "] is ", describe(sum),
            "; sums are bfloat16 (float32 ones need no rounding: add_ does)");
      check_output(kOp, "sum", sum);
      check(same_device(sum, sums[0]), kOp, ": sums[", i, "] is ", describe(sum),
            " but sums[0] is ", describe(sums[0]), "; pass one list per device");
      check(addend.scalar_type() == ScalarType::Float && same_shape(addend, sum) &&
                same_device(addend, sum),
            kOp, ": addends[", i, "] is ", describe(addend), " but the sum is ", describe(sum),
            "; an addend is float32, of the sum's shape and device");
      // Positions stay well inside int64.
      check(offsets[i] >= 0 && offsets[i] <= INT64_MAX / 2, kOp, ": offsets[", i, "] is ",
            offsets[i], ", expected a position from 0 to 2**62 - 1");
      addends.push_back(torch::stable::contiguous(addend));
      sizes.push_back(sum.numel());
    }
    check_apart(kOp, {{"sums", &sums}}, {{"addends", &addends}});
  }

 private:
  static constexpr const char* kOp = "add_rounded_";
};

}  // namespace fastunlearn
