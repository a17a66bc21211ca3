// The doors of the operators under the randomized SVD: checks, shapes, contiguous inputs.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/check.h"
#include "subspace/grouped_mm.h"

namespace fastunlearn {

// Products out_i = op(a_i) b_i; without b the sketch of the normal matrices of `seeds`.
struct GroupedDoor {
  std::vector<Tensor> a, b;
  std::vector<GroupedShape> shapes;
  bool widened = false;  // float32 factors, float64 sums

  GroupedDoor(const char* op, const std::vector<Tensor>& out, const std::vector<Tensor>& a_,
              const std::vector<Tensor>* b_, const std::vector<int64_t>* seeds, bool transpose) {
    check(out.size() == a_.size() && (!b_ || b_->size() == a_.size()) &&
              (!seeds || seeds->size() == a_.size()),
          op, ": ", out.size(), " outputs, ", a_.size(), " matrices and ",
          b_ ? b_->size() : seeds->size(), b_ ? " right factors" : " seeds",
          "; there must be as many of each");
    for (size_t i = 0; i < out.size(); ++i) {
      const Tensor& x = a_[i];
      check(is_real(x) && is_real(out[i]) && (!b_ || (*b_)[i].scalar_type() == x.scalar_type()) &&
                x.scalar_type() == a_[0].scalar_type() &&
                out[i].scalar_type() == out[0].scalar_type() &&
                (out[i].scalar_type() == x.scalar_type() ||
                 out[i].scalar_type() == ScalarType::Double),
            op, ": member ", i, " multiplies ", describe(x), " and writes ", describe(out[i]),
            "; all factors must be float32 or all float64, and out as wide or float64");
      check(x.dim() == 2 && out[i].dim() == 2 && (!b_ || (*b_)[i].dim() == 2), op, ": member ", i,
            " is ", describe(x), " into ", describe(out[i]), "; matrices are needed");
      check(same_device(x, out[0]) && same_device(out[i], out[0]) &&
                (!b_ || same_device((*b_)[i], out[0])),
            op, ": member ", i, " is ", describe(x), " but the first output is ", describe(out[0]),
            "; move all to one device");
      const GroupedShape shape{x.size(transpose ? 1 : 0), x.size(transpose ? 0 : 1),
                               out[i].size(1)};
      check(out[i].size(0) == shape.rows &&
                (!b_ || ((*b_)[i].size(0) == shape.depth && (*b_)[i].size(1) == shape.columns)),
            op, ": member ", i, " multiplies ", describe(x), transpose ? " transposed" : "",
            b_ ? " and " : "", b_ ? describe((*b_)[i]) : "", " into ", describe(out[i]),
            "; the shapes do not fit");
      check(shape.columns <= INT32_MAX, op, ": member ", i, " has ", shape.columns, " columns");
      check_output(op, "out", out[i]);
      a.push_back(torch::stable::contiguous(x));
      if (b_) b.push_back(torch::stable::contiguous((*b_)[i]));
      shapes.push_back(shape);
    }
    check_apart(op, out);
    widened = !out.empty() && out[0].scalar_type() != a[0].scalar_type();
  }

 private:
  // No output may share memory with a factor or another output: one sort by address, then
  // neighbours.
  void check_apart(const char* op, const std::vector<Tensor>& out) const {
    struct Range {
      const char* begin;
      const char* end;
      bool written;
    };
    std::vector<Range> ranges;
    auto add = [&](const std::vector<Tensor>& tensors, bool written) {
      for (const Tensor& tensor : tensors) {
        if (tensor.numel() == 0) continue;
        const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
        ranges.push_back({begin, begin + tensor.numel() * tensor.element_size(), written});
      }
    };
    add(out, true);
    add(a, false);
    add(b, false);
    std::sort(ranges.begin(), ranges.end(),
              [](const Range& x, const Range& y) { return x.begin < y.begin; });
    const char* read_until = nullptr;  // of the ranges before
    const char* written_until = nullptr;
    for (const Range& range : ranges) {
      check(range.begin >= written_until && (!range.written || range.begin >= read_until), op,
            ": out shares memory with a factor or another output; pass a copy of it");
      const char*& until = range.written ? written_until : read_until;
      until = std::max(until, range.end);
    }
  }
};

// A batch of square matrices [B, k, k].
inline void check_squares(const char* op, const char* name, const Tensor& batch) {
  check_output(op, name, batch);
  check(is_real(batch) && batch.dim() == 3 && batch.size(1) == batch.size(2), op, ": ", name,
        " is ", describe(batch), "; expected float32 or float64 [batch, k, k]");
}

struct CholeskyDoor {
  CholeskyDoor(const Tensor& grams, const Tensor& inverses, const Tensor& ranks) {
    constexpr const char* op = "cholesky_inverse_";
    check_squares(op, "grams", grams);
    check_squares(op, "inverses", inverses);
    check(grams.scalar_type() == ScalarType::Double && inverses.scalar_type() == ScalarType::Double,
          op, ": grams is ", describe(grams), " and inverses ", describe(inverses),
          "; float64 is needed: a Gram matrix has squared the condition number");
    check(same_shape(grams, inverses) && same_device(grams, inverses) && !overlap(grams, inverses),
          op, ": inverses is ", describe(inverses), " but grams ", describe(grams),
          "; they must have one shape and device and share no memory");
    check_output(op, "ranks", ranks);
    check(ranks.scalar_type() == ScalarType::Long && ranks.dim() == 1 &&
              ranks.size(0) == grams.size(0) && same_device(ranks, grams),
          op, ": ranks is ", describe(ranks), ", expected int64 [", grams.size(0),
          "] beside grams");
  }
};

struct JacobiDoor {
  JacobiDoor(const Tensor& rows, const std::optional<Tensor>& rotation, const Tensor& sweeps) {
    constexpr const char* op = "orthogonal_rows_";
    check_squares(op, "rows", rows);
    if (rotation) {
      check_squares(op, "rotation", *rotation);
      check(same_shape(rows, *rotation) && same_device(rows, *rotation) &&
                rows.scalar_type() == rotation->scalar_type() && !overlap(rows, *rotation),
            op, ": rotation is ", describe(*rotation), " but rows ", describe(rows),
            "; they must be alike and share no memory");
    }
    check_output(op, "sweeps", sweeps);
    check(sweeps.scalar_type() == ScalarType::Long && sweeps.dim() == 1 &&
              sweeps.size(0) == rows.size(0) && same_device(sweeps, rows),
          op, ": sweeps is ", describe(sweeps), ", expected int64 [", rows.size(0),
          "] beside rows");
  }
};

}  // namespace fastunlearn
