// The splits of attention_decode become one output per sequence and head, in fp16 or fp32 and, if asked for, as the int8
// activations that the output projection multiplies.
//
// CTA (head, sequence) of head_dim threads, a dimension a thread; a warp holds one block of 32 activations. Splits are
// added in order. A sequence of length 0 gives zeros. Bound by launch overhead.
#include "kv.cuh"

struct Arguments {
  const float* partial;        // [n, heads, splits, head_dim]
  const float2* partial_stats; // [n, heads, splits] {max, sum}
  const void* lengths;
  void* out;           // [n, heads * head_dim], float or half; may be null
  signed char* q;      // [n, K], or [2n, K] where is_16_bit; may be null. K = heads * head_dim, padded with zeros to 256
  float2* scales;
  int splits, window, out_is_half, lengths_are_64_bit, K, is_16_bit;
};

__device__ __forceinline__ void put(const Arguments& a, int column, float value) {
  const size_t block = (static_cast<size_t>(blockIdx.y) * a.K + column) / BLOCK;
  const size_t second = block + static_cast<size_t>(gridDim.y) * a.K / BLOCK;
  quantize_block(value, a.q + block * BLOCK, a.scales + block, threadIdx.x % WARP,
                 a.is_16_bit ? a.q + second * BLOCK : nullptr, a.scales + second);
}

extern "C" __global__ void __launch_bounds__(256) attention_combine(Arguments a) {
  const int length = static_cast<int>(load_index(a.lengths, blockIdx.y, a.lengths_are_64_bit));
  const int split = split_of(length);
  const int end = min(a.splits, (length + split - 1) / split);
  const int begin = a.window < 0 ? 0 : max(0, length - 1 - a.window) / split;
  const size_t head = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const float2* stats = a.partial_stats + head * a.splits;
  const float* partial = a.partial + head * a.splits * blockDim.x + threadIdx.x;
  float max = -1e30f;
  for (int s = begin; s < end; s++) max = fmaxf(max, stats[s].x);
  float sum = 0.0f, out = 0.0f;
  for (int s = begin; s < end; s++) {
    const float factor = exp2_approx(__fsub_rn(stats[s].x, max));
    sum = __fmaf_rn(stats[s].y, factor, sum);
    out = __fmaf_rn(partial[static_cast<size_t>(s) * blockDim.x], factor, out);
  }
  const float value = length > 0 ? __fdiv_rn(out, sum) : 0.0f;
  const size_t at = head * blockDim.x + threadIdx.x;
  if (a.out) store_element(a.out, at, a.out_is_half, value);
  if (!a.q) return;
  put(a, blockIdx.x * blockDim.x + threadIdx.x, value);
  if (blockIdx.x < gridDim.x - 1) return; // the last head pads the row: whole warps, as K and head_dim are
  for (int column = gridDim.x * blockDim.x + threadIdx.x; column < a.K; column += blockDim.x) put(a, column, 0.0f);
}
