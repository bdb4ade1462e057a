// Pieces of sampling over the vocabulary: one CTA of 1024 threads per row, fp32, no sort.
//
//   argmax              index of the largest logit, the first of equals; a NaN counts as largest, as in torch
//   top_k_top_p_filter  probabilities: those outside of the top k, of the nucleus p, or below min_p times the largest become
//                       zero, the rest is scaled to sum 1. The smallest kept value is found by bisection over the
//                       bits of the probability (31 passes over a row that stays in L2). Equals of it are all kept.
#include "common.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / WARP;

__device__ __forceinline__ u32 ordered_bits(float value) {
  const u32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

__device__ __forceinline__ u64 warp_largest(u64 key) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) key = larger(key, __shfl_xor_sync(ALL_LANES, key, offset));
  return key;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    argmax(const void* logits, long long* out, int logits_are_half, int vocabulary) {
  __shared__ u64 best[WARPS];
  const size_t base = static_cast<size_t>(blockIdx.x) * vocabulary;
  u64 key = 0; // value above, complement of the index below: the first of equals is the largest key
  for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
    const u64 value = ordered_bits(load_element(logits, base + i, logits_are_half));
    key = larger(key, value << 32 | (0xffffffffu - static_cast<u32>(i)));
  }
  key = warp_largest(key);
  if (threadIdx.x % WARP == 0) best[threadIdx.x / WARP] = key;
  __syncthreads();
  if (threadIdx.x >= WARP) return;
  key = warp_largest(best[threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = 0xffffffffu - static_cast<u32>(key);
}

struct Total {
  float sum;
  int count;
};

// Sum and count of the row's values >= threshold, in a fixed order; the same for all threads.
__device__ __forceinline__ Total total_above(const float* row, int vocabulary, float threshold, Total* shared) {
  Total total = {0.0f, 0};
  for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
    const float value = row[i];
    if (value >= threshold) total.sum = __fadd_rn(total.sum, value), total.count++;
  }
  total.sum = warp_sum(total.sum);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) total.count += __shfl_xor_sync(ALL_LANES, total.count, offset);
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = total;
  __syncthreads();
  total = shared[threadIdx.x % WARP];
  total.sum = warp_sum(total.sum);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) total.count += __shfl_xor_sync(ALL_LANES, total.count, offset);
  return total;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    top_k_top_p_filter(float* probabilities, const int* top_k, const float* top_p, const float* min_p, int vocabulary) {
  __shared__ Total shared[WARPS];
  __shared__ u32 maxima[WARPS];
  float* row = probabilities + static_cast<size_t>(blockIdx.x) * vocabulary;
  const int k = top_k ? __ldg(top_k + blockIdx.x) : vocabulary;
  const float p = top_p ? __ldg(top_p + blockIdx.x) : 1.0f;
  float max = 0.0f;
  for (int i = threadIdx.x; i < vocabulary; i += THREADS) max = fmaxf(max, row[i]);
  max = warp_max(max);
  if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = __float_as_uint(max);
  __syncthreads();
  max = warp_max(__uint_as_float(maxima[threadIdx.x % WARP]));
  const Total all = total_above(row, vocabulary, 0.0f, shared);
  const float wanted = __fmul_rn(p, all.sum);
  // The largest threshold that keeps at least k values, and the one that keeps at least the share p: the stricter holds.
  u32 kept_by_k = 0, kept_by_p = 0;
  for (u32 bit = 1u << 30; bit; bit >>= 1) {
    const u32 try_k = kept_by_k | bit, try_p = kept_by_p | bit;
    if (k < vocabulary && try_k <= __float_as_uint(max) &&
        total_above(row, vocabulary, __uint_as_float(try_k), shared).count >= k)
      kept_by_k = try_k;
    if (p < 1.0f && try_p <= __float_as_uint(max) &&
        total_above(row, vocabulary, __uint_as_float(try_p), shared).sum >= wanted)
      kept_by_p = try_p;
  }
  float threshold = __uint_as_float(kept_by_k > kept_by_p ? kept_by_k : kept_by_p);
  if (min_p) threshold = fmaxf(threshold, __fmul_rn(max, __ldg(min_p + blockIdx.x)));
  const Total kept = total_above(row, vocabulary, threshold, shared);
  __syncthreads();
  for (int i = threadIdx.x; i < vocabulary; i += THREADS)
    row[i] = row[i] >= threshold ? __fdiv_rn(row[i], kept.sum) : row[i] != row[i] ? row[i] : 0.0f;
}
