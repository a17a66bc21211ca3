// conversions UP OUT: every bf16, then every fp16, as fp32.  conversions DOWN IN OUT: fp32 to bf16,
// then to fp16. Raw bytes, for tests/test_emulator.py to compare with torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstring>
#include <vector>

template <typename T>
static void write(const char* path, const std::vector<T>& values) {
  std::FILE* file = std::fopen(path, "wb");
  std::fwrite(values.data(), sizeof(T), values.size(), file);
  std::fclose(file);
}

int main(int, char** argv) {
  if (std::strcmp(argv[1], "UP") == 0) {
    std::vector<float> wide;
    for (unsigned bits = 0; bits < 65536; ++bits) {
      wide.push_back(__bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits))));
    }
    for (unsigned bits = 0; bits < 65536; ++bits) {
      wide.push_back(__half2float(__ushort_as_half(static_cast<unsigned short>(bits))));
    }
    write(argv[2], wide);
    return 0;
  }
  std::vector<float> values;
  std::FILE* file = std::fopen(argv[2], "rb");
  for (float x; std::fread(&x, sizeof x, 1, file) == 1;) values.push_back(x);
  std::fclose(file);
  std::vector<unsigned short> narrow;
  for (float x : values) narrow.push_back(__bfloat16_as_ushort(__float2bfloat16_rn(x)));
  for (float x : values) narrow.push_back(__half_as_ushort(__float2half_rn(x)));
  write(argv[3], narrow);
  return 0;
}
