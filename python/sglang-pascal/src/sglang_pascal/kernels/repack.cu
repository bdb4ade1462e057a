// File layout <-> device layout of quantised weights, and rows back to floating point.
//
// Compiled once per weight type (-DTYPE=Q4_K ...). Layouts: weights.cuh.
//   repack     one thread moves one 16-byte unit of the device layout: it gathers the bytes from the row's blocks.
//   unrepack   one thread writes one byte of the file layout: for tests, and to save what was loaded.
//   dequantize one warp computes 256 columns of one row: embedding lookups, and float copies of a tensor.
// All are bound by memory bandwidth and run once per tensor or on a few rows; 256 threads, no shared memory.
#include "weights.cuh"

// Where byte `i` of a row in plane `plane` comes from: its offset in the record's file bytes of the row; `flip` is xored
// into it. The tail counts as one plane more.
struct Source {
  int offset;
  u32 flip;
};

template <class T>
struct File;

template <>
struct File<Q4_K> {
  static constexpr int ROW_BYTES = 144;
  static __device__ Source byte(int plane, int i) { return {16 * plane + i, 0}; }
};

template <>
struct File<Q5_K> {
  static constexpr int ROW_BYTES = 176;
  static __device__ Source byte(int plane, int i) { return {16 * plane + i, 0}; }
};

template <>
struct File<Q6_K> {
  static constexpr int ROW_BYTES = 210;
  static __device__ Source byte(int plane, int i) { return {16 * plane + i, plane >= 8 && plane < 12 ? 0xaau : 0u}; }
};

template <>
struct File<Q8_0> {
  static constexpr int ROW_BYTES = 68;
  static __device__ Source byte(int plane, int i) {
    if (plane == 4) return {(i >> 1) * 34 + (i & 1), 0};
    return {(plane >> 1) * 34 + 2 + 16 * (plane & 1) + i, 0};
  }
};

template <>
struct File<Q4_0> {
  static constexpr int ROW_BYTES = 36;
  static __device__ Source byte(int plane, int i) {
    if (plane == 2) return {(i >> 1) * 18 + (i & 1), 0};
    return {plane * 18 + 2 + i, 0x88};
  }
};

template <>
struct File<Q4_1> {
  static constexpr int ROW_BYTES = 40;
  static __device__ Source byte(int plane, int i) {
    if (plane == 2) return {((i >> 1) & 1) * 20 + 2 * (i >> 2) + (i & 1), 0};
    return {plane * 20 + 4 + i, 0};
  }
};

// A record. Its units are of 16 bytes; those of the tails hold several rows each.
template <class T>
struct Record {
  static constexpr int UNITS = T::SHORT_TILES ? T::UNITS / STEPS : T::UNITS;
  static constexpr int PLANES = UNITS / WARP, TAIL_BYTES = UNITS % WARP * 16 / WARP;
  static constexpr int ROW_BYTES = File<T>::ROW_BYTES;
  static_assert(PLANES * 16 + TAIL_BYTES == ROW_BYTES, "repacking keeps the number of bytes");
};

struct Place {
  int row, offset; // in the tensor's file bytes
  u32 flip;
};

// Where byte `i` of a unit of the device layout belongs in the file; outside of the tensor where row or offset are.
template <class T>
__device__ __forceinline__ Place place_of(u64 unit, int i, int n_records) {
  const u64 record = unit / Record<T>::UNITS;
  const int within = static_cast<int>(unit % Record<T>::UNITS);
  const int group = static_cast<int>(record / n_records), in_row = static_cast<int>(record % n_records);
  const bool is_tail = within >= Record<T>::PLANES * WARP;
  const int tail_byte = (within - Record<T>::PLANES * WARP) * 16 + i;
  constexpr int TAIL = Record<T>::TAIL_BYTES ? Record<T>::TAIL_BYTES : 1; // never 0, for the sake of the division
  const Source source = File<T>::byte(within / WARP, is_tail ? tail_byte % TAIL : i);
  return {group * WARP + (is_tail ? tail_byte / TAIL : within % WARP), in_row * Record<T>::ROW_BYTES + source.offset,
          source.flip};
}

// out: units of all records. in: rows of row_bytes each. What lies outside of the tensor becomes zero bytes, which
// dequantise to zero weights in every type (flipped bytes included: their scale is zero).
template <class T>
__device__ __forceinline__ void repack(const u8* in, u8* out, int rows, int row_bytes, int n_records, u64 n_units) {
  const u64 unit = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= n_units) return;
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const Place from = place_of<T>(unit, i, n_records);
    if (from.row < rows && from.offset < row_bytes)
      words[i / 4] |= (__ldg(in + static_cast<size_t>(from.row) * row_bytes + from.offset) ^ from.flip) << (8 * (i % 4));
  }
  reinterpret_cast<uint4*>(out)[unit] = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
__device__ __forceinline__ void unrepack(const u8* in, u8* out, int rows, int row_bytes, int n_records, u64 n_units) {
  const u64 unit = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= n_units) return;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const Place to = place_of<T>(unit, i, n_records);
    if (to.row < rows && to.offset < row_bytes)
      out[static_cast<size_t>(to.row) * row_bytes + to.offset] = static_cast<u8>(__ldg(in + unit * 16 + i) ^ to.flip);
  }
}

// out[i, :] = row ids[i] of the tensor (row i when ids is null). A row that is out of range becomes NaN.
// Grid: (rows of out, ceil(tiles / 8)); a warp per tile. A lane computes one weight of each block.
template <class T>
__device__ __forceinline__ void dequantize(const uint4* weights, const void* ids, int ids_are_64_bit, void* out,
                                           int out_is_half, int rows, int n_steps, int columns) {
  const int tile_index = blockIdx.y * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (tile_index * STEPS >= n_steps) return;
  const long long row = ids ? load_index(ids, blockIdx.x, ids_are_64_bit) : static_cast<long long>(blockIdx.x);
  const bool valid = row >= 0 && row < rows;
  const int r = valid ? static_cast<int>(row % WARP) : 0;
  const int group = valid ? static_cast<int>(row / WARP) : 0;
  const uint4* tile = weights + unit_of<T>(group, tile_index, n_steps) + r;
  typename T::Header header = T::load_header(tile, r);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    if (step >= steps_of<T>(tile_index, n_steps)) break;
    Step w;
    T::unpack(header, T::load(tile, r, step), step, w);
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
    NAME(repack, TYPE)(const u8* in, u8* out, int rows, int row_bytes, int n_records, u64 n_units) {
  repack<TYPE>(in, out, rows, row_bytes, n_records, n_units);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(unrepack, TYPE)(const u8* in, u8* out, int rows, int row_bytes, int n_records, u64 n_units) {
  unrepack<TYPE>(in, out, rows, row_bytes, n_records, n_units);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(dequantize, TYPE)(const uint4* weights, const void* ids, void* out, int ids_are_64_bit, int out_is_half,
                           int rows, int n_steps, int columns) {
  dequantize<TYPE>(weights, ids, ids_are_64_bit, out, out_is_half, rows, n_steps, columns);
}
