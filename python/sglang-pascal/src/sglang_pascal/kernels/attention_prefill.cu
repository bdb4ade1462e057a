// Many new queries per sequence against its paged keys and values, causal.
//
// Compiled per pool type and head size (-DKV=F16|E5M2|INT8 -DHEAD_DIM=64|128|256). CTA (block of 64 queries, head,
// sequence) of 128 threads; keys in tiles of KEYS, cut at multiples of KEYS, so that a query's bits do not depend on its
// neighbours. Scores: 8 x 8 a thread (8 x 4 of 256 dimensions, whose output needs the registers), from chunks of 16
// dimensions of Q and K in shared memory as fp32: fp16 is widened once where it is stored, since widening runs at a quarter
// of the multiply rate. Then the running softmax, then P x V: 8 x HEAD_DIM / 16 outputs a thread, 64 keys of P at a time,
// V in chunks of 8 KB. A chunk is loaded into registers while the one before it is multiplied, and stored into the other
// of two buffers, so there is one barrier a chunk. Shared: 33 or 41 KB, two CTAs an SM.
// P is stored with its rows permuted (`p_of`) and V with its dimensions permuted (`dimension_of`): a warp's 16-byte stores
// then use every bank once.
#include "kv.cuh"

constexpr int THREADS = 128, QUERIES = 64, CHUNK = 16, HALF_TILE = 64; // keys of P that shared memory has room for

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
  static constexpr int KEYS = D > 128 ? 64 : 128, GROUPS = KEYS / HALF_TILE;
  static constexpr int PER_THREAD = D / 16;   // dimensions of the output
  static constexpr int CHUNKS = D / CHUNK;
  static constexpr int V_TOKENS = 2048 / D;   // 16 values a thread
  static constexpr int VECTORS = D / EIGHT;   // of a token
  typedef typename KV::Vector Vector;

  struct Chunk {
    float q[CHUNK][QUERIES], k[CHUNK][KEYS];
  };
  union {
    Chunk in;
    float v[V_TOKENS][D];
  } buffers[2];
  float p[HALF_TILE][QUERIES];
  float max[QUERIES], sum[QUERIES]; // of each row so far: a thread has no registers for its rows'
  u32 slots[2][KEYS];               // of this tile and the next

  struct Place {
    int first_row, n_rows, first_position, kv_head, head, end;
  };

  // What a thread has in flight: 8 values of Q and CHUNK * KEYS / THREADS of K, or 16 of V.
  struct InFlight {
    uint4 q[2];
    Vector kv[2];
  };

  static __device__ __forceinline__ int key_of_thread() { return threadIdx.x % KEYS; }

  // Where four rows of P begin: 4 * part .. of key `key`.
  static __device__ __forceinline__ int p_of(int part, int key) { return 4 * (part ^ (key / 4 & 7)); }

  // The first of four dimensions that stand at 4 * place of a token of V.
  static __device__ __forceinline__ int dimension_of(int place) { return EIGHT * (place % VECTORS) + 4 * (place / VECTORS); }

  __device__ __forceinline__ void fetch_chunk(const Arguments& a, const Place& place, u32 slot, int chunk, InFlight& to) const {
    const int row = threadIdx.x % QUERIES, part = threadIdx.x / QUERIES;
    const int query = place.first_row + min(row, place.n_rows - 1);
    const size_t base = (static_cast<size_t>(query) * a.heads + place.head) * VECTORS + chunk * 2 + part; // of eight values
    if (a.is_half) {
      to.q[0] = __ldg(static_cast<const uint4*>(a.q) + base);
    } else {
      to.q[0] = __ldg(static_cast<const uint4*>(a.q) + 2 * base);
      to.q[1] = __ldg(static_cast<const uint4*>(a.q) + 2 * base + 1);
    }
    const u32 vector = (slot * a.kv_heads + place.kv_head) * VECTORS + chunk * 2;
    const Vector* keys = static_cast<const Vector*>(a.keys) + vector;
    if (GROUPS == 2)
      to.kv[0] = __ldg(keys), to.kv[1] = __ldg(keys + 1);
    else
      to.kv[0] = __ldg(keys + threadIdx.x / KEYS);
  }

  __device__ __forceinline__ void store_chunk(const Arguments& a, Chunk& chunk, const InFlight& from) const {
    const int row = threadIdx.x % QUERIES, part = threadIdx.x / QUERIES, key = key_of_thread();
    float q[EIGHT];
    if (a.is_half) {
      F16::widen(from.q[0], q);
    } else {
#pragma unroll
      for (int i = 0; i < EIGHT; i++) q[i] = __uint_as_float(word(from.q[i / 4], i % 4));
    }
#pragma unroll
    for (int d = 0; d < EIGHT; d++) chunk.q[part * EIGHT + d][row] = q[d];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      float k[EIGHT];
      KV::widen(from.kv[i], k);
      const int first = GROUPS == 2 ? i * EIGHT : threadIdx.x / KEYS * EIGHT;
#pragma unroll
      for (int d = 0; d < EIGHT; d++) chunk.k[first + d][key] = k[d];
    }
  }

  static __device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

  // Tokens first .. first + V_TOKENS - 1 of the tile. What stands behind the last key is multiplied by 0, but its copy may
  // be infinite: store_values writes zeros there.
  __device__ __forceinline__ void fetch_values(const Arguments& a, const Place& place, const u32* tile_slots, int first,
                                               int n_keys, InFlight& to) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = threadIdx.x + i * THREADS, token = min(first + at / VECTORS, n_keys - 1);
      const u32 vector = (tile_slots[token] * a.kv_heads + place.kv_head) * VECTORS + at % VECTORS;
      to.kv[i] = __ldg(static_cast<const Vector*>(a.values) + vector);
    }
  }

  __device__ __forceinline__ void store_values(float (&v)[V_TOKENS][D], int first, int n_keys, const InFlight& from) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = threadIdx.x + i * THREADS, token = at / VECTORS, part = at % VECTORS;
      float values[EIGHT];
      KV::widen(from.kv[i], values);
      const bool real = first + token < n_keys;
#pragma unroll
      for (int d = 0; d < EIGHT; d++) values[d] = real ? values[d] : 0.0f;
      float4* to = reinterpret_cast<float4*>(v[token]);
      to[part] = make_float4(values[0], values[1], values[2], values[3]);
      to[VECTORS + part] = make_float4(values[4], values[5], values[6], values[7]);
    }
  }

  static __device__ __forceinline__ void spread4(const float4& v, float* out) {
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }

  // s[i][4 g + j]: query 8 ty + i, key 64 g + 4 tx + j. USED: groups of 64 keys that the tile has.
  template <int USED>
  static __device__ __forceinline__ void add_scores(const Chunk& chunk, float (&s)[8][4 * GROUPS], int ty, int tx) {
#pragma unroll(GROUPS == 2 ? 2 : 4)
    for (int d = 0; d < CHUNK; d++) {
      float q[8], k[4 * GROUPS];
      spread4(*reinterpret_cast<const float4*>(&chunk.q[d][8 * ty]), q);
      spread4(*reinterpret_cast<const float4*>(&chunk.q[d][8 * ty + 4]), q + 4);
#pragma unroll
      for (int g = 0; g < USED; g++) spread4(*reinterpret_cast<const float4*>(&chunk.k[d][HALF_TILE * g + 4 * tx]), k + 4 * g);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4 * USED; j++) s[i][j] = __fmaf_rn(q[i], k[j], s[i][j]);
    }
  }

  // Sums of products become scores in units of log2, or MASKED.
  __device__ __forceinline__ void finish_scores(const Arguments& a, const Place& place, float (&s)[8][4 * GROUPS],
                                                const u32* tile_slots, int first_key, int n_keys, int ty, int tx) const {
    const bool capped = a.soft_cap > 0.0f;
#pragma unroll
    for (int j = 0; j < 4 * GROUPS; j++) {
      float scale = capped ? a.scale : __fmul_rn(a.scale, LOG2_E);
      if (KV::HAS_SCALE) {
        const size_t slot = tile_slots[min(HALF_TILE * (j / 4) + 4 * tx + j % 4, n_keys - 1)];
        scale = __fmul_rn(scale, half_to_float(__ldg(a.key_scales + slot * a.kv_heads + place.kv_head)));
      }
#pragma unroll
      for (int i = 0; i < 8; i++) s[i][j] = __fmul_rn(s[i][j], scale);
    }
    if (capped) {
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4 * GROUPS; j++) s[i][j] = finish_score(s[i][j], 1.0f, a.soft_cap);
    }
    const bool all_seen = first_key + KEYS - 1 <= place.first_position && n_keys == KEYS &&
                          (a.window < 0 || first_key >= place.first_position + QUERIES - 1 - a.window);
    if (all_seen) return;
    const int own = place.first_position + 8 * ty - first_key - 4 * tx; // of query 0, beyond the position of key 0
    const int keys = n_keys - 4 * tx, window = a.window < 0 ? own + 8 : a.window;
#pragma unroll
    for (int j = 0; j < 4 * GROUPS; j++) {
      const int key = HALF_TILE * (j / 4) + j % 4;
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (key >= keys || key > own + i || own + i - key > window) s[i][j] = MASKED;
    }
  }

  // Running softmax of the thread's 8 rows; 16 lanes share a row. s becomes P, out is scaled to the new maximum.
  __device__ __forceinline__ void softmax(float (&s)[8][4 * GROUPS], float (&out)[8][PER_THREAD], int ty, int tx) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float row_max = s[i][0];
#pragma unroll
      for (int j = 1; j < 4 * GROUPS; j++) row_max = fmaxf(row_max, s[i][j]);
#pragma unroll
      for (int offset = 8; offset; offset >>= 1) row_max = fmaxf(row_max, __shfl_xor_sync(ALL_LANES, row_max, offset));
      const float new_max = fmaxf(max[8 * ty + i], row_max);
      const float base = new_max == MASKED ? 0.0f : new_max; // P of a row that has seen nothing is 0
      const float factor = exp2_approx(__fsub_rn(max[8 * ty + i], base));
      float row_sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4 * GROUPS; j++) {
        s[i][j] = exp2_approx(__fsub_rn(s[i][j], base));
        row_sum = __fadd_rn(row_sum, s[i][j]);
      }
#pragma unroll
      for (int offset = 8; offset; offset >>= 1)
        row_sum = __fadd_rn(row_sum, __shfl_xor_sync(ALL_LANES, row_sum, offset));
      row_sum = __fmaf_rn(sum[8 * ty + i], factor, row_sum);
      __syncwarp(); // all 16 lanes have read
      if (tx == 0) max[8 * ty + i] = new_max, sum[8 * ty + i] = row_sum;
#pragma unroll
      for (int j = 0; j < PER_THREAD; j++) out[i][j] = __fmul_rn(out[i][j], factor);
    }
  }

  // P of the keys of group g, with int8 values' scales.
  template <int G>
  __device__ __forceinline__ void store_p(const Arguments& a, const Place& place, const float (&s)[8][4 * GROUPS],
                                          const u32* tile_slots, int n_keys, int ty, int tx) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int key = 4 * tx + j;
      float scale = 1.0f;
      if (KV::HAS_SCALE) {
        const size_t slot = tile_slots[min(HALF_TILE * G + key, n_keys - 1)];
        scale = half_to_float(__ldg(a.value_scales + slot * a.kv_heads + place.kv_head));
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = KV::HAS_SCALE ? __fmul_rn(s[4 * h + i][4 * G + j], scale) : s[4 * h + i][4 * G + j];
        *reinterpret_cast<float4*>(&p[key][p_of(2 * ty + h, key)]) = make_float4(values[0], values[1], values[2], values[3]);
      }
    }
  }

  // Thread (ty, tx): queries 8 ty + i; the dimensions that stand at 4 * (tx + 16 c) + j. first: key of P of the first token.
  __device__ __forceinline__ void add_values(const float (&v)[V_TOKENS][D], float (&out)[8][PER_THREAD], int first, int ty,
                                             int tx) const {
#pragma unroll(D > 128 ? 1 : 2)
    for (int token = 0; token < V_TOKENS; token++) {
      const int key = first + token;
      float weight[8];
      spread4(*reinterpret_cast<const float4*>(&p[key][p_of(2 * ty, key)]), weight);
      spread4(*reinterpret_cast<const float4*>(&p[key][p_of(2 * ty + 1, key)]), weight + 4);
#pragma unroll
      for (int c = 0; c < PER_THREAD / 4; c++) {
        float values[4];
        spread4(*reinterpret_cast<const float4*>(&v[token][4 * (tx + 16 * c)]), values);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) out[i][4 * c + j] = __fmaf_rn(weight[i], values[j], out[i][4 * c + j]);
      }
    }
  }

  __device__ __forceinline__ u32 slot_of(const int* table, const Place& place, int first_key) const {
    return static_cast<u32>(__ldg(table + min(first_key + key_of_thread(), place.end - 1)));
  }

  // The scores of a tile; at the end its first values are stored. b: the buffer that holds what comes next.
  template <int USED>
  __device__ __forceinline__ void multiply_keys(const Arguments& a, const Place& place, u32 slot, const u32* tile_slots,
                                                int n_keys, float (&s)[8][4 * GROUPS], int& b, int ty, int tx) {
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      InFlight next;
      const bool is_last = chunk == CHUNKS - 1;
      if (is_last)
        fetch_values(a, place, tile_slots, 0, n_keys, next);
      else
        fetch_chunk(a, place, slot, chunk + 1, next);
      add_scores<USED>(buffers[b].in, s, ty, tx);
      if (is_last)
        store_values(buffers[b ^ 1].v, 0, n_keys, next);
      else
        store_chunk(a, buffers[b ^ 1].in, next);
      __syncthreads();
      b ^= 1;
    }
  }

  // out += P x V of the keys of group G, whose P is stored. At the end the values of the next group are stored, or the next
  // tile's first chunk.
  template <int G>
  __device__ __forceinline__ void multiply_values(const Arguments& a, const Place& place, u32 next_slot, bool has_next,
                                                  const u32* tile_slots, int n_keys, float (&out)[8][PER_THREAD], int& b,
                                                  int ty, int tx) {
    const int end = min(HALF_TILE * (G + 1), n_keys);
#pragma unroll 1
    for (int first = HALF_TILE * G; first < end; first += V_TOKENS) {
      InFlight next;
      const bool is_last = first + V_TOKENS >= n_keys;
      if (!is_last)
        fetch_values(a, place, tile_slots, first + V_TOKENS, n_keys, next);
      else if (has_next)
        fetch_chunk(a, place, next_slot, 0, next);
      add_values(buffers[b].v, out, first - HALF_TILE * G, ty, tx);
      if (!is_last)
        store_values(buffers[b ^ 1].v, first + V_TOKENS, n_keys, next);
      else if (has_next)
        store_chunk(a, buffers[b ^ 1].in, next);
      __syncthreads();
      b ^= 1;
    }
  }

  __device__ __forceinline__ bool find_place(const Arguments& a, Place& place, const int*& table, int& begin) const {
    const int block = gridDim.x - 1 - blockIdx.x; // the longest first
    const int start = __ldg(a.query_starts + blockIdx.z), n_new = __ldg(a.query_starts + blockIdx.z + 1) - start;
    if (block * QUERIES >= n_new) return false;
    const int length = static_cast<int>(load_index(a.lengths, blockIdx.z, a.lengths_are_64_bit));
    const size_t request = static_cast<size_t>(load_index(a.requests, blockIdx.z, a.requests_are_64_bit));
    place.n_rows = min(QUERIES, n_new - block * QUERIES);
    place.first_row = start + block * QUERIES;
    place.first_position = length - n_new + block * QUERIES;
    place.head = blockIdx.y;
    place.kv_head = blockIdx.y / (a.heads / a.kv_heads);
    place.end = place.first_position + place.n_rows;
    table = a.req_to_token + request * a.stride;
    begin = a.window < 0 ? 0 : ::max(0, place.first_position - a.window) / KEYS * KEYS;
    return true;
  }

  __device__ __forceinline__ void run(const Arguments& a) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    Place place;
    const int* table;
    int begin, b = 0;
    if (!find_place(a, place, table, begin)) return;
    float out[8][PER_THREAD] = {};
    if (threadIdx.x < QUERIES) max[threadIdx.x] = MASKED, sum[threadIdx.x] = 0.0f;
    u32 slot = slot_of(table, place, begin);
    slots[begin / KEYS % 2][key_of_thread()] = slot;
    {
      InFlight first;
      fetch_chunk(a, place, slot, 0, first);
      store_chunk(a, buffers[0].in, first);
    }
    __syncthreads();
#pragma unroll 1
    for (int first_key = begin; first_key < place.end; first_key += KEYS) {
      const int n_keys = min(KEYS, place.end - first_key);
      const bool has_next = first_key + KEYS < place.end;
      const u32* tile_slots = slots[first_key / KEYS % 2];
      const u32 next_slot = has_next ? slot_of(table, place, first_key + KEYS) : 0;
      float s[8][4 * GROUPS] = {};
      if (GROUPS == 1 || n_keys > HALF_TILE)
        multiply_keys<GROUPS>(a, place, slot, tile_slots, n_keys, s, b, ty, tx);
      else
        multiply_keys<1>(a, place, slot, tile_slots, n_keys, s, b, ty, tx);
      slots[(first_key / KEYS + 1) % 2][key_of_thread()] = next_slot; // read behind the next barrier
      finish_scores(a, place, s, tile_slots, first_key, n_keys, ty, tx);
      softmax(s, out, ty, tx);
      store_p<0>(a, place, s, tile_slots, n_keys, ty, tx);
      __syncthreads();
      multiply_values<0>(a, place, next_slot, has_next, tile_slots, n_keys, out, b, ty, tx);
      if (GROUPS == 2 && n_keys > HALF_TILE) {
        store_p<GROUPS - 1>(a, place, s, tile_slots, n_keys, ty, tx);
        __syncthreads();
        multiply_values<GROUPS - 1>(a, place, next_slot, has_next, tile_slots, n_keys, out, b, ty, tx);
      }
      slot = next_slot;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (8 * ty + i >= place.n_rows) continue;
      const size_t base = (static_cast<size_t>(place.first_row + 8 * ty + i) * a.heads + place.head) * D;
#pragma unroll
      for (int j = 0; j < PER_THREAD; j++)
        store_element(a.out, base + dimension_of(tx + 16 * (j / 4)) + j % 4, a.is_half, __fdiv_rn(out[i][j], sum[8 * ty + i]));
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
