// Every operator's schema. One line of contract above each; fastunlearn/ops.py documents them for
// users.
#include <torch/csrc/stable/library.h>

#include "common/names.h"

STABLE_TORCH_LIBRARY(FASTUNLEARN_NAMESPACE, m) {
  // out[P, D] += sum_n (sum_t grad_output[n, t, p] * input[n, t, d])^2. allow_tf32: fp32 inputs may
  // be rounded to TF32 on CUDA; a CPU never does.
  m.def(
      "sq_grad_linear(Tensor(a!) out, Tensor input, Tensor grad_output, bool allow_tf32=False) -> "
      "()");
  // The same over the patches of a convolution: out[Co, Ci/groups, kh, kw].
  m.def(
      "sq_grad_conv2d(Tensor(a!) out, Tensor input, Tensor grad_output, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool allow_tf32=False) -> ()");
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
  // sums = bfloat16 of (sums + addends), rounded up or down by random bits of (seed, step, offset +
  // index); one launch for all tensors.
  m.def(
      "add_rounded_(Tensor(a!)[] sums, Tensor[] addends, int seed, int step, int[] offsets) -> ()");
  // Where forget / (retain + eps) > gamma: weight = fill (mode 0), = initial (1), or
  // *= min(1, dampening / ratio) (2). rules [tensors, 3] holds gamma, eps and fill; writes bit
  // masks and counts of what passed.
  m.def(
      "threshold_reset_(Tensor(a!)[] weights, Tensor[] forget, Tensor[] retain, Tensor rules, "
      "int action, float dampening, Tensor[] initial, Tensor(b!)[] masks, Tensor(c!) counts) -> "
      "()");
  // counts[row, digit] += ratios forget / (retain + eps) whose bits go on from prefix[row] with
  // that digit; one row for all tensors, or one each.
  m.def(
      "ratio_histogram_(Tensor(a!) counts, Tensor[] forget, Tensor[] retain, Tensor eps, "
      "Tensor prefix, int level) -> ()");
  // grad = 0 where the mask bit is 0.
  m.def("mask_grads_(Tensor(a!)[] grads, Tensor[] masks) -> ()");
  // torch.optim.SGD and AdamW where the mask bit is 1; the state of the k-th bit is element k.
  m.def(
      "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] masks, Tensor[] starts, "
      "Tensor(b!)[] momentum_buffers, float lr, float momentum, float weight_decay, bool nesterov) "
      "-> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] masks, Tensor[] starts, "
      "Tensor(b!)[] means, Tensor(c!)[] squares, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step) -> ()");
  // out_i = op(a_i) b_i; op transposes or does nothing.
  m.def("grouped_mm_(Tensor(a!)[] out, Tensor[] a, Tensor[] b, bool transpose) -> ()");
  // out_i = op(matrix_i) Omega(seed_i), Omega of independent standard normal numbers.
  m.def("sketch_(Tensor(a!)[] out, Tensor[] matrices, int[] seeds, bool transpose) -> ()");
  // gram = R^T R replaced by R, inverse = R^-1; dependent columns dropped, kept ones counted.
  m.def(
      "cholesky_inverse_(Tensor(a!) grams, Tensor(b!) inverses, Tensor(c!) ranks, float tolerance) "
      "-> ()");
  // rows [B, k, k] = rotation rows, with the rows orthogonal to one another.
  m.def("orthogonal_rows_(Tensor(a!) rows, Tensor(b!)? rotation, Tensor(c!) sweeps) -> ()");
  // gram[g, D, D] += sum of weights[n] * patch^T patch over the patches of a convolution's input.
  m.def(
      "gram_accumulate_conv2d_(Tensor(a!) gram, Tensor images, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, Tensor? weights=None) -> ()");
  // scores[p] = T(Y, feature | chosen) with the nearest neighbours at distances[i, j] +
  // (x_i - x_j)^2; without distances T(Y, feature). rank_terms [2, n]: R_i, and min(R_i, R_N(i)) or
  // L_i; -inf for features that are no candidates.
  m.def(
      "codec_scores_(Tensor(a!) scores, Tensor features, Tensor rank_terms, Tensor? distances, "
      "Tensor candidates) -> ()");
  // distances[i, j] += (column_i - column_j)^2; rank_terms[1, i] = min(R_i, R_N(i)) of the nearest.
  m.def("codec_choose_(Tensor(a!) distances, Tensor(b!) rank_terms, Tensor column) -> ()");
  // values[i, j] += scales[j] * standard normal number of (seed, i, j).
  m.def("add_column_noise_(Tensor(a!) values, Tensor scales, int seed) -> ()");
}
