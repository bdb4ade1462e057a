// What the two products with quantised weights share, so that a row's sum has the same bits in both.
//
// The order of a sum, whatever the number of columns n: K is cut into `splits` ranges of tiles (a function of the
// weight's shape and the card); in a split, slice s adds the blocks of tiles s, s + 4, ... in order; then the four slices
// are added in order, then the splits, then (where x is two int8 of each value) both halves, then bias and residual.
#pragma once
#include "weights.cuh"

constexpr int SLICES = 4;

struct Arguments {
  const uint4* weights;
  const int4* x;          // [n, K] int8; of two halves the second is what the rounding of the first lost
  const float2* x_scales; // [n, K / 32] {d, d * sum q}
  void* y;                // [n / halves, rows], float or half; rows y_stride elements apart
  const float* bias;      // [rows] or null
  const void* residual;   // like y, rows residual_stride apart; or null
  float* partials;
  u32* tickets;           // one per group of 32 rows, zero before and after
  long long y_stride, residual_stride;
  int rows, n_tiles, n_steps, n, y_is_half, splits; // n_steps: of 64 columns, in a row of the weights
  int halves;             // 1, or 2 (the decode product only): y[i] = product of x[i] + product of x[n / 2 + i]
};

__device__ __forceinline__ int split_begin(const Arguments& a, int split) {
  return static_cast<int>(static_cast<long long>(a.n_tiles) * split / a.splits);
}

// acc += weight scale * activation scale * sum of 32 (or 16) products of bytes.
__device__ __forceinline__ float add_products(float acc, float weight_scale, float d, int products) {
  return __fmaf_rn(__fmul_rn(weight_scale, d), static_cast<float>(products), acc);
}

__device__ __forceinline__ void write_output(const Arguments& a, int n, int row, float sum) {
  if (row >= a.rows || n >= a.n) return;
  if (a.bias) sum = __fadd_rn(sum, __ldg(a.bias + row));
  if (a.residual) sum = __fadd_rn(sum, load_element(a.residual, n * a.residual_stride + row, a.y_is_half));
  store_element(a.y, n * a.y_stride + row, a.y_is_half, sum);
}
