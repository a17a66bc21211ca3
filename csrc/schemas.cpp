// Every operator's schema. One line of contract above each; fastunlearn/ops.py documents them for
// users.
#include <torch/csrc/stable/library.h>

#include "common/names.h"

STABLE_TORCH_LIBRARY(FASTUNLEARN_NAMESPACE, m) {
  // out[P, D] += sum_n (sum_t grad_output[n, t, p] * input[n, t, d])^2
  m.def("sq_grad_linear(Tensor(a!) out, Tensor input, Tensor grad_output) -> ()");
  // The same over the patches of a convolution: out[Co, Ci/groups, kh, kw].
  m.def(
      "sq_grad_conv2d(Tensor(a!) out, Tensor input, Tensor grad_output, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups) -> ()");
  // out[C] += sum_n (sum_t grad_output[n, t, c] * normalized[n, t, c])^2
  m.def(
      "sq_grad_affine(Tensor(a!) out, Tensor normalized, Tensor grad_output, int channel_dim=-1) "
      "-> ()");
  // out[C] += sum_n (sum_t grad_output[n, t, c])^2
  m.def("sq_grad_bias(Tensor(a!) out, Tensor grad_output, int channel_dim=-1) -> ()");
  // out[V, D] += sum_n (sum over t with indices[n, t] == v of grad_output[n, t, :])^2
  m.def(
      "sq_grad_embedding(Tensor(a!) out, Tensor indices, Tensor grad_output, "
      "int? padding_idx=None) -> ()");
  // weight = 0 where forget > gamma * retain; writes bit masks and counts of what was reset.
  m.def(
      "threshold_reset_(Tensor(a!)[] weights, Tensor[] forget, Tensor[] retain, float gamma, "
      "Tensor(b!)[] masks, Tensor(c!) counts) -> ()");
  // grad = 0 where the mask bit is 0.
  m.def("mask_grads_(Tensor(a!)[] grads, Tensor[] masks) -> ()");
}
