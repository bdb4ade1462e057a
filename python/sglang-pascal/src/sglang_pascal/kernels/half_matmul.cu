// y[n, row] = sum over k of w[row, k] * x[n, k] with float16 weights, for a few columns n: layers that a file keeps in F16.
//
// One kernel per column count N. CTA: 4 warps of 4 rows; a lane loads 8 consecutive weights of each of its warp's rows
// (512 contiguous bytes a warp and row) and the same 8 activations, multiplies in fp32, and the warp adds its lanes by
// halving. Bound by the weights' bytes: 2 per weight, read once. No shared memory; x comes from L1.
#include "common.cuh"

constexpr int WARPS = 4, ROWS = 4, EIGHT = 8;

struct Arguments {
  const uint4* weights; // [rows, columns / 8]
  const uint4* x;       // [n, columns / 8]
  void* y;              // [n, rows], float or half; rows y_stride elements apart
  const float* bias;    // [rows] or null
  long long y_stride;
  int rows, columns, n, y_is_half;
};

__device__ __forceinline__ void widen(const uint4& v, float (&out)[EIGHT]) {
  halves_to_floats(v.x, out[0], out[1]), halves_to_floats(v.y, out[2], out[3]);
  halves_to_floats(v.z, out[4], out[5]), halves_to_floats(v.w, out[6], out[7]);
}

template <int N>
__device__ __forceinline__ void multiply(const Arguments& a) {
  const int lane = threadIdx.x % WARP, first_row = (blockIdx.x * WARPS + threadIdx.x / WARP) * ROWS;
  const int per_row = a.columns / EIGHT;
  if (first_row >= a.rows) return;
  float acc[ROWS][N];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int n = 0; n < N; n++) acc[r][n] = 0.0f;
#pragma unroll 1
  for (int i = lane; i < per_row; i += WARP) {
    float w[ROWS][EIGHT];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      widen(__ldg(a.weights + static_cast<size_t>(min(first_row + r, a.rows - 1)) * per_row + i), w[r]);
#pragma unroll
    for (int n = 0; n < N; n++) {
      float x[EIGHT];
      widen(__ldg(a.x + static_cast<size_t>(min(n, a.n - 1)) * per_row + i), x);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < EIGHT; k++) acc[r][n] = __fmaf_rn(w[r][k], x[k], acc[r][n]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int n = 0; n < N; n++) {
      float sum = warp_sum(acc[r][n]);
      if (lane > 0 || first_row + r >= a.rows || n >= a.n) continue;
      if (a.bias) sum = __fadd_rn(sum, __ldg(a.bias + first_row + r));
      store_element(a.y, n * a.y_stride + first_row + r, a.y_is_half, sum);
    }
}

#define KERNEL(N) \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP) half_matmul_n##N(Arguments a) { multiply<N>(a); }

KERNEL(1)
KERNEL(2)
KERNEL(4)
KERNEL(8)
KERNEL(16)
