// Activations to int8, fused with what comes before a matrix product.
//
// Output of each: q int8 [n, K], scales [n, K / 32] of {d, d * sum q}, d = absmax / 127 over 32 consecutive values. Where
// `low` is not 0 both have 2n rows: the second half is what the rounding of the first lost. K is a multiple of 256;
// columns from `columns` to K become zero.
//   quantize               x
//   rms_norm_quantize      x (+ residual, which is replaced by the sum) * rsqrt(mean square + eps) * weight
//   silu_mul_quantize      silu(gate) * up, x = [n, 2 * columns] with gate first
// quantize, silu: a thread has four consecutive values, so that eight lanes share a block and its shuffles; CTAs of 128
// threads. rms_norm: one CTA a row, with a thread for each column up to 1024: a decode step waits for its chain of loads,
// shuffles and divisions twice a layer. So all loads of a thread's first columns are in flight at once, what they
// gave stays in registers, and their blocks are quantised side by side. A row of more than 4096 columns is read twice
// behind these. A warp holds one block of 32 at a time. No shared memory but 128 bytes for the row's sum.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int NORM_THREADS = 1024, MOST_HELD = 4; // MOST_HELD: columns of a thread in registers
constexpr int FOUR = 4, LANES = BLOCK / FOUR;     // of a block

// low: rows between a row and the one of its second int8; 0 = there is none.
__device__ __forceinline__ void put(float value, int column, int row, int K, signed char* q, float2* scales, int low) {
  const size_t block = (static_cast<size_t>(row) * K + column) / BLOCK;
  const size_t second = block + static_cast<size_t>(low) * K / BLOCK;
  quantize_block(value, q + block * BLOCK, scales + block, threadIdx.x % WARP, low ? q + second * BLOCK : nullptr,
                 scales + second);
}

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

template <int COUNT, int OFFSETS>
__device__ __forceinline__ void add_lanes(int (&sums)[COUNT]) {
#pragma unroll
  for (int offset = OFFSETS; offset; offset >>= 1)
#pragma unroll
    for (int j = 0; j < COUNT; j++) sums[j] += __shfl_xor_sync(ALL_LANES, sums[j], offset);
}

// Four consecutive values a lane, eight lanes a block: what quantize_block gives, to the bit.
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
  int high[FOUR], sum[1] = {0};
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < FOUR; i++) {
    steps[i] = __fmul_rn(values[i], step.inverse), high[i] = __float2int_rn(steps[i]);
    sum[0] += high[i], word |= (static_cast<u32>(high[i]) & 0xffu) << 8 * i;
  }
  add_lanes<1, LANES / 2>(sum);
  *reinterpret_cast<u32*>(q + at) = word;
  if (is_first) scales[at / BLOCK] = make_float2(step.d, __fmul_rn(step.d, static_cast<float>(sum[0])));
  if (!low) return;
  int low_sum[1] = {0};
  word = 0;
#pragma unroll
  for (int i = 0; i < FOUR; i++) {
    const int value = low_of(steps[i], high[i]);
    low_sum[0] += value, word |= (static_cast<u32>(value) & 0xffu) << 8 * i;
  }
  add_lanes<1, LANES / 2>(low_sum);
  const size_t second = at + static_cast<size_t>(low) * K;
  const float fine = __fmul_rn(step.d, 1.0f / LOW_STEPS);
  *reinterpret_cast<u32*>(q + second) = word;
  if (is_first)
    scales[second / BLOCK] = make_float2(fine, __fmul_rn(fine, static_cast<float>(LOW_STEPS * sum[0] + low_sum[0])));
}

// Whether four elements of each row of x can be loaded at once.
__device__ __forceinline__ bool loads_four(const void* x, int columns, bool is_half) {
  return columns % FOUR == 0 && reinterpret_cast<u64>(x) % (is_half ? 8 : 16) == 0;
}

// Elements first .. first + 3, of which those from `count` on are zero.
__device__ __forceinline__ void load_four(const void* base, size_t first, int count, bool is_half, bool is_aligned,
                                          float (&values)[FOUR]) {
  if (is_aligned && count >= FOUR) {
    if (is_half) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const u16*>(base) + first));
      halves_to_floats(v.x, values[0], values[1]), halves_to_floats(v.y, values[2], values[3]);
    } else {
      const float4 v = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(base) + first));
      values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < FOUR; i++) values[i] = i < count ? load_element(base, first + i, is_half) : 0.0f;
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

// What the norm of a row needs. y (same type as x; may be null) receives the normalised values; q may be null instead.
struct Norm {
  const void* x;
  void* residual;
  const void* weight;
  void* y;
  signed char* q;
  float2* scales;
  float eps;
  int x_is_half, weight_is_half, columns, K, low;
};

template <bool HALF>
__device__ __forceinline__ float plain_load(const void* base, size_t i) {
  return HALF ? half_to_float(static_cast<const u16*>(base)[i]) : static_cast<const float*>(base)[i];
}

template <bool HALF>
__device__ __forceinline__ float add_residual(const Norm& a, size_t at, float value, float residual) {
  const float sum = __fadd_rn(value, residual);
  store_element(a.residual, at, HALF, sum);
  return HALF ? half_to_float(float_to_half(sum)) : sum;
}

// 1 / root of the mean square. The warps' sums are added in order.
__device__ __forceinline__ float norm_factor(const Norm& a, float sum) {
  __shared__ float4 sums[NORM_THREADS / WARP / 4];
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) reinterpret_cast<float*>(sums)[threadIdx.x / WARP] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / WARP / 4; w++) { // a multiple of 8 warps, as K is one of 256
    const float4 four = sums[w];
    total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, four.x), four.y), four.z), four.w);
  }
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(total, static_cast<float>(a.columns)), a.eps)));
}

// The int8 of COUNT blocks of a warp, blockDim.x columns apart, whose sums are of `high`, or of both where low is given.
// Columns from K on are not written.
template <int COUNT>
__device__ __forceinline__ void write_blocks(const Norm& a, size_t at, const int (&values)[COUNT], const int (&sums)[COUNT],
                                             const float (&d)[COUNT]) {
#pragma unroll
  for (int j = 0; j < COUNT; j++, at += blockDim.x) {
    if (threadIdx.x + j * blockDim.x >= a.K) break; // whole warps
    a.q[at] = static_cast<signed char>(values[j]);
    if (threadIdx.x % WARP == 0) a.scales[at / BLOCK] = make_float2(d[j], __fmul_rn(d[j], static_cast<float>(sums[j])));
  }
}

// A block of 32 a warp and value: what quantize_block gives for each, side by side.
template <int COUNT>
__device__ __forceinline__ void put_side_by_side(const Norm& a, float (&values)[COUNT], int row) {
  const size_t at = static_cast<size_t>(row) * a.K + threadIdx.x;
  u32 amax[COUNT];
  float d[COUNT];
  int high[COUNT], sums[COUNT];
#pragma unroll
  for (int j = 0; j < COUNT; j++) amax[j] = absolute_bits(values[j]);
#pragma unroll
  for (int offset = WARP / 2; offset; offset >>= 1)
#pragma unroll
    for (int j = 0; j < COUNT; j++) amax[j] = larger(amax[j], __shfl_xor_sync(ALL_LANES, amax[j], offset));
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const Step step(amax[j]);
    d[j] = step.d, values[j] = __fmul_rn(values[j], step.inverse);
    sums[j] = high[j] = __float2int_rn(values[j]);
  }
  add_lanes<COUNT, WARP / 2>(sums);
  write_blocks<COUNT>(a, at, high, sums, d);
  if (!a.low) return;
  int low_sums[COUNT];
#pragma unroll
  for (int j = 0; j < COUNT; j++) low_sums[j] = high[j] = low_of(values[j], high[j]);
  add_lanes<COUNT, WARP / 2>(low_sums);
#pragma unroll
  for (int j = 0; j < COUNT; j++) low_sums[j] += LOW_STEPS * sums[j], d[j] = __fmul_rn(d[j], 1.0f / LOW_STEPS);
  write_blocks<COUNT>(a, at + static_cast<size_t>(a.low) * a.K, high, low_sums, d);
}

// Columns threadIdx.x + j * blockDim.x: the first COUNT of a thread stay in registers, the others are read again.
template <bool HALF, int COUNT>
__device__ __forceinline__ void norm_row(const Norm& a) {
  const int row = blockIdx.x, held = COUNT * blockDim.x;
  const size_t base = static_cast<size_t>(row) * a.columns;
  float values[COUNT], residuals[COUNT], sum = 0.0f;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int column = threadIdx.x + j * blockDim.x;
    const bool is_real = column < a.columns;
    values[j] = is_real ? load_element(a.x, base + column, HALF) : 0.0f;
    residuals[j] = is_real && a.residual ? plain_load<HALF>(a.residual, base + column) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int column = threadIdx.x + j * blockDim.x;
    if (a.residual && column < a.columns) values[j] = add_residual<HALF>(a, base + column, values[j], residuals[j]);
    sum = __fmaf_rn(values[j], values[j], sum);
  }
  for (int column = threadIdx.x + held; column < a.columns; column += blockDim.x) {
    float value = load_element(a.x, base + column, HALF);
    if (a.residual) value = add_residual<HALF>(a, base + column, value, plain_load<HALF>(a.residual, base + column));
    sum = __fmaf_rn(value, value, sum);
  }
  float weights[COUNT]; // in flight while the sums of all threads are added
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int column = threadIdx.x + j * blockDim.x;
    weights[j] = column < a.columns ? load_element(a.weight, column, a.weight_is_half) : 0.0f;
  }
  const float factor = norm_factor(a, sum);
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int column = threadIdx.x + j * blockDim.x;
    values[j] = __fmul_rn(__fmul_rn(values[j], factor), weights[j]);
    if (a.y && column < a.columns) store_element(a.y, base + column, HALF, values[j]);
  }
  if (a.q) put_side_by_side<COUNT>(a, values, row);
  for (int column = threadIdx.x + held; column < a.K; column += blockDim.x) { // whole warps
    float value = 0.0f;
    if (column < a.columns) {
      value = plain_load<HALF>(a.residual ? a.residual : a.x, base + column);
      value = __fmul_rn(__fmul_rn(value, factor), load_element(a.weight, column, a.weight_is_half));
      if (a.y) store_element(a.y, base + column, HALF, value);
    }
    if (a.q) put(value, column, row, a.K, a.q, a.scales, a.low);
  }
}

template <bool HALF>
__device__ __forceinline__ void norm_row(const Norm& a) {
  const int count = (a.K + blockDim.x - 1) / blockDim.x;
  if (count == 1)
    norm_row<HALF, 1>(a);
  else if (count == 2)
    norm_row<HALF, 2>(a);
  else
    norm_row<HALF, MOST_HELD>(a);
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS, 2)
    rms_norm_quantize(const void* x, void* residual, const void* weight, void* y, signed char* q, float2* scales,
                      float eps, int x_is_half, int weight_is_half, int columns, int K, int low) {
  const Norm a = {x, residual, weight, y, q, scales, eps, x_is_half, weight_is_half, columns, K, low};
  if (x_is_half)
    norm_row<true>(a);
  else
    norm_row<false>(a);
}
