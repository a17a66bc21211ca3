// Several OS threads launch at once, as torch's do; each launch has the device to itself.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 64;

__global__ void sum_kernel(int* out, int start) {
  __shared__ int tile[kThreads];
  const int tid = static_cast<int>(threadIdx.x);
  tile[tid] = start + tid;
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += tile[i];
  out[tid] = __shfl_xor_sync(0xffffffffu, sum, 1);
}

}  // namespace

int main() {
  std::atomic<int> wrong = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<int> out(kThreads);
        emulator::launch(1, kThreads, 0, [p = out.data(), caller] { sum_kernel(p, caller); });
        for (int sum : out) wrong += sum != kThreads * caller + kThreads * (kThreads - 1) / 2;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf(wrong == 0 ? "all sums right\n" : "wrong sums\n");
}
