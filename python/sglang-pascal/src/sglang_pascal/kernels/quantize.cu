// Activations to int8, fused with what comes before a matrix product.
//
// Output of each: q int8 [n, K], scales [n, K / 32] of {d, d * sum q}, d = absmax / 127 over 32 consecutive values. Where
// `low` is not 0 both have 2n rows: the second half is what the rounding of the first lost. K is a multiple of 256;
// columns from `columns` to K become zero.
//   quantize               x
//   rms_norm_quantize      x (+ residual, which is replaced by the sum) * rsqrt(mean square + eps) * weight
//   silu_mul_quantize      silu(gate) * up, x = [n, 2 * columns] with gate first
// A thread quantises four consecutive values, so that eight lanes share a block and its shuffles. quantize, silu: CTAs of 128
// threads. rms_norm: one CTA a row, with a thread for each column up to 1024: a decode step waits for its chain of loads,
// shuffles and divisions twice a layer, and that is as long as a thread has columns. It reads its row twice, from the cache
// the second time; a loop, since code that runs once a launch comes from memory. No shared memory but 128 bytes for the
// row's sum.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int NORM_THREADS = 1024;
constexpr int FOUR = 4, LANES = BLOCK / FOUR; // values of a lane, and lanes of a block

__device__ __forceinline__ u32 absolute_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

__device__ __forceinline__ u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// Steps and their inverse of a block (common.cuh) from its largest magnitude.
struct Step {
  float d, inverse;
  __device__ __forceinline__ explicit Step(u32 amax_bits) {
    const float amax = __uint_as_float(amax_bits);
    const bool zero = amax < TINY;
    inverse = zero ? 0.0f : __fdiv_rn(INT8_MAX, amax);
    d = zero ? 0.0f : __fdiv_rn(amax, INT8_MAX);
  }
};

__device__ __forceinline__ int low_of(float steps, int q) {
  const int low = __float2int_rn(__fmul_rn(__fsub_rn(steps, static_cast<float>(q)), static_cast<float>(LOW_STEPS)));
  return max(-128, min(127, low));
}

__device__ __forceinline__ int sum_of_block(int sum) {
#pragma unroll
  for (int offset = LANES / 2; offset; offset >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  return sum;
}

// Four consecutive values a lane, eight lanes a block: what quantize_block gives, to the bit. low: rows between a row and the
// one of its second int8; 0 = there is none.
__device__ __forceinline__ void put_four(const float (&values)[FOUR], int column, int row, int K, signed char* q,
                                         float2* scales, int low) {
  u32 amax = larger(larger(absolute_bits(values[0]), absolute_bits(values[1])),
                    larger(absolute_bits(values[2]), absolute_bits(values[3])));
#pragma unroll
  for (int offset = LANES / 2; offset; offset >>= 1) amax = larger(amax, __shfl_xor_sync(ALL_LANES, amax, offset));
  const Step step(amax);
  const size_t at = static_cast<size_t>(row) * K + column;
  const bool is_first = threadIdx.x % LANES == 0;
  float steps[FOUR];
  int high[FOUR], sum = 0;
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < FOUR; i++) {
    steps[i] = __fmul_rn(values[i], step.inverse), high[i] = __float2int_rn(steps[i]);
    sum += high[i], word |= (static_cast<u32>(high[i]) & 0xffu) << 8 * i;
  }
  sum = sum_of_block(sum);
  *reinterpret_cast<u32*>(q + at) = word;
  if (is_first) scales[at / BLOCK] = make_float2(step.d, __fmul_rn(step.d, static_cast<float>(sum)));
  if (!low) return;
  int low_sum = 0;
  word = 0;
#pragma unroll
  for (int i = 0; i < FOUR; i++) {
    const int value = low_of(steps[i], high[i]);
    low_sum += value, word |= (static_cast<u32>(value) & 0xffu) << 8 * i;
  }
  low_sum = sum_of_block(low_sum);
  const size_t second = at + static_cast<size_t>(low) * K;
  const float fine = __fmul_rn(step.d, 1.0f / LOW_STEPS);
  *reinterpret_cast<u32*>(q + second) = word;
  if (is_first)
    scales[second / BLOCK] = make_float2(fine, __fmul_rn(fine, static_cast<float>(LOW_STEPS * sum + low_sum)));
}

// load_element of what this CTA may have written.
__device__ __forceinline__ float read_element(const void* base, size_t i, bool is_half) {
  return is_half ? half_to_float(static_cast<const u16*>(base)[i]) : static_cast<const float*>(base)[i];
}

// Whether four elements of each row of x can be loaded at once.
__device__ __forceinline__ bool loads_four(const void* x, int columns, bool is_half) {
  return columns % FOUR == 0 && reinterpret_cast<u64>(x) % (is_half ? 8 : 16) == 0;
}

// Elements first .. first + 3, of which those from `count` on are zero. WRITTEN: that this CTA may have written them.
template <bool WRITTEN = false>
__device__ __forceinline__ void load_four(const void* base, size_t first, int count, bool is_half, bool is_aligned,
                                          float (&values)[FOUR]) {
  if (is_aligned && count >= FOUR) {
    if (is_half) {
      const uint2* at = reinterpret_cast<const uint2*>(static_cast<const u16*>(base) + first);
      const uint2 v = WRITTEN ? *at : __ldg(at);
      halves_to_floats(v.x, values[0], values[1]), halves_to_floats(v.y, values[2], values[3]);
    } else {
      const float4* at = reinterpret_cast<const float4*>(static_cast<const float*>(base) + first);
      const float4 v = WRITTEN ? *at : __ldg(at);
      values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < FOUR; i++)
    values[i] = i >= count ? 0.0f : WRITTEN ? read_element(base, first + i, is_half) : load_element(base, first + i, is_half);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize(const void* x, signed char* q, float2* scales, int x_is_half, int columns, int K, int low) {
  const int row = blockIdx.y, column = FOUR * (blockIdx.x * THREADS + threadIdx.x);
  if (column >= K) return; // whole warps: K is a multiple of 256
  float values[FOUR];
  load_four(x, static_cast<size_t>(row) * columns + column, columns - column, x_is_half, loads_four(x, columns, x_is_half), values);
  put_four(values, column, row, K, q, scales, low);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_mul_quantize(const void* x, signed char* q, float2* scales, int x_is_half, int columns, int K, int low) {
  const int row = blockIdx.y, column = FOUR * (blockIdx.x * THREADS + threadIdx.x);
  if (column >= K) return;
  const size_t first = static_cast<size_t>(row) * 2 * columns + column;
  const bool is_aligned = loads_four(x, columns, x_is_half);
  float gate[FOUR], up[FOUR], values[FOUR];
  load_four(x, first, columns - column, x_is_half, is_aligned, gate);
  load_four(x, first + columns, columns - column, x_is_half, is_aligned, up);
#pragma unroll
  for (int i = 0; i < FOUR; i++)
    values[i] = __fmul_rn(__fdiv_rn(gate[i], __fadd_rn(1.0f, __expf(-gate[i]))), up[i]);
  put_four(values, column, row, K, q, scales, low);
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
      // Plain loads: an earlier kernel, or this one below, writes it and reads it back.
      value = __fadd_rn(value, read_element(residual, base + column, x_is_half));
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
  const void* source = residual ? residual : x; // of which the barrier has made the sums visible
  const bool is_aligned = loads_four(source, columns, x_is_half), has_aligned_weight = loads_four(weight, columns, weight_is_half);
  for (int column = FOUR * threadIdx.x; column < K; column += FOUR * blockDim.x) { // whole warps: K is a multiple of 256
    float values[FOUR], weights[FOUR];
    load_four<true>(source, base + column, columns - column, x_is_half, is_aligned, values);
    load_four(weight, column, columns - column, weight_is_half, has_aligned_weight, weights);
#pragma unroll
    for (int i = 0; i < FOUR; i++) {
      values[i] = column + i < columns ? __fmul_rn(__fmul_rn(values[i], factor), weights[i]) : 0.0f;
      if (y && column + i < columns) store_element(y, base + column + i, x_is_half, values[i]);
    }
    if (q) put_four(values, column, row, K, q, scales, low);
  }
}
