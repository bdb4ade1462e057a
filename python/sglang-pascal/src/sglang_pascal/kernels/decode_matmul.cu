// y[n, row] = sum over k of w[row, k] * x[n, k] for a few columns n: the product of a decode step.
//
// Compiled once per weight type (-DTYPE=Q4_K ...), one kernel per column count N; fewer columns are padded with zeros.
// One lane owns R rows (R groups of 32 rows in a CTA), so weight loads are whole 512-byte planes, the lane's scales are
// in its registers, activations are the same word for the warp, and the loop has no shuffle.
// CTA: 128 threads = 4 warps, one slice each (matmul.cuh), whatever N, R and CHUNK are: a row's bits do not depend on how
// many columns are computed with it. Splits of K are CTAs (grid.y); the one that finishes last adds them in order, from
// partials [splits, n, 32 * groups].
//
//   N        1     2     4     8    16
//   R        1     1     2     2     2     rows a lane: a uniform 16-byte shared load may cost 4 cycles on sm_61, so
//                                          columns are shared by two rows from N = 4 on (Q6_K, which has more scales
//                                          and is slower by its bytes, not at N = 8: its loads fit there)
//   CHUNK   32    32    16     8     8     tiles of activations staged
//   shared 10K   20K   20K   20K   40K     upper bound: 320 bytes * N * CHUNK
// Registers and the resulting occupancy: docs/kernels.md, checked against ptxas by a test.
#include "matmul.cuh"

template <class T>
constexpr int SCALES = T::HAS_MIN ? 2 : 1; // floats of a block of activations: d, and d * sum q where it is needed

template <class T, int N, int CHUNK>
__device__ __forceinline__ void stage(const Arguments& a, int4* x, float* scales, int first_tile, int count) {
#pragma unroll 1
  for (int n = 0; n < N; n++) {
    const bool real = n < a.n;
    const int4* source = a.x + (static_cast<size_t>(n) * a.n_tiles + first_tile) * 16;
    for (int i = threadIdx.x; i < count * 16; i += WARP * SLICES)
      x[n * CHUNK * 16 + i] = real ? __ldg(source + i) : make_int4(0, 0, 0, 0);
    const float2* source_scales = a.x_scales + (static_cast<size_t>(n) * a.n_tiles + first_tile) * 8;
    for (int i = threadIdx.x; i < count * 8; i += WARP * SLICES) {
      const float2 s = real ? __ldg(source_scales + i) : make_float2(0.0f, 0.0f);
      scales[(n * CHUNK * 8 + i) * SCALES<T>] = s.x;
      if (T::HAS_MIN) scales[(n * CHUNK * 8 + i) * SCALES<T> + 1] = s.y;
    }
  }
}

// acc += one block of 32 products. `x` are the block's 32 int8 activations, `scale` {d, d * sum q}.
template <class T>
__device__ __forceinline__ void add_block(float& acc, const Step& w, int b, const int* x, float d, float d_sum) {
  int low = 0, high = 0;
#pragma unroll
  for (int k = 0; k < 4; k++) low = dot4<T::SIGNED>(w.bytes[b][k], x[k], low);
  if (!T::HALF_SCALES) high = low;
#pragma unroll
  for (int k = 4; k < 8; k++) high = dot4<T::SIGNED>(w.bytes[b][k], x[k], high);
  if (T::HALF_SCALES) acc = add_products(acc, w.scale[b][0], d, low);
  acc = add_products(acc, w.scale[b][1], d, high);
  if (T::HAS_MIN) acc = __fmaf_rn(-w.min[b], d_sum, acc);
}

template <class T, int N, int R, int CHUNK>
__device__ __forceinline__ void add_step(float (&acc)[R][N], const uint4* const (&tile)[R],
                                         const typename T::Header (&header)[R], int step, const int4* x,
                                         const float* scales) {
  Step w[R];
#pragma unroll
  for (int r = 0; r < R; r++) T::unpack(header[r], T::load(tile[r], threadIdx.x % WARP, step), step, w[r]);
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int block = T::block(step, b);
      const int4 x0 = x[n * CHUNK * 16 + 2 * block], x1 = x[n * CHUNK * 16 + 2 * block + 1];
      const int words[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
      const float* s = scales + (n * CHUNK * 8 + block) * SCALES<T>;
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

template <class T, int N, int R, int CHUNK>
__device__ __forceinline__ void add_tile(float (&acc)[R][N], const uint4* const (&tile)[R], const int4* x,
                                         const float* scales) {
  typename T::Header header[R];
#pragma unroll
  for (int r = 0; r < R; r++) header[r] = T::load_header(tile[r], threadIdx.x % WARP);
#pragma unroll
  for (int step = 0; step < STEPS; step++) add_step<T, N, R, CHUNK>(acc, tile, header, step, x, scales);
}

// The last tile of a row, where it has fewer steps: once a row, so its steps are a loop of their own.
template <class T, int N, int R, int CHUNK>
__device__ __forceinline__ void add_short_tile(float (&acc)[R][N], const uint4* const (&tile)[R], int steps,
                                               const int4* x, const float* scales) {
  const typename T::Header header[R] = {};
#pragma unroll 1
  for (int step = 0; step < steps; step++) add_step<T, N, R, CHUNK>(acc, tile, header, step, x, scales);
}

// The sum of one output over the splits, in order.
__device__ __forceinline__ float sum_of_splits(const Arguments& a, int n, int row, int padded_rows) {
  float sum = 0.0f;
  for (int split = 0; split < gridDim.y; split++)
    sum = __fadd_rn(sum, __ldcg(a.partials + (static_cast<size_t>(split) * a.n + n) * padded_rows + row));
  return sum;
}

// Sum over splits, by the CTA that comes last. Called by all threads.
template <int N, int R>
__device__ __forceinline__ void add_splits(const Arguments& a, int padded_rows, int outputs) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(a.tickets + blockIdx.x, 1u) == gridDim.y - 1;
    if (is_last) a.tickets[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < R * WARP * outputs; i += WARP * SLICES) {
    const int n = i / (R * WARP), row = blockIdx.x * R * WARP + i % (R * WARP);
    if (row >= a.rows) continue;
    float sum = sum_of_splits(a, n, row, padded_rows);
    if (a.halves == 2) sum = __fadd_rn(sum, sum_of_splits(a, n + outputs, row, padded_rows));
    write_output(a, n, row, sum);
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

template <class T, int N, int R, int CHUNK>
__device__ __forceinline__ void multiply(const Arguments& a) {
  __shared__ int4 x[N * CHUNK * 16];
  __shared__ float2 scales_[N * CHUNK * 8 * SCALES<T> / 2];
  float* scales = reinterpret_cast<float*>(scales_);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int groups = (a.rows + WARP - 1) / WARP;
  const int begin = split_begin(a, blockIdx.y), end = split_begin(a, blockIdx.y + 1);
  const uint4* tile[R]; // the warp's next tile: SLICES further each time, in the next chunk too
  static_assert(CHUNK % SLICES == 0, "a warp has the same slice in every chunk");
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
  for (int first = begin; first < end; first += CHUNK) {
    const int count = min(CHUNK, end - first), whole = T::SHORT_TILES ? min(count, a.n_steps / STEPS - first) : count;
    __syncthreads();
    stage<T, N, CHUNK>(a, x, scales, first, count);
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < whole; i += SLICES) {
      add_tile<T, N, R, CHUNK>(acc, tile, x + i * 16, scales + i * 8 * SCALES<T>);
#pragma unroll
      for (int r = 0; r < R; r++) tile[r] += SLICES * T::UNITS;
    }
    if (T::SHORT_TILES && whole < count && whole % SLICES == warp)
      add_short_tile<T, N, R, CHUNK>(acc, tile, a.n_steps % STEPS, x + whole * 16, scales + whole * 8 * SCALES<T>);
  }

  __syncthreads();
  float* sums = reinterpret_cast<float*>(x); // [slice][n][r][lane]: SLICES * N * R * 128 bytes <= N * CHUNK * 256
  static_assert(SLICES * R * WARP * 4 <= CHUNK * 256, "the sums fit where the activations were");
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int r = 0; r < R; r++) sums[((warp * N + n) * R + r) * WARP + lane] = acc[r][n];
  __syncthreads();
  const int padded_rows = groups * WARP, outputs = a.halves == 2 ? a.n / 2 : a.n;
  for (int i = threadIdx.x; i < N * R * WARP; i += WARP * SLICES) {
    const int n = i / (R * WARP), row = blockIdx.x * R * WARP + i % (R * WARP);
    float sum = sum_of_slices<N * R * WARP>(sums + i);
    if (gridDim.y > 1) {
      if (n < a.n && row < padded_rows)
        __stcg(a.partials + (static_cast<size_t>(blockIdx.y) * a.n + n) * padded_rows + row, sum);
    } else if (n < outputs) {
      if (a.halves == 2) sum = __fadd_rn(sum, sum_of_slices<N * R * WARP>(sums + i + outputs * R * WARP));
      write_output(a, n, row, sum);
    }
  }
  if (gridDim.y > 1) add_splits<N, R>(a, padded_rows, outputs);
}

#define KERNEL(T, N, R, CHUNK, CTAS_PER_SM)                                                                             \
  extern "C" __global__ void __launch_bounds__(WARP* SLICES, CTAS_PER_SM) NAME(T, N)(Arguments a) {                      \
    multiply<T, N, R, CHUNK>(a);                                                                                        \
  }
#define NAME_(T, N) decode_matmul_##T##_n##N
#define NAME(T, N) NAME_(T, N)

constexpr int WIDE_ROWS = TYPE::HALF_SCALES ? 1 : 2;

KERNEL(TYPE, 1, 1, 32, 4)
KERNEL(TYPE, 2, 1, 32, 4)
KERNEL(TYPE, 4, 2, 16, 3)
#if __CUDA_ARCH__ >= 610
KERNEL(TYPE, 8, WIDE_ROWS, 8, 3)
#else
KERNEL(TYPE, 8, WIDE_ROWS, 8, 2) // the bytes spread for 16-bit products need more registers
#endif
KERNEL(TYPE, 16, 2, 8, 2)
