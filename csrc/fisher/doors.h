// The doors of the Fisher operators: every back end asks the same of its arguments, here and once.
// A door returns contiguous tensors and the sizes; it raises before anything is written.
#pragma once

#include <algorithm>
#include <array>
#include <climits>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/conv2d_door.h"
#include "fisher/sq_grad_channels.h"
#include "fisher/sq_grad_embedding.h"
#include "fisher/sq_grad_tile.h"

namespace fastunlearn {

inline void check_accumulator(const char* op, const Tensor& out, int64_t dim) {
  check_output(op, "out", out);
  check(out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::Double, op,
        ": out is ", describe(out), "; sums of squares are kept in float32 (float64 for float64)");
  check(out.dim() == dim, op, ": out is ", describe(out), ", expected ", dim, " axes");
}

// A layer's input (or normalized input) and the gradient of its output.
inline void check_pair(const char* op, const char* name, const Tensor& input, const Tensor& grad,
                       const Tensor& out) {
  check_input(op, name, input, out);
  check_input(op, "grad_output", grad, out);
  check(input.scalar_type() == grad.scalar_type(), op, ": ", name, " is ", describe(input),
        " but grad_output is ", describe(grad), "; they must have one dtype");
}

struct LinearDoor {
  Tensor input, grad;
  SqGradShape shape;

  LinearDoor(const Tensor& out, const Tensor& input_, const Tensor& grad_)
      : input(input_), grad(grad_) {
    constexpr const char* op = "sq_grad_linear";
    check_accumulator(op, out, 2);
    check_pair(op, "input", input, grad, out);
    const int64_t dim = input.dim();
    bool leading = dim >= 2 && grad.dim() == dim;
    for (int64_t i = 0; leading && i < dim - 1; ++i) leading = input.size(i) == grad.size(i);
    check(leading, op, ": input is ", describe(input), " and grad_output ", describe(grad),
          "; expected [N, ..., D] and [N, ..., P] with the same leading axes");
    check(out.size(0) == grad.size(dim - 1) && out.size(1) == input.size(dim - 1), op, ": out is ",
          describe(out), ", expected [", grad.size(dim - 1), ", ", input.size(dim - 1), "]");
    input = readable(op, "input", input, out);
    grad = readable(op, "grad_output", grad, out);
    shape = {1, input.size(0), product(input, 1, dim - 1), out.size(0), out.size(1)};
  }
};

struct Conv2dDoor {
  Tensor input, grad;
  SqGradShape shape;
  Conv2dGeometry geometry;

  Conv2dDoor(const Tensor& out, const Tensor& input_, const Tensor& grad_,
             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
             const std::vector<int64_t>& dilation, int64_t groups)
      : input(input_), grad(grad_) {
    constexpr const char* op = "sq_grad_conv2d";
    check_accumulator(op, out, 4);
    check_pair(op, "input", input, grad, out);
    check(input.dim() == 4 && grad.dim() == 4 && input.size(0) == grad.size(0), op, ": input is ",
          describe(input), " and grad_output ", describe(grad),
          "; expected [N, Ci, H, W] and [N, Co, Ho, Wo]");
    check(groups > 0 && input.size(1) % groups == 0 && grad.size(1) % groups == 0, op,
          ": groups = ", groups, " must divide the channels of input ", describe(input),
          " and of grad_output ", describe(grad));
    check(out.size(0) == grad.size(1) && out.size(1) * groups == input.size(1), op, ": out is ",
          describe(out), ", expected [", grad.size(1), ", ", input.size(1) / groups, ", kh, kw]");
    check(fits_int(product(grad, 1, 4)), op, ": one sample of grad_output ", describe(grad),
          " has 2^31 elements or more");
    geometry = conv2d_geometry(op, "input", input, groups, {out.size(2), out.size(3)}, stride,
                               padding, dilation);
    check(grad.size(2) == geometry.out_h && grad.size(3) == geometry.out_w, op, ": grad_output is ",
          describe(grad), ", but this input, kernel, stride, padding and dilation give ",
          geometry.out_h, " x ", geometry.out_w, " positions");
    input = readable(op, "input", input, out);
    grad = readable(op, "grad_output", grad, out);
    shape = {groups, input.size(0), int64_t{geometry.out_h} * geometry.out_w, out.size(0) / groups,
             out.size(1) * out.size(2) * out.size(3)};
  }
};

struct ChannelsDoor {
  Tensor grad;
  std::optional<Tensor> normalized;
  SqGradChannelsShape shape;

  ChannelsDoor(const char* op, const Tensor& out, std::optional<Tensor> normalized_,
               const Tensor& grad_, int64_t channel_dim)
      : grad(grad_), normalized(std::move(normalized_)) {
    check_accumulator(op, out, 1);
    check_input(op, "grad_output", grad, out);
    const int64_t dim = grad.dim();
    const int64_t axis = channel_dim < 0 ? channel_dim + dim : channel_dim;
    check(axis >= 1 && axis < dim, op, ": channel_dim = ", channel_dim, " of grad_output ",
          describe(grad), " must name an axis after the first, which counts the samples");
    check(out.size(0) == grad.size(axis), op, ": out is ", describe(out), ", expected [",
          grad.size(axis), "]");
    if (normalized) {
      check_pair(op, "normalized", *normalized, grad, out);
      check(same_shape(*normalized, grad), op, ": normalized is ", describe(*normalized),
            " but grad_output is ", describe(grad));
      normalized = readable(op, "normalized", *normalized, out);
    }
    grad = readable(op, "grad_output", grad, out);
    shape = {grad.size(0), product(grad, 1, axis), grad.size(axis), product(grad, axis + 1, dim)};
  }
};

struct EmbeddingDoor {
  Tensor grad;
  Tensor sorted_ids;  // [N T] int64, ascending
  Tensor order;       // [N T] int64, where each came from: sample = order / T
  SqGradEmbeddingShape shape;

  EmbeddingDoor(const Tensor& out, const Tensor& indices, const Tensor& grad_,
                std::optional<int64_t> padding_idx)
      : grad(grad_) {
    constexpr const char* op = "sq_grad_embedding";
    check_accumulator(op, out, 2);
    check_input(op, "grad_output", grad, out);
    check(same_device(indices, out), op, ": indices are ", describe(indices), " but out is ",
          describe(out));
    check(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int, op,
          ": indices are ", describe(indices), "; int64 or int32 is needed");
    bool leading = indices.dim() >= 1 && grad.dim() == indices.dim() + 1;
    for (int64_t i = 0; leading && i < indices.dim(); ++i)
      leading = indices.size(i) == grad.size(i);
    check(leading, op, ": indices are ", describe(indices), " and grad_output ", describe(grad),
          "; expected [N, ...] and [N, ..., D] with the same leading axes");
    check(out.size(1) == grad.size(grad.dim() - 1), op, ": out is ", describe(out),
          ", expected [V, ", grad.size(grad.dim() - 1), "]");
    const int64_t rows = out.size(0);
    int64_t padding = padding_idx.value_or(-1);
    check(!padding_idx || (padding >= -rows && padding < rows), op, ": padding_idx = ", padding,
          " is outside an embedding of ", rows, " rows");
    if (padding_idx && padding < 0) padding += rows;
    grad = readable(op, "grad_output", grad, out);
    std::tie(sorted_ids, order) = sort_ids(indices);
    const int64_t count = sorted_ids.numel();
    if (count > 0 &&
        out.is_cpu()) {  // on a GPU a bad index traps in the kernel: no synchronisation here
      const int64_t* ids = sorted_ids.const_data_ptr<int64_t>();
      check(ids[0] >= 0 && ids[count - 1] < rows, op, ": indices run from ", ids[0], " to ",
            ids[count - 1], " but out has ", rows, " rows");
    }
    const int64_t samples = indices.size(0);
    shape = {samples, samples ? count / samples : 0, rows, out.size(1), padding};
  }

 private:
  // A stable sort by id keeps each id's positions in order of sample.
  static std::pair<Tensor, Tensor> sort_ids(const Tensor& indices) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const Tensor flat = torch::stable::flatten(torch::stable::to(indices, ScalarType::Long));
    std::array<StableIValue, 4> stack{from(flat), from(std::optional<bool>(true)), from(int64_t{0}),
                                      from(false)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
};

}  // namespace fastunlearn
