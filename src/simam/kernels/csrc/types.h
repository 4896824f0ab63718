/* What cpu.c and both inclusions of kernel.inc share. */

#ifndef SIMAM_CPU_H
#define SIMAM_CPU_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER)
#define INLINE __forceinline
#define SIMD(clauses) __pragma(omp simd clauses)
#define PREFETCH(address, to_write) ((void)(address))
#else
#define INLINE inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define SIMD(clauses) PRAGMA(omp simd clauses)
#define PREFETCH(address, to_write) __builtin_prefetch(address, to_write, 2)
#endif

enum { SHARED, LEAVE_ONE_OUT };
enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 };

/* A tile is a group of channels that are worked on together, a block the part of it over which
   sums are taken in the precision of the map; sums of blocks are taken in double. A block of rows
   is contiguous: some short channels, or a part of a long one. */
enum { TILE_CHANNELS = 64, SHORT_ROW = 1024, ROW_BLOCK = 4096, STRIP_BLOCK = 256 };

/* How far ahead memory is asked for: pieces of a row, in elements, and lines of strips. */
enum { PIECE = 256, LINES_AHEAD = 16 };

/* N samples of C channels of M positions. In rows, the positions of a channel are neighbours in
   memory; in strips (channels last), the channels of a position are. */
typedef struct {
    const void *x;
    const void *gradient; /* of the output; NULL in the forward pass */
    void *result;         /* output, or gradient of the input, laid out as x */
    int64_t samples, channels, positions;
    double lambda;
    int dtype, strips, statistics;

    int64_t tile_channels, block_positions;
    int64_t tiles_per_sample, tiles, blocks;
} Job;

/* Lines of neighbours in memory: element i of line o is element start + o * stride + i of x. In
   rows a line is a channel, in strips a position. */
typedef struct {
    int64_t start, stride, lines, length;
    int64_t channels, first, positions; /* of the tile; from the first on, so many */
} Block;

/* Of the channels of a block, or of all blocks so far. The mean is centre + shift, which keeps
   the digits that the centre alone rounds away. */
typedef struct {
    double centre[TILE_CHANNELS], shift[TILE_CHANNELS], squares[TILE_CHANNELS];
} Moments;

/* Sums over the positions of each channel; see kernel.inc. */
typedef struct {
    double of_deviation[TILE_CHANNELS], of_total[TILE_CHANNELS];
} Sums;

#endif
