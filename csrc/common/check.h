// Checks at the operator's door. A message says what was given, what was expected, and what to do.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/names.h"

namespace fastunlearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "Float [3, 4] on cpu"
inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "] on " << (tensor.is_cpu() ? "cpu" : "cuda:");
  if (!tensor.is_cpu()) text << tensor.get_device_index();
  return text.str();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline int64_t product(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t count = 1;
  for (int64_t i = first; i < last; ++i) count *= tensor.size(i);
  return count;
}

inline bool is_storage_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

// What needs no wider sums: float32 or float64.
inline bool is_real(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

// What sums of `type` are kept in: fp32 for everything up to fp32, float64 for itself.
inline ScalarType accumulator_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Two contiguous tensors that share memory.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  auto end = [&](const Tensor& t) { return begin(t) + t.numel() * t.element_size(); };
  return begin(a) < end(b) && begin(b) < end(a);
}

// A tensor that an operator writes: contiguous, so that no two of its elements share memory.
inline void check_output(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), op, ": ", name, " is written in place and must be contiguous, got ",
        describe(tensor), "; pass ", name, ".contiguous() and copy the result back");
}

// An input that is read while `out` is written.
inline void check_input(const char* op, const char* name, const Tensor& tensor, const Tensor& out) {
  check(same_device(tensor, out), op, ": ", name, " is ", describe(tensor), " but out is ",
        describe(out), "; move both to one device");
  check(is_storage_type(tensor.scalar_type()), op, ": ", name, " is ", describe(tensor),
        "; float32, bfloat16, float16 or float64 is needed");
  check(accumulator_of(tensor.scalar_type()) == out.scalar_type(), op, ": ", name, " is ",
        describe(tensor), " and sums are kept in ",
        torch::headeronly::toString(accumulator_of(tensor.scalar_type())), ", but out is ",
        describe(out));
}

// `tensor` itself or a contiguous copy; checked not to share memory with `out`.
inline Tensor readable(const char* op, const char* name, const Tensor& tensor, const Tensor& out,
                       const char* out_name = "out") {
  Tensor dense = torch::stable::contiguous(tensor);
  check(!overlap(dense, out), op, ": ", name, " shares memory with ", out_name,
        "; pass a copy of it");
  return dense;
}

}  // namespace fastunlearn
