// The micro-kernels' clones. Floating-point contraction is on, so each clone uses its own fused
// multiply-add.
#include "fisher/sq_grad_tile_cpu.h"

namespace fastunlearn {

FASTUNLEARN_CPU_CLONES
void multiply_panels_cpu(const float* grads, const float* inputs, int depth, int rows, int columns,
                         bool start, PanelEnd end, float* product, float* squares) {
  multiply_panels<float, false>(grads, inputs, depth, rows, columns, start, end, product, squares);
}

FASTUNLEARN_CPU_CLONES
void multiply_panels_cpu(const double* grads, const double* inputs, int depth, int rows,
                         int columns, bool start, PanelEnd end, double* product, double* squares) {
  multiply_panels<double, false>(grads, inputs, depth, rows, columns, start, end, product, squares);
}

FASTUNLEARN_CPU_CLONES
void square_panels_cpu(const float* grads, const float* inputs, int depth, int rows, int columns,
                       float* squares) {
  multiply_panels<float, true>(grads, inputs, depth, rows, columns, true, PanelEnd::kKeep, nullptr,
                               squares);
}

FASTUNLEARN_CPU_CLONES
void square_panels_cpu(const double* grads, const double* inputs, int depth, int rows, int columns,
                       double* squares) {
  multiply_panels<double, true>(grads, inputs, depth, rows, columns, true, PanelEnd::kKeep, nullptr,
                                squares);
}

}  // namespace fastunlearn
