// add_rounded_ on a CPU: threads over chunks, vectors over the counters and then over the elements.
#include "fisher/add_rounded.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/cpu.h"
#include "common/tensor_list_cpu.h"
#include "fisher/add_rounded_door.h"

namespace fastunlearn {
namespace {

// The random bits of 512 elements are made at once: 1 KB, which stays in the first cache.
constexpr int kOctets = 64;
static_assert(std::endian::native == std::endian::little, "halves of words are read as they lie");

struct RoundedChunk {
  uint16_t* sum;
  const float* addend;
  int64_t begin, end;
  int64_t offset;
  uint64_t seed, step;
};

FASTUNLEARN_CPU_CLONES
void add_chunk(const RoundedChunk& chunk) {
  for (int64_t i = chunk.begin; i < chunk.end;) {
    const int64_t position = chunk.offset + i;
    const int lead = static_cast<int>(position % kOctet);
    const auto count = static_cast<int>(std::min<int64_t>(kOctets * kOctet - lead, chunk.end - i));
    const int octets = (lead + count + kOctet - 1) / kOctet;
    uint32_t words[4 * kOctets];
    for (int c = 0; c < octets; ++c) {
      const PhiloxWords four =
          rounding_words(chunk.seed, chunk.step, static_cast<uint64_t>(position / kOctet + c));
      words[4 * c] = four.x;
      words[4 * c + 1] = four.y;
      words[4 * c + 2] = four.z;
      words[4 * c + 3] = four.w;
    }
    uint16_t random[kOctets * kOctet];
    std::memcpy(random, words, 4 * sizeof(uint32_t) * octets);
    uint16_t* sum = chunk.sum + i;
    const float* addend = chunk.addend + i;
    for (int j = 0; j < count; ++j) {
      const float exact = std::bit_cast<float>(static_cast<uint32_t>(sum[j]) << 16) + addend[j];
      sum[j] = static_cast<uint16_t>(round_to_bfloat16(exact, random[lead + j]));
    }
    i += count;
  }
}

void add_rounded_cpu(const std::vector<Tensor>& sums, const std::vector<Tensor>& addends,
                     int64_t seed, int64_t step, const std::vector<int64_t>& offsets) {
  const AddRoundedDoor door(sums, addends, offsets);
  for_each_chunk(door.sizes, [&](const ListChunk& part) {
    add_chunk({static_cast<uint16_t*>(sums[part.entry].mutable_data_ptr()),
               static_cast<const float*>(door.addends[part.entry].const_data_ptr()), part.begin,
               part.end, offsets[part.entry], static_cast<uint64_t>(seed),
               static_cast<uint64_t>(step)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("add_rounded_", TORCH_BOX(&add_rounded_cpu));
}

}  // namespace fastunlearn
