// y[n, row] = sum over k of w[row, k] * x[n, k] for many columns n: the product of a prefill.
//
// Compiled once per weight type (-DTYPE=Q4_K ...). Tile: 128 rows x 64 columns, 128 threads, 8 x 8 outputs a thread.
// Steps of 64 weights: thread t unpacks row t's 64 bytes and half a column's activations into shared memory as
// [word of 4 k][row] and [word of 4 k][column]. Two buffers: the next step's loads are in flight while this one is
// multiplied, and one barrier a step separates them.
// Shared: 29-31 KB, two CTAs an SM (8 warps; the 64 independent sums of a thread hide the latency).
// A thread has room for one set of sums, but the order of addition (matmul.cuh) has three levels. So tiles are visited
// slice by slice, and at the end of a slice a thread adds its sums to memory of its own, which stays in L2: 2 reads and
// 2 writes of 32 KB a slice. CTAs are persistent, so that this memory is 64 KB a CTA, not as large as the result.
#include "matmul.cuh"

constexpr int ROWS = 128, COLUMNS = 64, THREADS = 128, WORDS = 16;

template <class T>
struct Buffer {
  static constexpr int SCALES = T::HALF_SCALES ? 4 : 2;
  int a[WORDS][ROWS];
  int b[WORDS][COLUMNS];
  float a_scale[SCALES][ROWS];
  float a_min[T::HAS_MIN ? 2 : 1][ROWS];
  float b_scale[2][COLUMNS];
  float b_sum[T::HAS_MIN ? 2 : 1][COLUMNS];
};

struct Columns {
  int4 low, high;
  float2 scale;
};

template <class T>
__device__ __forceinline__ Columns load_columns(const Arguments& a, int column, int half, int tile, int step) {
  if (column >= a.n) return {make_int4(0, 0, 0, 0), make_int4(0, 0, 0, 0), make_float2(0.0f, 0.0f)};
  const size_t block = (static_cast<size_t>(column) * a.n_tiles + tile) * 8 + T::block(step, half);
  return {__ldg(a.x + 2 * block), __ldg(a.x + 2 * block + 1), __ldg(a.x_scales + block)};
}

template <class T>
__device__ __forceinline__ void store_step(Buffer<T>& buffer, const typename T::Header& header,
                                           const typename T::Raw& raw, const Columns& columns, int step) {
  const int t = threadIdx.x, column = t % COLUMNS, half = t / COLUMNS;
  Step w;
  T::unpack(header, raw, step, w);
#pragma unroll
  for (int b = 0; b < 2; b++) {
#pragma unroll
    for (int k = 0; k < 8; k++) buffer.a[8 * b + k][t] = static_cast<int>(w.bytes[b][k]);
    if (T::HALF_SCALES) {
      buffer.a_scale[2 * b][t] = w.scale[b][0];
      buffer.a_scale[2 * b + 1][t] = w.scale[b][1];
    } else {
      buffer.a_scale[b][t] = w.scale[b][0];
    }
    if (T::HAS_MIN) buffer.a_min[b][t] = -w.min[b];
  }
  const int words[8] = {columns.low.x,  columns.low.y,  columns.low.z,  columns.low.w,
                        columns.high.x, columns.high.y, columns.high.z, columns.high.w};
#pragma unroll
  for (int k = 0; k < 8; k++) buffer.b[8 * half + k][column] = words[k];
  buffer.b_scale[half][column] = columns.scale.x;
  if (T::HAS_MIN) buffer.b_sum[half][column] = columns.scale.y;
}

__device__ __forceinline__ void spread4(const float4& v, float* out) {
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

// acc += the products of one step. Thread (ty, tx) has rows 4 ty + i and 64 + 4 ty + i, columns 4 tx + j and 32 + 4 tx + j.
template <class T>
__device__ __forceinline__ void multiply_step(const Buffer<T>& buffer, float (&acc)[8][8], int ty, int tx) {
  constexpr int WORDS_PER_SCALE = T::HALF_SCALES ? 4 : 8;
#pragma unroll 1
  for (int part = 0; part < WORDS / WORDS_PER_SCALE; part++) {
    const int b = part * WORDS_PER_SCALE / 8;
    int sums[8][8];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) sums[i][j] = 0;
#pragma unroll
    for (int k = 0; k < WORDS_PER_SCALE; k++) {
      const int word = part * WORDS_PER_SCALE + k;
      const int4 a0 = *reinterpret_cast<const int4*>(&buffer.a[word][4 * ty]);
      const int4 a1 = *reinterpret_cast<const int4*>(&buffer.a[word][64 + 4 * ty]);
      const int4 b0 = *reinterpret_cast<const int4*>(&buffer.b[word][4 * tx]);
      const int4 b1 = *reinterpret_cast<const int4*>(&buffer.b[word][32 + 4 * tx]);
      const int av[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      const int bv[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] = dot4<T::SIGNED>(av[i], bv[j], sums[i][j]);
    }
#pragma unroll
    for (int jh = 0; jh < 2; jh++) {
      float d[4], d_sum[4];
      spread4(*reinterpret_cast<const float4*>(&buffer.b_scale[b][32 * jh + 4 * tx]), d);
      if (T::HAS_MIN) spread4(*reinterpret_cast<const float4*>(&buffer.b_sum[b][32 * jh + 4 * tx]), d_sum);
#pragma unroll
      for (int ih = 0; ih < 2; ih++) {
        float scale[4], min[4];
        spread4(*reinterpret_cast<const float4*>(&buffer.a_scale[part][64 * ih + 4 * ty]), scale);
        if (T::HAS_MIN) spread4(*reinterpret_cast<const float4*>(&buffer.a_min[b][64 * ih + 4 * ty]), min);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            float& sum = acc[4 * ih + i][4 * jh + j];
            sum = add_products(sum, scale[i], d[j], sums[4 * ih + i][4 * jh + j]);
            if (T::HAS_MIN) sum = __fmaf_rn(min[i], d_sum[j], sum);
          }
      }
    }
  }
}

// Tiles along K in the order of the sum: split by split, slice by slice.
struct Walk {
  int split, slice, tile, end;

  __device__ __forceinline__ explicit Walk(const Arguments& a) : split(0), slice(0), tile(0), end(split_begin(a, 1)) {}

  // Whether the tile is the last of its slice, and the slice the last of its split that has tiles.
  __device__ __forceinline__ bool ends_slice() const { return tile + SLICES >= end; }
  __device__ __forceinline__ bool ends_split(const Arguments& a) const {
    return ends_slice() && (slice == SLICES - 1 || split_begin(a, split) + slice + 1 >= end);
  }

  __device__ __forceinline__ void advance(const Arguments& a) {
    if (!ends_slice()) {
      tile += SLICES;
    } else if (!ends_split(a)) {
      tile = split_begin(a, split) + ++slice;
    } else {
      slice = 0, split++;
      tile = split_begin(a, split), end = split_begin(a, split + 1);
    }
  }
};

// sums (in registers) + what earlier slices or splits have left in the thread's own memory.
__device__ __forceinline__ void add_earlier(float (&sums)[8][8], const float* own) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) sums[i][j] = __fadd_rn(own[(8 * i + j) * THREADS], sums[i][j]);
}

__device__ __forceinline__ void keep(const float (&sums)[8][8], float* own) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) own[(8 * i + j) * THREADS] = sums[i][j];
}

__device__ __forceinline__ void clear(float (&sums)[8][8]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) sums[i][j] = 0.0f;
}

// At the end of a slice. own: [2 or 1][64][THREADS], of slices, then of splits.
__device__ __forceinline__ void end_slice(const Arguments& a, const Walk& at, float (&acc)[8][8], float* own) {
  if (at.slice > 0) add_earlier(acc, own);
  if (!at.ends_split(a)) {
    keep(acc, own);
  } else if (a.splits > 1) {
    float* of_splits = own + 64 * THREADS;
    if (at.split > 0) add_earlier(acc, of_splits);
    if (at.split < a.splits - 1) keep(acc, of_splits);
  }
}

__device__ __forceinline__ void write_tile(const Arguments& a, const float (&acc)[8][8], int first_row,
                                           int first_column, int ty, int tx) {
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 8; i++)
      write_output(a, first_column + 32 * (j / 4) + 4 * tx + j % 4, first_row + 64 * (i / 4) + 4 * ty + i % 4,
                   acc[i][j]);
}

template <class T>
__device__ __forceinline__ void multiply_tile(const Arguments& a, Buffer<T> (&buffers)[2], float* own, int first_row,
                                              int first_column) {
  const int t = threadIdx.x, lane = t % WARP, warp = t / WARP;
  const int ty = warp * 4 + lane / 8, tx = lane % 8;
  const int groups = (a.rows + WARP - 1) / WARP;
  const int group = min(first_row / WARP + warp, groups - 1);
  const uint4* tiles = a.weights + unit_of<T>(group, 0, a.n_steps) + lane;
  const int column = first_column + t % COLUMNS, half = t / COLUMNS;
  float acc[8][8];
  clear(acc);

  Walk at(a); // the step that is multiplied; `ahead` is the one that is loaded
  Walk ahead = at;
  const uint4* tile = tiles + static_cast<size_t>(ahead.tile) * T::UNITS;
  typename T::Header header = T::load_header(tile, lane);
  typename T::Raw raw = T::load(tile, lane, 0);
  Columns columns = load_columns<T>(a, column, half, ahead.tile, 0);
  store_step<T>(buffers[0], header, raw, columns, 0);
  __syncthreads();
  int step = 0; // of `ahead`
#pragma unroll 1
  for (int s = 0; s < a.n_steps; s++) {
    const int next = s + 1;
    step = step + 1 < steps_of<T>(ahead.tile, a.n_steps) ? step + 1 : 0;
    if (next < a.n_steps) {
      if (step == 0) {
        ahead.advance(a);
        tile = tiles + static_cast<size_t>(ahead.tile) * T::UNITS;
        header = T::load_header(tile, lane);
      }
      raw = T::load(tile, lane, step);
      columns = load_columns<T>(a, column, half, ahead.tile, step);
    }
    multiply_step<T>(buffers[s % 2], acc, ty, tx);
    if (next < a.n_steps) store_step<T>(buffers[next % 2], header, raw, columns, step);
    if (step == 0) {
      if (at.ends_slice()) {
        end_slice(a, at, acc, own);
        if (next < a.n_steps) clear(acc);
      }
      at = ahead;
    }
    __syncthreads();
  }
  write_tile(a, acc, first_row, first_column, ty, tx);
}

// One-dimensional grid of persistent CTAs: columns vary fastest, so that a weight tile stays in L2 for all columns.
template <class T>
__device__ __forceinline__ void multiply(const Arguments& a) {
  __shared__ Buffer<T> buffers[2];
  const int column_tiles = (a.n + COLUMNS - 1) / COLUMNS, row_tiles = (a.rows + ROWS - 1) / ROWS;
  float* own = a.partials + static_cast<size_t>(blockIdx.x) * (a.splits > 1 ? 2 : 1) * 64 * THREADS + threadIdx.x;
#pragma unroll 1
  for (int i = blockIdx.x; i < column_tiles * row_tiles; i += gridDim.x)
    multiply_tile<T>(a, buffers, own, i / column_tiles * ROWS, i % column_tiles * COLUMNS);
}

#define NAME_(T) tile_matmul_##T
#define NAME(T) NAME_(T)
extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(TYPE)(Arguments a) { multiply<TYPE>(a); }
