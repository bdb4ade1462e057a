// One new query per sequence against its paged keys and values.
//
// Compiled per pool type and head size (-DKV=F16|E5M2|INT8 -DHEAD_DIM=64|128|256), one kernel per padded count G of query
// heads that share a KV head. CTA (split, KV head, sequence) of 128 threads: all G heads in one CTA, so that a key is
// read from memory once; more than 8 heads are several CTAs. A split is 32 to 256 positions by the sequence's length, cut
// at multiples: the result of a sequence does not depend on what else is in the batch. attention_combine adds the splits
// in order.
// Scores: HEAD_DIM / 8 lanes share a key (16 bytes of fp16 each), G sums are reduced by halving exchanges, then softmax
// over the split in shared memory, then the same lanes sum p * v.
// Shared: (1 + G) KB of places and scores, 16 * G * HEAD_DIM bytes of warp sums: 41 KB at most (G = 8, HEAD_DIM = 256).
// A lane holds 8 * G query or output values: 64 registers at G = 8.
#include "kv.cuh"

constexpr int THREADS = 128, WARPS = 4;

struct Arguments {
  const void* q;              // [n, heads, HEAD_DIM], float or half
  const void* keys;           // pools
  const void* values;
  const u16* key_scales;      // int8 pools only
  const u16* value_scales;
  const int* req_to_token;    // [requests, stride]: slot of each position
  const void* requests;       // [n] row of req_to_token
  const void* lengths;        // [n] positions including the new one; 0 = padding
  float* partial;             // [n, heads, splits, HEAD_DIM]
  float2* partial_stats;      // [n, heads, splits] {max, sum}
  long long stride;
  int heads, kv_heads, window, q_is_half, requests_are_64_bit, lengths_are_64_bit;
  float scale, soft_cap;
};

// a[0] = the sum over the group's lanes of the value that belongs to the lane; returns which value that is.
template <int G, int LANES>
__device__ __forceinline__ int reduce_group(float (&a)[G], int lane) {
  int mine = 0;
#pragma unroll
  for (int width = G / 2, offset = 1; width >= 1; width >>= 1, offset <<= 1) {
    const bool upper = lane & offset;
#pragma unroll
    for (int g = 0; g < width; g++) {
      const float sent = upper ? a[g] : a[g + width], kept = upper ? a[g + width] : a[g];
      a[g] = __fadd_rn(kept, __shfl_xor_sync(ALL_LANES, sent, offset));
    }
    mine += upper ? width : 0;
  }
#pragma unroll
  for (int offset = G; offset < LANES; offset <<= 1) a[0] = __fadd_rn(a[0], __shfl_xor_sync(ALL_LANES, a[0], offset));
  return mine;
}

template <class KV, int D, int G>
struct Attention {
  static constexpr int LANES = D / EIGHT;    // that share a token
  static constexpr int TOKENS = WARP / LANES; // a warp has at once
  static constexpr int PER_ROUND = WARPS * TOKENS;
  static constexpr int AHEAD = 2, TOGETHER = 4; // rounds whose keys or values are in flight
  typedef typename KV::Vector Vector;

  // Eight elements of a key, and its scale.
  struct Key {
    Vector values;
    u32 scale;
    __device__ __forceinline__ void load(const Arguments& a, u32 vector, int part) {
      values = __ldg(static_cast<const Vector*>(a.keys) + vector * LANES + part);
      if (KV::HAS_SCALE) scale = __ldg(a.key_scales + vector);
    }
  };

  u32 vectors[MOST_SPLIT]; // slot * kv_heads + KV head of each position
  float scores[MOST_SPLIT][G];
  float sums[WARPS][G][D];

  // What the CTA computes: some of the query heads of a KV head.
  struct Heads {
    int kv_head, first, count;

    __device__ __forceinline__ explicit Heads(const Arguments& a) {
      const int chunks = gridDim.y / a.kv_heads, group = a.heads / a.kv_heads, chunk = blockIdx.y % chunks;
      kv_head = blockIdx.y / chunks;
      first = kv_head * group + chunk * G;
      count = min(G, group - chunk * G);
    }
  };

  __device__ __forceinline__ void score(const Arguments& a, const Heads& heads, int first, int count) {
    const int lane = threadIdx.x % WARP, part = lane % LANES, token = threadIdx.x / LANES;
    float q[G][EIGHT];
    const u32 first_head = (blockIdx.z * a.heads + heads.first) * D + part * EIGHT; // n * heads * D is far below 2^32
#pragma unroll
    for (int g = 0; g < G; g++) {
      const u32 base = first_head + min(g, heads.count - 1) * D;
#pragma unroll
      for (int d = 0; d < EIGHT; d++) q[g][d] = load_element(a.q, base + d, a.q_is_half);
    }
    Key ahead[AHEAD]; // of the next rounds
#pragma unroll
    for (int r = 0; r < AHEAD; r++) ahead[r].load(a, vectors[min(first + r * PER_ROUND + token, count - 1)], part);
#pragma unroll 1
    for (int begin = first; begin < count; begin += AHEAD * PER_ROUND) // the same for all lanes: they exchange below
#pragma unroll
      for (int r = 0; r < AHEAD; r++) {
        const int i = begin + r * PER_ROUND + token;
        if (r > 0 && begin + r * PER_ROUND >= count) break;
        float k[EIGHT];
        KV::widen(ahead[r].values, k);
        float scale = a.scale;
        if (KV::HAS_SCALE) scale = __fmul_rn(scale, half_to_float(ahead[r].scale));
        ahead[r].load(a, vectors[min(i + AHEAD * PER_ROUND, count - 1)], part);
        float dot[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
          dot[g] = 0.0f;
#pragma unroll
          for (int d = 0; d < EIGHT; d++) dot[g] = __fmaf_rn(k[d], q[g][d], dot[g]);
        }
        const int mine = reduce_group<G, LANES>(dot, part);
        if (part < G && i < count) scores[i][mine] = finish_score(dot[0], scale, a.soft_cap);
      }
  }

  // Scores become exp2(score - max); int8 values' scales are multiplied in.
  __device__ __forceinline__ void softmax(const Arguments& a, const Heads& heads, int first, int count) {
    const int lane = threadIdx.x % WARP;
    for (int g = threadIdx.x / WARP; g < G; g += WARPS) {
      float max = MASKED;
      for (int i = first + lane; i < count; i += WARP) max = fmaxf(max, scores[i][g]);
      max = warp_max(max);
      float sum = 0.0f;
      for (int i = first + lane; i < count; i += WARP) {
        float p = exp2_approx(__fsub_rn(scores[i][g], max));
        sum = __fadd_rn(sum, p);
        if (KV::HAS_SCALE)
          p = __fmul_rn(p, half_to_float(__ldg(a.value_scales + vectors[i])));
        scores[i][g] = p;
      }
      sum = warp_sum(sum);
      if (lane == 0 && g < heads.count)
        a.partial_stats[(static_cast<size_t>(blockIdx.z) * a.heads + heads.first + g) * gridDim.x + blockIdx.x] =
            make_float2(max, sum);
    }
  }

  // out += p * v of COUNT rounds from position i on.
  template <int COUNT>
  __device__ __forceinline__ void add_values(const Arguments& a, int i, int part, float (&out)[G][EIGHT]) {
    Vector loaded[COUNT];
#pragma unroll
    for (int r = 0; r < COUNT; r++)
      loaded[r] = __ldg(static_cast<const Vector*>(a.values) + vectors[i + r * PER_ROUND] * LANES + part);
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
      float v[EIGHT];
      KV::widen(loaded[r], v);
#pragma unroll
      for (int g = 0; g < G; g++) {
        const float p = scores[i + r * PER_ROUND][g];
#pragma unroll
        for (int d = 0; d < EIGHT; d++) out[g][d] = __fmaf_rn(p, v[d], out[g][d]);
      }
    }
  }

  __device__ __forceinline__ void accumulate(const Arguments& a, int first, int count) {
    const int lane = threadIdx.x % WARP, part = lane % LANES, token = threadIdx.x / LANES;
    float out[G][EIGHT];
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
      for (int d = 0; d < EIGHT; d++) out[g][d] = 0.0f;
    int i = first + token;
#pragma unroll 1
    for (; i + (TOGETHER - 1) * PER_ROUND < count; i += TOGETHER * PER_ROUND) add_values<TOGETHER>(a, i, part, out);
#pragma unroll 1
    for (; i < count; i += PER_ROUND) add_values<1>(a, i, part, out);
    __syncwarp();
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
      for (int d = 0; d < EIGHT; d++) {
        float sum = out[g][d];
#pragma unroll
        for (int offset = LANES; offset < WARP; offset <<= 1)
          sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, offset));
        if (lane < LANES) sums[threadIdx.x / WARP][g][part * EIGHT + d] = sum;
      }
  }

  __device__ __forceinline__ void run(const Arguments& a) {
    const int length = static_cast<int>(load_index(a.lengths, blockIdx.z, a.lengths_are_64_bit));
    const Heads heads(a);
    const int split = split_of(length), base = blockIdx.x * split;
    const int count = min(split, length - base);
    const int first = a.window < 0 ? 0 : max(0, length - 1 - a.window - base); // within the split
    if (count <= 0 || first >= count) return;
    const size_t request = static_cast<size_t>(load_index(a.requests, blockIdx.z, a.requests_are_64_bit));
    const int* slots = a.req_to_token + request * a.stride + base;
    for (int i = first + threadIdx.x; i < count; i += THREADS)
      vectors[i] = static_cast<u32>(__ldg(slots + i)) * a.kv_heads + heads.kv_head;
    __syncthreads();
    score(a, heads, first, count);
    __syncthreads();
    softmax(a, heads, first, count);
    __syncthreads();
    accumulate(a, first, count);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < heads.count * D; i += THREADS) {
      const int g = i / D, d = i % D;
      float sum = sums[0][g][d];
#pragma unroll
      for (int w = 1; w < WARPS; w++) sum = __fadd_rn(sum, sums[w][g][d]);
      const size_t head = static_cast<size_t>(blockIdx.z) * a.heads + heads.first + g;
      a.partial[(head * gridDim.x + blockIdx.x) * D + d] = sum;
    }
  }
};

#define NAME_(KV, D, G) attention_decode_##KV##_d##D##_g##G
#define NAME(KV, D, G) NAME_(KV, D, G)
#define KERNEL(G)                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM > 128 ? 2 : G > 4 ? 3 : 4)                        \
      NAME(KV, HEAD_DIM, G)(Arguments a) {                                                          \
    __shared__ Attention<KV, HEAD_DIM, G> attention;                                               \
    attention.run(a);                                                                              \
  }

KERNEL(1)
KERNEL(2)
KERNEL(4)
KERNEL(8)
