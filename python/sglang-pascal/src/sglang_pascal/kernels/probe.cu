// How many instructions of a kind a multiprocessor completes per clock: what the design of the products rests on, and
// what no document says for sm_61 (above all whether a 16-byte load of one shared address by a warp takes 1 or 4 clocks).
//
// Each kernel: one CTA of 1024 threads per multiprocessor; a thread repeats UNROLL independent instructions ITERATIONS
// times. out[0] of a CTA is the number of clocks between the first start and the last end of its warps.
// `code_*` are loops of that many KB of FFMA (8 bytes, and 8 of scheduling for three of them): what a loop that does not
// fit the instruction cache costs.
// `stream` reads memory: every thread adds 16-byte loads, which gives the bandwidth that a kernel can reach.
#include "common.cuh"

constexpr int THREADS = 1024, ITERATIONS = 256, UNROLL = 16;

template <int LENGTH = UNROLL, int TIMES = ITERATIONS, class Step>
__device__ __forceinline__ void measure(u32* clocks, u32* sink, Step step) {
  __shared__ u32 start, end;
  if (threadIdx.x == 0) start = 0xffffffffu, end = 0;
  __syncthreads();
  u32 values[UNROLL];
#pragma unroll
  for (int i = 0; i < UNROLL; i++) values[i] = threadIdx.x * 7 + i;
  u32 began, ended;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(began)::"memory");
#pragma unroll 1
  for (int n = 0; n < TIMES; n++)
#pragma unroll
    for (int i = 0; i < LENGTH; i++) step(values[i % UNROLL], i);
  asm volatile("mov.u32 %0, %%clock;" : "=r"(ended)::"memory");
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < UNROLL; i++) sum += values[i];
  atomicMin(&start, began), atomicMax(&end, ended);
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
  if (sum == 0x12345678) *sink = sum; // so that nothing is left out
}

#define PROBE(NAME) extern "C" __global__ void __launch_bounds__(THREADS) probe_##NAME(u32* clocks, u32* sink)

PROBE(ffma) {
  measure(clocks, sink, [](u32& v, int) {
    asm volatile("{.reg .f32 f; mov.b32 f, %0; fma.rn.f32 f, f, f, f; mov.b32 %0, f;}" : "+r"(v));
  });
}

// LENGTH * TIMES stands in measure.py.
#define PROBE_CODE(KB, LENGTH, TIMES)                                                                                    \
  PROBE(code_##KB##k) {                                                                                                 \
    measure<LENGTH, TIMES>(clocks, sink, [](u32& v, int) {                                                              \
      asm volatile("{.reg .f32 f; mov.b32 f, %0; fma.rn.f32 f, f, f, f; mov.b32 %0, f;}" : "+r"(v));                     \
    });                                                                                                                 \
  }
PROBE_CODE(11, 1024, 48)
PROBE_CODE(33, 3072, 16)
PROBE_CODE(49, 4608, 11)

#if __CUDA_ARCH__ >= 610
PROBE(dp4a) {
  measure(clocks, sink, [](u32& v, int) { asm volatile("dp4a.u32.s32 %0, %0, %0, %0;" : "+r"(v)); });
}
#endif

PROBE(integer_to_float) {
  measure(clocks, sink, [](u32& v, int) {
    asm volatile("{.reg .f32 f; cvt.rn.f32.s32 f, %0; mov.b32 %0, f;}" : "+r"(v));
  });
}

PROBE(half_to_float) {
  measure(clocks, sink, [](u32& v, int) {
    asm volatile("{.reg .b16 l, h; .reg .f32 f; mov.b32 {l, h}, %0; cvt.f32.f16 f, l; mov.b32 %0, f;}" : "+r"(v));
  });
}

PROBE(shuffle) {
  measure(clocks, sink, [](u32& v, int) {
    asm volatile("shfl.sync.bfly.b32 %0, %0, 1, 0x1f, 0xffffffff;" : "+r"(v));
  });
}

// The same 16 bytes for the whole warp.
PROBE(shared_broadcast) {
  __shared__ uint4 data[UNROLL];
  if (threadIdx.x < UNROLL) data[threadIdx.x] = make_uint4(0, 0, 0, 0);
  u32 base;
  asm("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(base) : "l"(data));
  __syncthreads();
  measure(clocks, sink, [base](u32& v, int i) {
    u32 a;
    asm volatile("{.reg .b32 b, c, d; ld.volatile.shared.v4.u32 {%0, b, c, d}, [%1];}" : "=r"(a) : "r"(base + 16 * i));
    v ^= a;
  });
}

// Grid-stride sum of `count` 16-byte units.
extern "C" __global__ void __launch_bounds__(256) probe_stream(const uint4* data, u32* sink, u64 count) {
  u32 sum = 0;
  const u64 stride = static_cast<u64>(gridDim.x) * 256;
#pragma unroll 4
  for (u64 i = static_cast<u64>(blockIdx.x) * 256 + threadIdx.x; i < count; i += stride) {
    const uint4 v = __ldg(data + i);
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678) *sink = sum;
}
