// What the doors of operators over lists of tensors share.
#pragma once

#include <algorithm>
#include <vector>

#include "common/check.h"

namespace fastunlearn {

inline void check_list(const char* op, const char* name, const std::vector<Tensor>& list,
                       const char* first_name, const std::vector<Tensor>& first) {
  check(list.size() == first.size(), op, ": ", first.size(), " ", first_name, " but ", list.size(),
        " ", name, "; one of each per tensor is needed");
}

struct NamedList {
  const char* name;
  const std::vector<Tensor>* tensors;
};

// What is written shares no memory with anything else of the call. Sorted by address: a list can be
// long. Contiguous tensors only.
inline void check_apart(const char* op, const std::vector<NamedList>& written,
                        const std::vector<NamedList>& read) {
  struct Range {
    const char *begin, *end, *name;
    size_t index;
  };
  auto ranges_of = [](const std::vector<NamedList>& lists) {
    std::vector<Range> ranges;
    for (const NamedList& list : lists) {
      for (size_t i = 0; i < list.tensors->size(); ++i) {
        const Tensor& tensor = (*list.tensors)[i];
        const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
        const size_t bytes = tensor.numel() * tensor.element_size();
        if (bytes) ranges.push_back({begin, begin + bytes, list.name, i});
      }
    }
    return ranges;
  };
  auto complain = [op](const Range& a, const Range& b) {
    check(false, op, ": ", a.name, "[", a.index, "] shares memory with ", b.name, "[", b.index,
          "]; pass a tied tensor once, and copies of what is read");
  };
  std::vector<Range> targets = ranges_of(written);
  std::stable_sort(targets.begin(), targets.end(),
                   [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t k = 1; k < targets.size(); ++k) {
    if (targets[k].begin < targets[k - 1].end) complain(targets[k], targets[k - 1]);
  }
  for (const Range& source : ranges_of(read)) {
    // Targets lie apart, so the only one that can reach into the source is the last to begin
    // before its end.
    auto after = std::lower_bound(targets.begin(), targets.end(), source.end,
                                  [](const Range& a, const char* end) { return a.begin < end; });
    if (after != targets.begin() && source.begin < std::prev(after)->end) {
      complain(source, *std::prev(after));
    }
  }
}

}  // namespace fastunlearn
