/* SimAM on the CPU: the tiles, the threads and the exported functions. The arithmetic is in
   kernel.inc, and stages.inc compiles it for each set of instructions. Plain C without headers of
   torch or Python, so that one build works with every version of both.

   A job runs in stages. The first computes the moments of every channel. In the forward pass the
   second computes the output; in the backward pass the second, backward_reduce, computes the sums
   that the gradient needs, and the third, backward_apply, the gradient. A stage works on one tile
   of a block at a time. Channels that fit the cache are read from memory only once.

   Blocks are independent, so each thread runs all stages on blocks of its own. With fewer blocks
   than threads, each thread works on tiles of its own instead, and the threads synchronize after
   every stage. The results are the same, bit for bit.

   Do not build with -ffast-math: the code relies on NaN and infinity, and the flag would also set
   flush-to-zero for the whole process. */

#include "types.h"
#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { SUCCESS, OUT_OF_MEMORY, PARALLEL_FOR_FAILED };

static INLINE int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Adds the moments of `count` positions to the moments of the channel's previous positions (Chan,
   Golub and LeVeque). mean_hi keeps its first value; mean_lo takes the changes of the mean. */
static INLINE void combine_moments(Moments *m, int64_t c, double previous, double count,
                                   double mean_hi, double mean_lo, double sum_sq)
{
    if (previous == 0) {
        m->mean_hi[c] = mean_hi;
        m->mean_lo[c] = mean_lo;
        m->sum_sq[c] = sum_sq;
        return;
    }
    const double delta = mean_hi - m->mean_hi[c] + (mean_lo - m->mean_lo[c]);
    const double fraction = count / (previous + count);
    m->mean_lo[c] += delta * fraction;
    m->sum_sq[c] += sum_sq + delta * delta * previous * fraction;
}

/* The same, given the sum and the sum of squares of the deviations from mean_hi. */
static INLINE void combine_run(Moments *m, int64_t c, double previous, double count, double mean_hi,
                               double sum, double sum_sq)
{
    const double mean_lo = sum / count;
    combine_moments(m, c, previous, count, mean_hi, mean_lo, sum_sq - sum * mean_lo);
}

static INLINE int64_t element_size(int dtype)
{
    return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2;
}

/* Returns the address of element i, which may be out of bounds. */
static INLINE const void *address(const void *data, int64_t i, int dtype)
{
    return (const void *)((uintptr_t)data + (uintptr_t)(i * element_size(dtype)));
}

/* Prefetches `count` elements from index i. The address may be out of bounds; a prefetch never
   faults. */
static INLINE void prefetch(const void *data, int64_t i, int64_t count, int dtype, int to_write)
{
    const int64_t per_cache_line = 64 / element_size(dtype);
    for (int64_t j = i; j < i + count; j += per_cache_line)
        PREFETCH(address(data, j, dtype), to_write);
}

/* What a contiguous line prefetches: the same line of the next tile. */
typedef struct {
    const void *x, *dy, *out;
} Ahead;

static INLINE Ahead look_ahead(const Job *job, int64_t i)
{
    return (Ahead){address(job->x, i, job->dtype), address(job->dy, i, job->dtype),
                   address(job->out, i, job->dtype)};
}

#define LOG2_E 1.4426950408889634

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)

/* BOOL_SWITCH runs a statement in which CONSTANT is the value of the condition. DISPATCH_DTYPE
   calls the float or double version of a function, with arguments in which DTYPE is the dtype.
   Both names are compile-time constants, so the loops of the functions contain no branches. */
#define BOOL_SWITCH(condition, CONSTANT, statement) \
    do { \
        if (condition) { \
            enum { CONSTANT = 1 }; \
            statement; \
        } else { \
            enum { CONSTANT = 0 }; \
            statement; \
        } \
    } while (0)

#define CASE_DTYPE(constant, call) \
    case constant: { \
        enum { DTYPE = constant }; \
        call; \
        break; \
    }

#define DISPATCH_DTYPE(dtype, function, arguments) \
    switch (dtype) { \
        CASE_DTYPE(FLOAT64, PASTE(function##_double, LEVEL) arguments) \
        CASE_DTYPE(FLOAT32, PASTE(function##_float, LEVEL) arguments) \
        CASE_DTYPE(BFLOAT16, PASTE(function##_float, LEVEL) arguments) \
        CASE_DTYPE(FLOAT16, PASTE(function##_float, LEVEL) arguments) \
    }

/* The functions that run the stages on a tile, for one instruction set. */
typedef struct {
    const char *name;
    void (*compute_moments)(const Job *job, const Tile *tile, Moments *m);
    void (*forward)(const Job *job, const Tile *tile, const Moments *m);
    void (*backward_reduce)(const Job *job, const Tile *tile, const Moments *m, Sums *sums,
                            float *scratch);
    void (*backward_apply)(const Job *job, const Tile *tile, const Moments *m, const Sums *sums,
                           float *scratch);
} Level;

/* The instructions that the compiler was asked for. */
#if defined(FLOAT_LANES) /* for tests */
#elif defined(_MSC_VER)
#define FLOAT_LANES 1 /* no vector types */
#elif defined(__AVX512F__)
#define FLOAT_LANES 16
#elif defined(__AVX2__)
#define FLOAT_LANES 8
#else
#define FLOAT_LANES 4
#endif
#if defined(__F16C__)
#define HAS_F16C
#endif
#define LEVEL compiled
#define LEVEL_NAME "as compiled"
#include "stages.inc"

/* On x86-64 the library also holds the levels above that, and selects one when it runs. With
   SIMAM_ONE_LEVEL it does not, so that each level can be tested. Not on Windows, where GCC does not
   align large vectors on the stack. */
#if defined(__x86_64__) && !defined(_WIN32) && !defined(SIMAM_ONE_LEVEL)
#if !defined(__AVX2__)
#define HAS_V3
#endif
#if !defined(__AVX512F__)
#define HAS_V4
#endif
#endif

#define V3_FEATURES "avx2,bmi2,f16c,fma"
#define V4_FEATURES "avx2,bmi2,f16c,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#if defined(__clang__)
#define BEGIN_TARGET(features) \
    PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#if defined(HAS_V3)
BEGIN_TARGET(V3_FEATURES)
#define FLOAT_LANES 8
#define HAS_F16C
#define LEVEL v3
#define LEVEL_NAME "x86-64-v3"
#include "stages.inc"
END_TARGET
#endif

#if defined(HAS_V4)
BEGIN_TARGET(V4_FEATURES)
#define FLOAT_LANES 16
#define HAS_F16C
#define LEVEL v4
#define LEVEL_NAME "x86-64-v4"
#include "stages.inc"
END_TARGET
#endif

/* Returns the highest level that the library holds and that this processor has. */
static const Level *select_level(void)
{
#if defined(HAS_V4)
    __builtin_cpu_init();
    const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("bmi2");
    const int v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    if (v3 && v4)
        return &level_v4;
#if defined(HAS_V3)
    if (v3)
        return &level_v3;
#endif
#endif
    return &level_compiled;
}

static Tile get_tile(const Job *job, int64_t block, int64_t index)
{
    const int64_t sample = block / job->blocks_per_sample;
    const int64_t channel = block % job->blocks_per_sample * job->block_channels;
    Tile tile;
    tile.channels = min_i64(job->block_channels, job->channels - channel);
    tile.first_position = index * job->tile_positions;
    tile.positions = min_i64(job->tile_positions, job->positions - tile.first_position);
    tile.start = sample * job->channels * job->positions;
    if (job->channels_last) {
        tile.start += tile.first_position * job->channels + channel;
        tile.stride = job->channels;
        tile.lines = tile.positions;
        tile.length = tile.channels;
    } else {
        tile.start += channel * job->positions + tile.first_position;
        tile.stride = job->positions;
        tile.lines = tile.channels;
        tile.length = tile.positions;
    }
    return tile;
}

/* Statistics of the channels, over one tile or over all tiles of a block so far. */
typedef struct {
    Moments moments;
    Sums sums;
} ChannelStats;

typedef enum { MOMENTS, FORWARD, BACKWARD_REDUCE, BACKWARD_APPLY } Stage;

static void run_stage(const Level *level, const Job *job, Stage stage, const Tile *tile,
                      const ChannelStats *block_stats, ChannelStats *tile_stats, float *scratch)
{
    switch (stage) {
    case MOMENTS:
        level->compute_moments(job, tile, &tile_stats->moments);
        break;
    case FORWARD:
        level->forward(job, tile, &block_stats->moments);
        break;
    case BACKWARD_REDUCE:
        level->backward_reduce(job, tile, &block_stats->moments, &tile_stats->sums, scratch);
        break;
    case BACKWARD_APPLY:
        level->backward_apply(job, tile, &block_stats->moments, &block_stats->sums, scratch);
    }
}

/* Adds the statistics of a tile to those of its block. The tiles of a block come in order. */
static void accumulate(Stage stage, const Tile *tile, ChannelStats *block_stats,
                       const ChannelStats *tile_stats)
{
    for (int64_t c = 0; c < tile->channels; c++) {
        if (stage == MOMENTS) {
            combine_moments(&block_stats->moments, c, (double)tile->first_position,
                            (double)tile->positions, tile_stats->moments.mean_hi[c],
                            tile_stats->moments.mean_lo[c], tile_stats->moments.sum_sq[c]);
        } else if (stage == BACKWARD_REDUCE) {
            const int has_previous = tile->first_position > 0;
            Sums *sums = &block_stats->sums;
            sums->sum_d[c] = (has_previous ? sums->sum_d[c] : 0) + tile_stats->sums.sum_d[c];
            sums->sum_s[c] = (has_previous ? sums->sum_s[c] : 0) + tile_stats->sums.sum_s[c];
        }
    }
}

typedef void LoopBody(int64_t begin, int64_t end, void *context);
typedef int32_t ParallelFor(int64_t begin, int64_t end, int64_t grain, LoopBody *body,
                            void *context);

/* With fewer elements than this, a thread costs more time than it saves. */
enum { GRAIN_ELEMENTS = 32768 };

typedef struct {
    const Level *level;
    const Job *job;
    const Stage *stages;
    int num_stages;
    int out_of_memory;

    /* used only by parallel_over_tiles */
    Stage stage;
    ChannelStats *block_stats, *tile_stats;
    float *scratch;
} Work;

/* Elements of scratch memory per block; see terms_of_tile in kernel.inc. */
static int64_t scratch_size(const Job *job)
{
    const int half = job->dtype == BFLOAT16 || job->dtype == FLOAT16;
    return half && job->dy ? job->block_channels * job->positions : 0;
}

static void run_blocks(int64_t begin, int64_t end, void *context)
{
    Work *work = context;
    const Job *job = work->job;
    float *scratch = NULL;
    if (scratch_size(job)) {
        scratch = malloc((size_t)scratch_size(job) * sizeof *scratch);
        if (!scratch) {
            work->out_of_memory = 1;
            return;
        }
    }
    for (int64_t block = begin; block < end; block++) {
        ChannelStats block_stats, tile_stats;
        for (int s = 0; s < work->num_stages; s++) {
            const Stage stage = work->stages[s];
            for (int64_t index = 0; index < job->tiles_per_block; index++) {
                const Tile tile = get_tile(job, block, index);
                if (job->tiles_per_block == 1) {
                    run_stage(work->level, job, stage, &tile, &block_stats, &block_stats, scratch);
                    continue;
                }
                run_stage(work->level, job, stage, &tile, &block_stats, &tile_stats, scratch);
                accumulate(stage, &tile, &block_stats, &tile_stats);
            }
        }
    }
    free(scratch);
}

static void run_tiles(int64_t begin, int64_t end, void *context)
{
    Work *work = context;
    const Job *job = work->job;
    for (int64_t i = begin; i < end; i++) {
        const int64_t block = i / job->tiles_per_block;
        const Tile tile = get_tile(job, block, i % job->tiles_per_block);
        run_stage(work->level, job, work->stage, &tile, &work->block_stats[block],
                  &work->tile_stats[i],
                  work->scratch ? work->scratch + block * scratch_size(job) : NULL);
    }
}

static int64_t grain_size(int64_t elements)
{
    return elements < GRAIN_ELEMENTS ? GRAIN_ELEMENTS / elements : 1;
}

static int parallel_over_blocks(Work *work, ParallelFor *parallel_for)
{
    const Job *job = work->job;
    const int64_t grain = grain_size(job->block_channels * job->positions);
    if (!parallel_for || job->blocks <= grain)
        run_blocks(0, job->blocks, work);
    else if (parallel_for(0, job->blocks, grain, run_blocks, work))
        return PARALLEL_FOR_FAILED;
    return work->out_of_memory ? OUT_OF_MEMORY : SUCCESS;
}

static int parallel_over_tiles(Work *work, ParallelFor *parallel_for)
{
    const Job *job = work->job;
    const int64_t tiles = job->blocks * job->tiles_per_block;
    int status = SUCCESS;
    work->block_stats = malloc((size_t)job->blocks * sizeof *work->block_stats);
    work->tile_stats = malloc((size_t)tiles * sizeof *work->tile_stats);
    if (scratch_size(job))
        work->scratch = malloc((size_t)(job->blocks * scratch_size(job)) * sizeof *work->scratch);
    if (!work->block_stats || !work->tile_stats || (scratch_size(job) && !work->scratch))
        status = OUT_OF_MEMORY;
    const int64_t grain = grain_size(job->block_channels * job->tile_positions);
    for (int s = 0; s < work->num_stages && status == SUCCESS; s++) {
        work->stage = work->stages[s];
        if (parallel_for(0, tiles, grain, run_tiles, work))
            status = PARALLEL_FOR_FAILED;
        for (int64_t i = 0; i < tiles && status == SUCCESS; i++) {
            const int64_t block = i / job->tiles_per_block;
            const Tile tile = get_tile(job, block, i % job->tiles_per_block);
            accumulate(work->stage, &tile, &work->block_stats[block], &work->tile_stats[i]);
        }
    }
    free(work->block_stats);
    free(work->tile_stats);
    free(work->scratch);
    return status;
}

/* Memory that is new to the process is mapped page by page, at the first write to each page. With
   small pages this may take longer than everything else. Every byte of the output is written, so
   huge pages waste no memory. The system may ignore the advice. */
static void advise_huge_pages(void *data, int64_t size)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20, min_size = 4 << 20;
    const uintptr_t start = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)size) / page * page;
    if ((uintptr_t)size >= min_size && end > start)
        (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)data, (void)size;
#endif
}

static int run(Job *job, const Stage *stages, int num_stages, ParallelFor *parallel_for,
               int threads)
{
    if (job->samples == 0 || job->channels == 0)
        return SUCCESS;
    advise_huge_pages(job->out,
                      job->samples * job->channels * job->positions * element_size(job->dtype));
    if (job->channels_last) {
        /* The last block does not get fewer channels than the lanes of a vector. */
        const int64_t last = job->channels % BLOCK_CHANNELS;
        const int64_t block = last > 0 && last < MAX_LANES ? BLOCK_CHANNELS - MAX_LANES
                                                           : BLOCK_CHANNELS;
        job->block_channels = min_i64(block, job->channels);
        job->tile_positions = TILE_POSITIONS;
    } else {
        job->channels *= job->samples;
        job->samples = 1;
        /* A multiple of four, because the kernel sums four channels at a time. */
        job->block_channels = job->positions > SHORT_CHANNEL
                                  ? 1
                                  : min_i64(BLOCK_CHANNELS, TILE_ELEMENTS / job->positions / 4 * 4);
        job->tile_positions = TILE_ELEMENTS;
    }
    job->blocks_per_sample = (job->channels + job->block_channels - 1) / job->block_channels;
    job->blocks = job->samples * job->blocks_per_sample;
    job->tiles_per_block = (job->positions + job->tile_positions - 1) / job->tile_positions;

    Work work = {.level = select_level(), .job = job, .stages = stages, .num_stages = num_stages};
    if (parallel_for && job->blocks < threads && job->tiles_per_block > 1)
        return parallel_over_tiles(&work, parallel_for);
    return parallel_over_blocks(&work, parallel_for);
}

/* Computes the output. parallel_for is torch's parallel loop over `threads` threads, or NULL.
   Returns SUCCESS, OUT_OF_MEMORY or PARALLEL_FOR_FAILED. */
EXPORT int simam_forward(const void *x, void *out, int64_t samples, int64_t channels,
                         int64_t positions, double e_lambda, int dtype, int channels_last,
                         int leave_one_out, ParallelFor *parallel_for, int threads)
{
    static const Stage stages[] = {MOMENTS, FORWARD};
    Job job = {.x = x,
               .out = out,
               .samples = samples,
               .channels = channels,
               .positions = positions,
               .e_lambda = e_lambda,
               .dtype = dtype,
               .channels_last = channels_last,
               .leave_one_out = leave_one_out};
    return run(&job, stages, 2, parallel_for, threads);
}

/* Computes dx, the gradient with respect to x, from dy, the gradient with respect to the output.
   Otherwise as simam_forward. */
EXPORT int simam_backward(const void *dy, const void *x, void *dx, int64_t samples,
                          int64_t channels, int64_t positions, double e_lambda, int dtype,
                          int channels_last, int leave_one_out, ParallelFor *parallel_for,
                          int threads)
{
    static const Stage stages[] = {MOMENTS, BACKWARD_REDUCE, BACKWARD_APPLY};
    Job job = {.x = x,
               .dy = dy,
               .out = dx,
               .samples = samples,
               .channels = channels,
               .positions = positions,
               .e_lambda = e_lambda,
               .dtype = dtype,
               .channels_last = channels_last,
               .leave_one_out = leave_one_out};
    return run(&job, stages, 3, parallel_for, threads);
}

/* Names the level that runs on this processor. */
EXPORT const char *simam_cpu_level(void)
{
    return select_level()->name;
}
