// y[n, row] = sum over k of w[row, k] * x[n, k] for many outputs n: the product of a prefill, or of many requests.
//
// Compiled once per weight type and bits of x (-DTYPE=Q4_K -DBITS=16 ...), one kernel per number of outputs in a tile: 128
// rows x up to 64 or 128 outputs. A thread has 8 rows, columns 4 tx .. 4 tx + 3 of a group of 32 and the first SECOND of the
// four of another one, so that kernels for fewer outputs leave columns out; SIDES times 128 threads share the rows:
//
//   outputs   32   40   48   56   64  128 (8 bits)
//   SECOND     0    1    2    3    4    4
//   SIDES      1    1    1    1    1    2
//   CTAs       3    2    2    2    2    1   a multiprocessor: as many as registers allow
//
// 8 bits are multiplied by dp4a; 16 bits by dp2a, two 16-bit values of x with two bytes of the weight: as many instructions
// as two dp4a with the two int8 of x, and one sum, which is the joined sum of matmul.cuh to the bit. Both int8 become 16-bit
// values when they are stored in shared memory.
//
// Steps of 64 weights, in shared memory as [word of 4 k][row] and [word of 4 k, or of 2 with 16 bits][column]. With one side, thread t unpacks row
// t's 64 bytes and half a column's activations; with two, the first side's threads unpack weights and the second's fetch
// activations, so that unpacking is shared by twice the columns. Two buffers: the next step's loads are in flight while
// this one is multiplied, and one barrier a step separates them. Shared: 25-41 KB.
// A thread has room for one set of sums, but the order of addition (matmul.cuh) has three levels. So tiles are visited
// slice by slice, and at the end of a slice a thread adds its sums to memory of its own, which stays in L2: 2 reads and
// 2 writes of up to 64 KB a slice, 16 bytes at a time. CTAs are persistent, so that this memory is 128 KB a CTA, not as large
// as the result.
// Where tiles are too few for the card, splits of K are CTAs (grid.y); the last of a row tile adds them in order, from
// partials [splits, n, 32 * groups].
#include "matmul.cuh"

constexpr int ROWS = 128, SIDE = 128, WORDS = 16; // SIDE: threads
constexpr int HALVES = BITS / 8; // int8 of a value of x, and words of x for one word of weights
constexpr int GROUP = 32; // columns

// Which of a tile's columns a kernel has.
template <int SECOND_, int SIDES_>
struct Shape {
  static constexpr int SECOND = SECOND_, SIDES = SIDES_, THREADS = SIDE * SIDES;
  static constexpr int GROUPS = SECOND ? 2 : 1, COLUMNS_OF_SIDE = GROUP * GROUPS, COLUMNS = COLUMNS_OF_SIDE * SIDES;
  static constexpr int OUT = 4 + SECOND; // of a row, a thread has
  static constexpr int OUTPUTS_OF_SIDE = 8 * OUT, OUTPUTS = OUTPUTS_OF_SIDE * SIDES;
  static constexpr int VECTORS = 4 * COLUMNS / SIDE;   // of int8, a thread fetches in a step
  static constexpr int BLOCKS = VECTORS > 2 ? 2 : 1;   // that these belong to
  // Columns of a thread in group g, and a thread's output, of its side, in column `in_four` of that group.
  static __device__ __forceinline__ constexpr int count(int g) { return g ? SECOND : 4; }
  static __device__ __forceinline__ int output(int g, int tx, int in_four) { return GROUP * g + count(g) * tx + in_four; }
};

// Read 16 bytes at a time: every array is a multiple of them.
template <class T, class S>
struct alignas(16) Buffer {
  static constexpr int SCALES = T::HALF_SCALES ? 4 : 2;
  int a[WORDS][ROWS];
  int b[WORDS * HALVES][S::COLUMNS];
  float a_scale[SCALES][ROWS];
  float a_min[T::HAS_MIN ? 2 : 1][ROWS];
  float b_scale[2][S::COLUMNS];
  float b_sum[T::HAS_MIN ? 2 : 1][S::COLUMNS];
};

// What a thread fetches of a step: a column's two blocks, one, or half of one.
template <class S>
struct Columns {
  int4 words[HALVES][S::VECTORS];
  float2 scale[S::BLOCKS];
};

// Thread t's part of the activations: its column, the first of its words of 4 k, and where the column's output is, or -1.
template <class S>
struct Place {
  int column, first, output;
  __device__ __forceinline__ Place() {
    const int t = threadIdx.x % SIDE;
    column = t % S::COLUMNS, first = t / S::COLUMNS * 4 * S::VECTORS;
    const int side = column / S::COLUMNS_OF_SIDE, group = column % S::COLUMNS_OF_SIDE / GROUP, in_group = column % GROUP;
    output = in_group % 4 < S::count(group) ? S::OUTPUTS_OF_SIDE * side + S::output(group, in_group / 4, in_group % 4) : -1;
  }
};

// A thread's row of x; no words: a column of zeros.
struct Source {
  const int4* words;
  const float2* scales;
};

template <class T, class S>
__device__ __forceinline__ Columns<S> load_columns(const Arguments& a, const Place<S>& place, const Source& row, int tile, int step) {
  Columns<S> columns;
  if (!row.words) {
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
      for (int i = 0; i < S::VECTORS; i++) columns.words[half][i] = make_int4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++) columns.scale[i] = make_float2(0.0f, 0.0f);
    return columns;
  }
  constexpr int IN_BLOCK = S::VECTORS / S::BLOCKS;
  const int low = HALVES == 2 ? 8 * a.low * a.n_tiles : 0; // blocks from a high half to its low one
#pragma unroll
  for (int b = 0; b < S::BLOCKS; b++) {
    const int block = 8 * tile + T::block(step, S::BLOCKS == 2 ? b : place.first / 8);
    columns.scale[b] = __ldg(row.scales + block + low); // of the whole value, with its low half
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
      for (int i = 0; i < IN_BLOCK; i++)
        columns.words[half][IN_BLOCK * b + i] =
            __ldg(row.words + 2 * (block + half * low) + (IN_BLOCK == 1 ? place.first % 8 / 4 : i));
  }
  return columns;
}

// Row t of a step's weights.
template <class T, class S>
__device__ __forceinline__ void store_weights(Buffer<T, S>& buffer, const typename T::Header& header,
                                              const typename T::Raw& raw, int step) {
  const int t = threadIdx.x % SIDE;
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
}

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Four values 256 * high + low as two words of 16-bit pairs. A negative low byte takes one from the high one, which is at
// least -127, so that no byte borrows from its neighbour.
__device__ __forceinline__ void store_pairs(u32 high, u32 low, int* first, int* second) {
  const u32 upper = ((high ^ 0x80808080u) - ((low >> 7) & 0x01010101u)) ^ 0x80808080u;
  *first = static_cast<int>(permute(low, upper, 0x5140)), *second = static_cast<int>(permute(low, upper, 0x7362));
}

template <class T, class S>
__device__ __forceinline__ void store_columns(Buffer<T, S>& buffer, const Place<S>& place, const Columns<S>& columns) {
  constexpr int NEXT = S::COLUMNS;
#pragma unroll
  for (int i = 0; i < S::VECTORS; i++) {
    int* words = &buffer.b[HALVES * (place.first + 4 * i)][place.column];
    const int4 &high = columns.words[0][i], &low = columns.words[HALVES - 1][i];
    if (HALVES == 1) {
      words[0] = low.x, words[NEXT] = low.y, words[2 * NEXT] = low.z, words[3 * NEXT] = low.w;
    } else {
      store_pairs(high.x, low.x, words, words + NEXT), store_pairs(high.y, low.y, words + 2 * NEXT, words + 3 * NEXT);
      store_pairs(high.z, low.z, words + 4 * NEXT, words + 5 * NEXT), store_pairs(high.w, low.w, words + 6 * NEXT, words + 7 * NEXT);
    }
  }
#pragma unroll
  for (int b = 0; b < S::BLOCKS; b++) {
    const int block = S::BLOCKS == 2 ? b : place.first / 8;
    buffer.b_scale[block][place.column] = columns.scale[b].x;
    if (T::HAS_MIN) buffer.b_sum[block][place.column] = columns.scale[b].y;
  }
}

__device__ __forceinline__ void spread4(const float4& v, float* out) {
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

// Column j of a thread, in a buffer's words.
__device__ __forceinline__ int word_of(const int4 (&words)[2], int j) {
  const int4& v = words[j / 4];
  return j % 4 == 0 ? v.x : j % 4 == 1 ? v.y : j % 4 == 2 ? v.z : v.w;
}

// Of a thread: rows 4 ty + i and 64 + 4 ty + i of the tile, columns 4 tx + j of its side's groups.
struct Thread {
  int side, ty, tx;
  __device__ __forceinline__ Thread() {
    const int t = threadIdx.x % SIDE, lane = t % WARP;
    side = threadIdx.x / SIDE, ty = t / WARP * 4 + lane / 8, tx = lane % 8;
  }
};

// sum += the products of a word of weights with word `half` of x: four int8, or a pair of 16 bits with half of the weights.
template <bool SIGNED>
__device__ __forceinline__ int add_word(int half, u32 weights, int x, int sum) {
  if (HALVES == 1) return dot4<SIGNED>(weights, x, sum);
#if __CUDA_ARCH__ >= 610
  int d;
  if (SIGNED && half == 0) asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(weights), "r"(sum));
  if (SIGNED && half == 1) asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(weights), "r"(sum));
  if (!SIGNED && half == 0) asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(weights), "r"(sum));
  if (!SIGNED && half == 1) asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(weights), "r"(sum));
  return d;
#else
  // The same two bytes as 16-bit pairs; selector digits above 7 repeat the byte's sign, 4 is a byte of zero.
  return multiply_add_pairs(permute_bytes(weights, SIGNED ? half ? 0xb3a2 : 0x9180 : half ? 0x4342 : 0x4140), x, sum);
#endif
}

// acc += the products of one step.
template <class T, class S>
__device__ __forceinline__ void multiply_step(const Buffer<T, S>& buffer, float (&acc)[8][S::OUT], const Thread& me) {
  constexpr int WORDS_PER_SCALE = T::HALF_SCALES ? 4 : 8, GROUPS = S::GROUPS, MINE = S::OUT;
  const int ty = me.ty, column = S::COLUMNS_OF_SIDE * me.side + 4 * me.tx;
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
      const int av[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        int4 columns[2];
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
          columns[g] = *reinterpret_cast<const int4*>(&buffer.b[HALVES * word + half][GROUP * g + column]);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < MINE; j++)
            sums[i][j] = add_word<T::SIGNED>(half, av[i], word_of(columns, j), sums[i][j]);
      }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      float d[4], d_sum[4];
      spread4(*reinterpret_cast<const float4*>(&buffer.b_scale[b][GROUP * g + column]), d);
      if (T::HAS_MIN) spread4(*reinterpret_cast<const float4*>(&buffer.b_sum[b][GROUP * g + column]), d_sum);
#pragma unroll
      for (int ih = 0; ih < 2; ih++) {
        float scale[4], min[4];
        spread4(*reinterpret_cast<const float4*>(&buffer.a_scale[part][64 * ih + 4 * ty]), scale);
        if (T::HAS_MIN) spread4(*reinterpret_cast<const float4*>(&buffer.a_min[b][64 * ih + 4 * ty]), min);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < S::count(g); j++) {
            float& sum = acc[4 * ih + i][4 * g + j];
            sum = add_products(sum, scale[i], d[j], sums[4 * ih + i][4 * g + j]);
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

// What the end of a tile's sums needs of a Walk, in one register.
struct Ending {
  u32 bits;
  __device__ __forceinline__ Ending(const Arguments& a, const Walk& at)
      : bits(at.ends_slice() | (at.slice > 0) << 1 | at.ends_split(a) << 2 | at.split << 3) {}
  __device__ __forceinline__ bool ends_slice() const { return bits & 1; }
  __device__ __forceinline__ bool has_earlier_slices() const { return bits & 2; }
  __device__ __forceinline__ bool ends_split() const { return bits & 4; }
  __device__ __forceinline__ int split() const { return bits >> 3; }
};

// Number i of a thread's sums.
template <int OUT>
__device__ __forceinline__ float& sum_of(float (&sums)[8][OUT], int i) {
  return sums[i / OUT][i % OUT];
}

// sums (in registers) + what earlier slices or splits have left in the thread's own memory, four at a time.
template <int THREADS, int OUT>
__device__ __forceinline__ void add_earlier(float (&sums)[8][OUT], const float4* own) {
#pragma unroll
  for (int i = 0; i < 2 * OUT; i++) {
    const float4 earlier = own[i * THREADS];
    sum_of(sums, 4 * i) = __fadd_rn(earlier.x, sum_of(sums, 4 * i));
    sum_of(sums, 4 * i + 1) = __fadd_rn(earlier.y, sum_of(sums, 4 * i + 1));
    sum_of(sums, 4 * i + 2) = __fadd_rn(earlier.z, sum_of(sums, 4 * i + 2));
    sum_of(sums, 4 * i + 3) = __fadd_rn(earlier.w, sum_of(sums, 4 * i + 3));
  }
}

template <int THREADS, int OUT>
__device__ __forceinline__ void keep(float (&sums)[8][OUT], float4* own) {
#pragma unroll
  for (int i = 0; i < 2 * OUT; i++)
    own[i * THREADS] = make_float4(sum_of(sums, 4 * i), sum_of(sums, 4 * i + 1), sum_of(sums, 4 * i + 2),
                                   sum_of(sums, 4 * i + 3));
}

template <int OUT>
__device__ __forceinline__ void clear(float (&sums)[8][OUT]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < OUT; j++) sums[i][j] = 0.0f;
}

// At the end of a slice. splits: that the thread adds. own: [2 or 1][2 * OUT][THREADS], of slices, then of splits.
template <int THREADS, int OUT>
__device__ __forceinline__ void end_slice(const Ending& at, int splits, float (&acc)[8][OUT], float4* own) {
  if (at.has_earlier_slices()) add_earlier<THREADS>(acc, own);
  if (!at.ends_split()) {
    keep<THREADS>(acc, own);
  } else if (splits > 1) {
    float4* of_splits = own + 2 * OUT * THREADS;
    if (at.split() > 0) add_earlier<THREADS>(acc, of_splits);
    if (at.split() < splits - 1) keep<THREADS>(acc, of_splits);
  }
}

// partials: where the sums of one split go, or null for the results.
template <class S>
__device__ __forceinline__ void write_tile(const Arguments& a, const float (&acc)[8][S::OUT], float* partials,
                                           int first_row, int first_output, const Thread& me) {
  const int first = first_row + 4 * me.ty;
#pragma unroll
  for (int j = 0; j < S::OUT; j++) {
    const int n = first_output + S::OUTPUTS_OF_SIDE * me.side + S::output(j / 4, me.tx, j % 4);
    if (n >= a.n) continue;
    const Output output(a, n);
    float* of_split = partials ? partial_of(a, partials, blockIdx.y, n, first) : nullptr;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float four[4] = {acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j]};
      if (!of_split)
        write_four(a, output, first + 16 * i, four);
      else if (first + 16 * i < a.rows) // there is place up to the end of a group of 32 rows
        __stcg(reinterpret_cast<float4*>(of_split + 16 * i), make_float4(four[0], four[1], four[2], four[3]));
    }
  }
}

// How a header of the weights comes: decoded at once, or after its load has been in flight for a step, where registers allow it.
template <class T>
struct Fetched {
  __device__ __forceinline__ void load(const uint4* tile, int lane, typename T::Header& header) { header = T::load_header(tile, lane); }
  __device__ __forceinline__ void finish(typename T::Header&) const {}
};

template <>
struct Fetched<Q4_K> {
  uint4 bytes;
  __device__ __forceinline__ void load(const uint4* tile, int, Q4_K::Header&) { bytes = __ldg(tile); }
  __device__ __forceinline__ void finish(Q4_K::Header& header) const { header = decode_k_header(bytes); }
};

// What a thread has in flight, in registers that both roles share.
struct InFlight {
  uint4 words[5];
  template <class V>
  __device__ __forceinline__ void put(const V& v) {
    static_assert(sizeof(V) <= sizeof(words), "registers of either role");
    memcpy(words, &v, sizeof(V));
  }
  template <class V>
  __device__ __forceinline__ V get() const {
    V v;
    memcpy(&v, words, sizeof(V));
    return v;
  }
};

template <class T, class S>
__device__ __forceinline__ void multiply_tile(const Arguments& a, Buffer<T, S> (&buffers)[2], float4* own, float* partials,
                                              int first_row, int first_output) {
  const Thread me;
  const bool unpacks = S::SIDES == 1 || me.side == 0, fetches = S::SIDES == 1 || me.side == 1;
  const int lane = threadIdx.x % WARP, groups = (a.rows + WARP - 1) / WARP;
  const int group = min(first_row / WARP + static_cast<int>(threadIdx.x) % SIDE / WARP, groups - 1);
  const uint4* tiles = a.weights + unit_of<T>(group, 0, a.n_steps) + lane;
  const Place<S> place;
  const int output = first_output + place.output;
  const size_t first_block = static_cast<size_t>(output) * a.n_tiles * 8;
  const Source row = {place.output >= 0 && output < a.n ? a.x + 2 * first_block : nullptr, a.x_scales + first_block};
  float acc[8][S::OUT];
  clear(acc);

  Walk ahead(a, blockIdx.y); // the step that is loaded
  Ending at(a, ahead);       // of the tile that is multiplied
  const int splits = gridDim.y > 1 ? 1 : a.splits;
  const int n_steps = min(a.n_steps, STEPS * split_begin(a, blockIdx.y + splits)) - STEPS * ahead.tile;
  const uint4* tile = tiles + static_cast<size_t>(ahead.tile) * T::UNITS;
  typename T::Header header;
  if (unpacks) header = T::load_header(tile, lane), store_weights(buffers[0], header, T::load(tile, lane, 0), 0);
  if (fetches) store_columns(buffers[0], place, load_columns<T>(a, place, row, ahead.tile, 0));
  __syncthreads();
  int step = 0; // of `ahead`
  Fetched<T> fetched;
  typename T::Raw raw;
  Columns<S> columns;
  InFlight either;
#pragma unroll 1
  for (int s = 0; s < n_steps; s++) {
    const int next = s + 1;
    step = step + 1 < steps_of<T>(ahead.tile, a.n_steps) ? step + 1 : 0;
    if (next < n_steps) {
      if (step == 0) {
        ahead.advance(a);
        tile = tiles + static_cast<size_t>(ahead.tile) * T::UNITS;
        if (unpacks) fetched.load(tile, lane, header);
      }
      if (S::SIDES == 1) {
        raw = T::load(tile, lane, step), columns = load_columns<T>(a, place, row, ahead.tile, step);
      } else if (unpacks) {
        either.put(T::load(tile, lane, step));
      } else {
        either.put(load_columns<T>(a, place, row, ahead.tile, step));
      }
    }
    multiply_step<T, S>(buffers[s % 2], acc, me);
    if (next < n_steps) {
      if (unpacks && step == 0) fetched.finish(header);
      if (unpacks) store_weights(buffers[next % 2], header, S::SIDES == 1 ? raw : either.get<typename T::Raw>(), step);
      if (fetches) store_columns(buffers[next % 2], place, S::SIDES == 1 ? columns : either.get<Columns<S>>());
    }
    if (step == 0) {
      if (at.ends_slice()) {
        end_slice<S::THREADS>(at, splits, acc, own);
        if (next < n_steps) clear(acc);
      }
      at = Ending(a, ahead);
    }
    __syncthreads();
  }
  write_tile<S>(a, acc, partials, first_row, first_output, me);
}

// The next tile of a persistent CTA: the first that no CTA has taken. A multiprocessor does not serve its CTAs equally, so
// that with as many tiles for each the slower one would end alone. Each tile adds one; the last sets the ticket back.
__device__ __forceinline__ int next_tile(const Arguments& a, int tiles) {
  __shared__ int next;
  if (threadIdx.x == 0) {
    const int taken = static_cast<int>(atomicAdd(a.tickets, 1u));
    if (taken == tiles - 1) *a.tickets = 0;
    next = gridDim.x + taken;
  }
  __syncthreads();
  return next;
}

// Grid: persistent CTAs, columns varying fastest, so that a weight tile stays in L2 for all columns; or, with splits as
// grid.y, a CTA for each tile and split.
template <class T, class S>
__device__ __forceinline__ void multiply(const Arguments& a) {
  __shared__ Buffer<T, S> buffers[2];
  const bool apart = gridDim.y > 1;
  const int column_tiles = (a.n + S::OUTPUTS - 1) / S::OUTPUTS, row_tiles = (a.rows + ROWS - 1) / ROWS;
  const size_t of_cta = static_cast<size_t>(ROWS) * S::OUTPUTS * (a.splits > 1 && !apart ? 2 : 1);
  float* of_this = a.partials + (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * of_cta;
  float4* own = reinterpret_cast<float4*>(of_this) + threadIdx.x;
  float* partials = apart ? a.partials + static_cast<size_t>(gridDim.y) * gridDim.x * of_cta : nullptr;
#pragma unroll 1
  for (int i = blockIdx.x; i < column_tiles * row_tiles; i = next_tile(a, column_tiles * row_tiles)) {
    const int row_tile = i / column_tiles;
    multiply_tile<T, S>(a, buffers, own, partials, row_tile * ROWS, i % column_tiles * S::OUTPUTS);
    if (!apart) continue;
    if (comes_last(a.tickets + row_tile * (ROWS / WARP), gridDim.y * column_tiles))
      add_splits<ROWS>(a, partials, row_tile * ROWS);
    return;
  }
}

#define KERNEL(OUTPUTS, SECOND, SIDES, CTAS_PER_SM)                                                                     \
  extern "C" __global__ void __launch_bounds__(SIDE* SIDES, CTAS_PER_SM) NAME(TYPE, BITS, OUTPUTS)(Arguments a) {        \
    multiply<TYPE, Shape<SECOND, SIDES>>(a);                                                                            \
  }
#define NAME_(T, BITS, OUTPUTS) tile_matmul_##T##_##BITS##bit_n##OUTPUTS
#define NAME(T, BITS, OUTPUTS) NAME_(T, BITS, OUTPUTS)

// Outputs, sides and CTAs also stand in ops/matmul.py.
constexpr int NARROW_CTAS = __CUDA_ARCH__ >= 610 ? 3 : 2; // sm_60 spreads bytes for 16-bit products: more registers
KERNEL(32, 0, 1, NARROW_CTAS)
KERNEL(40, 1, 1, 2)
KERNEL(48, 2, 1, 2)
KERNEL(56, 3, 1, 2)
KERNEL(64, 4, 1, 2)
#if BITS == 8
KERNEL(128, 4, 2, 1)
#endif
