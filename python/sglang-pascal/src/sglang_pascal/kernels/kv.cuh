// The three element types of a paged KV pool, read eight elements at a time.
//
// Pools are [slots, kv_heads, HEAD_DIM]. An offset counts groups of eight elements; 32 bits reach 64 GiB of fp16.
// int8 has one fp16 scale per slot and head, [slots, kv_heads]: the value is q * scale.
#pragma once
#include "common.cuh"

constexpr int EIGHT = 8;

struct F16 {
  typedef uint4 Vector;
  static constexpr bool HAS_SCALE = false;
  static __device__ __forceinline__ void widen(const Vector& v, float (&out)[EIGHT]) {
    halves_to_floats(v.x, out[0], out[1]), halves_to_floats(v.y, out[2], out[3]);
    halves_to_floats(v.z, out[4], out[5]), halves_to_floats(v.w, out[6], out[7]);
  }
};

__device__ __forceinline__ u32 interleave_zero(u32 word, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(word), "r"(selector));
  return d;
}

// A byte of e5m2 is the upper byte of the fp16 with the same value.
struct E5M2 {
  typedef uint2 Vector;
  static constexpr bool HAS_SCALE = false;
  static __device__ __forceinline__ void widen(const Vector& v, float (&out)[EIGHT]) {
    halves_to_floats(interleave_zero(v.x, 0x1404), out[0], out[1]);
    halves_to_floats(interleave_zero(v.x, 0x3424), out[2], out[3]);
    halves_to_floats(interleave_zero(v.y, 0x1404), out[4], out[5]);
    halves_to_floats(interleave_zero(v.y, 0x3424), out[6], out[7]);
  }
};

struct INT8 {
  typedef uint2 Vector;
  static constexpr bool HAS_SCALE = true;
  static __device__ __forceinline__ void widen(const Vector& v, float (&out)[EIGHT]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[i] = static_cast<float>(static_cast<signed char>(v.x >> (8 * i)));
      out[4 + i] = static_cast<float>(static_cast<signed char>(v.y >> (8 * i)));
    }
  }
};

template <class KV>
__device__ __forceinline__ void load_eight(const void* pool, u32 offset, float (&out)[EIGHT]) {
  KV::widen(__ldg(static_cast<const typename KV::Vector*>(pool) + offset), out);
}

constexpr float LOG2_E = 1.44269504f;
constexpr float MASKED = -1e30f; // finite, so that the difference of two masked scores is no NaN

// Score in units of log2, after the soft cap. `capped` 0 = no cap.
__device__ __forceinline__ float finish_score(float dot, float scale, float soft_cap) {
  const float score = __fmul_rn(dot, scale);
  return __fmul_rn(soft_cap > 0.0f ? __fmul_rn(soft_cap, tanhf(__fdiv_rn(score, soft_cap))) : score, LOG2_E);
}

// Positions of one split of a decode: a sixteenth of the sequence up to 256, so that few and short sequences fill a card
// too. It depends on the sequence's own length alone, and so do the bits of its result.
constexpr int MOST_SPLIT = 256;
__device__ __forceinline__ int split_of(int length) {
  return 32 << ((length > 512) + (length > 1024) + (length > 2048));
}
