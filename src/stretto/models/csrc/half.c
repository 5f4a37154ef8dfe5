/* Linears in half precision, where the processor multiplies it natively: twice the products of float32 per instruction.

   Weights that are stored in 16 bits become halves, times a power of two of the matrix; a row of inputs is rounded to
   halves, times a power of two of that row alone. Both are below 2^4, so a sum of SUM products stays below 2^15 and
   cannot overflow. Such a sum is added up in halves: chains of CHAIN products in order, with one rounding a product,
   then the chains in order; the sums are added in float32, in order. The error (2^-11 of an input, some 2^-10 of a
   chain) is below that of rounding the inputs to bfloat16. As in linear.c, a row's bits are those it has alone. */
#include "native.h"

#if HALF
#include <immintrin.h>

#define SUM 128     /* products that are added up in halves: a sum in float32 costs the time of seven products */
#define CHAIN 32    /* of these, one behind the other: most of the error */
#define KB 256      /* inputs of a block: 16 KB of weights, a third of L1 */
#define MB 96       /* rows of a tile */
#define MR 16       /* rows of a register block */
#define PAIR 8      /* up to so many rows run through two panels at once: two streams from memory */
#define STREAMS 4   /* the next block is fetched in so many places at once: the hardware's prefetcher stays in a page */
#define NEAR 2048   /* bytes ahead of the weights in use that are fetched into L1; the next block is into L2 */

/* Packed rows: groups of four, [group][k][4] halves, so that few pointers reach many rows; then the rows' factors. */
size_t half_bytes(int64_t n, int64_t k) { return (size_t)(n + 3) / 4 * k * 8 + (size_t)(n + 3) / 4 * 16; }

static float *factors(const Product *p, const char *packed) { return (float *)(packed + (p->n + 3) / 4 * p->m->k * 8); }

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
    for (; j + VL <= k; j += VL, to += 4 * VL) {
        const __m256i a = to_half(x[0] + j, by[0]), b = to_half(x[1] + j, by[1]);
        const __m256i c = to_half(x[2] + j, by[2]), d = to_half(x[3] + j, by[3]);
        const __m256i ab0 = _mm256_unpacklo_epi16(a, b), ab1 = _mm256_unpackhi_epi16(a, b);
        const __m256i cd0 = _mm256_unpacklo_epi16(c, d), cd1 = _mm256_unpackhi_epi16(c, d);
        const __m256i q0 = _mm256_unpacklo_epi32(ab0, cd0), q1 = _mm256_unpackhi_epi32(ab0, cd0);
        const __m256i q2 = _mm256_unpacklo_epi32(ab1, cd1), q3 = _mm256_unpackhi_epi32(ab1, cd1);
        _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(q0, q1, 0x20));
        _mm256_storeu_si256((__m256i *)to + 1, _mm256_permute2x128_si256(q2, q3, 0x20));
        _mm256_storeu_si256((__m256i *)to + 2, _mm256_permute2x128_si256(q0, q1, 0x31));
        _mm256_storeu_si256((__m256i *)to + 3, _mm256_permute2x128_si256(q2, q3, 0x31));
    }
    for (; j < k; j++, to += 4)
        for (int r = 0; r < 4; r++) {
            const _Float16 h = (_Float16)(x[r][j] * by[r]);
            memcpy(to + r, &h, 2);
        }
}

void half_pack(const Product *p, int64_t first, int64_t last, char *packed) {
    for (int64_t i = first; i < last; i += 4)
        pack_group(p, i, (uint16_t *)packed + i * p->m->k, factors(p, packed) + i);
}

/* tile[r] = x[r][k0 : k0 + kb] W, or += unless k0 = 0, for mr rows and np neighbouring panels. x: the first group at k0;
   the next group is ``group`` halves away. */
INLINE void block(
    const int mr, const int np, const uint16_t *x, size_t group, int k0, int kb, const char *w, size_t panel, float *tile,
    const char *ahead, const char *far) {
    const uint16_t *g[MR / 4];
    UNROLL for (int i = 0; i < (mr + 3) / 4; i++) g[i] = x + i * group;
    const char *next[STREAMS];
    for (int i = 0; i < STREAMS; i++) next[i] = far + kb / STREAMS * i * 64;
    for (size_t first = 0; first < (size_t)kb; first += SUM) { /* int counters cost a tenth: widened for each address */
        const size_t end = kb - first < SUM ? kb : first + SUM;
        __m512h sum[MR][2];
        for (size_t start = first; start < end; start += CHAIN) {
            const size_t stop = end - start < CHAIN ? end : start + CHAIN;
            __m512h acc[MR][2];
            UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < np; c++) acc[r][c] = _mm512_setzero_ph();
            for (size_t k = start; k < stop; k++) {
                __m512h wv[2];
                UNROLL for (int c = 0; c < np; c++) {
                    wv[c] = _mm512_loadu_ph(w + c * panel + k * 64);
                    KEEP(wv[c]);
                    __builtin_prefetch(ahead + c * panel + k * 64, 0, 3);
                    __builtin_prefetch(next[k % STREAMS] + c * panel + k / STREAMS * 64, 0, 2);
                }
                UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < np; c++)
                    __asm__("vfmadd231ph %2%{1to32%}, %1, %0"
                            : "+v"(acc[r][c]) : "v"(wv[c]), "m"(g[r / 4][4 * k + r % 4]));
            }
            UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < np; c++)
                sum[r][c] = start > first ? _mm512_add_ph(sum[r][c], acc[r][c]) : acc[r][c];
        }
        UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < np; c++) {
            float *t = tile + c * MB * PW + r * PW;
            vf low = (vf)_mm512_cvtxph_ps((__m256h)_mm512_castsi512_si256((__m512i)sum[r][c]));
            vf high = (vf)_mm512_cvtxph_ps((__m256h)_mm512_extracti64x4_epi64((__m512i)sum[r][c], 1));
            if (k0 + first) low += load(t), high += load(t + VL);
            store(t, low), store(t + VL, high);
        }
    }
}

static void rows_block(
    int mr, int np, const uint16_t *x, size_t group, int k0, int kb, const char *w, size_t panel, float *tile,
    const char *ahead, const char *far) {
#define CASE(R, NP) \
    case R: block(R, NP, x, group, k0, kb, w, panel, tile, ahead, far); break
    if (np == 2)
        switch (mr) { CASE(1, 2); CASE(2, 2); CASE(3, 2); CASE(4, 2); CASE(5, 2); CASE(6, 2); CASE(7, 2); CASE(8, 2); }
    else
        switch (mr) {
            CASE(1, 1); CASE(2, 1); CASE(3, 1); CASE(4, 1); CASE(5, 1); CASE(6, 1); CASE(7, 1); CASE(8, 1);
            CASE(9, 1); CASE(10, 1); CASE(11, 1); CASE(12, 1); CASE(13, 1); CASE(14, 1); CASE(15, 1); CASE(16, 1);
        }
}

void half_part(const Product *p, const char *packed, int first, int last, const char *after) {
    const Mat *m = p->m;
    const size_t panel = 64 * (size_t)m->k;
    float tile[2 * MB * PW] __attribute__((aligned(64)));
    for (int64_t row0 = 0; row0 < p->n; row0 += MB) {
        const int rows = p->n - row0 < MB ? (int)(p->n - row0) : MB;
        const int groups = (rows + 3) / 4, blocks = (rows + MR - 1) / MR;
        const uint16_t *x = (const uint16_t *)packed + row0 * m->k;
        for (int j = first; j < last;) {
            const int np = rows <= PAIR && j + 1 < last ? 2 : 1;
            for (int k0 = 0; k0 < m->k; k0 += KB) {
                const int kb = m->k - k0 < KB ? m->k - k0 : KB;
                const char *w = (const char *)m->w + j * panel + k0 * 64, *far = NEXT_BLOCK(w, 64);
                for (int i = 0; i < blocks; i++) { /* whole groups, in blocks of nearly equal size */
                    const int a = groups * i / blocks * 4, e = i + 1 < blocks ? groups * (i + 1) / blocks * 4 : rows;
                    const uint16_t *at = x + (size_t)a * m->k + 4 * k0;
                    const char *near = i ? w : w + NEAR;
                    rows_block(
                        e - a, np, at, 4 * (size_t)m->k, k0, kb, w, panel, tile + a * PW, near, i ? w : far);
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
