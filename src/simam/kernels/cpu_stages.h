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

static INLINE REAL NAME(load)(const void *data, int64_t i, int dtype)
{
    switch (dtype) {
    case FLOAT16:
        return from_float16(((const uint16_t *)data)[i]);
    case BFLOAT16:
        return from_bfloat16(((const uint16_t *)data)[i]);
    default:
        return ((const REAL *)data)[i];
    }
}

static INLINE void NAME(store)(void *data, int64_t i, REAL value, int dtype)
{
    switch (dtype) {
    case FLOAT16:
        ((uint16_t *)data)[i] = to_float16((float)value);
        break;
    case BFLOAT16:
        ((uint16_t *)data)[i] = to_bfloat16((float)value);
        break;
    default:
        ((REAL *)data)[i] = value;
    }
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

/* Of four runs of neighbours, at starts[0] to starts[3]: a centre, and the sum and the squares of
   the deviations from it. In turns, since one alone would wait for its own additions. */
static INLINE void NAME(four_runs)(const void *x, const int64_t *starts, int64_t length,
                                   REAL *centre, REAL *sum, REAL *squares, int dtype)
{
    const int64_t at0 = starts[0], at1 = starts[1], at2 = starts[2], at3 = starts[3];
    REAL a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    SIMD(reduction(+ : a0, a1, a2, a3))
    for (int64_t i = 0; i < length; i++) {
        a0 += NAME(load)(x, at0 + i, dtype);
        a1 += NAME(load)(x, at1 + i, dtype);
        a2 += NAME(load)(x, at2 + i, dtype);
        a3 += NAME(load)(x, at3 + i, dtype);
    }
    const REAL inverse = 1 / (REAL)length;
    a0 *= inverse, a1 *= inverse, a2 *= inverse, a3 *= inverse;
    REAL b0 = 0, b1 = 0, b2 = 0, b3 = 0, c0 = 0, c1 = 0, c2 = 0, c3 = 0;
    SIMD(reduction(+ : b0, b1, b2, b3, c0, c1, c2, c3))
    for (int64_t i = 0; i < length; i++) {
        const REAL d0 = NAME(load)(x, at0 + i, dtype) - a0;
        const REAL d1 = NAME(load)(x, at1 + i, dtype) - a1;
        const REAL d2 = NAME(load)(x, at2 + i, dtype) - a2;
        const REAL d3 = NAME(load)(x, at3 + i, dtype) - a3;
        b0 += d0, b1 += d1, b2 += d2, b3 += d3;
        c0 += d0 * d0, c1 += d1 * d1, c2 += d2 * d2, c3 += d3 * d3;
    }
    centre[0] = a0, centre[1] = a1, centre[2] = a2, centre[3] = a3;
    sum[0] = b0, sum[1] = b1, sum[2] = b2, sum[3] = b3;
    squares[0] = c0, squares[1] = c1, squares[2] = c2, squares[3] = c3;
}

static INLINE void NAME(rows_moments)(const Job *job, const Block *b, Moments *m, int dtype)
{
    REAL centre[4], sum[4], squares[4];
    if (b->channels == 1) { /* its quarters, and at most three positions more */
        const int64_t quarter = b->length / 4;
        double seen = 0;
        if (quarter > 0) {
            const int64_t starts[4] = {b->start, b->start + quarter, b->start + 2 * quarter,
                                       b->start + 3 * quarter};
            NAME(four_runs)(job->x, starts, quarter, centre, sum, squares, dtype);
            for (int run = 0; run < 4; run++) {
                merge_run(m, 0, seen, (double)quarter, centre[run], sum[run], squares[run]);
                seen += (double)quarter;
            }
        }
        for (int64_t i = 4 * quarter; i < b->length; i++)
            merge(m, 0, seen++, 1, NAME(load)(job->x, b->start + i, dtype), 0, 0);
        return;
    }
    for (int64_t c = 0; c < b->channels; c += 4) {
        int64_t starts[4];
        for (int run = 0; run < 4; run++) {
            const int64_t channel = c + run < b->channels ? c + run : c;
            starts[run] = b->start + channel * b->stride;
        }
        NAME(four_runs)(job->x, starts, b->length, centre, sum, squares, dtype);
        for (int run = 0; run < 4 && c + run < b->channels; run++)
            merge_run(m, c + run, 0, (double)b->length, centre[run], sum[run], squares[run]);
    }
}

static INLINE void NAME(strips_moments)(const Job *job, const Block *b, Moments *m, int dtype)
{
    const void *const x = job->x;
    REAL centre[TILE_CHANNELS] = {0}, sum[TILE_CHANNELS] = {0}, squares[TILE_CHANNELS] = {0};
    for (int64_t p = 0; p < b->lines; p++) {
        const int64_t start = b->start + p * b->stride;
        SIMD()
        for (int64_t c = 0; c < b->length; c++)
            centre[c] += NAME(load)(x, start + c, dtype);
    }
    for (int64_t c = 0; c < b->length; c++)
        centre[c] /= (REAL)b->lines;
    for (int64_t p = 0; p < b->lines; p++) {
        const int64_t start = b->start + p * b->stride;
        SIMD()
        for (int64_t c = 0; c < b->length; c++) {
            const REAL d = NAME(load)(x, start + c, dtype) - centre[c];
            sum[c] += d;
            squares[c] += d * d;
        }
    }
    for (int64_t c = 0; c < b->length; c++)
        merge_run(m, c, 0, (double)b->lines, centre[c], sum[c], squares[c]);
}

static INLINE void NAME(moments)(const Job *job, const Block *b, Moments *m, int dtype)
{
    if (job->strips)
        NAME(strips_moments)(job, b, m, dtype);
    else
        NAME(rows_moments)(job, b, m, dtype);
}

static INLINE void NAME(scale_lines)(const Job *job, const Block *b, const Moments *m, int dtype,
                                     int strips, int statistics)
{
    const void *const x = job->x;
    void *const result = job->result;
    NAME(Channels) k;
    NAME(find_channels)(job, b, m, &k);
    for (int64_t o = 0; o < b->lines; o++) {
        const int64_t start = b->start + o * b->stride;
        SIMD()
        for (int64_t i = 0; i < b->length; i++) {
            const int64_t c = strips ? i : o;
            REAL unused, unused_too;
            const REAL t = NAME(load)(x, start + i, dtype);
            const REAL d = NAME(deviation)(&k, c, t);
            const REAL e = NAME(decay)(&k, c, d, statistics, &unused, &unused_too);
            NAME(store)(result, start + i, t / (1 + e), dtype);
        }
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

/* The terms go where they keep their digits: to the result, or for half precision to scratch,
   which has the lines of the tile one after the other. */
static INLINE REAL *NAME(terms)(const Job *job, const Block *b, float *scratch, int dtype,
                                int strips, int64_t *stride)
{
    if (dtype == BFLOAT16 || dtype == FLOAT16) {
        *stride = strips ? b->length : job->positions;
        return (REAL *)scratch + (strips ? b->first * *stride : b->first);
    }
    *stride = b->stride;
    return (REAL *)job->result + b->start;
}

static INLINE void NAME(gather_lines)(const Job *job, const Block *b, const Moments *m, Sums *sums,
                                      float *scratch, int dtype, int strips, int statistics)
{
    const void *const x = job->x, *const gradient = job->gradient;
    int64_t stride;
    REAL *const terms = NAME(terms)(job, b, scratch, dtype, strips, &stride);
    NAME(Channels) k;
    NAME(find_channels)(job, b, m, &k);
    REAL of_deviation[TILE_CHANNELS] = {0}, of_total[TILE_CHANNELS] = {0};
    for (int64_t o = 0; o < b->lines; o++) {
        const int64_t start = b->start + o * b->stride, to = o * stride;
        if (strips) {
            SIMD()
            for (int64_t c = 0; c < b->length; c++) {
                REAL v_d, v_total;
                terms[to + c] = NAME(pull)(&k, c, NAME(load)(x, start + c, dtype),
                                           NAME(load)(gradient, start + c, dtype), statistics,
                                           &v_d, &v_total);
                of_deviation[c] += v_d;
                of_total[c] += v_total;
            }
        } else {
            REAL sum_d = 0, sum_total = 0;
            SIMD(reduction(+ : sum_d, sum_total))
            for (int64_t i = 0; i < b->length; i++) {
                REAL v_d, v_total;
                terms[to + i] = NAME(pull)(&k, o, NAME(load)(x, start + i, dtype),
                                           NAME(load)(gradient, start + i, dtype), statistics,
                                           &v_d, &v_total);
                sum_d += v_d;
                sum_total += v_total;
            }
            of_deviation[o] = sum_d;
            of_total[o] = sum_total;
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

static INLINE void NAME(settle_lines)(const Job *job, const Block *b, const Moments *m,
                                      const Sums *sums, float *scratch, int dtype, int strips)
{
    const void *const x = job->x;
    void *const result = job->result;
    int64_t stride;
    const REAL *const terms = NAME(terms)(job, b, scratch, dtype, strips, &stride);
    NAME(Channels) k;
    NAME(find_channels)(job, b, m, &k);
    REAL slope[TILE_CHANNELS], mean[TILE_CHANNELS];
    for (int64_t c = 0; c < b->channels; c++) {
        slope[c] = (REAL)(2 * k.of_total[c] * sums->of_total[c]);
        mean[c] = (REAL)(k.of_deviation[c] * sums->of_deviation[c] / (double)job->positions);
    }
    for (int64_t o = 0; o < b->lines; o++) {
        const int64_t start = b->start + o * b->stride, from = o * stride;
        SIMD()
        for (int64_t i = 0; i < b->length; i++) {
            const int64_t c = strips ? i : o;
            const REAL d = NAME(deviation)(&k, c, NAME(load)(x, start + i, dtype));
            NAME(store)(result, start + i, terms[from + i] + slope[c] * d - mean[c], dtype);
        }
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
