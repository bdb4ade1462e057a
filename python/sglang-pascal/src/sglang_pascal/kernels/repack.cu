// File layout <-> device layout of quantised weights, and rows back to floating point.
//
// Compiled once per weight type (-DTYPE=Q4_K ...). Layouts: weights.cuh.
//   repack     one thread moves one 16-byte unit of the device layout: it gathers the bytes from the row's blocks.
//   unrepack   one thread writes one byte of the file layout: for tests, and to save what was loaded.
//   dequantize one warp computes 256 columns of one row: embedding lookups, and float copies of a tensor.
// All are bound by memory bandwidth and run once per tensor or on a few rows; 256 threads, no shared memory.
#include "weights.cuh"

// Where byte `i` of unit `plane` comes from: its offset in the row's 256 columns of file bytes; `flip` is xored into it.
struct Source {
  int offset;
  u32 flip;
};

template <class T>
struct File;

template <>
struct File<Q4_K> {
  static constexpr int BLOCK_BYTES = 144, BLOCKS = 1;
  static __device__ Source byte(int plane, int i) { return {16 * plane + i, 0}; }
};

template <>
struct File<Q5_K> {
  static constexpr int BLOCK_BYTES = 176, BLOCKS = 1;
  static __device__ Source byte(int plane, int i) { return {16 * plane + i, 0}; }
};

template <>
struct File<Q6_K> {
  static constexpr int BLOCK_BYTES = 210, BLOCKS = 1;
  static __device__ Source byte(int plane, int i) { return {16 * plane + i, plane >= 8 && plane < 12 ? 0xaau : 0u}; }
};

template <>
struct File<Q8_0> {
  static constexpr int BLOCK_BYTES = 34, BLOCKS = 8;
  static __device__ Source byte(int plane, int i) {
    if (plane == 16) return {(i >> 1) * 34 + (i & 1), 0};
    return {(plane >> 1) * 34 + 2 + 16 * (plane & 1) + i, 0};
  }
};

template <>
struct File<Q4_0> {
  static constexpr int BLOCK_BYTES = 18, BLOCKS = 8;
  static __device__ Source byte(int plane, int i) {
    if (plane == 8) return {(i >> 1) * 18 + (i & 1), 0};
    return {plane * 18 + 2 + i, 0x88};
  }
};

template <>
struct File<Q4_1> {
  static constexpr int BLOCK_BYTES = 20, BLOCKS = 8;
  static __device__ Source byte(int plane, int i) {
    if (plane >= 8) return {(i >> 1) * 20 + 2 * (plane - 8) + (i & 1), 0};
    return {plane * 20 + 4 + i, 0};
  }
};

template <class T>
struct Layout {
  static constexpr int PLANES = T::UNITS / WARP;                     // whole planes
  static constexpr int TAIL_BYTES = (T::UNITS % WARP) * 16 / WARP;   // per row, behind the planes: Q6_K's d
  static constexpr int ROW_BYTES = File<T>::BLOCK_BYTES * File<T>::BLOCKS; // of 256 columns in the file
  static_assert(PLANES * 16 + TAIL_BYTES == ROW_BYTES, "repacking keeps the number of bytes");
};

// out: groups * n_tiles * UNITS units. in: rows of row_bytes each. What lies outside of the tensor becomes zero bytes,
// which dequantise to zero weights in every type (flipped bytes included: their scale is zero).
template <class T>
__device__ __forceinline__ void repack(const u8* in, u8* out, int rows, int row_bytes, int n_tiles, u64 n_units) {
  const u64 unit = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= n_units) return;
  const u64 tile = unit / T::UNITS;
  const int within = static_cast<int>(unit % T::UNITS);
  const int group = static_cast<int>(tile / n_tiles), column = static_cast<int>(tile % n_tiles) * Layout<T>::ROW_BYTES;
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const bool tail = within >= Layout<T>::PLANES * WARP;
    const int tail_byte = (within - Layout<T>::PLANES * WARP) * 16 + i;
    const int row = group * WARP + (tail ? tail_byte / 2 : within % WARP);
    const Source from = tail ? Source{Layout<T>::PLANES * 16 + (tail_byte & 1), 0} : File<T>::byte(within / WARP, i);
    const int offset = column + from.offset;
    if (row < rows && offset < row_bytes)
      words[i / 4] |= (__ldg(in + static_cast<size_t>(row) * row_bytes + offset) ^ from.flip) << (8 * (i % 4));
  }
  reinterpret_cast<uint4*>(out)[unit] = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
__device__ __forceinline__ void unrepack(const u8* in, u8* out, int rows, int row_bytes, int n_tiles, u64 n_units) {
  const u64 unit = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= n_units) return;
  const u64 tile = unit / T::UNITS;
  const int within = static_cast<int>(unit % T::UNITS);
  const int group = static_cast<int>(tile / n_tiles), column = static_cast<int>(tile % n_tiles) * Layout<T>::ROW_BYTES;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const bool tail = within >= Layout<T>::PLANES * WARP;
    const int tail_byte = (within - Layout<T>::PLANES * WARP) * 16 + i;
    const int row = group * WARP + (tail ? tail_byte / 2 : within % WARP);
    const Source to = tail ? Source{Layout<T>::PLANES * 16 + (tail_byte & 1), 0} : File<T>::byte(within / WARP, i);
    const int offset = column + to.offset;
    if (row < rows && offset < row_bytes)
      out[static_cast<size_t>(row) * row_bytes + offset] = static_cast<u8>(__ldg(in + unit * 16 + i) ^ to.flip);
  }
}

// out[i, :] = row ids[i] of the tensor (row i when ids is null). A row that is out of range becomes NaN.
// Grid: (rows of out, ceil(n_tiles / 8)); a warp per tile. A lane computes one weight of each block.
template <class T>
__device__ __forceinline__ void dequantize(const uint4* weights, const void* ids, int ids_are_64_bit, void* out,
                                           int out_is_half, int rows, int n_tiles, int columns) {
  const int tile_index = blockIdx.y * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (tile_index >= n_tiles) return;
  const long long row = ids ? load_index(ids, blockIdx.x, ids_are_64_bit) : static_cast<long long>(blockIdx.x);
  const bool valid = row >= 0 && row < rows;
  const int r = valid ? static_cast<int>(row % WARP) : 0;
  const u64 group = valid ? static_cast<u64>(row) / WARP : 0;
  const uint4* tile = weights + (group * n_tiles + tile_index) * T::UNITS + r;
  typename T::Header header = T::load_header(tile, r);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    Step w;
    T::unpack(header, T::load(tile, step), step, w);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      u32 word = 0; // the lane's weight is byte lane % 4 of word lane / 4
#pragma unroll
      for (int k = 0; k < 8; k++) {
        u32 candidate = w.bytes[b][k];
        asm("" : "+r"(candidate)); // or the compiler indexes the array, which puts it into local memory
        word = lane / 4 == k ? candidate : word;
      }
      const u32 byte = (word >> (8 * (lane % 4))) & 0xff;
      const float q = T::SIGNED ? static_cast<float>(static_cast<signed char>(byte)) : static_cast<float>(byte);
      const float value = __fmul_rn(lane < 16 ? w.scale[b][0] : w.scale[b][1], q);
      const int column = tile_index * SUPERBLOCK + T::block(step, b) * BLOCK + lane;
      if (column < columns)
        store_element(out, static_cast<size_t>(blockIdx.x) * columns + column, out_is_half,
                      !valid ? __uint_as_float(0x7fffffffu) : T::HAS_MIN ? __fsub_rn(value, w.min[b]) : value);
    }
  }
}

#define NAME_(P, T) P##_##T
#define NAME(P, T) NAME_(P, T)

extern "C" __global__ void __launch_bounds__(256)
    NAME(repack, TYPE)(const u8* in, u8* out, int rows, int row_bytes, int n_tiles, u64 n_units) {
  repack<TYPE>(in, out, rows, row_bytes, n_tiles, n_units);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(unrepack, TYPE)(const u8* in, u8* out, int rows, int row_bytes, int n_tiles, u64 n_units) {
  unrepack<TYPE>(in, out, rows, row_bytes, n_tiles, n_units);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(dequantize, TYPE)(const uint4* weights, const void* ids, void* out, int ids_are_64_bit, int out_is_half,
                           int rows, int n_tiles, int columns) {
  dequantize<TYPE>(weights, ids, ids_are_64_bit, out, out_is_half, rows, n_tiles, columns);
}
