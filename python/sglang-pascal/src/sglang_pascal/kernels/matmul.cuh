// What the two products with quantised weights share, so that a row's sum has the same bits in both.
//
// The order of a sum, whatever the number of outputs n: K is cut into `splits` ranges of tiles (a function of the
// weight's shape and the card); in a split, slice s adds the blocks of tiles s, s + 4, ... in order; then the four slices
// are added in order, then the splits, then bias and residual.
//
// x has 8 or 16 bits (HALVES = 1 or 2). 16 bits are two int8 of each value, x = d * (256 * high + low): a block's integer
// products with both are joined before the one conversion, scale and addition that 8 bits take as well. The joined sum
// is below 2^28 and is rounded to float once.
#pragma once
#include "weights.cuh"

constexpr int SLICES = 4;

struct Arguments {
  const uint4* weights;
  const int4* x;          // int8 rows of K; `low` rows behind those of the high halves are the low ones
  const float2* x_scales; // likewise rows of K / 32 {d, d * sum q}; with a low half they are of the whole value
  void* y;                // [n, rows], float or half; rows y_stride elements apart
  const float* bias;      // [rows] or null
  const void* residual;   // like y, rows residual_stride apart; or null
  float* partials;
  u32* tickets;           // one per group of 32 rows, zero before and after
  long long y_stride, residual_stride;
  int rows, n_tiles, n_steps, n, y_is_half, splits; // n_steps: of 64 columns, in a row of the weights
  int low;                // rows of x between a high half and its low one; 0 of 8 bits
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

// Where output n is written, and what is added to it.
struct Output {
  char* y;
  const char* residual; // or null
  __device__ __forceinline__ Output(const Arguments& a, int n) {
    const int size = a.y_is_half ? 2 : 4;
    y = static_cast<char*>(a.y) + n * a.y_stride * size;
    residual = a.residual ? static_cast<const char*>(a.residual) + n * a.residual_stride * size : nullptr;
  }
};

// write_output for rows row .. row + 3, which are stored at once where their address allows it.
__device__ __forceinline__ void write_four(const Arguments& a, const Output& output, int row, float (&sums)[4]) {
  const int count = a.rows - row;
  if (count <= 0) return;
  if (a.bias)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) sums[i] = __fadd_rn(sums[i], __ldg(a.bias + row + i));
  if (output.residual)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) sums[i] = __fadd_rn(sums[i], load_element(output.residual, row + i, a.y_is_half));
  const u64 address = reinterpret_cast<u64>(output.y) + row * (a.y_is_half ? 2 : 4);
  if (count < 4 || address % (a.y_is_half ? 8 : 16)) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) store_element(output.y, row + i, a.y_is_half, sums[i]);
  } else if (a.y_is_half) {
    *reinterpret_cast<uint2*>(address) = make_uint2(float_to_half(sums[0]) | float_to_half(sums[1]) << 16,
                                                    float_to_half(sums[2]) | float_to_half(sums[3]) << 16);
  } else {
    *reinterpret_cast<float4*>(address) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

// Where split `split` of an output lies in partials [splits, n, 32 * groups].
__device__ __forceinline__ float* partial_of(const Arguments& a, float* partials, int split, int n, int row) {
  const int padded_rows = (a.rows + WARP - 1) / WARP * WARP;
  return partials + (static_cast<size_t>(split) * a.n + n) * padded_rows + row;
}

// Of `ctas` CTAs that share a ticket, whether this one is the last to come here. Called by all threads; what the others
// wrote before is visible afterwards.
__device__ __forceinline__ bool comes_last(u32* ticket, u32 ctas) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(ticket, 1u) == ctas - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

constexpr int SUMS_TOGETHER = 4; // of four rows each, that a thread adds side by side

// The results of rows first_row.. (ROW_COUNT of them) from the sums of all splits, in order. What a CTA does alone at the end
// takes little time only if many loads are in flight.
template <int ROW_COUNT>
__device__ __forceinline__ void add_splits(const Arguments& a, float* partials, int first_row) {
  constexpr int FOURS = ROW_COUNT / 4;
  for (int first = threadIdx.x; first < FOURS * a.n; first += SUMS_TOGETHER * blockDim.x) {
    float sums[SUMS_TOGETHER][4];
#pragma unroll
    for (int t = 0; t < SUMS_TOGETHER; t++) sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = 0.0f;
#pragma unroll 1
    for (int split = 0; split < a.splits; split++)
#pragma unroll
      for (int t = 0; t < SUMS_TOGETHER; t++) {
        const int i = first + t * blockDim.x, n = i / FOURS, row = first_row + 4 * (i % FOURS);
        if (n >= a.n || row >= a.rows) continue;
        const float4 part = __ldcg(reinterpret_cast<const float4*>(partial_of(a, partials, split, n, row)));
        sums[t][0] = __fadd_rn(sums[t][0], part.x), sums[t][1] = __fadd_rn(sums[t][1], part.y);
        sums[t][2] = __fadd_rn(sums[t][2], part.z), sums[t][3] = __fadd_rn(sums[t][3], part.w);
      }
#pragma unroll
    for (int t = 0; t < SUMS_TOGETHER; t++) {
      const int i = first + t * blockDim.x, n = i / FOURS;
      if (n < a.n) write_four(a, Output(a, n), first_row + 4 * (i % FOURS), sums[t]);
    }
  }
}
