// Cholesky factors of many small Gram matrices and their inverses, dependent columns dropped: the
// small half of CholeskyQR.
//
// G = R^T R with R upper triangular. Where what is left of G_jj falls to tolerance * G_jj or below,
// column j depends on those before it: R_jj and row j of R become 0, and so do row and column j of
// the inverse, so that Y R^-1 has a zero column there.
#pragma once

#include <cstdint>

namespace fastunlearn {

inline constexpr int kCholeskyThreads = 256;

struct CholeskyParams {
  double* grams;     // [batch, k, k], replaced by R
  double* inverses;  // [batch, k, k]
  int64_t* ranks;    // [batch], columns kept; -1 where a Gram matrix is not finite
  int64_t size;      // k
  double tolerance;
};

}  // namespace fastunlearn
