/* Types and constants that simam_cpu.c, kernel.inc and half.h share. */

#ifndef SIMAM_TYPES_H
#define SIMAM_TYPES_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER)
#define INLINE __forceinline
#define SIMD(clauses) __pragma(omp simd clauses)
#define UNROLL
#define PREFETCH(address, to_write) ((void)(address))
#else
#define INLINE inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define SIMD(clauses) PRAGMA(omp simd clauses)
#define UNROLL PRAGMA(GCC unroll 8)
#define PREFETCH(address, to_write) \
    ((to_write) ? __builtin_prefetch(address, 1, 2) : __builtin_prefetch(address, 0, 2))
#endif

enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 };

/* A block is a group of channels, and a tile is a block by a range of positions. Sums over a tile
   have the type REAL of kernel.inc; sums over the tiles of a block are double. A contiguous tile
   is contiguous in memory: it holds several short channels, or positions of a single channel. */
enum {
    BLOCK_CHANNELS = 64,  /* the most channels of a block */
    SHORT_CHANNEL = 1024, /* contiguous channels of at most this many positions share a block */
    TILE_ELEMENTS = 4096, /* the most elements of a contiguous tile */
    TILE_POSITIONS = 256  /* the most positions of a channels-last tile */
};

/* A contiguous tile is processed in pieces of at most PIECE elements, and each piece prefetches
   the same piece of the next tile. A channels-last tile prefetches LINES_AHEAD lines ahead. */
enum { LINES_AHEAD = 16 };

/* The most lanes of a vector; see kernel.inc. */
enum { MAX_LANES = 16 };
#define FOR_MAX_LANES(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x

/* A forward or backward pass over a tensor of N samples, C channels and M positions. In the
   contiguous layout the positions of a channel are adjacent in memory, and all N * C channels
   count as channels of one sample. In the channels-last layout the channels of a position are
   adjacent. */
typedef struct {
    const void *x;
    const void *dy; /* the gradient with respect to the output; NULL in the forward pass */
    void *out;      /* the output or, in the backward pass, dx; both in the layout of x */
    int64_t samples, channels, positions;
    double e_lambda;
    int dtype, channels_last, leave_one_out;

    int64_t block_channels, tile_positions;
    int64_t blocks_per_sample, blocks, tiles_per_block;
} Job;

/* Lines of adjacent elements: element i of line j has the index start + j * stride + i in x. A
   line holds positions of one channel in the contiguous layout, and channels of one position in
   the channels-last layout. */
typedef struct {
    int64_t start, stride, lines, length;
    int64_t channels, first_position, positions;
} Tile;

/* Moments of the channels, over one tile or over all tiles of a block so far. sum_sq is the sum of
   the squared deviations from the mean. The mean is mean_hi + mean_lo: mean_lo keeps the digits
   that mean_hi rounds away. */
typedef struct {
    double mean_hi[BLOCK_CHANNELS], mean_lo[BLOCK_CHANNELS], sum_sq[BLOCK_CHANNELS];
} Moments;

/* Sums of v_d and v_s over the positions of each channel; see kernel.inc. */
typedef struct {
    double sum_d[BLOCK_CHANNELS], sum_s[BLOCK_CHANNELS];
} Sums;

#endif
