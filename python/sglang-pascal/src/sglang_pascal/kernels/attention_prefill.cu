// Many new queries per sequence against its paged keys and values, causal.
//
// Compiled per pool type and head size (-DKV=F16|E5M2|INT8 -DHEAD_DIM=64|128|256). CTA (block of 64 queries, head,
// sequence) of 128 threads; keys in tiles of 64, cut at multiples of 64, so that a query's bits do not depend on its
// neighbours. Scores: 8 x 4 a thread, from chunks of 32 dimensions of Q and K in shared memory as fp32: fp16 is widened
// once where it is stored, since widening runs at a quarter of the multiply rate. Then the running softmax, then P x V:
// 8 x HEAD_DIM / 16 outputs a thread, V in chunks of 16 KB. Shared: 32 KB, two CTAs an SM.
#include "kv.cuh"

constexpr int THREADS = 128, QUERIES = 64, KEYS = 64, CHUNK = 32;

struct Arguments {
  const void* q;           // [tokens, heads, HEAD_DIM], float or half
  const void* keys;        // pools: the new tokens' own keys and values are in them already
  const void* values;
  const u16* key_scales;   // int8 pools only
  const u16* value_scales;
  const int* req_to_token; // [requests, stride]
  const void* requests;    // [n]
  const void* lengths;     // [n] positions including the new ones
  const int* query_starts; // [n + 1] of each sequence's first new token
  void* out;               // [tokens, heads, HEAD_DIM], like q
  long long stride;
  int heads, kv_heads, window, is_half, requests_are_64_bit, lengths_are_64_bit;
  float scale, soft_cap;
};

template <class KV, int D>
struct Prefill {
  static constexpr int PER_THREAD = D / 16;              // dimensions of the output
  static constexpr int V_TOKENS = 4096 / D > 32 ? 32 : 4096 / D; // 16 KB at most
  static constexpr int COLUMN_STEP = PER_THREAD < 4 ? PER_THREAD : 4;

  struct Chunks {
    float q[CHUNK][QUERIES], k[CHUNK][KEYS];
  };
  union {
    Chunks in;
    float v[V_TOKENS][D];
  };
  float p[KEYS][QUERIES];
  u32 slots[KEYS];

  struct Place {
    int first_row, n_rows, first_position, kv_head, head;
  };

  __device__ __forceinline__ void load_chunk(const Arguments& a, const Place& place, int chunk, int n_keys) {
    const int row = threadIdx.x % 64, half = threadIdx.x / 64;
    const int query = place.first_row + min(row, place.n_rows - 1);
    const size_t base = (static_cast<size_t>(query) * a.heads + place.head) * D + chunk * CHUNK + half * 16;
#pragma unroll(D > 128 ? 4 : 16) // fewer loads in flight where the output needs the registers
    for (int d = 0; d < 16; d++) in.q[half * 16 + d][row] = load_element(a.q, base + d, a.is_half);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float k[EIGHT];
      const u32 slot = slots[min(row, n_keys - 1)];
      load_eight<KV>(a.keys, (slot * a.kv_heads + place.kv_head) * (D / EIGHT) + chunk * 4 + half * 2 + e, k);
#pragma unroll
      for (int d = 0; d < EIGHT; d++) in.k[half * 16 + e * EIGHT + d][row] = k[d];
    }
  }

  // s[i][j]: query 8 ty + i, key 4 tx + j.
  __device__ __forceinline__ void add_scores(float (&s)[8][4], int ty, int tx) const {
#pragma unroll 4
    for (int d = 0; d < CHUNK; d++) {
      const float4 q0 = *reinterpret_cast<const float4*>(&in.q[d][8 * ty]);
      const float4 q1 = *reinterpret_cast<const float4*>(&in.q[d][8 * ty + 4]);
      const float4 k0 = *reinterpret_cast<const float4*>(&in.k[d][4 * tx]);
      const float q[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w}, k[4] = {k0.x, k0.y, k0.z, k0.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = __fmaf_rn(q[i], k[j], s[i][j]);
    }
  }

  __device__ __forceinline__ void finish_scores(const Arguments& a, const Place& place, float (&s)[8][4], int first_key,
                                                int n_keys, int ty, int tx) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int key = 4 * tx + j, position = first_key + key;
      float scale = a.scale;
      if (KV::HAS_SCALE) {
        const size_t slot = slots[min(key, n_keys - 1)];
        scale = __fmul_rn(scale, half_to_float(__ldg(a.key_scales + slot * a.kv_heads + place.kv_head)));
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int own = place.first_position + 8 * ty + i;
        const bool seen = key < n_keys && position <= own && (a.window < 0 || position >= own - a.window);
        s[i][j] = seen ? finish_score(s[i][j], scale, a.soft_cap) : MASKED;
      }
    }
  }

  // Running softmax of the thread's 8 rows; 16 lanes share a row. Writes P, returns the factor of what was summed before.
  __device__ __forceinline__ void softmax(const Arguments& a, const Place& place, const float (&s)[8][4], float (&max)[8],
                                          float (&sum)[8], float (&factor)[8], int n_keys, int ty, int tx) {
    float value_scale[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      value_scale[j] = 1.0f;
      if (KV::HAS_SCALE) {
        const size_t slot = slots[min(4 * tx + j, n_keys - 1)];
        value_scale[j] = half_to_float(__ldg(a.value_scales + slot * a.kv_heads + place.kv_head));
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float row_max = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
#pragma unroll
      for (int offset = 8; offset; offset >>= 1) row_max = fmaxf(row_max, __shfl_xor_sync(ALL_LANES, row_max, offset));
      const float new_max = fmaxf(max[i], row_max);
      factor[i] = exp2_approx(__fsub_rn(max[i], new_max));
      max[i] = new_max;
      float row_sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float value = s[i][j] == MASKED ? 0.0f : exp2_approx(__fsub_rn(s[i][j], new_max));
        row_sum = __fadd_rn(row_sum, value);
        p[4 * tx + j][8 * ty + i] = KV::HAS_SCALE ? __fmul_rn(value, value_scale[j]) : value;
      }
#pragma unroll
      for (int offset = 8; offset; offset >>= 1)
        row_sum = __fadd_rn(row_sum, __shfl_xor_sync(ALL_LANES, row_sum, offset));
      sum[i] = __fmaf_rn(sum[i], factor[i], row_sum);
    }
  }

  __device__ __forceinline__ void load_values(const Arguments& a, const Place& place, int first, int n_keys) {
    constexpr int VECTORS = D / EIGHT;
    for (int i = threadIdx.x; i < V_TOKENS * VECTORS; i += THREADS) {
      const int token = i / VECTORS, part = i % VECTORS;
      float out[EIGHT];
      const u32 slot = slots[min(first + token, n_keys - 1)];
      load_eight<KV>(a.values, (slot * a.kv_heads + place.kv_head) * VECTORS + part, out);
      const bool real = first + token < n_keys; // a padded key has p = 0, but its copy may be infinite
#pragma unroll
      for (int d = 0; d < EIGHT; d++) v[token][part * EIGHT + d] = real ? out[d] : 0.0f;
    }
  }

  // Thread (ty, tx): queries 8 ty + i; dimensions COLUMN_STEP * (tx + 16 * c) + j.
  __device__ __forceinline__ void add_values(float (&out)[8][PER_THREAD], int first, int ty, int tx) const {
#pragma unroll(D > 128 ? 1 : 2)
    for (int token = 0; token < V_TOKENS; token++) {
      const float4 p0 = *reinterpret_cast<const float4*>(&p[first + token][8 * ty]);
      const float4 p1 = *reinterpret_cast<const float4*>(&p[first + token][8 * ty + 4]);
      const float weight[8] = {p0.x, p0.y, p0.z, p0.w, p1.x, p1.y, p1.z, p1.w};
#pragma unroll
      for (int c = 0; c < PER_THREAD / COLUMN_STEP; c++) {
        const float4 value = *reinterpret_cast<const float4*>(&v[token][COLUMN_STEP * (tx + 16 * c)]);
        const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < COLUMN_STEP; j++)
            out[i][COLUMN_STEP * c + j] = __fmaf_rn(weight[i], values[j], out[i][COLUMN_STEP * c + j]);
      }
    }
  }

  __device__ __forceinline__ void run(const Arguments& a) {
    const int lane = threadIdx.x % WARP, ty = threadIdx.x / 16, tx = lane % 16;
    const int start = __ldg(a.query_starts + blockIdx.z), n_new = __ldg(a.query_starts + blockIdx.z + 1) - start;
    if (static_cast<int>(blockIdx.x) * QUERIES >= n_new) return;
    const int length = static_cast<int>(load_index(a.lengths, blockIdx.z, a.lengths_are_64_bit));
    const size_t request = static_cast<size_t>(load_index(a.requests, blockIdx.z, a.requests_are_64_bit));
    Place place;
    place.n_rows = min(QUERIES, n_new - static_cast<int>(blockIdx.x) * QUERIES);
    place.first_row = start + blockIdx.x * QUERIES;
    place.first_position = length - n_new + blockIdx.x * QUERIES;
    place.head = blockIdx.y;
    place.kv_head = blockIdx.y / (a.heads / a.kv_heads);
    float out[8][PER_THREAD], max[8], sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      max[i] = MASKED, sum[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < PER_THREAD; j++) out[i][j] = 0.0f;
    }
    const int end = place.first_position + place.n_rows;
    const int begin = a.window < 0 ? 0 : ::max(0, place.first_position - a.window) / KEYS * KEYS;
#pragma unroll 1
    for (int first_key = begin; first_key < end; first_key += KEYS) {
      const int n_keys = min(KEYS, end - first_key);
      __syncthreads();
      if (threadIdx.x < n_keys) slots[threadIdx.x] = __ldg(a.req_to_token + request * a.stride + first_key + threadIdx.x);
      __syncthreads();
      float s[8][4] = {};
#pragma unroll 1
      for (int chunk = 0; chunk < D / CHUNK; chunk++) {
        load_chunk(a, place, chunk, n_keys);
        __syncthreads();
        add_scores(s, ty, tx);
        __syncthreads();
      }
      finish_scores(a, place, s, first_key, n_keys, ty, tx);
      float factor[8];
      softmax(a, place, s, max, sum, factor, n_keys, ty, tx);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++) out[i][j] = __fmul_rn(out[i][j], factor[i]);
#pragma unroll 1
      for (int first = 0; first < n_keys; first += V_TOKENS) {
        load_values(a, place, first, n_keys);
        __syncthreads();
        add_values(out, first, ty, tx);
        __syncthreads();
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (8 * ty + i >= place.n_rows) continue;
      const size_t base = (static_cast<size_t>(place.first_row + 8 * ty + i) * a.heads + place.head) * D;
#pragma unroll
      for (int j = 0; j < PER_THREAD; j++)
        store_element(a.out, base + COLUMN_STEP * (tx + 16 * (j / COLUMN_STEP)) + j % COLUMN_STEP, a.is_half,
                      __fdiv_rn(out[i][j], sum[i]));
    }
  }
};

#define NAME_(KV, D) attention_prefill_##KV##_d##D
#define NAME(KV, D) NAME_(KV, D)
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(KV, HEAD_DIM)(Arguments a) {
  __shared__ Prefill<KV, HEAD_DIM> prefill;
  prefill.run(a);
}
