/* Linears in half precision, where the processor multiplies it natively: twice the products of float32 per instruction.

   Weights that are stored in 16 bits become halves, times a power of two of the matrix; a row of inputs is rounded to
   halves, times a power of two of that row alone. Weights are below 2^3 and inputs below 2^4, so a sum of KB products
   stays below 2^15 and cannot overflow. Inputs go in pairs (k, k + 1): one word of 32 bits, broadcast once, multiplies
   the pairs of 16 columns in each vector of weights, so the two halves of a lane add up even and odd k. A lane's sum is
   added up in halves: chains of CHAIN products in order, with one rounding a product, then the chains in order, then
   even and odd; the sums of blocks are added in float32, in order. The error (2^-11 of an input, some 2^-10 of a
   chain) is below that of rounding the inputs to bfloat16. As in linear.c, a row's bits are those it has alone. */
#include "native.h"

#if HALF
#include <immintrin.h>

#define KB 256      /* inputs of a block and products of a sum: 16 KB of weights, a third of L1 */
#define CHAIN 64    /* of these, half of them in each half of a lane, one behind the other: most of the error */
#define MB 96       /* rows of a tile */
#define MR 12       /* rows of a register block: 24 accumulators of 32 registers */
#define PAIR 6      /* up to so many rows run through two panels at once: two streams from memory */
#define PAIRS(k) (((size_t)(k) + 1) / 2)
#define STREAMS 4   /* the next block is fetched in so many places at once: the hardware's prefetcher stays in a page */
#define NEAR 2048   /* bytes ahead of the weights in use that are fetched into L1; the next block is into L2 */

/* Packed rows: groups of four, [group][pair of k][4][2] halves, so that few pointers reach many rows; then the rows'
   factors. */
size_t half_bytes(int64_t n, int64_t k) { return (size_t)(n + 3) / 4 * (PAIRS(k) * 16 + 16); }

static float *factors(const Product *p, const char *packed) {
    return (float *)(packed + (p->n + 3) / 4 * PAIRS(p->m->k) * 16);
}

/* 2^e with |x| < 2^(e + 4) for all k of x; at least 2^-99 */
static float row_factor(const float *x, int k) {
    const vu magnitude = (vu){0} + 0x7fffffffu;
    vu high = (vu){0};
    int j = 0;
    uint32_t most = 0;
    for (; j + VL <= k; j += VL) {
        const vu v = (vu)load(x + j) & magnitude;
        high = (vu)pick((vi)(v > high), (vf)v, (vf)high);
    }
    for (int l = 0; l < VL; l++) most = high[l] > most ? high[l] : most;
    for (; j < k; j++) {
        uint32_t u;
        memcpy(&u, x + j, 4);
        u &= 0x7fffffffu;
        most = u > most ? u : most;
    }
    uint32_t e = most >> 23; /* the exponent of the largest, plus 127 */
    e = (e < 31 ? 31 : e) - 3;
    e <<= 23;
    float f;
    memcpy(&f, &e, 4);
    return f;
}

INLINE __m256i to_half(const float *x, float by) { return (__m256i)_mm512_cvtxps_ph((__m512)(load(x) * by)); }

/* Rows row0 .. row0 + 3 (fewer at the end) of p into ``to``. */
static void pack_group(const Product *p, int64_t row0, uint16_t *to, float *factor) {
    const int k = p->m->k, rows = p->n - row0 < 4 ? (int)(p->n - row0) : 4;
    const float *x[4];
    float by[4];
    for (int r = 0; r < 4; r++) {
        const int64_t i = row0 + (r < rows ? r : 0);
        x[r] = p->x + (p->gather ? p->gather[i] : i) * p->ldx;
        factor[r] = row_factor(x[r], k), by[r] = 1 / factor[r];
    }
    int j = 0;
    for (; j + VL <= k; j += VL, to += 4 * VL) { /* 8 pairs of each row; four rows' pairs side by side */
        const __m256i a = to_half(x[0] + j, by[0]), b = to_half(x[1] + j, by[1]);
        const __m256i c = to_half(x[2] + j, by[2]), d = to_half(x[3] + j, by[3]);
        const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
        const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
        const __m256i q0 = _mm256_unpacklo_epi64(ab0, cd0), q1 = _mm256_unpackhi_epi64(ab0, cd0);
        const __m256i q2 = _mm256_unpacklo_epi64(ab1, cd1), q3 = _mm256_unpackhi_epi64(ab1, cd1);
        _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(q0, q1, 0x20));
        _mm256_storeu_si256((__m256i *)to + 1, _mm256_permute2x128_si256(q2, q3, 0x20));
        _mm256_storeu_si256((__m256i *)to + 2, _mm256_permute2x128_si256(q0, q1, 0x31));
        _mm256_storeu_si256((__m256i *)to + 3, _mm256_permute2x128_si256(q2, q3, 0x31));
    }
    for (; j < k; j += 2, to += 8)
        for (int r = 0; r < 4; r++)
            for (int e = 0; e < 2; e++) {
                const _Float16 h = j + e < k ? (_Float16)(x[r][j + e] * by[r]) : (_Float16)0;
                memcpy(to + 2 * r + e, &h, 2);
            }
}

void half_pack(const Product *p, int64_t first, int64_t last, char *packed) {
    for (int64_t i = first; i < last; i += 4)
        pack_group(p, i, (uint16_t *)packed + i / 4 * PAIRS(p->m->k) * 8, factors(p, packed) + i);
}

/* out [PW] (= or +=, unless first) the sums of odd (a) and even (b) columns, whose lanes hold even and odd k */
INLINE void fold(__m512h a, __m512h b, float *out, int first) {
    const __m512i u = (__m512i)a, v = (__m512i)b;
    const __m512i crossed = _mm512_shldi_epi32(u, v, 16); /* words: b's high one, a's low one */
    const __m512h y = _mm512_add_ph((__m512h)crossed, (__m512h)_mm512_mask_blend_epi16(0xaaaaaaaau, v, u));
    vf low = (vf)_mm512_cvtxph_ps((__m256h)_mm512_castsi512_si256((__m512i)y));
    vf high = (vf)_mm512_cvtxph_ps((__m256h)_mm512_extracti64x4_epi64((__m512i)y, 1));
    if (!first) low += load(out), high += load(out + VL);
    store(out, low), store(out + VL, high);
}

/* acc [rows][2 np] += the pair k of inputs times their weights; meanwhile fetches lines of ``ahead`` and ``far``. */
INLINE void pair(
    const int mr, const int np, const uint16_t *const *g, size_t k, const char *w, size_t panel, const char *ahead,
    const char *far, size_t step, __m512h (*acc)[4]) {
    __m512h wv[4];
    UNROLL for (int c = 0; c < 2 * np; c++) {
        const size_t at = c / 2 * panel + c % 2 * 64;
        wv[c] = _mm512_loadu_ph(w + at + k * 128);
        KEEP(wv[c]);
        __builtin_prefetch(ahead + at + k * 128, 0, 3);
        if (c % 2 == 0 || step == 128) __builtin_prefetch(far + at, 0, 2);
    }
    UNROLL for (int r = 0; r < mr; r++) {
        int32_t both;
        memcpy(&both, g[r / 4] + 8 * k + r % 4 * 2, 4);
        __m512h xv = (__m512h)_mm512_set1_epi32(both);
        KEEP(xv);
        UNROLL for (int c = 0; c < 2 * np; c++) /* as GCC chooses registers, it copies accumulators */
            __asm__("vfmadd231ph %2, %1, %0" : "+v"(acc[r][c]) : "v"(xv), "v"(wv[c]));
    }
}

/* tile[r] = x[r][k0 : k0 + kb] W, or += unless k0 = 0, for mr rows and np neighbouring panels. x: the first group at k0;
   the next group is ``group`` halves away. w: [pair of k][even columns, odd columns][VL][2] halves. Meanwhile
   fetches ``ahead`` into L1 and ``step`` bytes for each pair of each of STREAMS parts of the next block, ``far``, into L2. */
INLINE void block(
    const int mr, const int np, const uint16_t *x, size_t group, int k0, int kb, const char *w, size_t panel, float *tile,
    const char *ahead, const char *far, size_t step) {
    const uint16_t *g[MR / 4];
    UNROLL for (int i = 0; i < (mr + 3) / 4; i++) g[i] = x + i * group;
    const size_t pairs = PAIRS(kb), stride = pairs / STREAMS * 128;
    const char *more = far;
    __m512h sum[MR][4];
    for (size_t start = 0; start < pairs; start += CHAIN / 2) { /* int counters cost a tenth: as wide as addresses */
        const size_t stop = pairs - start < CHAIN / 2 ? pairs : start + CHAIN / 2;
        __m512h acc[MR][4];
        UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < 2 * np; c++) acc[r][c] = _mm512_setzero_ph();
        size_t k = start;
        for (; k + STREAMS <= stop; k += STREAMS, more += step)
            UNROLL for (int i = 0; i < STREAMS; i++)
                pair(mr, np, g, k + i, w, panel, ahead, more + i * stride, step, acc);
        for (; k < stop; k++) pair(mr, np, g, k, w, panel, ahead, more, step, acc);
        UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < 2 * np; c++)
            sum[r][c] = start ? _mm512_add_ph(sum[r][c], acc[r][c]) : acc[r][c];
    }
    UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < np; c++)
        fold(sum[r][2 * c + 1], sum[r][2 * c], tile + c * MB * PW + r * PW, !k0);
}

static void rows_block(
    int mr, int np, const uint16_t *x, size_t group, int k0, int kb, const char *w, size_t panel, float *tile,
    const char *ahead, const char *far, size_t step) {
#define CASE(R, NP) \
    case R: block(R, NP, x, group, k0, kb, w, panel, tile, ahead, far, step); break
    if (np == 2)
        switch (mr) { CASE(1, 2); CASE(2, 2); CASE(3, 2); CASE(4, 2); CASE(5, 2); CASE(6, 2); }
    else
        switch (mr) {
            CASE(1, 1); CASE(2, 1); CASE(3, 1); CASE(4, 1); CASE(5, 1); CASE(6, 1);
            CASE(7, 1); CASE(8, 1); CASE(9, 1); CASE(10, 1); CASE(11, 1); CASE(12, 1);
        }
}

void half_part(const Product *p, const char *packed, int first, int last, const char *after) {
    const Mat *m = p->m;
    const size_t panel = 128 * PAIRS(m->k), group = PAIRS(m->k) * 8;
    float tile[2 * MB * PW] __attribute__((aligned(64)));
    for (int64_t row0 = 0; row0 < p->n; row0 += MB) {
        const int rows = p->n - row0 < MB ? (int)(p->n - row0) : MB;
        const int groups = (rows + 3) / 4, blocks = (rows + MR - 1) / MR;
        const uint16_t *x = (const uint16_t *)packed + row0 / 4 * group;
        for (int j = first; j < last;) {
            const int np = rows <= PAIR && j + 1 < last ? 2 : 1;
            for (int k0 = 0; k0 < m->k; k0 += KB) {
                const int kb = m->k - k0 < KB ? m->k - k0 : KB;
                const char *w = (const char *)m->w + j * panel + k0 * 64, *far = NEXT_BLOCK(w, 64);
                for (int i = 0; i < blocks; i++) { /* whole groups, in blocks of nearly equal size */
                    const int a = groups * i / blocks * 4, e = i + 1 < blocks ? groups * (i + 1) / blocks * 4 : rows;
                    const uint16_t *at = x + a / 4 * group + 4 * k0;
                    const size_t step = 128 / blocks, skip = PAIRS(kb) / STREAMS * step * i; /* each fetches its share */
                    const char *near = i ? w : w + NEAR;
                    rows_block(e - a, np, at, group, k0, kb, w, panel, tile + a * PW, near, far + skip, step);
                }
            }
            for (int c = 0; c < np; c++)
                finish_panel(p, j + c, row0, rows, tile + c * MB * PW, factors(p, packed) + row0);
            j += np;
        }
    }
}

#else
size_t half_bytes(int64_t n, int64_t k) { return 0 * n * k; }
void half_pack(const Product *p, int64_t first, int64_t last, char *packed) {
    (void)p, (void)first, (void)last, (void)packed;
}
void half_part(const Product *p, const char *packed, int first, int last, const char *after) {
    (void)p, (void)packed, (void)first, (void)last, (void)after;
}
#endif
