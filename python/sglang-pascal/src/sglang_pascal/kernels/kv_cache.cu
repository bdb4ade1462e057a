// Rotary embedding (and the norm of queries and keys) with the write of keys and values into the paged pool.
//
// CTA of 4 warps; a warp has one head of one token: query heads, then key heads, then value heads. Queries go to `q_out`,
// keys and values to their slot in the pool's type. Norm and rotation in fp32; keys and values are rounded to the
// input's type first, as a pool of that type holds them. Bound by launch overhead. Shared: 4 KB.
#include "common.cuh"

constexpr int WARPS = 4, MAX_HEAD_DIM = 256, PER_LANE = MAX_HEAD_DIM / WARP;
enum PoolType { POOL_F16, POOL_E5M2, POOL_INT8 };

struct Arguments {
  const void* qkv;          // [n, (heads + 2 kv_heads) * head_dim], float or half
  const void* positions;    // [n]
  const void* slots;        // [n]; a negative slot is not written
  const float* cos_sin;     // [positions, rotary_dim]: cosines, then sines
  const void* q_norm;       // [head_dim] or null
  const void* k_norm;
  void* q_out;              // [n, heads, head_dim], like qkv
  void* keys;               // [slots, kv_heads, head_dim]
  void* values;
  u16* key_scales;          // [slots, kv_heads]; int8 only
  u16* value_scales;
  int n, heads, kv_heads, head_dim, rotary_dim, is_neox, pool_type;
  int is_half, norm_is_half, positions_are_64_bit, slots_are_64_bit;
  float eps;
};

// fp32 -> fp16 -> e5m2, each to nearest even: what torch computes from fp16. NaN stays NaN.
__device__ __forceinline__ u8 float_to_e5m2(float value) {
  const u32 half = float_to_half(value);
  if ((half & 0x7fff) > 0x7c00) return static_cast<u8>((half >> 8) | 0x7f);
  return static_cast<u8>((half + 0x7f + ((half >> 8) & 1)) >> 8);
}

// Value i of a head, rotated with its partner.
__device__ __forceinline__ float rotate(const Arguments& a, const float* head, int i, float cosine, float sine) {
  if (i >= a.rotary_dim) return head[i];
  const int half = a.rotary_dim / 2;
  const bool first = a.is_neox ? i < half : i % 2 == 0;
  const int partner = a.is_neox ? (first ? i + half : i - half) : i ^ 1;
  return __fmaf_rn(first ? -head[partner] : head[partner], sine, __fmul_rn(head[i], cosine));
}

__device__ __forceinline__ void store_kv(const Arguments& a, void* pool, u16* scales, size_t vector, int i, float value,
                                         float absmax) {
  const size_t at = vector * a.head_dim + i;
  if (a.pool_type == POOL_F16) {
    static_cast<u16*>(pool)[at] = static_cast<u16>(float_to_half(value));
  } else if (a.pool_type == POOL_E5M2) {
    static_cast<u8*>(pool)[at] = float_to_e5m2(value);
  } else {
    const u32 bits = float_to_half(__fdiv_rn(absmax, INT8_MAX));
    const float scale = half_to_float(bits);
    if (i == 0) scales[vector] = static_cast<u16>(bits);
    const int q = scale > 0.0f ? __float2int_rn(__fdiv_rn(value, scale)) : 0;
    static_cast<signed char*>(pool)[at] = static_cast<signed char>(max(-127, min(127, q)));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP) rope_and_store(Arguments a) {
  __shared__ float buffer[WARPS][MAX_HEAD_DIM];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int total = a.heads + 2 * a.kv_heads;
  const int vector = blockIdx.x * WARPS + warp;
  if (vector >= a.n * total) return;
  const int token = vector / total, head = vector % total;
  const bool is_query = head < a.heads, is_value = head >= a.heads + a.kv_heads;
  float* values = buffer[warp];
  const size_t base = static_cast<size_t>(vector) * a.head_dim;
  // A chain of loads, position and then its angles, beside that of the head's values.
  const long long position = load_index(a.positions, token, a.positions_are_64_bit);
  const long long slot = is_query ? 0 : load_index(a.slots, token, a.slots_are_64_bit);
  const int half = a.rotary_dim / 2;
  float result[PER_LANE], cosines[PER_LANE], sines[PER_LANE], squares = 0.0f, absmax = 0.0f;
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) {
    const int i = lane + WARP * e;
    result[e] = i < a.head_dim ? load_element(a.qkv, base + i, a.is_half) : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) {
    const int i = lane + WARP * e;
    cosines[e] = sines[e] = 0.0f;
    if (is_value || i >= a.rotary_dim) continue;
    const float* cosine = a.cos_sin + position * a.rotary_dim + (a.is_neox ? i < half ? i : i - half : i / 2);
    cosines[e] = __ldg(cosine), sines[e] = __ldg(cosine + half);
  }
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) {
    values[lane + WARP * e] = result[e];
    squares = __fmaf_rn(result[e], result[e], squares);
  }
  const void* norm = is_query ? a.q_norm : is_value ? nullptr : a.k_norm;
  if (norm) {
    const float mean = __fdiv_rn(warp_sum(squares), static_cast<float>(a.head_dim));
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, a.eps)));
    for (int i = lane; i < a.head_dim; i += WARP)
      values[i] = __fmul_rn(__fmul_rn(values[i], factor), load_element(norm, i, a.norm_is_half));
  }
  __syncwarp();
  const bool has_scale = a.pool_type == POOL_INT8 && !is_query;
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) {
    if (WARP * e >= a.head_dim) break; // whole warps
    const int i = lane + WARP * e;
    result[e] = i >= a.head_dim ? 0.0f : is_value ? values[i] : rotate(a, values, i, cosines[e], sines[e]);
    if (a.is_half) result[e] = half_to_float(float_to_half(result[e]));
    if (!has_scale) continue;
    const float largest = warp_absmax(result[e]);
    absmax = largest <= absmax ? absmax : largest; // keeps a NaN
    if (largest != largest) absmax = largest;
  }
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) {
    const int i = lane + WARP * e;
    if (i >= a.head_dim) continue;
    if (is_query) {
      store_element(a.q_out, (static_cast<size_t>(token) * a.heads + head) * a.head_dim + i, a.is_half, result[e]);
    } else if (slot >= 0) {
      const int kv_head = head - a.heads - (is_value ? a.kv_heads : 0);
      store_kv(a, is_value ? a.values : a.keys, is_value ? a.value_scales : a.key_scales,
               static_cast<size_t>(slot) * a.kv_heads + kv_head, i, result[e], absmax);
    }
  }
}
