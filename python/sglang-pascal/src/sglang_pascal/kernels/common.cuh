// What every kernel file shares: fixed-width names, fp16 conversions, the four-way byte dot product, warp reductions.
//
// No CUDA header is included, so NVRTC needs none. Arithmetic whose bits are promised (ops/matmul.py) is written with
// the _rn intrinsics: ptxas may otherwise contract a multiply and an add on one target and not on another.
// fp16 is a storage format only: Pascal's sm_61 adds and multiplies halves at 1/64 of the fp32 rate.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int BLOCK = 32;       // values that share one activation scale
constexpr int SUPERBLOCK = 256; // weights of one row in one weight tile

__device__ __forceinline__ float half_to_float(u32 bits) {
  float value;
  asm("{.reg .b16 low; cvt.u16.u32 low, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(bits));
  return value;
}

__device__ __forceinline__ void halves_to_floats(u32 bits, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(bits));
}

__device__ __forceinline__ u32 float_to_half(float value) {
  u32 bits;
  asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(value));
  return bits;
}

// Bring a line of 128 bytes into L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 610
// c + sum of the four products of bytes. One instruction (IDP) on sm_61.
template <bool SIGNED>
__device__ __forceinline__ int dot4(u32 weights, int activations, int c) {
  int d;
  if (SIGNED)
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(weights), "r"(activations), "r"(c));
  else
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(weights), "r"(activations), "r"(c));
  return d;
}
#else
// The same integer on sm_60, which has no dp4a: bytes are spread to 16-bit pairs, and each 16 x 16 + 32 bit product is
// one XMAD. Selector digits above 7 repeat the byte's sign.
__device__ __forceinline__ int multiply_add_pairs(u32 a, u32 b, int c) {
  asm("{.reg .s16 al, ah, bl, bh; mov.b32 {al, ah}, %1; mov.b32 {bl, bh}, %2;\n\t"
      "mad.wide.s16 %0, al, bl, %0; mad.wide.s16 %0, ah, bh, %0;}"
      : "+r"(c)
      : "r"(a), "r"(b));
  return c;
}

__device__ __forceinline__ u32 permute_bytes(u32 a, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(a), "r"(selector));
  return d;
}

template <bool SIGNED>
__device__ __forceinline__ int dot4(u32 weights, int activations, int c) {
  const u32 even = SIGNED ? permute_bytes(weights, 0xa280) : weights & 0x00ff00ffu;
  const u32 odd = SIGNED ? permute_bytes(weights, 0xb391) : (weights >> 8) & 0x00ff00ffu;
  c = multiply_add_pairs(even, permute_bytes(activations, 0xa280), c);
  return multiply_add_pairs(odd, permute_bytes(activations, 0xb391), c);
}
#endif

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
    value = __fadd_rn(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
}

// Largest magnitude of the warp. Compared as bits, where NaN is above infinity: fmaxf would drop a NaN.
__device__ __forceinline__ float warp_absmax(float value) {
  u32 bits = __float_as_uint(value) & 0x7fffffffu;
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    const u32 other = __shfl_xor_sync(ALL_LANES, bits, offset);
    bits = other > bits ? other : bits;
  }
  return __uint_as_float(bits);
}

// Elements that are float or half by a runtime flag: the branch is uniform and costs nothing beside the memory access.
__device__ __forceinline__ float load_element(const void* base, size_t i, bool is_half) {
  return is_half ? half_to_float(__ldg(static_cast<const u16*>(base) + i)) : __ldg(static_cast<const float*>(base) + i);
}

__device__ __forceinline__ void store_element(void* base, size_t i, bool is_half, float value) {
  if (is_half)
    static_cast<u16*>(base)[i] = static_cast<u16>(float_to_half(value));
  else
    static_cast<float*>(base)[i] = value;
}

// torch indices are int32 or int64.
__device__ __forceinline__ long long load_index(const void* base, size_t i, bool is_64_bit) {
  return is_64_bit ? __ldg(static_cast<const long long*>(base) + i)
                   : static_cast<long long>(__ldg(static_cast<const int*>(base) + i));
}

constexpr float INT8_MAX = 127.0f;
constexpr float TINY = 1e-30f; // below it 127 / amax may overflow: such a block counts as zero

constexpr int LOW_STEPS = 256; // of the low int8 in one step of the high one

// A warp's int8 values and {d, d * their sum}. high_sum: of the high halves, in steps of the low ones.
__device__ __forceinline__ int write_block(int q, float d, signed char* q_out, float2* scale_out, int lane,
                                           int high_sum = 0) {
  int sum = q;
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  q_out[lane] = static_cast<signed char>(q);
  if (lane == 0) *scale_out = make_float2(d, __fmul_rn(d, static_cast<float>(high_sum + sum)));
  return sum;
}

// One warp holds one block of 32 values, a value a lane; writes its int8 values and {d, d * sum q}. With q_low, what the
// rounding lost is written there as int8 of a 256th of the step: both together are 16 bits, and scale_low is of both.
// d is NaN or infinite where a value is: whatever multiplies it shows that.
__device__ __forceinline__ void quantize_block(float value, signed char* q_out, float2* scale_out, int lane,
                                               signed char* q_low = nullptr, float2* scale_low = nullptr) {
  const float amax = warp_absmax(value);
  const bool zero = amax < TINY;
  const float inverse = zero ? 0.0f : __fdiv_rn(INT8_MAX, amax);
  const float d = zero ? 0.0f : __fdiv_rn(amax, INT8_MAX);
  const float steps = __fmul_rn(value, inverse);
  const int q = __float2int_rn(steps);
  const int sum = write_block(q, d, q_out, scale_out, lane);
  if (!q_low) return;
  const int low = __float2int_rn(__fmul_rn(__fsub_rn(steps, static_cast<float>(q)), static_cast<float>(LOW_STEPS)));
  write_block(max(-128, min(127, low)), __fmul_rn(d, 1.0f / LOW_STEPS), q_low, scale_low, lane, LOW_STEPS * sum);
}
