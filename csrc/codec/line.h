// Nearest neighbours by one feature alone: on a sorted line they are adjacent.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/bits.h"

namespace fastunlearn {

// Unsigned keys that sort as the numbers do; -0 is 0, NaN lies at an end.
template <typename T>
using LineKey = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename T>
FASTUNLEARN_HOST_DEVICE LineKey<T> line_key(T x) {
  using Key = LineKey<T>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  const Key bits = bits_of(x + T{0});
  return bits & kSign ? ~bits : bits | kSign;
}

template <typename T>
FASTUNLEARN_HOST_DEVICE T line_value(LineKey<T> key) {
  using Key = LineKey<T>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  return number_of(key & kSign ? static_cast<Key>(key ^ kSign) : static_cast<Key>(~key));
}

// First place of the value that stands at `place`: the lowest row among equals, since the sort kept
// their order.
template <typename Key>
FASTUNLEARN_HOST_DEVICE int first_of_equals(const Key* keys, int place) {
  if (place == 0 || keys[place - 1] != keys[place]) return place;
  int low = 0, high = place - 1;  // keys[high] is equal; search the first that is
  while (low < high) {
    const int middle = (low + high) / 2;
    if (keys[middle] < keys[place]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The row nearest to the one at `place`; the lowest of equally near ones; -1 if none is at a finite
// distance. keys [n] ascending, rows [n] ascending among equal keys.
template <typename T, typename Row>
FASTUNLEARN_HOST_DEVICE int nearest_on_line(const LineKey<T>* keys, const Row* rows, int n,
                                            int place) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const LineKey<T> key = keys[place];
  const T here = line_value<T>(key);
  if (!(here - here == T{0})) return -1;
  const int first = first_of_equals(keys, place);
  if (first < place) return static_cast<int>(rows[first]);
  if (place + 1 < n && keys[place + 1] == key) return static_cast<int>(rows[place + 1]);
  const T below = place > 0 ? here - line_value<T>(keys[place - 1]) : kInfinity;
  const T above = place + 1 < n ? line_value<T>(keys[place + 1]) - here : kInfinity;
  if (!(below < kInfinity) && !(above < kInfinity)) return -1;  // written so that NaN is none
  if (!(below < kInfinity) || above < below) return static_cast<int>(rows[place + 1]);
  const int lowest = static_cast<int>(rows[first_of_equals(keys, place - 1)]);
  if (below < above || !(above < kInfinity)) return lowest;
  return lowest < static_cast<int>(rows[place + 1]) ? lowest : static_cast<int>(rows[place + 1]);
}

}  // namespace fastunlearn
