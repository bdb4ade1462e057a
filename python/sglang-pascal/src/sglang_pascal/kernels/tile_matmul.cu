// y[n, row] = sum over k of w[row, k] * x[n, k] for many outputs n: the product of a prefill, or of many requests.
//
// Compiled once per weight type and bits of x (-DTYPE=Q4_K -DBITS=16 ...), one kernel per number of outputs in a tile. Tile:
// 128 rows x 64 columns of int8, which are 64 outputs of 8 bits or both halves of 32 outputs of 16 (matmul.cuh); kernels
// for fewer outputs leave columns out. 128 threads; a thread has 8 rows and PER columns of each of GROUPS groups:
//
//   bits       8    8    8    8   16
//   outputs   24   32   48   64   32
//   GROUPS     1    1    2    2    2    of 32 columns; of 16 bits the second holds the low halves
//   PER        3    4    3    4    4    columns 4 tx .. 4 tx + PER - 1 of a group
//   CTAs       3    3    2    2    2    a multiprocessor: as many as registers allow
//
// Steps of 64 weights: thread t unpacks row t's 64 bytes and half a column's activations into shared memory as
// [word of 4 k][row] and [word of 4 k][column]. Two buffers: the next step's loads are in flight while this one is
// multiplied, and one barrier a step separates them. Shared: 25-31 KB.
// A thread has room for one set of sums, but the order of addition (matmul.cuh) has three levels. So tiles are visited
// slice by slice, and at the end of a slice a thread adds its sums to memory of its own, which stays in L2: 2 reads and
// 2 writes of up to 32 KB a slice. CTAs are persistent, so that this memory is 64 KB a CTA, not as large as the result.
// Where tiles are too few for the card, splits of K are CTAs (grid.y); the last of a row tile adds them in order, from
// partials [splits, n, 32 * groups].
#include "matmul.cuh"

constexpr int ROWS = 128, THREADS = 128, WORDS = 16;
constexpr int HALVES = BITS / 8;
constexpr int GROUP = 32; // columns

// Read 16 bytes at a time: every array is a multiple of them.
template <class T, int GROUPS>
struct alignas(16) Buffer {
  static constexpr int SCALES = T::HALF_SCALES ? 4 : 2, OUTPUTS = GROUP * GROUPS / HALVES;
  int a[WORDS][ROWS];
  int b[WORDS][GROUP * GROUPS];
  float a_scale[SCALES][ROWS];
  float a_min[T::HAS_MIN ? 2 : 1][ROWS];
  float b_scale[2][OUTPUTS];
  float b_sum[T::HAS_MIN ? 2 : 1][OUTPUTS];
};

// Half of a column's block pair, or a quarter where one group leaves two threads for each half.
template <int GROUPS>
struct Columns {
  int4 words[GROUPS];
  float2 scale;
};

// Thread t's part of the activations: column, which of a step's two blocks, and the first of its eight words.
template <int GROUPS>
struct Place {
  int column, block, first;
  __device__ __forceinline__ Place() {
    const int part = threadIdx.x / (GROUP * GROUPS); // 2 or 4 parts
    column = threadIdx.x % (GROUP * GROUPS), block = part * GROUPS / 2, first = GROUPS == 2 ? 0 : part % 2 * 4;
  }
};

// row: of x, or -1 for zeros.
template <class T, int GROUPS>
__device__ __forceinline__ Columns<GROUPS> load_columns(const Arguments& a, const Place<GROUPS>& place, int row, int tile,
                                                        int step) {
  Columns<GROUPS> columns;
  if (row < 0) {
#pragma unroll
    for (int i = 0; i < GROUPS; i++) columns.words[i] = make_int4(0, 0, 0, 0);
    columns.scale = make_float2(0.0f, 0.0f);
    return columns;
  }
  const size_t block = (static_cast<size_t>(row) * a.n_tiles + tile) * 8 + T::block(step, place.block);
#pragma unroll
  for (int i = 0; i < GROUPS; i++) columns.words[i] = __ldg(a.x + 2 * block + place.first / 4 + i);
  columns.scale = __ldg(a.x_scales + block);
  return columns;
}

template <class T, int GROUPS>
__device__ __forceinline__ void store_step(Buffer<T, GROUPS>& buffer, const typename T::Header& header,
                                           const typename T::Raw& raw, const Place<GROUPS>& place,
                                           const Columns<GROUPS>& columns, int step) {
  const int t = threadIdx.x;
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
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    int* words = &buffer.b[8 * place.block + place.first + 4 * i][place.column];
    words[0] = columns.words[i].x, words[GROUP * GROUPS] = columns.words[i].y;
    words[2 * GROUP * GROUPS] = columns.words[i].z, words[3 * GROUP * GROUPS] = columns.words[i].w;
  }
  if (HALVES == 2 && place.column < GROUP) return; // the scales of a value stand with its low half
  buffer.b_scale[place.block][place.column % Buffer<T, GROUPS>::OUTPUTS] = columns.scale.x;
  if (T::HAS_MIN) buffer.b_sum[place.block][place.column % Buffer<T, GROUPS>::OUTPUTS] = columns.scale.y;
}

__device__ __forceinline__ void spread4(const float4& v, float* out) {
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

// Column j (of a thread's GROUPS * PER) in a buffer: in group j / PER.
template <int PER>
__device__ __forceinline__ int word_of(const int4 (&words)[2], int j) {
  const int4& v = words[j / PER];
  return j % PER == 0 ? v.x : j % PER == 1 ? v.y : j % PER == 2 ? v.z : v.w;
}

// acc += the products of one step. Thread (ty, tx) has rows 4 ty + i and 64 + 4 ty + i.
template <class T, int GROUPS, int PER>
__device__ __forceinline__ void multiply_step(const Buffer<T, GROUPS>& buffer, float (&acc)[8][GROUPS * PER / HALVES],
                                              int ty, int tx) {
  constexpr int WORDS_PER_SCALE = T::HALF_SCALES ? 4 : 8, MINE = GROUPS * PER;
#pragma unroll 1
  for (int part = 0; part < WORDS / WORDS_PER_SCALE; part++) {
    const int b = part * WORDS_PER_SCALE / 8;
    int sums[8][MINE];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < MINE; j++) sums[i][j] = 0;
#pragma unroll
    for (int k = 0; k < WORDS_PER_SCALE; k++) {
      const int word = part * WORDS_PER_SCALE + k;
      const int4 a0 = *reinterpret_cast<const int4*>(&buffer.a[word][4 * ty]);
      const int4 a1 = *reinterpret_cast<const int4*>(&buffer.a[word][64 + 4 * ty]);
      int4 columns[2];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) columns[g] = *reinterpret_cast<const int4*>(&buffer.b[word][GROUP * g + 4 * tx]);
      const int av[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < MINE; j++) sums[i][j] = dot4<T::SIGNED>(av[i], word_of<PER>(columns, j), sums[i][j]);
    }
#pragma unroll
    for (int g = 0; g < GROUPS / HALVES; g++) {
      float d[4], d_sum[4];
      spread4(*reinterpret_cast<const float4*>(&buffer.b_scale[b][GROUP * g + 4 * tx]), d);
      if (T::HAS_MIN) spread4(*reinterpret_cast<const float4*>(&buffer.b_sum[b][GROUP * g + 4 * tx]), d_sum);
#pragma unroll
      for (int ih = 0; ih < 2; ih++) {
        float scale[4], min[4];
        spread4(*reinterpret_cast<const float4*>(&buffer.a_scale[part][64 * ih + 4 * ty]), scale);
        if (T::HAS_MIN) spread4(*reinterpret_cast<const float4*>(&buffer.a_min[b][64 * ih + 4 * ty]), min);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < PER; j++) {
            float& sum = acc[4 * ih + i][PER * g + j];
            const int products = sums[4 * ih + i][PER * g + j];
            const int joined = HALVES == 1 ? products : (products << 8) + sums[4 * ih + i][MINE - PER + j];
            sum = add_products(sum, scale[i], d[j], joined);
            if (T::HAS_MIN) sum = __fmaf_rn(min[i], d_sum[j], sum);
          }
      }
    }
  }
}

// Tiles along K in the order of the sum, split by split and slice by slice, from split `first` on.
struct Walk {
  int split, slice, tile, end;

  __device__ __forceinline__ Walk(const Arguments& a, int first)
      : split(first), slice(0), tile(split_begin(a, first)), end(split_begin(a, first + 1)) {}

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
template <int OUT>
__device__ __forceinline__ void add_earlier(float (&sums)[8][OUT], const float* own) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < OUT; j++) sums[i][j] = __fadd_rn(own[(OUT * i + j) * THREADS], sums[i][j]);
}

template <int OUT>
__device__ __forceinline__ void keep(const float (&sums)[8][OUT], float* own) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < OUT; j++) own[(OUT * i + j) * THREADS] = sums[i][j];
}

template <int OUT>
__device__ __forceinline__ void clear(float (&sums)[8][OUT]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < OUT; j++) sums[i][j] = 0.0f;
}

// At the end of a slice. splits: that the thread adds. own: [2 or 1][8 * OUT][THREADS], of slices, then of splits.
template <int OUT>
__device__ __forceinline__ void end_slice(const Arguments& a, const Walk& at, int splits, float (&acc)[8][OUT],
                                          float* own) {
  if (at.slice > 0) add_earlier(acc, own);
  if (!at.ends_split(a)) {
    keep(acc, own);
  } else if (splits > 1) {
    float* of_splits = own + 8 * OUT * THREADS;
    if (at.split > 0) add_earlier(acc, of_splits);
    if (at.split < splits - 1) keep(acc, of_splits);
  }
}

// partials: where the sums of one split go, or null for the results.
template <int PER, int OUT>
__device__ __forceinline__ void write_tile(const Arguments& a, const float (&acc)[8][OUT], float* partials, int first_row,
                                           int first_output, int ty, int tx) {
#pragma unroll
  for (int j = 0; j < OUT; j++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int n = first_output + 8 * PER * (j / PER) + PER * tx + j % PER;
      const int row = first_row + 64 * (i / 4) + 4 * ty + i % 4;
      if (!partials)
        write_output(a, n, row, acc[i][j]);
      else if (n < a.n && row < a.rows)
        __stcg(partial_of(a, partials, blockIdx.y, n, row), acc[i][j]);
    }
}

template <class T, int GROUPS, int PER>
__device__ __forceinline__ void multiply_tile(const Arguments& a, Buffer<T, GROUPS> (&buffers)[2], float* own,
                                              float* partials, int first_row, int first_output) {
  constexpr int OUT = GROUPS * PER / HALVES;
  const int t = threadIdx.x, lane = t % WARP, warp = t / WARP;
  const int ty = warp * 4 + lane / 8, tx = lane % 8;
  const int groups = (a.rows + WARP - 1) / WARP;
  const int group = min(first_row / WARP + warp, groups - 1);
  const uint4* tiles = a.weights + unit_of<T>(group, 0, a.n_steps) + lane;
  const Place<GROUPS> place;
  const int in_group = place.column % GROUP, second = place.column / GROUP; // column 4 tx + j of a group: its output PER tx + j
  const int output = first_output + (HALVES == 1 ? 8 * PER * second : 0) + PER * (in_group / 4) + in_group % 4;
  const int row = in_group % 4 < PER && output < a.n ? output + (HALVES == 2 ? second * a.low : 0) : -1;
  float acc[8][OUT];
  clear(acc);

  Walk at(a, blockIdx.y); // the step that is multiplied; `ahead` is the one that is loaded
  Walk ahead = at;
  const int splits = gridDim.y > 1 ? 1 : a.splits;
  const int n_steps = min(a.n_steps, STEPS * split_begin(a, blockIdx.y + splits)) - STEPS * at.tile;
  const uint4* tile = tiles + static_cast<size_t>(ahead.tile) * T::UNITS;
  typename T::Header header = T::load_header(tile, lane);
  typename T::Raw raw = T::load(tile, lane, 0);
  Columns<GROUPS> columns = load_columns<T>(a, place, row, ahead.tile, 0);
  store_step(buffers[0], header, raw, place, columns, 0);
  __syncthreads();
  int step = 0; // of `ahead`
#pragma unroll 1
  for (int s = 0; s < n_steps; s++) {
    const int next = s + 1;
    step = step + 1 < steps_of<T>(ahead.tile, a.n_steps) ? step + 1 : 0;
    if (next < n_steps) {
      if (step == 0) {
        ahead.advance(a);
        tile = tiles + static_cast<size_t>(ahead.tile) * T::UNITS;
        header = T::load_header(tile, lane);
      }
      raw = T::load(tile, lane, step);
      columns = load_columns<T>(a, place, row, ahead.tile, step);
    }
    multiply_step<T, GROUPS, PER>(buffers[s % 2], acc, ty, tx);
    if (next < n_steps) store_step(buffers[next % 2], header, raw, place, columns, step);
    if (step == 0) {
      if (at.ends_slice()) {
        end_slice(a, at, splits, acc, own);
        if (next < n_steps) clear(acc);
      }
      at = ahead;
    }
    __syncthreads();
  }
  write_tile<PER>(a, acc, partials, first_row, first_output, ty, tx);
}

// Grid: persistent CTAs, columns varying fastest, so that a weight tile stays in L2 for all columns; or, with splits as
// grid.y, a CTA for each tile and split.
template <class T, int GROUPS, int PER>
__device__ __forceinline__ void multiply(const Arguments& a) {
  constexpr int OUTPUTS = 8 * PER * GROUPS / HALVES;
  __shared__ Buffer<T, GROUPS> buffers[2];
  const bool apart = gridDim.y > 1;
  const int column_tiles = (a.n + OUTPUTS - 1) / OUTPUTS, row_tiles = (a.rows + ROWS - 1) / ROWS;
  const size_t of_cta = static_cast<size_t>(ROWS) * OUTPUTS * (a.splits > 1 && !apart ? 2 : 1);
  float* own = a.partials + (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * of_cta + threadIdx.x;
  float* partials = apart ? a.partials + static_cast<size_t>(gridDim.y) * gridDim.x * of_cta : nullptr;
#pragma unroll 1
  for (int i = blockIdx.x; i < column_tiles * row_tiles; i += gridDim.x) {
    const int row_tile = i / column_tiles;
    multiply_tile<T, GROUPS, PER>(a, buffers, own, partials, row_tile * ROWS, i % column_tiles * OUTPUTS);
    if (apart && comes_last(a.tickets + row_tile * (ROWS / WARP), gridDim.y * column_tiles))
      add_splits(a, partials, row_tile * ROWS, ROWS);
  }
}

#define KERNEL(OUTPUTS, GROUPS, PER, CTAS_PER_SM)                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) NAME(TYPE, BITS, OUTPUTS)(Arguments a) {            \
    multiply<TYPE, GROUPS, PER>(a);                                                                                     \
  }
#define NAME_(T, BITS, OUTPUTS) tile_matmul_##T##_##BITS##bit_n##OUTPUTS
#define NAME(T, BITS, OUTPUTS) NAME_(T, BITS, OUTPUTS)

// Outputs and CTAs also stand in ops/matmul.py.
#if BITS == 8
constexpr int NARROW_CTAS = __CUDA_ARCH__ >= 610 ? 3 : 2; // sm_60 spreads bytes for 16-bit products: more registers
KERNEL(24, 1, 3, NARROW_CTAS)
KERNEL(32, 1, 4, NARROW_CTAS)
KERNEL(48, 2, 3, 2)
KERNEL(64, 2, 4, 2)
#else
KERNEL(32, 2, 4, 2)
#endif
