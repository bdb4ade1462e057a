// Activations to int8, fused with what comes before a matrix product.
//
// Output of each: q int8 [n, K], scales [n, K / 32] of {d, d * sum q}, d = absmax / 127 over 32 consecutive values. Where
// `low` is not 0 both have 2n rows: the second half is what the rounding of the first lost. K is a multiple of 32;
// columns from `columns` to K (K is padded to 256) become zero.
//   quantize               x
//   rms_norm_quantize      x (+ residual, which is replaced by the sum) * rsqrt(mean square + eps) * weight
//   silu_mul_quantize      silu(gate) * up, x = [n, 2 * columns] with gate first
// quantize, silu: CTAs of 256 threads, a value each. rms_norm: one CTA a row, with a thread for each column up to 1024: a
// decode step waits for its chain of loads, shuffles and divisions twice a layer, and that is as long as a thread has
// columns. It reads its row twice, from the cache the second time. A warp holds one block of 32 at a time. No shared
// memory but 128 bytes for the row's sum.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int NORM_THREADS = 1024;

// low: rows between a row and the one of its second int8; 0 = there is none.
__device__ __forceinline__ void put(float value, int column, int row, int K, signed char* q, float2* scales, int low = 0) {
  const size_t block = (static_cast<size_t>(row) * K + column) / BLOCK;
  const size_t second = block + static_cast<size_t>(low) * K / BLOCK;
  quantize_block(value, q + block * BLOCK, scales + block, threadIdx.x % WARP, low ? q + second * BLOCK : nullptr,
                 scales + second);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize(const void* x, signed char* q, float2* scales, int x_is_half, int columns, int K, int low) {
  const int row = blockIdx.y;
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= K) return; // whole warps: K is a multiple of 32
  const float value = column < columns ? load_element(x, static_cast<size_t>(row) * columns + column, x_is_half) : 0.0f;
  put(value, column, row, K, q, scales, low);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_mul_quantize(const void* x, signed char* q, float2* scales, int x_is_half, int columns, int K, int low) {
  const int row = blockIdx.y;
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= K) return;
  float value = 0.0f;
  if (column < columns) {
    const size_t i = static_cast<size_t>(row) * 2 * columns + column;
    const float gate = load_element(x, i, x_is_half), up = load_element(x, i + columns, x_is_half);
    value = __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, __expf(-gate))), up);
  }
  put(value, column, row, K, q, scales, low);
}

// y (same type as x; may be null) receives the normalised values; q may be null instead.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    rms_norm_quantize(const void* x, void* residual, const void* weight, void* y, signed char* q, float2* scales,
                      float eps, int x_is_half, int weight_is_half, int columns, int K, int low) {
  __shared__ float sums[NORM_THREADS / WARP];
  const int row = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const size_t base = static_cast<size_t>(row) * columns;
  float sum = 0.0f;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    float value = load_element(x, base + column, x_is_half);
    if (residual) {
      // Plain load: the same thread wrote it in an earlier kernel, and reads its own sum back below.
      value = __fadd_rn(value, x_is_half ? half_to_float(static_cast<u16*>(residual)[base + column])
                                         : static_cast<float*>(residual)[base + column]);
      store_element(residual, base + column, x_is_half, value);
      if (x_is_half) value = half_to_float(static_cast<u16*>(residual)[base + column]);
    }
    sum = __fmaf_rn(value, value, sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < blockDim.x / WARP; w++) total = __fadd_rn(total, sums[w]);
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(total, static_cast<float>(columns)), eps)));
  for (int column = threadIdx.x; column < K; column += blockDim.x) { // whole warps: K is a multiple of 32
    float value = 0.0f;
    if (column < columns) {
      const void* source = residual ? residual : x;
      value = x_is_half ? half_to_float(static_cast<const u16*>(source)[base + column])
                        : static_cast<const float*>(source)[base + column];
      value = __fmul_rn(__fmul_rn(value, factor), load_element(weight, column, weight_is_half));
      if (y) store_element(y, base + column, x_is_half, value);
    }
    if (q) put(value, column, row, K, q, scales, low);
  }
}
