/* The arithmetic, for one type REAL: float or double. cpu.c includes it once for each.

   t is a neuron, d its deviation from the mean of its channel, S the sum of the d^2 and M the
   number of positions. With u = 1 / e* - 1/2, the gate s = sigmoid(u + 1/2) and the gradient g
   of the output,

       output = t s,    gradient = g s + v u_d + 2 d sum(v u_S) - mean(v u_d),

   where v = g t s (1 - s), and u_d and u_S are the derivatives of u. */

/* Constants of the channels of a tile. u_d and u_S are computed but for the last two. */
typedef struct {
    REAL centre[TILE_CHANNELS], shift[TILE_CHANNELS];
    REAL total[TILE_CHANNELS], steepness[TILE_CHANNELS];
    REAL positions, others, stretch, lambda;
    REAL of_deviation[TILE_CHANNELS];
    double of_total[TILE_CHANNELS];
} NAME(Channels);

/* `count` elements from i on: where they lie, or half precision widened into the buffer. */
static INLINE const REAL *NAME(read)(const void *data, int64_t i, int64_t count, REAL *buffer,
                                     int dtype)
{
    if (dtype != BFLOAT16 && dtype != FLOAT16)
        return (const REAL *)data + i;
    const uint16_t *const halves = (const uint16_t *)data + i;
    SIMD()
    for (int64_t j = 0; j < count; j++)
        buffer[j] = dtype == FLOAT16 ? from_float16(halves[j]) : from_bfloat16(halves[j]);
    return buffer;
}

/* Where to put elements from i on: where they belong, or into the buffer, for `write`. */
static INLINE REAL *NAME(room)(void *data, int64_t i, REAL *buffer, int dtype)
{
    return dtype == BFLOAT16 || dtype == FLOAT16 ? buffer : (REAL *)data + i;
}

static INLINE void NAME(write)(void *data, int64_t i, int64_t count, const REAL *buffer, int dtype)
{
    if (dtype != BFLOAT16 && dtype != FLOAT16)
        return;
    uint16_t *const halves = (uint16_t *)data + i;
    SIMD()
    for (int64_t j = 0; j < count; j++)
        halves[j] = dtype == FLOAT16 ? to_float16((float)buffer[j]) : to_bfloat16((float)buffer[j]);
}

/* 2^t for t <= 0 as 2^n 2^f, |f| <= 1/2; NaN for NaN. Adding MAGIC rounds t to the integer n
   and leaves n plus the bias of an exponent in the lowest bits. At LEAST it stops falling, where
   1 + 2^t is 1 already. */
static INLINE REAL NAME(power_of_two)(REAL t)
{
    t = t < LEAST ? LEAST : t;
    const REAL rounded = t + MAGIC;
    const REAL f = t - (rounded - MAGIC);
    BITS bits;
    memcpy(&bits, &rounded, sizeof bits);
    bits <<= MANTISSA;
    REAL power;
    memcpy(&power, &bits, sizeof power);
    return POLYNOMIAL(f) * power;
}

static INLINE REAL NAME(deviation)(const NAME(Channels) *k, int64_t c, REAL t)
{
    return t - k->centre[c] - k->shift[c];
}

/* exp(-(u + 1/2)), u_d and u_S, the latter two but for a factor that the channel shares. */
static INLINE REAL NAME(decay)(const NAME(Channels) *k, int64_t c, REAL d, int statistics,
                               REAL *u_d, REAL *u_total)
{
    const REAL log2_e = (REAL)LOG2_E;
    if (statistics == SHARED) { /* u = d^2 / (4 (S / (M - 1) + lambda)) */
        *u_d = d;
        *u_total = d * d * k->steepness[c];
        return NAME(power_of_two)(-*u_total - log2_e / 2);
    }
    /* u = shift^2 / (4 variance), of t - mu_t and s_t^2 + lambda. Where one neuron holds nearly
       all of S the difference cancels, to below zero by rounding. */
    const REAL shift = d * k->stretch;
    const REAL rest = k->total[c] - d * shift;
    const REAL variance = (rest < 0 ? 0 : rest) / k->others + k->lambda;
    const REAL ratio = shift / variance;
    const REAL u = shift * ratio / 4;
    *u_d = ratio * (k->positions + shift * ratio);
    *u_total = u / variance;
    return NAME(power_of_two)(-log2_e * u - log2_e / 2);
}

static INLINE void NAME(find_channels)(const Job *job, const Block *b, const Moments *m,
                                       NAME(Channels) *k)
{
    const double positions = (double)job->positions;
    const double others = positions > 1 ? positions - 1 : 1;
    for (int64_t c = 0; c < b->channels; c++) {
        k->centre[c] = (REAL)(m->centre[c] + m->shift[c]);
        k->shift[c] = (REAL)(m->centre[c] - k->centre[c] + m->shift[c]);
        k->total[c] = (REAL)m->squares[c];
        double q = 0.25 / (m->squares[c] / others + job->lambda);
        q = q > LARGEST ? LARGEST : q;
        k->steepness[c] = (REAL)(q * LOG2_E);
        const int shared = job->statistics == SHARED;
        k->of_deviation[c] = (REAL)(shared ? 2 * q : 0.5 / others);
        k->of_total[c] = (shared ? -4 * q / LOG2_E : -1) / others;
    }
    k->positions = (REAL)positions;
    k->others = (REAL)others;
    k->stretch = (REAL)(positions / others);
    k->lambda = (REAL)job->lambda;
}

/* The mean of each of four runs of neighbours, and below the sums that correct it. In turns, since
   one run alone would wait for its own additions; and the means of all runs first, since the sums
   of a run must wait for its mean. */
static INLINE void NAME(find_centres)(const REAL *const *runs, int64_t length, REAL *centres)
{
    const REAL *const x0 = runs[0], *const x1 = runs[1], *const x2 = runs[2], *const x3 = runs[3];
    REAL a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    SIMD(reduction(+ : a0, a1, a2, a3))
    for (int64_t i = 0; i < length; i++) {
        a0 += x0[i];
        a1 += x1[i];
        a2 += x2[i];
        a3 += x3[i];
    }
    const REAL inverse = 1 / (REAL)length;
    centres[0] = a0 * inverse;
    centres[1] = a1 * inverse;
    centres[2] = a2 * inverse;
    centres[3] = a3 * inverse;
}

/* Sums and squares of the deviations from the centres. */
static INLINE void NAME(find_sums)(const REAL *const *runs, int64_t length, const REAL *centres,
                                   REAL *sums, REAL *squares)
{
    const REAL *const x0 = runs[0], *const x1 = runs[1], *const x2 = runs[2], *const x3 = runs[3];
    const REAL c0 = centres[0], c1 = centres[1], c2 = centres[2], c3 = centres[3];
    REAL a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
    SIMD(reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3))
    for (int64_t i = 0; i < length; i++) {
        const REAL d0 = x0[i] - c0, d1 = x1[i] - c1, d2 = x2[i] - c2, d3 = x3[i] - c3;
        a0 += d0, b0 += d0 * d0;
        a1 += d1, b1 += d1 * d1;
        a2 += d2, b2 += d2 * d2;
        a3 += d3, b3 += d3 * d3;
    }
    sums[0] = a0, sums[1] = a1, sums[2] = a2, sums[3] = a3;
    squares[0] = b0, squares[1] = b1, squares[2] = b2, squares[3] = b3;
}

/* The rows of a block, or the quarters of its only row, four at a time. */
static INLINE void NAME(rows_moments)(const Job *job, const Block *b, Moments *m, int dtype)
{
    REAL buffer[ROW_BLOCK];
    const REAL *const x = NAME(read)(job->x, b->start, b->lines * b->length, buffer, dtype);
    const int quartered = b->lines == 1 && b->length >= 4;
    const int64_t runs = quartered ? 4 : b->lines;
    const int64_t length = quartered ? b->length / 4 : b->length;
    REAL centres[TILE_CHANNELS + 3], sums[TILE_CHANNELS + 3], squares[TILE_CHANNELS + 3];
    const REAL *starts[TILE_CHANNELS + 3];
    if (b->first + b->positions < job->positions)
        fetch(job->x, b->start + b->length, b->length, dtype, 0);
    for (int64_t run = 0; run < runs + 3; run++)
        starts[run] = x + least(run, runs - 1) * length;
    for (int64_t run = 0; run < runs; run += 4)
        NAME(find_centres)(starts + run, length, centres + run);
    for (int64_t run = 0; run < runs; run += 4)
        NAME(find_sums)(starts + run, length, centres + run, sums + run, squares + run);
    for (int64_t run = 0; run < runs; run++)
        merge_run(m, quartered ? 0 : run, quartered ? (double)(run * length) : 0, (double)length,
                  centres[run], sums[run], squares[run]);
    if (quartered) /* at most three positions are left */
        for (int64_t i = 4 * length; i < b->length; i++)
            merge_run(m, 0, (double)i, 1, x[i], 0, 0);
}

static INLINE void NAME(strips_moments)(const Job *job, const Block *b, Moments *m,
                                        int64_t length, int dtype)
{
    REAL buffer[TILE_CHANNELS];
    REAL centre[TILE_CHANNELS], sum[TILE_CHANNELS], squares[TILE_CHANNELS];
    for (int64_t c = 0; c < length; c++)
        centre[c] = sum[c] = squares[c] = 0;
    for (int64_t p = 0; p < b->lines; p++) {
        const int64_t start = b->start + p * b->stride;
        if (b->stride > length)
            fetch(job->x, start + LINES_AHEAD * b->stride, length, dtype, 0);
        const REAL *const x = NAME(read)(job->x, start, length, buffer, dtype);
        SIMD()
        for (int64_t c = 0; c < length; c++)
            centre[c] += x[c];
    }
    for (int64_t c = 0; c < length; c++)
        centre[c] /= (REAL)b->lines;
    for (int64_t p = 0; p < b->lines; p++) {
        const int64_t start = b->start + p * b->stride;
        const REAL *const x = NAME(read)(job->x, start, length, buffer, dtype);
        SIMD()
        for (int64_t c = 0; c < length; c++) {
            const REAL d = x[c] - centre[c];
            sum[c] += d;
            squares[c] += d * d;
        }
    }
    for (int64_t c = 0; c < length; c++)
        merge_run(m, c, 0, (double)b->lines, centre[c], sum[c], squares[c]);
}

static INLINE void NAME(moments)(const Job *job, const Block *b, Moments *m, int dtype)
{
    if (job->strips && b->length == TILE_CHANNELS)
        NAME(strips_moments)(job, b, m, TILE_CHANNELS, dtype);
    else if (job->strips)
        NAME(strips_moments)(job, b, m, b->length, dtype);
    else
        NAME(rows_moments)(job, b, m, dtype);
}

/* In rows a line has one channel, in strips channel i at element i. A whole tile of strips has a
   length that the compiler knows, here and elsewhere, so that what belongs to its channels stays
   in registers from line to line. */
static INLINE void NAME(scale_line)(const REAL *x, REAL *result, int64_t length,
                                    const NAME(Channels) *k, int64_t channel, int strips,
                                    int statistics)
{
    SIMD()
    for (int64_t i = 0; i < length; i++) {
        const int64_t c = strips ? i : channel;
        REAL unused, unused_too;
        const REAL d = NAME(deviation)(k, c, x[i]);
        result[i] = x[i] / (1 + NAME(decay)(k, c, d, statistics, &unused, &unused_too));
    }
}

static INLINE void NAME(scale_lines)(const Job *job, const Block *b, const Moments *m, int dtype,
                                     int strips, int statistics)
{
    NAME(Channels) k;
    NAME(find_channels)(job, b, m, &k);
    /* A block of rows is contiguous; a line of strips is. */
    const int64_t batch = strips ? 1 : b->lines;
    REAL in[ROW_BLOCK], out[ROW_BLOCK];
    for (int64_t o = 0; o < b->lines; o += batch) {
        const int64_t start = b->start + o * b->stride, count = batch * b->length;
        const REAL *const x = NAME(read)(job->x, start, count, in, dtype);
        REAL *const result = NAME(room)(job->result, start, out, dtype);
        if (strips) {
            if (b->stride > b->length)
                fetch(job->result, start + LINES_AHEAD * b->stride, count, dtype, 1);
            if (count == TILE_CHANNELS)
                NAME(scale_line)(x, result, TILE_CHANNELS, &k, 0, strips, statistics);
            else
                NAME(scale_line)(x, result, count, &k, 0, strips, statistics);
        } else {
            for (int64_t line = 0; line < b->lines; line++)
                for (int64_t first = 0; first < b->length; first += PIECE) {
                    const int64_t i = line * b->length + first;
                    const int64_t piece = least(PIECE, b->length - first);
                    fetch(job->x, start + count + i, piece, dtype, 0);
                    fetch(job->result, start + count + i, piece, dtype, 1);
                    NAME(scale_line)(x + i, result + i, piece, &k, line, strips, statistics);
                }
        }
        NAME(write)(job->result, start, count, result, dtype);
    }
}

/* The options as constants, so that the loops hold no branch. */
static INLINE void NAME(scale)(const Job *job, const Block *b, const Moments *m, int dtype)
{
    if (job->statistics == SHARED && job->strips)
        NAME(scale_lines)(job, b, m, dtype, 1, SHARED);
    else if (job->statistics == SHARED)
        NAME(scale_lines)(job, b, m, dtype, 0, SHARED);
    else if (job->strips)
        NAME(scale_lines)(job, b, m, dtype, 1, LEAVE_ONE_OUT);
    else
        NAME(scale_lines)(job, b, m, dtype, 0, LEAVE_ONE_OUT);
}

/* The first two terms of the gradient, and v u_d and v u_S, which the others are made of. */
static INLINE REAL NAME(pull)(const NAME(Channels) *k, int64_t c, REAL t, REAL g, int statistics,
                              REAL *v_d, REAL *v_total)
{
    const REAL d = NAME(deviation)(k, c, t);
    const REAL e = NAME(decay)(k, c, d, statistics, v_d, v_total);
    const REAL s = 1 / (1 + e);
    const REAL gs = g * s;
    const REAL v = gs * t * (e * s);
    *v_d *= v;
    *v_total *= v;
    return gs + k->of_deviation[c] * *v_d;
}

static INLINE void NAME(gather_row)(const REAL *x, const REAL *g, REAL *terms, int64_t length,
                                    const NAME(Channels) *k, int64_t channel, REAL *of_deviation,
                                    REAL *of_total, int statistics)
{
    REAL sum_d = 0, sum_total = 0;
    SIMD(reduction(+ : sum_d, sum_total))
    for (int64_t i = 0; i < length; i++) {
        REAL v_d, v_total;
        terms[i] = NAME(pull)(k, channel, x[i], g[i], statistics, &v_d, &v_total);
        sum_d += v_d;
        sum_total += v_total;
    }
    of_deviation[channel] += sum_d;
    of_total[channel] += sum_total;
}

static INLINE void NAME(gather_strip)(const REAL *x, const REAL *g, REAL *terms, int64_t length,
                                      const NAME(Channels) *k, REAL *of_deviation, REAL *of_total,
                                      int statistics)
{
    SIMD()
    for (int64_t c = 0; c < length; c++) {
        REAL v_d, v_total;
        terms[c] = NAME(pull)(k, c, x[c], g[c], statistics, &v_d, &v_total);
        of_deviation[c] += v_d;
        of_total[c] += v_total;
    }
}

/* Where the terms of a block go and keep their digits: to the result, or for half precision to
   the scratch of the tile, which has its lines one after the other. */
static INLINE REAL *NAME(terms)(const Job *job, const Block *b, float *scratch, int dtype,
                                int strips, int64_t *stride)
{
    if (dtype == BFLOAT16 || dtype == FLOAT16) {
        *stride = b->length;
        return (REAL *)scratch + (strips ? b->first * b->length : b->first);
    }
    *stride = b->stride;
    return (REAL *)job->result + b->start;
}

static INLINE void NAME(gather_lines)(const Job *job, const Block *b, const Moments *m, Sums *sums,
                                      float *scratch, int dtype, int strips, int statistics)
{
    NAME(Channels) k;
    NAME(find_channels)(job, b, m, &k);
    int64_t stride;
    REAL *const terms = NAME(terms)(job, b, scratch, dtype, strips, &stride);
    const int64_t batch = strips ? 1 : b->lines;
    REAL in[ROW_BLOCK], pull[ROW_BLOCK];
    REAL of_deviation[TILE_CHANNELS], of_total[TILE_CHANNELS];
    for (int64_t c = 0; c < b->channels; c++)
        of_deviation[c] = of_total[c] = 0;
    for (int64_t o = 0; o < b->lines; o += batch) {
        const int64_t start = b->start + o * b->stride, count = batch * b->length;
        const REAL *const x = NAME(read)(job->x, start, count, in, dtype);
        const REAL *const g = NAME(read)(job->gradient, start, count, pull, dtype);
        if (strips) {
            if (b->stride > b->length) {
                fetch(job->gradient, start + LINES_AHEAD * b->stride, count, dtype, 0);
                fetch(job->result, start + LINES_AHEAD * b->stride, count, dtype, 1);
            }
            if (count == TILE_CHANNELS)
                NAME(gather_strip)(x, g, terms + o * stride, TILE_CHANNELS, &k, of_deviation,
                                   of_total, statistics);
            else
                NAME(gather_strip)(x, g, terms + o * stride, count, &k, of_deviation, of_total,
                                   statistics);
        } else {
            for (int64_t line = 0; line < b->lines; line++)
                for (int64_t first = 0; first < b->length; first += PIECE) {
                    const int64_t i = line * b->length + first;
                    const int64_t piece = least(PIECE, b->length - first);
                    fetch(job->x, start + count + i, piece, dtype, 0);
                    fetch(job->gradient, start + count + i, piece, dtype, 0);
                    fetch(job->result, start + count + i, piece, dtype, 1);
                    NAME(gather_row)(x + i, g + i, terms + line * stride + first, piece, &k, line,
                                     of_deviation, of_total, statistics);
                }
        }
    }
    for (int64_t c = 0; c < b->channels; c++) {
        sums->of_deviation[c] = of_deviation[c];
        sums->of_total[c] = of_total[c];
    }
}

static INLINE void NAME(gather)(const Job *job, const Block *b, const Moments *m, Sums *sums,
                                float *scratch, int dtype)
{
    if (job->statistics == SHARED && job->strips)
        NAME(gather_lines)(job, b, m, sums, scratch, dtype, 1, SHARED);
    else if (job->statistics == SHARED)
        NAME(gather_lines)(job, b, m, sums, scratch, dtype, 0, SHARED);
    else if (job->strips)
        NAME(gather_lines)(job, b, m, sums, scratch, dtype, 1, LEAVE_ONE_OUT);
    else
        NAME(gather_lines)(job, b, m, sums, scratch, dtype, 0, LEAVE_ONE_OUT);
}

static INLINE void NAME(settle_line)(const REAL *x, const REAL *terms, REAL *result,
                                     int64_t length, const NAME(Channels) *k, const REAL *slope,
                                     const REAL *mean, int64_t channel, int strips)
{
    SIMD()
    for (int64_t i = 0; i < length; i++) {
        const int64_t c = strips ? i : channel;
        result[i] = terms[i] + slope[c] * NAME(deviation)(k, c, x[i]) - mean[c];
    }
}

static INLINE void NAME(settle_lines)(const Job *job, const Block *b, const Moments *m,
                                      const Sums *sums, float *scratch, int dtype, int strips)
{
    NAME(Channels) k;
    NAME(find_channels)(job, b, m, &k);
    REAL slope[TILE_CHANNELS], mean[TILE_CHANNELS];
    for (int64_t c = 0; c < b->channels; c++) {
        slope[c] = (REAL)(2 * k.of_total[c] * sums->of_total[c]);
        mean[c] = (REAL)(k.of_deviation[c] * sums->of_deviation[c] / (double)job->positions);
    }
    int64_t stride;
    const REAL *const terms = NAME(terms)(job, b, scratch, dtype, strips, &stride);
    const int64_t batch = strips ? 1 : b->lines;
    REAL in[ROW_BLOCK], out[ROW_BLOCK];
    for (int64_t o = 0; o < b->lines; o += batch) {
        const int64_t start = b->start + o * b->stride, count = batch * b->length;
        const REAL *const x = NAME(read)(job->x, start, count, in, dtype);
        REAL *const result = NAME(room)(job->result, start, out, dtype);
        for (int64_t line = 0; line < batch; line++)
            NAME(settle_line)(x + line * b->length, terms + (o + line) * stride,
                              result + line * b->length, b->length, &k, slope, mean, line, strips);
        NAME(write)(job->result, start, count, result, dtype);
    }
}

static INLINE void NAME(settle)(const Job *job, const Block *b, const Moments *m, const Sums *sums,
                                float *scratch, int dtype)
{
    if (job->strips)
        NAME(settle_lines)(job, b, m, sums, scratch, dtype, 1);
    else
        NAME(settle_lines)(job, b, m, sums, scratch, dtype, 0);
}
