// The instructions of csrc/common/mma.cuh on registers and shared memory that
// tests/test_emulator.py lays out and reads. Compiles with nvcc too.
//   tensor_cores BF16|HALF|TF32 in out   fragments a [32, 4], b [32, 2], d [32, 4] to d
//   tensor_cores                         prints ldmatrix and cp.async
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/mma.cuh"
#include "common/shared_memory.cuh"

namespace {

using fastunlearn::dynamic_shared;

constexpr int kLanes = 32;

struct Registers {
  uint32_t a[kLanes][4], b[kLanes][2];
  float d[kLanes][4];
};

template <typename Scalar>
__global__ void mma_kernel(Registers* registers) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = registers->a[lane][i];
  for (int i = 0; i < 2; ++i) b[i] = registers->b[lane][i];
  for (int i = 0; i < 4; ++i) d[i] = registers->d[lane][i];
  if constexpr (std::is_same_v<Scalar, float>) {
    for (uint32_t& value : a) value = fastunlearn::to_tf32(__uint_as_float(value));
    for (uint32_t& value : b) value = fastunlearn::to_tf32(__uint_as_float(value));
    fastunlearn::mma_m16n8k8(d, a, b);
  } else {
    fastunlearn::mma_m16n8k16<Scalar>(d, a, b);
  }
  for (int i = 0; i < 4; ++i) registers->d[lane][i] = d[i];
}

// Matrix l / 8, row l % 8 lies at row l of a [32, 16] array that holds 16 l + column.
__global__ void ldmatrix_kernel(uint32_t* out) {
  uint16_t* rows = dynamic_shared<uint16_t>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 16; ++i) rows[16 * lane + i] = static_cast<uint16_t>(16 * lane + i);
  __syncwarp();
  uint32_t plain[4], transposed[4];
  fastunlearn::ldmatrix_x4(plain, rows + 16 * lane);
  fastunlearn::ldmatrix_x4_trans(transposed, rows + 16 * lane);
  for (int i = 0; i < 4; ++i) {
    out[4 * lane + i] = plain[i];
    out[4 * (kLanes + lane) + i] = transposed[i];
  }
}

// Three groups: 16 bytes at once; 9 bytes in three copies of 8, 4 and 4; none. Every thread looks
// at its neighbour's.
__global__ void copy_kernel(const uint32_t* from, uint32_t* out) {
  uint32_t* to = dynamic_shared<uint32_t>();
  const unsigned lane = threadIdx.x;
  const unsigned neighbour = (lane + 1) % kLanes;
  auto place = [&](unsigned group) { return to + 4 * (kLanes * group + lane); };
  const uint32_t* mine = from + 4 * lane;
  fastunlearn::cp_async<16>(place(0), mine, 16);
  fastunlearn::cp_async_commit();
  fastunlearn::cp_async<8>(place(1), mine, 8);
  fastunlearn::cp_async<4>(place(1) + 2, mine + 2, 1);
  fastunlearn::cp_async<4>(place(1) + 3, mine + 3, 0);
  fastunlearn::cp_async_commit();
  fastunlearn::cp_async<16>(place(2), from, 0);
  fastunlearn::cp_async_commit();
  auto look = [&](unsigned row) {
#ifndef MISSING_BARRIER
    __syncthreads();
#endif
    for (unsigned i = 0; i < 12; ++i)
      out[12 * (kLanes * row + lane) + i] = to[4 * (kLanes * (i / 4) + neighbour) + i % 4];
    __syncthreads();
  };
  look(0);
  fastunlearn::cp_async_wait<2>();
  look(1);
  fastunlearn::cp_async_wait<0>();
  look(2);
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), size_t bytes, Args... args) {
#ifdef FASTUNLEARN_EMULATED
  emulator::launch(dim3(1), dim3(kLanes), bytes, [=] { kernel(args...); });
#else
  kernel<<<1, kLanes, bytes>>>(args...);
#endif
}

template <typename Scalar>
bool multiply(const char* in, const char* out) {
  Registers host;
  std::FILE* file = std::fopen(in, "rb");
  if (file == nullptr || std::fread(&host, sizeof host, 1, file) != 1) return false;
  std::fclose(file);
  Registers* device = nullptr;
  cudaMalloc(&device, sizeof host);
  cudaMemcpyAsync(device, &host, sizeof host, cudaMemcpyHostToDevice, nullptr);
  launch(mma_kernel<Scalar>, 0, device);
  cudaMemcpyAsync(&host, device, sizeof host, cudaMemcpyDeviceToHost, nullptr);
  cudaStreamSynchronize(nullptr);
  cudaFree(device);
  file = std::fopen(out, "wb");
  if (file == nullptr || std::fwrite(host.d, sizeof host.d, 1, file) != 1) return false;
  return std::fclose(file) == 0;
}

template <typename... Params, typename... Inputs>
void print(const char* name, void (*kernel)(Params...), size_t shared, size_t count,
           Inputs... inputs) {
  uint32_t* out = nullptr;
  cudaMalloc(&out, count * sizeof(uint32_t));
  launch(kernel, shared, inputs..., out);
  std::vector<uint32_t> host(count);
  cudaMemcpyAsync(host.data(), out, count * sizeof(uint32_t), cudaMemcpyDeviceToHost, nullptr);
  cudaStreamSynchronize(nullptr);
  cudaFree(out);
  std::printf("%s", name);
  for (uint32_t value : host) std::printf(" %u", value);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4) {
    const bool done = std::strcmp(argv[1], "BF16") == 0 ? multiply<__nv_bfloat16>(argv[2], argv[3])
                      : std::strcmp(argv[1], "HALF") == 0 ? multiply<__half>(argv[2], argv[3])
                                                          : multiply<float>(argv[2], argv[3]);
    return done ? 0 : 1;
  }
  print("ldmatrix", ldmatrix_kernel, kLanes * 16 * sizeof(uint16_t), 2 * 4 * kLanes);
  uint32_t host[4 * kLanes];
  for (uint32_t i = 0; i < 4 * kLanes; ++i) host[i] = 0x01010101u * (i + 1);
  uint32_t* from = nullptr;
  cudaMalloc(&from, sizeof host);
  cudaMemcpyAsync(from, host, sizeof host, cudaMemcpyHostToDevice, nullptr);
  print("copy", copy_kernel, 3 * 16 * kLanes, 3 * 12 * kLanes, static_cast<const uint32_t*>(from));
  cudaFree(from);
}
