/* SimAM on the CPU, forward and backward, in one pass over the memory as far as a channel fits
   the cache. Plain C: no header of torch or Python, so that one build serves all their versions.

   A job goes through stages: the moments of every channel, then either the output, or the sums
   that the gradient needs and the gradient. Each stage works on one block of one tile. Tiles are
   independent, so threads share them out. Where there are fewer tiles than threads, they share
   the blocks instead, and wait for each other after each stage; the results are the same.

   The build must not allow what -ffast-math allows: NaN and infinity keep their meaning, and that
   flag would also set flush-to-zero for the whole process. */

#include "types.h"
#include "half.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { DONE, OUT_OF_MEMORY, FAILED };

static INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Add `count` positions to the `seen` ones of a channel, after Chan, Golub and LeVeque; squares are
   those of deviations from the mean. The first centre stays, and the shift takes up the rest. */
static INLINE void merge(Moments *m, int64_t c, double seen, double count, double centre,
                         double shift, double squares)
{
    if (seen == 0) {
        m->centre[c] = centre;
        m->shift[c] = shift;
        m->squares[c] = squares;
        return;
    }
    const double delta = centre - m->centre[c] + (shift - m->shift[c]);
    const double part = count / (seen + count);
    m->shift[c] += delta * part;
    m->squares[c] += squares + delta * delta * seen * part;
}

/* The same, of the sum and the squares of deviations from the centre. */
static INLINE void merge_run(Moments *m, int64_t c, double seen, double count, double centre,
                             double sum, double squares)
{
    const double shift = sum / count;
    merge(m, c, seen, count, centre, shift, squares - sum * shift);
}

static INLINE int64_t size_of(int dtype)
{
    return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2;
}

/* Ask for elements of the memory that comes next. It may lie beyond the end: nothing is read. */
static INLINE void fetch(const void *data, int64_t i, int64_t count, int dtype, int to_write)
{
    const int64_t size = size_of(dtype);
    const uintptr_t start = (uintptr_t)data + (uintptr_t)(i * size);
    for (int64_t offset = 0; offset < count * size; offset += 64)
        PREFETCH((const void *)(start + (uintptr_t)offset), to_write);
}

#define LOG2_E 1.4426950408889634

/* 2^f for |f| <= 1/2, minimax: to 7.5e-8, so the gate to 2e-8; and in double to 2.2e-16. */
#define REAL float
#define NAME(name) name##_float
#define BITS uint32_t
#define MANTISSA 23
#define MAGIC (0x1.8p23f + 127)
#define LEAST (-126.0f)
#define LARGEST 1e38
#define POLYNOMIAL(f) \
    (0x1.000002p0f + \
     f * (0x1.62e428p-1f + \
          f * (0x1.ebf918p-3f + f * (0x1.c6b6e4p-5f + f * (0x1.3d0c52p-7f + f * 0x1.5c08e6p-10f)))))
#include "kernel.inc"
#undef REAL
#undef NAME
#undef BITS
#undef MANTISSA
#undef MAGIC
#undef LEAST
#undef LARGEST
#undef POLYNOMIAL

#define REAL double
#define NAME(name) name##_double
#define BITS uint64_t
#define MANTISSA 52
#define MAGIC (0x1.8p52 + 1023)
#define LEAST (-1022.0)
#define LARGEST 1e308
#define POLYNOMIAL(f) \
    (1.0 + \
     f * (0x1.62e42fefa3a17p-1 + \
          f * (0x1.ebfbdff82c3b9p-3 + \
               f * (0x1.c6b08d703d48ap-5 + \
                    f * (0x1.3b2ab6fbde0f7p-7 + \
                         f * (0x1.5d87fe9cc5d6fp-10 + \
                              f * (0x1.4309126056718p-13 + \
                                   f * (0x1.ffcb55e82f22cp-17 + \
                                        f * (0x1.62c157ee59177p-20 + \
                                             f * (0x1.b6740fc28f781p-24 + \
                                                  f * 0x1.e3991e644e6abp-28))))))))))
#include "kernel.inc"

/* A clone does not reach the functions that it calls, so all of them are inlined into these. The
   names of the levels are those of features; GCC knows them as such from 12 on. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define HAS_CLONES
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

CLONES static void find_moments(const Job *job, const Block *b, Moments *m)
{
    switch (job->dtype) {
    case FLOAT64:
        moments_double(job, b, m, FLOAT64);
        break;
    case FLOAT32:
        moments_float(job, b, m, FLOAT32);
        break;
    case BFLOAT16:
        moments_float(job, b, m, BFLOAT16);
        break;
    case FLOAT16:
        moments_float(job, b, m, FLOAT16);
    }
}

CLONES static void scale(const Job *job, const Block *b, const Moments *m)
{
    switch (job->dtype) {
    case FLOAT64:
        scale_double(job, b, m, FLOAT64);
        break;
    case FLOAT32:
        scale_float(job, b, m, FLOAT32);
        break;
    case BFLOAT16:
        scale_float(job, b, m, BFLOAT16);
        break;
    case FLOAT16:
        scale_float(job, b, m, FLOAT16);
    }
}

CLONES static void gather(const Job *job, const Block *b, const Moments *m, Sums *s, float *scratch)
{
    switch (job->dtype) {
    case FLOAT64:
        gather_double(job, b, m, s, scratch, FLOAT64);
        break;
    case FLOAT32:
        gather_float(job, b, m, s, scratch, FLOAT32);
        break;
    case BFLOAT16:
        gather_float(job, b, m, s, scratch, BFLOAT16);
        break;
    case FLOAT16:
        gather_float(job, b, m, s, scratch, FLOAT16);
    }
}

CLONES static void settle(
    const Job *job, const Block *b, const Moments *m, const Sums *s, float *scratch)
{
    switch (job->dtype) {
    case FLOAT64:
        settle_double(job, b, m, s, scratch, FLOAT64);
        break;
    case FLOAT32:
        settle_float(job, b, m, s, scratch, FLOAT32);
        break;
    case BFLOAT16:
        settle_float(job, b, m, s, scratch, BFLOAT16);
        break;
    case FLOAT16:
        settle_float(job, b, m, s, scratch, FLOAT16);
    }
}

static Block find_block(const Job *job, int64_t tile, int64_t index)
{
    const int64_t sample = tile / job->tiles_per_sample;
    const int64_t channel = tile % job->tiles_per_sample * job->tile_channels;
    Block b;
    b.channels = least(job->tile_channels, job->channels - channel);
    b.first = index * job->block_positions;
    b.positions = least(job->block_positions, job->positions - b.first);
    b.start = sample * job->channels * job->positions;
    if (job->strips) {
        b.start += b.first * job->channels + channel;
        b.stride = job->channels;
        b.lines = b.positions;
        b.length = b.channels;
    } else {
        b.start += channel * job->positions + b.first;
        b.stride = job->positions;
        b.lines = b.channels;
        b.length = b.positions;
    }
    return b;
}

/* What is known of a tile, or of a block of it. */
typedef struct {
    Moments moments;
    Sums sums;
} Known;

typedef enum { MOMENTS, SCALE, GATHER, SETTLE } Stage;

static void run_stage(const Job *job, Stage stage, const Block *b, const Known *tile, Known *block,
                      float *scratch)
{
    switch (stage) {
    case MOMENTS:
        find_moments(job, b, &block->moments);
        break;
    case SCALE:
        scale(job, b, &tile->moments);
        break;
    case GATHER:
        gather(job, b, &tile->moments, &block->sums, scratch);
        break;
    case SETTLE:
        settle(job, b, &tile->moments, &tile->sums, scratch);
    }
}

/* Take up what a stage found in a block. Blocks come in order. */
static void take_up(Stage stage, const Block *b, Known *tile, const Known *block)
{
    for (int64_t c = 0; c < b->channels; c++) {
        if (stage == MOMENTS) {
            merge(&tile->moments, c, (double)b->first, (double)b->positions,
                  block->moments.centre[c], block->moments.shift[c], block->moments.squares[c]);
        } else if (stage == GATHER) {
            const int more = b->first > 0;
            Sums *sums = &tile->sums;
            sums->of_deviation[c] =
                (more ? sums->of_deviation[c] : 0) + block->sums.of_deviation[c];
            sums->of_total[c] = (more ? sums->of_total[c] : 0) + block->sums.of_total[c];
        }
    }
}

typedef void Range(int64_t begin, int64_t end, void *context);
typedef int32_t ParallelFor(int64_t begin, int64_t end, int64_t grain, Range *range, void *context);

/* Below so many elements, a thread costs more than it takes over. */
enum { GRAIN = 32768 };

typedef struct {
    const Job *job;
    Stage stages[3];
    int number_of_stages;
    int out_of_memory;

    /* only where the blocks are shared out */
    Stage stage;
    Known *tiles, *blocks;
    float *scratch;
} Work;

static int64_t scratch_size(const Job *job)
{
    const int half = job->dtype == BFLOAT16 || job->dtype == FLOAT16;
    return half && job->gradient ? job->tile_channels * job->positions : 0;
}

static void run_tiles(int64_t begin, int64_t end, void *context)
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
    for (int64_t tile = begin; tile < end; tile++) {
        Known whole, part;
        for (int s = 0; s < work->number_of_stages; s++) {
            const Stage stage = work->stages[s];
            for (int64_t index = 0; index < job->blocks; index++) {
                const Block b = find_block(job, tile, index);
                if (job->blocks == 1) {
                    run_stage(job, stage, &b, &whole, &whole, scratch);
                    continue;
                }
                run_stage(job, stage, &b, &whole, &part, scratch);
                take_up(stage, &b, &whole, &part);
            }
        }
    }
    free(scratch);
}

static void run_blocks(int64_t begin, int64_t end, void *context)
{
    Work *work = context;
    const Job *job = work->job;
    for (int64_t i = begin; i < end; i++) {
        const int64_t tile = i / job->blocks;
        const Block b = find_block(job, tile, i % job->blocks);
        run_stage(job, work->stage, &b, &work->tiles[tile], &work->blocks[i],
                  work->scratch ? work->scratch + tile * scratch_size(job) : NULL);
    }
}

static int64_t grain_of(int64_t elements)
{
    return elements < GRAIN ? GRAIN / elements : 1;
}

static int share_tiles(Work *work, ParallelFor *parallel_for)
{
    const Job *job = work->job;
    const int64_t grain = grain_of(job->tile_channels * job->positions);
    if (!parallel_for || job->tiles <= grain)
        run_tiles(0, job->tiles, work);
    else if (parallel_for(0, job->tiles, grain, run_tiles, work))
        return FAILED;
    return work->out_of_memory ? OUT_OF_MEMORY : DONE;
}

static int share_blocks(Work *work, ParallelFor *parallel_for)
{
    const Job *job = work->job;
    const int64_t units = job->tiles * job->blocks;
    int status = DONE;
    work->tiles = malloc((size_t)job->tiles * sizeof *work->tiles);
    work->blocks = malloc((size_t)units * sizeof *work->blocks);
    if (scratch_size(job))
        work->scratch = malloc((size_t)(job->tiles * scratch_size(job)) * sizeof *work->scratch);
    if (!work->tiles || !work->blocks || (scratch_size(job) && !work->scratch))
        status = OUT_OF_MEMORY;
    const int64_t grain = grain_of(job->tile_channels * job->block_positions);
    for (int s = 0; s < work->number_of_stages && status == DONE; s++) {
        work->stage = work->stages[s];
        if (parallel_for(0, units, grain, run_blocks, work))
            status = FAILED;
        for (int64_t i = 0; i < units && status == DONE; i++) {
            const Block b = find_block(job, i / job->blocks, i % job->blocks);
            take_up(work->stage, &b, &work->tiles[i / job->blocks], &work->blocks[i]);
        }
    }
    free(work->tiles);
    free(work->blocks);
    free(work->scratch);
    return status;
}

/* What malloc takes fresh from the system arrives page by page, at the first write to each, which
   on small pages may take longer than all the rest. Every byte of a result is written, so huge
   pages waste nothing. A hint: whether it is heeded does not matter here. */
static void ask_for_huge_pages(void *data, int64_t size)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20, least_size = 4 << 20;
    const uintptr_t start = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)size) / page * page;
    if ((uintptr_t)size >= least_size && end > start)
        (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)data, (void)size;
#endif
}

/* The output of x, or with a gradient of the output that of x. parallel_for is torch's own, of
   so many threads, or NULL. Returns DONE, OUT_OF_MEMORY, or FAILED if parallel_for did. */
EXPORT int simam_cpu(const void *x, const void *gradient, void *result, int64_t samples,
                     int64_t channels, int64_t positions, double lambda, int dtype, int strips,
                     int statistics, ParallelFor *parallel_for, int threads)
{
    if (samples == 0 || channels == 0)
        return DONE;
    Job job = {x, gradient, result, samples, channels, positions, lambda, dtype, strips, statistics,
               0, 0, 0, 0, 0};
    if (strips) {
        job.tile_channels = least(TILE_CHANNELS, channels);
        job.block_positions = STRIP_BLOCK;
    } else {
        job.samples = 1;
        job.channels = samples * channels;
        job.tile_channels =
            positions > SHORT_ROW ? 1 : least(TILE_CHANNELS, ROW_BLOCK / positions / 4 * 4);
        job.block_positions = ROW_BLOCK;
    }
    job.tiles_per_sample = (job.channels + job.tile_channels - 1) / job.tile_channels;
    job.tiles = job.samples * job.tiles_per_sample;
    job.blocks = (positions + job.block_positions - 1) / job.block_positions;

    ask_for_huge_pages(result, samples * channels * positions * size_of(dtype));
    Work work = {&job, {MOMENTS, SCALE}, 2, 0, MOMENTS, NULL, NULL, NULL};
    if (gradient) {
        work.stages[1] = GATHER;
        work.stages[2] = SETTLE;
        work.number_of_stages = 3;
    }
    if (parallel_for && job.tiles < threads && job.blocks > 1)
        return share_blocks(&work, parallel_for);
    return share_tiles(&work, parallel_for);
}

/* The instructions that the processor allows. */
EXPORT const char *simam_cpu_level(void)
{
#if defined(HAS_CLONES)
    __builtin_cpu_init();
    const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("bmi2");
    const int v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    return v3 && v4 ? "x86-64-v4" : v3 ? "x86-64-v3" : "x86-64";
#else
    return "as compiled";
#endif
}
