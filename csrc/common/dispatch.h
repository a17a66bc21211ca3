// Storage types to C++ types, one switch for every back end.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "common/check.h"

namespace fastunlearn {

// Calls fn.template operator()<Scalar>() for the type that stores `type` on this back end.
// Types is a trait with members Float, BFloat16, Half, Double.
template <typename Types, typename Function>
void dispatch_storage(ScalarType type, Function&& fn) {
  switch (type) {
    case ScalarType::Float:
      return fn.template operator()<typename Types::Float>();
    case ScalarType::BFloat16:
      return fn.template operator()<typename Types::BFloat16>();
    case ScalarType::Half:
      return fn.template operator()<typename Types::Half>();
    case ScalarType::Double:
      return fn.template operator()<typename Types::Double>();
    default:
      check(false, "no kernel for ", torch::headeronly::toString(type));
  }
}

}  // namespace fastunlearn
