// y[n, row] = sum over k of w[row, k] * x[n, k] for a few outputs n: the product of a decode step.
//
// Compiled once per weight type and bits of x (-DTYPE=Q4_K -DBITS=16 ...), one kernel per number of outputs N; fewer are
// padded with zeros. x is read as C = N or 2 N columns of int8 (matmul.cuh).
// One lane owns R rows (R groups of 32 rows in a CTA), so weight loads are whole 512-byte planes, the lane's scales are
// in its registers, activations are the same word for the warp, and the loop has no shuffle.
// CTA: 128 threads = 4 warps, one slice each (matmul.cuh), whatever N, R and the staging are: a row's bits do not depend on
// how many are computed with it. Splits of K are CTAs (grid.y); the one that finishes last adds them in order, from
// partials [splits, n, 32 * groups].
//
//   R      1 for C = 1 and 2, else 2, and 3 or 4 (Q5_K: 3 or 2; 2 on sm_60) above C = 12: a uniform 16-byte shared load may
//          cost 4 cycles on sm_61, so rows share it; four rows are no slower than their bytes there
//   staged tiles of activations at once, by each warp for itself: as many as leave shared memory for the CTAs that registers
//          allow, half a tile a warp where there are many rows of x; with up to 12 loads of a lane in flight, since they come
//          from L2, and as few warps as there are do not hide that latency
//   ahead  a step's weights are loaded while the one before it is multiplied, where registers allow it; and L2 is asked for
//          a warp's next tile, since 8 warps a multiprocessor do not hide the memory's latency
//   steps  of a tile (64 weights) are unrolled up to C = 4; above they are a loop of 3 to 28 KB of code (32 rows of 8 bits, 24
//          of 16), which four of them would not be
// Registers and the resulting occupancy: docs/kernels.md, checked against ptxas by a test.
#include "matmul.cuh"

constexpr int HALVES = BITS / 8;
constexpr int UNROLLED_COLUMNS = 4; // of int8, up to which a tile's steps are unrolled

// Whether a step's weights are loaded while the one before it is multiplied: where registers allow it.
template <class T, int N, int R>
constexpr bool AHEAD = N * HALVES > UNROLLED_COLUMNS && R * N <= (R > 3 ? 48 : 72) && sizeof(typename T::Raw) <= 48;

template <class T>
constexpr int SCALES = T::HAS_MIN ? 2 : 1; // floats of a block of activations: d, and d * sum q where it is needed

// What of the activations is staged at once: a part (all, or a half) of each of TILES tiles.
template <int TILES_, int PARTS_>
struct Staging {
  static constexpr int TILES = TILES_, PARTS = PARTS_;
  static constexpr int VECTORS = 16 / PARTS, BLOCKS = 8 / PARTS; // of 16 and 32 values, of a tile
  static_assert(TILES % SLICES == 0, "a warp has the same slice each time");
  static_assert(PARTS == 1 || TILES == SLICES, "halves of one tile a warp");
};

// Stage part `part` of the activations of `count` tiles: x [N][HALVES][TILES][VECTORS], scales [N][TILES][BLOCKS][SCALES],
// of x as a whole. A warp stages what it multiplies itself (every fourth tile), so warps do not wait for each other.
template <class T, int N, class S>
__device__ __forceinline__ void stage_few(const Arguments& a, int4* x, float* scales, int first_tile, int count, int part) {
  constexpr int ROWS = N * HALVES;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tiles = (count - warp + SLICES - 1) / SLICES;
#pragma unroll 4
  for (int i = lane; i < tiles * ROWS * S::VECTORS; i += WARP) {
    const int tile = warp + SLICES * (i / S::VECTORS / ROWS), row = i / S::VECTORS % ROWS, n = row / HALVES, half = row % HALVES;
    const size_t source = (static_cast<size_t>(n + half * a.low) * a.n_tiles + first_tile + tile) * 16 + part * S::VECTORS;
    x[(row * S::TILES + tile) * S::VECTORS + i % S::VECTORS] =
        n < a.n ? __ldg(a.x + source + i % S::VECTORS) : make_int4(0, 0, 0, 0);
  }
#pragma unroll 4
  for (int i = lane; i < tiles * N * S::BLOCKS; i += WARP) {
    const int tile = warp + SLICES * (i / S::BLOCKS / N), n = i / S::BLOCKS % N;
    const size_t source =
        (static_cast<size_t>(n + (HALVES - 1) * a.low) * a.n_tiles + first_tile + tile) * 8 + part * S::BLOCKS;
    const float2 s = n < a.n ? __ldg(a.x_scales + source + i % S::BLOCKS) : make_float2(0.0f, 0.0f);
    const int to = ((n * S::TILES + tile) * S::BLOCKS + i % S::BLOCKS) * SCALES<T>;
    scales[to] = s.x;
    if (T::HAS_MIN) scales[to + 1] = s.y;
  }
}

// The same for many rows of x in whole tiles: a tile at a time, with as many loads in flight as registers allow.
template <class T, int N, int R, class S>
__device__ __forceinline__ void stage_many(const Arguments& a, int4* x, float* scales, int first_tile, int count, int part) {
  constexpr int OF_WORDS = WARP / S::VECTORS, OF_SCALES = WARP / S::BLOCKS; // rows of x that a warp loads at once
  constexpr int WORDS = N * HALVES / OF_WORDS, PAIRS = (N + OF_SCALES - 1) / OF_SCALES;
  constexpr int MOST = HALVES == 2 && R * N > 32 ? 6 : 12; // words in flight
  static_assert(N * HALVES % OF_WORDS == 0 && OF_WORDS % HALVES == 0, "whole loads of a warp");
  const int lane = threadIdx.x % WARP, row = lane / S::VECTORS, n = row / HALVES, of_scale = lane / S::BLOCKS;
#pragma unroll 1
  for (int tile = threadIdx.x / WARP; tile < count; tile += SLICES) {
    const int4* words = a.x + (static_cast<size_t>(n + row % HALVES * a.low) * a.n_tiles + first_tile + tile) * 16 +
                        part * S::VECTORS + lane % S::VECTORS;
    const float2* pairs =
        a.x_scales + (static_cast<size_t>(of_scale + (HALVES - 1) * a.low) * a.n_tiles + first_tile + tile) * 8 +
        part * S::BLOCKS + lane % S::BLOCKS;
    int4* to = x + (row * S::TILES + tile) * S::VECTORS + lane % S::VECTORS;
    float* to_scale = scales + ((of_scale * S::TILES + tile) * S::BLOCKS + lane % S::BLOCKS) * SCALES<T>;
    float2 pair[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++, pairs += OF_SCALES * 8 * a.n_tiles)
      pair[j] = of_scale + OF_SCALES * j < a.n ? __ldg(pairs) : make_float2(0.0f, 0.0f);
#pragma unroll
    for (int some = 0; some < WORDS; some += MOST) {
      int4 word[MOST];
#pragma unroll
      for (int j = some; j < some + MOST && j < WORDS; j++, words += OF_WORDS / HALVES * 16 * a.n_tiles)
        word[j - some] = n + OF_WORDS / HALVES * j < a.n ? __ldg(words) : make_int4(0, 0, 0, 0);
#pragma unroll
      for (int j = some; j < some + MOST && j < WORDS; j++) to[j * OF_WORDS * S::TILES * S::VECTORS] = word[j - some];
    }
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
      if (of_scale + OF_SCALES * j >= N) break;
      to_scale[j * OF_SCALES * S::TILES * S::BLOCKS * SCALES<T>] = pair[j].x;
      if (T::HAS_MIN) to_scale[j * OF_SCALES * S::TILES * S::BLOCKS * SCALES<T> + 1] = pair[j].y;
    }
  }
}

template <class T, int N, int R, class S>
__device__ __forceinline__ void stage(const Arguments& a, int4* x, float* scales, int first_tile, int count, int part) {
  if constexpr (N * HALVES > UNROLLED_COLUMNS && S::PARTS == 1)
    stage_many<T, N, R, S>(a, x, scales, first_tile, count, part);
  else
    stage_few<T, N, S>(a, x, scales, first_tile, count, part);
}

// Sum of COUNT words' products, with both halves of x joined.
template <class T, int COUNT>
__device__ __forceinline__ int dot(const u32* w, const int (&x)[HALVES][8], int first) {
  int sum = 0;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    sum <<= 8;
#pragma unroll
    for (int k = first; k < first + COUNT; k++) sum = dot4<T::SIGNED>(w[k], x[half][k], sum);
  }
  return sum;
}

// acc += one block of 32 products.
template <class T>
__device__ __forceinline__ void add_block(float& acc, const Step& w, int b, const int (&x)[HALVES][8], float d,
                                          float d_sum) {
  if (T::HALF_SCALES) {
    acc = add_products(acc, w.scale[b][0], d, dot<T, 4>(w.bytes[b], x, 0));
    acc = add_products(acc, w.scale[b][1], d, dot<T, 4>(w.bytes[b], x, 4));
  } else {
    acc = add_products(acc, w.scale[b][0], d, dot<T, 8>(w.bytes[b], x, 0));
  }
  if (T::HAS_MIN) acc = __fmaf_rn(-w.min[b], d_sum, acc);
}

// acc += the products of a step with the activations of x [N][HALVES][TILES][VECTORS] and their scales.
template <class T, int N, int FEWEST, int R, class S>
__device__ __forceinline__ void add_step(float (&acc)[R][N], const typename T::Raw (&raw)[R],
                                         const typename T::Header (&header)[R], int step, const int4* x,
                                         const float* scales, int count) {
  Step w[R];
#pragma unroll
  for (int r = 0; r < R; r++) T::unpack(header[r], raw[r], step, w[r]);
#pragma unroll
  for (int n = 0; n < N; n++) {
    if (n >= FEWEST && n >= count) break;
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int block = T::block(step, b) % S::BLOCKS;
      int words[HALVES][8];
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        const int4* source = x + (n * HALVES + half) * S::TILES * S::VECTORS + 2 * block;
        const int4 x0 = source[0], x1 = source[1];
        words[half][0] = x0.x, words[half][1] = x0.y, words[half][2] = x0.z, words[half][3] = x0.w;
        words[half][4] = x1.x, words[half][5] = x1.y, words[half][6] = x1.z, words[half][7] = x1.w;
      }
      const float* s = scales + (n * S::TILES * S::BLOCKS + block) * SCALES<T>;
      float d, d_sum = 0.0f;
      if (T::HAS_MIN) {
        const float2 both = *reinterpret_cast<const float2*>(s);
        d = both.x, d_sum = both.y;
      } else {
        d = *s;
      }
#pragma unroll
      for (int r = 0; r < R; r++) add_block<T>(acc[r][n], w[r], b, words, d, d_sum);
    }
  }
}

template <class T, int R>
__device__ __forceinline__ void load_step(const uint4* const (&tile)[R], int step, typename T::Raw (&raw)[R]) {
#pragma unroll
  for (int r = 0; r < R; r++) raw[r] = T::load(tile[r], threadIdx.x % WARP, step);
}

// Ask L2 for a warp's next tile: 128 bytes a lane.
template <class T, int R>
__device__ __forceinline__ void prefetch_tile(const uint4* const (&tile)[R]) {
  constexpr int LINES = (T::UNITS * 16 + 127) / 128;
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const uint4* next = tile[r] - lane + SLICES * T::UNITS;
#pragma unroll
    for (int i = 0; i < LINES; i += WARP)
      if (i + WARP <= LINES || i + lane < LINES) prefetch(next + (i + lane) * 8);
  }
}

// The steps first .. first + steps - 1 of a tile.
template <class T, int N, int FEWEST, int R, class S, bool UNROLL>
__device__ __forceinline__ void add_steps(float (&acc)[R][N], const uint4* const (&tile)[R], int first, int steps,
                                          const int4* x, const float* scales, int count) {
  constexpr int UNROLLED = UNROLL ? STEPS : 1;
  typename T::Header header[R];
#pragma unroll
  for (int r = 0; r < R; r++) header[r] = T::load_header(tile[r], threadIdx.x % WARP);
  typename T::Raw raw[R], next[R];
  if (AHEAD<T, N, R>) load_step<T, R>(tile, first, next);
#pragma unroll UNROLLED
  for (int i = 0; i < steps; i++) {
    const int step = first + i;
    if (AHEAD<T, N, R>) {
#pragma unroll
      for (int r = 0; r < R; r++) raw[r] = next[r];
      if (i + 1 < steps) load_step<T, R>(tile, step + 1, next);
    } else {
      load_step<T, R>(tile, step, raw);
    }
    add_step<T, N, FEWEST, R, S>(acc, raw, header, step, x, scales, count);
  }
}

// The sum of one output over the slices of a CTA, in order. COUNT: outputs of a slice.
template <int COUNT>
__device__ __forceinline__ float sum_of_slices(const float* sums) {
  float sum = sums[0];
#pragma unroll
  for (int s = 1; s < SLICES; s++) sum = __fadd_rn(sum, sums[s * COUNT]);
  return sum;
}

// Tile i of a chunk: all of its steps (WHOLE), or those that the last tile of a row has. Its activations stand in x and scales
// already if they are staged whole.
template <class T, int N, int FEWEST, int R, class S, bool WHOLE>
__device__ __forceinline__ void add_tile(const Arguments& a, float (&acc)[R][N], const uint4* const (&tile)[R], int4* x,
                                         float* scales, int first_tile, int count, int i) {
  const int steps = WHOLE ? STEPS : a.n_steps % STEPS;
  const int4* own_x = x + i * S::VECTORS;
  const float* own_scales = scales + i * S::BLOCKS * SCALES<T>;
  if constexpr (S::PARTS == 1) {
    constexpr bool UNROLL = WHOLE && N * HALVES <= UNROLLED_COLUMNS;
    add_steps<T, N, FEWEST, R, S, UNROLL>(acc, tile, 0, steps, own_x, own_scales, a.n);
  } else {
    constexpr int MOST = STEPS / S::PARTS;
#pragma unroll 1
    for (int first = 0; first < steps; first += MOST) {
      __syncwarp();
      stage<T, N, R, S>(a, x, scales, first_tile, count, first / MOST);
      __syncwarp();
      add_steps<T, N, FEWEST, R, S, false>(acc, tile, first, min(MOST, steps - first), own_x, own_scales, a.n);
    }
  }
}

template <class T, int N, int FEWEST, int R, class S>
__device__ __forceinline__ void multiply(const Arguments& a) {
  __shared__ int4 x[N * HALVES * S::TILES * S::VECTORS];
  __shared__ float2 scales_[N * S::TILES * S::BLOCKS * SCALES<T> / 2];
  float* scales = reinterpret_cast<float*>(scales_);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int groups = (a.rows + WARP - 1) / WARP;
  const int begin = split_begin(a, blockIdx.y), end = split_begin(a, blockIdx.y + 1);
  const uint4* tile[R]; // the warp's next tile: SLICES further each time, in the next chunk too
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int group = min(static_cast<int>(blockIdx.x) * R + r, groups - 1); // an odd last group is computed twice
    tile[r] = a.weights + unit_of<T>(group, begin + warp, a.n_steps) + lane;
  }
  float acc[R][N];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int n = 0; n < N; n++) acc[r][n] = 0.0f;

#pragma unroll 1
  for (int first = begin; first < end; first += S::TILES) {
    const int count = min(S::TILES, end - first), whole = T::SHORT_TILES ? min(count, a.n_steps / STEPS - first) : count;
    if (S::PARTS == 1) {
      __syncwarp();
      stage<T, N, R, S>(a, x, scales, first, count, 0);
      __syncwarp();
    }
#pragma unroll 1
    for (int i = warp; i < whole; i += SLICES) {
      if (N * HALVES > UNROLLED_COLUMNS && first + i + SLICES < end) prefetch_tile<T, R>(tile);
      add_tile<T, N, FEWEST, R, S, true>(a, acc, tile, x, scales, first, count, i);
#pragma unroll
      for (int r = 0; r < R; r++) tile[r] += SLICES * T::UNITS;
    }
    if (T::SHORT_TILES && whole < count && whole % SLICES == warp)
      add_tile<T, N, FEWEST, R, S, false>(a, acc, tile, x, scales, first, count, whole);
  }

  // The slices are added a few outputs at a time, where the activations were.
  float* sums = reinterpret_cast<float*>(x); // [slice][n][r][lane]
  constexpr int FITTING = HALVES * N * S::TILES * S::VECTORS * 16 / (SLICES * R * WARP * 4), TOGETHER = FITTING < N ? FITTING : N;
#pragma unroll
  for (int first = 0; first < N; first += TOGETHER) {
    __syncthreads();
#pragma unroll
    for (int n = first; n < first + TOGETHER && n < N; n++)
#pragma unroll
      for (int r = 0; r < R; r++) sums[((warp * TOGETHER + n - first) * R + r) * WARP + lane] = acc[r][n];
    __syncthreads();
    for (int i = threadIdx.x; i < TOGETHER * R * WARP; i += WARP * SLICES) {
      const int n = first + i / (R * WARP), row = blockIdx.x * R * WARP + i % (R * WARP);
      if (n >= N) break;
      const float sum = sum_of_slices<TOGETHER * R * WARP>(sums + i);
      if (gridDim.y == 1)
        write_output(a, n, row, sum);
      else if (n < a.n && row < groups * WARP)
        __stcg(partial_of(a, a.partials, blockIdx.y, n, row), sum);
    }
  }
  if (gridDim.y > 1 && comes_last(a.tickets + blockIdx.x, gridDim.y))
    add_splits<R * WARP>(a, a.partials, blockIdx.x * R * WARP);
}

constexpr int MOST_ROWS = __CUDA_ARCH__ >= 610 ? TYPE::MOST_ROWS : 2;
constexpr int MOST_ROWS_OF_MANY = MOST_ROWS > 2 ? MOST_ROWS - 1 : MOST_ROWS; // with more than 20 sums a row
// Two rows of the widest kernel would spill on sm_60 where each step has a scale and a minimum of its own.
constexpr int MOST_ROWS_OF_WIDEST = __CUDA_ARCH__ < 610 && TYPE::SHORT_TILES && TYPE::HAS_MIN ? 1 : MOST_ROWS_OF_MANY;

#define KERNEL(N, FEWEST, R, TILES, PARTS, CTAS_PER_SM)                                                                 \
  extern "C" __global__ void __launch_bounds__(WARP* SLICES, CTAS_PER_SM) NAME(TYPE, BITS, N)(Arguments a) {             \
    constexpr int MOST = N > 24 ? MOST_ROWS_OF_WIDEST : N > 20 ? MOST_ROWS_OF_MANY : MOST_ROWS;                         \
    multiply<TYPE, N, FEWEST, (R < MOST ? R : MOST), Staging<TILES, PARTS>>(a);                                          \
  }
#define NAME_(T, BITS, N) decode_matmul_##T##_##BITS##bit_n##N
#define NAME(T, BITS, N) NAME_(T, BITS, N)

constexpr int ROOM = __CUDA_ARCH__ >= 610 ? 3 : 2; // sm_60 spreads bytes for 16-bit products: more registers

// N and R also stand in ops/matmul.py.
#if BITS == 8
KERNEL(1, 1, 1, 32, 1, 4)
KERNEL(2, 2, 1, 32, 1, 4)
KERNEL(3, 3, 2, 16, 1, 3)
KERNEL(4, 4, 2, 16, 1, 3)
KERNEL(6, 5, 2, 8, 1, ROOM)
KERNEL(8, 7, 2, 8, 1, ROOM)
KERNEL(12, 9, 2, 8, 1, ROOM)
KERNEL(16, 13, 3, 4, 1, 2)
KERNEL(24, 17, 3, 4, 1, 2)
KERNEL(32, 25, 3, 4, 2, 2)
#else
KERNEL(1, 1, 1, 32, 1, 4)
KERNEL(2, 2, 2, 16, 1, 3)
KERNEL(3, 3, 2, 8, 1, ROOM)
KERNEL(4, 4, 2, 8, 1, ROOM)
KERNEL(6, 5, 2, 8, 1, ROOM)
KERNEL(8, 7, 4, 8, 1, 2)
KERNEL(12, 9, 4, 4, 1, 2)
KERNEL(16, 13, 4, 4, 1, 2)
KERNEL(24, 17, 3, 4, 2, 2)
#endif
