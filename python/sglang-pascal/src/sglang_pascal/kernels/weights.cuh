// The repacked weight layouts, and how 64 weights of a row become bytes and scales.
//
// A tensor is cut into groups of 32 rows, a group into records: 256 columns of the types whose blocks have 256 weights, 64
// of those whose blocks have 32. A record is a sequence of planes of 32 x 16 bytes, row r's 16 bytes at index r: lane r of
// a warp loads row r of a plane, and the warp one contiguous 512 bytes. Behind the planes are the rows' tails, row after
// row. Groups follow each other, and records within a group.
//
//   type  columns  planes (each 512 bytes)                                       tail    bytes per row and record
//   Q4_K  256      header (d, dmin, 12 scale bytes); 8 of nibbles                        144
//   Q5_K  256      header; 2 of fifth bits; 8 of nibbles                                 176
//   Q6_K  256      8 of low nibbles; 4 of upper bits, stored xor 0xaa; scales    d       210
//   Q8_0  64       4 of int8                                                     2 d     68
//   Q4_0  64       2 of nibbles, stored xor 0x88                                 2 d     36
//   Q4_1  64       2 of nibbles                                                  2 d, 2 m   40
//
// A tile is 256 columns: one record or four. The last tile of a row may have fewer (SHORT_TILES), so that rows of any
// multiple of 64 columns take no more bytes than in the file.
//
// The two xors turn an offset-binary number into two's complement whose top bits come first, so that 4 * (q - 32) and
// 16 * (q - 8) are read as signed bytes and the factor goes into the scale: no subtraction, no sum of activations.
// Unsigned high nibbles are used in place (16 * q) for the same reason. Largest magnitude of a sum over 32 products:
// 32 * 240 * 127 < 2^20, which fp32 holds exactly.
//
// A step is 64 weights of a row: two blocks of 32, which have columns 32 * block(step, 0) and 32 * block(step, 1).
#pragma once
#include "common.cuh"

struct Step {
  u32 bytes[2][8];   // [block][word]: four weights each
  float scale[2][2]; // [block][half]; both halves equal unless HALF_SCALES
  float min[2];      // subtracted times the activations' sum; only with HAS_MIN
};

constexpr int STEPS = 4; // per tile

// Of a row's steps (columns / 64, rounded up), those that its tile `tile` has.
template <class T>
__device__ __forceinline__ int steps_of(int tile, int n_steps) {
  return T::SHORT_TILES ? min(STEPS, n_steps - STEPS * tile) : STEPS;
}

// Where group `group`, tile `tile` begins; UNITS are those of a whole tile.
template <class T>
__device__ __forceinline__ size_t unit_of(int group, int tile, int n_steps) {
  return static_cast<size_t>(group) * n_steps * (T::UNITS / STEPS) + static_cast<size_t>(tile) * T::UNITS;
}

__device__ __forceinline__ u32 byte_of(u32 word, int i) { return (word >> (8 * i)) & 0xff; }

__device__ __forceinline__ void spread(const uint4& v, u32* words) {
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// 6-bit scales and mins of Q4_K and Q5_K, as bytes: sub-blocks 0..3 and 4..7.
struct KHeader {
  float d, dmin;
  u32 scales[2], mins[2];
};

__device__ __forceinline__ KHeader decode_k_header(const uint4& h) {
  KHeader header;
  halves_to_floats(h.x, header.d, header.dmin);
  header.scales[0] = h.y & 0x3f3f3f3fu;
  header.mins[0] = h.z & 0x3f3f3f3fu;
  header.scales[1] = (h.w & 0x0f0f0f0fu) | ((h.y >> 2) & 0x30303030u);
  header.mins[1] = ((h.w >> 4) & 0x0f0f0f0fu) | ((h.z >> 2) & 0x30303030u);
  return header;
}

__device__ __forceinline__ void k_scales(const KHeader& header, int step, float high_factor, Step& out) {
  const u32 scales = step < 2 ? header.scales[0] : header.scales[1];
  const u32 mins = step < 2 ? header.mins[0] : header.mins[1];
  const int i = 2 * (step & 1);
#pragma unroll
  for (int b = 0; b < 2; b++) {
    const float d = b ? __fmul_rn(header.d, high_factor) : header.d;
    out.scale[b][0] = out.scale[b][1] = __fmul_rn(d, static_cast<float>(byte_of(scales, i + b)));
    out.min[b] = __fmul_rn(header.dmin, static_cast<float>(byte_of(mins, i + b)));
  }
}

struct Q4_K {
  static constexpr int UNITS = 288, MOST_ROWS = 4;
  static constexpr bool SIGNED = false, HAS_MIN = true, HALF_SCALES = false, SHORT_TILES = false;
  typedef KHeader Header;
  struct Raw {
    uint4 low, high;
  };
  static __device__ __forceinline__ int block(int step, int b) { return 2 * step + b; }
  static __device__ __forceinline__ Header load_header(const uint4* tile, int) { return decode_k_header(__ldg(tile)); }
  static __device__ __forceinline__ Raw load(const uint4* tile, int, int step) {
    return {__ldg(tile + WARP * (1 + 2 * step)), __ldg(tile + WARP * (2 + 2 * step))};
  }
  static __device__ __forceinline__ void unpack(const Header& header, const Raw& raw, int step, Step& out) {
    u32 words[8];
    spread(raw.low, words), spread(raw.high, words + 4);
#pragma unroll
    for (int k = 0; k < 8; k++) out.bytes[0][k] = words[k] & 0x0f0f0f0fu, out.bytes[1][k] = words[k] & 0xf0f0f0f0u;
    k_scales(header, step, 0.0625f, out);
  }
};

struct Q5_K {
  static constexpr int UNITS = 352, MOST_ROWS = 3; // a lane's rows in a decode product, by its registers
  static constexpr bool SIGNED = false, HAS_MIN = true, HALF_SCALES = false, SHORT_TILES = false;
  struct Header {
    KHeader scales;
    uint4 fifth[2];
  };
  struct Raw {
    uint4 low, high;
  };
  static __device__ __forceinline__ int block(int step, int b) { return 2 * step + b; }
  static __device__ __forceinline__ Header load_header(const uint4* tile, int) {
    return {decode_k_header(__ldg(tile)), {__ldg(tile + WARP), __ldg(tile + 2 * WARP)}};
  }
  static __device__ __forceinline__ Raw load(const uint4* tile, int, int step) {
    return {__ldg(tile + WARP * (3 + 2 * step)), __ldg(tile + WARP * (4 + 2 * step))};
  }
  // Bit `bit` of each byte moved to bit 4.
  static __device__ __forceinline__ u32 fifth_bit(u32 bits, int bit) {
    return (bit < 4 ? bits << (4 - bit) : bits >> (bit - 4)) & 0x10101010u;
  }
  static __device__ __forceinline__ void unpack(const Header& header, const Raw& raw, int step, Step& out) {
    u32 words[8], bits[8];
    spread(raw.low, words), spread(raw.high, words + 4);
    spread(header.fifth[0], bits), spread(header.fifth[1], bits + 4);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      out.bytes[0][k] = (words[k] & 0x0f0f0f0fu) | fifth_bit(bits[k], 2 * step);
      out.bytes[1][k] = ((words[k] >> 4) & 0x0f0f0f0fu) | fifth_bit(bits[k], 2 * step + 1);
    }
    k_scales(header.scales, step, 1.0f, out);
  }
};

struct Q6_K {
  static constexpr int UNITS = 420, MOST_ROWS = 4;
  static constexpr bool SIGNED = true, HAS_MIN = false, HALF_SCALES = true, SHORT_TILES = false;
  struct Header {
    float d;
    uint4 scales;
  };
  struct Raw {
    uint4 low[2], upper[2];
  };
  // Steps 0, 1 are the first 128 weights: quarters 0 and 2, then 1 and 3, which share their bytes of low nibbles.
  static __device__ __forceinline__ int block(int step, int b) { return 4 * (step >> 1) + (step & 1) + 2 * b; }
  static __device__ __forceinline__ Header load_header(const uint4* tile, int row) {
    // `tile` is the row's unit of plane 0; its d is 2 * row bytes behind the last plane.
    const u16* d = reinterpret_cast<const u16*>(tile - row + 13 * WARP) + row;
    Header header;
    header.d = __fmul_rn(half_to_float(__ldg(d)), 0.25f);
    header.scales = __ldg(tile + 12 * WARP);
    return header;
  }
  static __device__ __forceinline__ Raw load(const uint4* tile, int, int step) {
    const uint4* upper = tile + WARP * (8 + 2 * (step >> 1));
    return {{__ldg(tile + WARP * 2 * step), __ldg(tile + WARP * (2 * step + 1))}, {__ldg(upper), __ldg(upper + WARP)}};
  }
  static __device__ __forceinline__ void unpack(const Header& header, const Raw& raw, int step, Step& out) {
    u32 low[8], upper[8];
    spread(raw.low[0], low), spread(raw.low[1], low + 4), spread(raw.upper[0], upper), spread(raw.upper[1], upper + 4);
    const int quarter = step & 1;
#pragma unroll
    for (int k = 0; k < 8; k++) {
      out.bytes[0][k] = ((low[k] << 2) & 0x3c3c3c3cu) | ((upper[k] << (6 - 2 * quarter)) & 0xc0c0c0c0u);
      out.bytes[1][k] = ((low[k] >> 2) & 0x3c3c3c3cu) | ((upper[k] << (2 - 2 * quarter)) & 0xc0c0c0c0u);
    }
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int pair = block(step, b); // two int8 scales
      const u32 word = word_of(header.scales, pair >> 1);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const signed char scale = static_cast<signed char>(byte_of(word, 2 * (pair & 1) + h));
        out.scale[b][h] = __fmul_rn(header.d, static_cast<float>(scale));
      }
    }
  }
};

// What the types with blocks of 32 share: all of a record is loaded with its step.
struct NoHeader {};

// The row's tail of step `step`; `tile` is the row's unit of plane 0.
template <class T, class Tail>
__device__ __forceinline__ Tail load_tail(const uint4* tile, int row, int step, int planes) {
  return __ldg(reinterpret_cast<const Tail*>(tile - row + step * (T::UNITS / STEPS) + planes * WARP) + row);
}

struct Q8_0 {
  static constexpr int UNITS = 544, MOST_ROWS = 4;
  static constexpr bool SIGNED = true, HAS_MIN = false, HALF_SCALES = false, SHORT_TILES = true;
  typedef NoHeader Header;
  struct Raw {
    uint4 v[4];
    u32 d;
  };
  static __device__ __forceinline__ int block(int step, int b) { return 2 * step + b; }
  static __device__ __forceinline__ Header load_header(const uint4*, int) { return {}; }
  static __device__ __forceinline__ Raw load(const uint4* tile, int row, int step) {
    const uint4* p = tile + step * (UNITS / STEPS);
    return {{__ldg(p), __ldg(p + WARP), __ldg(p + 2 * WARP), __ldg(p + 3 * WARP)},
            load_tail<Q8_0, u32>(tile, row, step, 4)};
  }
  static __device__ __forceinline__ void unpack(const Header&, const Raw& raw, int, Step& out) {
    float d[2];
    halves_to_floats(raw.d, d[0], d[1]);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      spread(raw.v[2 * b], out.bytes[b]), spread(raw.v[2 * b + 1], out.bytes[b] + 4);
      out.scale[b][0] = out.scale[b][1] = d[b];
    }
  }
};

struct Q4_0 {
  static constexpr int UNITS = 288, MOST_ROWS = 4;
  static constexpr bool SIGNED = true, HAS_MIN = false, HALF_SCALES = false, SHORT_TILES = true;
  typedef NoHeader Header;
  struct Raw {
    uint4 v[2];
    u32 d;
  };
  static __device__ __forceinline__ int block(int step, int b) { return 2 * step + b; }
  static __device__ __forceinline__ Header load_header(const uint4*, int) { return {}; }
  static __device__ __forceinline__ Raw load(const uint4* tile, int row, int step) {
    const uint4* p = tile + step * (UNITS / STEPS);
    return {{__ldg(p), __ldg(p + WARP)}, load_tail<Q4_0, u32>(tile, row, step, 2)};
  }
  static __device__ __forceinline__ void unpack(const Header&, const Raw& raw, int, Step& out) {
    float d[2];
    halves_to_floats(raw.d, d[0], d[1]);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      u32 words[4];
      spread(raw.v[b], words);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        out.bytes[b][k] = (words[k] << 4) & 0xf0f0f0f0u;
        out.bytes[b][4 + k] = words[k] & 0xf0f0f0f0u;
      }
      out.scale[b][0] = out.scale[b][1] = __fmul_rn(d[b], 0.0625f);
    }
  }
};

struct Q4_1 {
  static constexpr int UNITS = 320, MOST_ROWS = 4;
  static constexpr bool SIGNED = false, HAS_MIN = true, HALF_SCALES = false, SHORT_TILES = true;
  typedef NoHeader Header;
  struct Raw {
    uint4 v[2];
    uint2 d_m;
  };
  static __device__ __forceinline__ int block(int step, int b) { return 2 * step + b; }
  static __device__ __forceinline__ Header load_header(const uint4*, int) { return {}; }
  static __device__ __forceinline__ Raw load(const uint4* tile, int row, int step) {
    const uint4* p = tile + step * (UNITS / STEPS);
    return {{__ldg(p), __ldg(p + WARP)}, load_tail<Q4_1, uint2>(tile, row, step, 2)};
  }
  static __device__ __forceinline__ void unpack(const Header&, const Raw& raw, int, Step& out) {
    float d[2], m[2];
    halves_to_floats(raw.d_m.x, d[0], d[1]), halves_to_floats(raw.d_m.y, m[0], m[1]);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      u32 words[4];
      spread(raw.v[b], words);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        out.bytes[b][k] = words[k] & 0x0f0f0f0fu;
        out.bytes[b][4 + k] = (words[k] >> 4) & 0x0f0f0f0fu;
      }
      out.scale[b][0] = out.scale[b][1] = d[b];
      out.min[b] = -m[b];
    }
  }
};
