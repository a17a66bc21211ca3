// Where the operators are registered. The emulated build compiles the same sources under a second
// name, on CPU tensors, so that both can live in one process.
#pragma once

#ifdef FASTUNLEARN_EMULATED
#define FASTUNLEARN_NAMESPACE fastunlearn_emulated
#define FASTUNLEARN_CUDA_KEY CPU
#else
#define FASTUNLEARN_NAMESPACE fastunlearn
#define FASTUNLEARN_CUDA_KEY CUDA
#endif
