/* Pieces of attention: a tile of keys laid side by side, scores of queries in it, the running softmax, the mix of values.
   For attention.c. */
#include "native.h"
#define CHUNK 64 /* keys: 16 KB each of K and V at D = 64 */
#define QUERIES (VL == 16 ? 6 : 3) /* with 4 vectors of keys, or of a value: 24 accumulators of 32, or 12 of 16 */

INLINE vf load_kv(const char *p, int i, const int bf16) {
    if (!bf16) return load((const float *)p + i);
    vh h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

INLINE float one_kv(const char *p, int i, const int bf16) {
    return bf16 ? bf16_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

#if VL == 16
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VL == 8
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif
#ifdef __clang__
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* tile [D][CHUNK] = the n keys, side by side; a multiple of VL of pointers is read. */
INLINE void transpose(const char *const *keys, int n, int D, float *tile, const int bf16) {
    for (int j = 0; j < n; j += VL) {
        int d = 0;
        for (; d + VL <= D; d += VL) {
            vf a[VL], b[VL];
            UNROLL for (int i = 0; i < VL; i++) a[i] = load_kv(keys[j + i], d, bf16);
            for (int w = VL; w > 1; w /= 2) { /* each round interleaves row i with row i + VL / 2 */
                UNROLL for (int i = 0; i < VL / 2; i++) {
                    b[2 * i] = ZIP(a[i], a[i + VL / 2], ZIP_LOW);
                    b[2 * i + 1] = ZIP(a[i], a[i + VL / 2], ZIP_HIGH);
                }
                UNROLL for (int i = 0; i < VL; i++) a[i] = b[i];
            }
            UNROLL for (int i = 0; i < VL; i++) store(tile + (d + i) * CHUNK + j, a[i]);
        }
        for (; d < D; d++)
            for (int i = 0; i < VL; i++) tile[d * CHUNK + j + i] = one_kv(keys[j + i], d, bf16);
    }
}

/* s[i][0 : ng VL] = q[i] . keys, over d in order, for nq queries and ng groups of keys of a tile */
INLINE void dots(const int nq, const int ng, const float *const *q, const float *tile, int D, float (*s)[CHUNK]) {
    vf a[QUERIES * 4];
    UNROLL for (int i = 0; i < nq * ng; i++) a[i] = splat(0.0f);
    for (int d = 0; d < D; d++) {
        vf k[4];
        UNROLL for (int g = 0; g < ng; g++) {
            k[g] = load(tile + d * CHUNK + g * VL);
            KEEP(k[g]);
        }
        UNROLL for (int i = 0; i < nq; i++) {
            const float x = q[i][d];
            UNROLL for (int g = 0; g < ng; g++) a[i * ng + g] += x * k[g];
        }
    }
    UNROLL for (int i = 0; i < nq * ng; i++) store(s[i / ng] + i % ng * VL, a[i]);
}

/* out[i][d : d + nv VL] += sum over n keys of p[i][j] values[j] */
INLINE void mix_part(
    const int nq, const int nv, float (*p)[CHUNK], const char *const *values, int n, int d, float *const *out,
    int bf16) {
    vf a[QUERIES * 4 + 4];
    UNROLL for (int i = 0; i < nq * nv; i++) a[i] = load(out[i / nv] + d + i % nv * VL);
    for (int j = 0; j < n; j++) {
        vf pv[QUERIES];
        UNROLL for (int i = 0; i < nq; i++) {
            pv[i] = splat(p[i][j]);
            KEEP(pv[i]);
        }
        UNROLL for (int c = 0; c < nv; c++) {
            vf v = load_kv(values[j], d + c * VL, bf16);
            KEEP(v);
            UNROLL for (int i = 0; i < nq; i++) a[i * nv + c] += pv[i] * v;
        }
    }
    UNROLL for (int i = 0; i < nq * nv; i++) store(out[i / nv] + d + i % nv * VL, a[i]);
}

INLINE void mix(
    const int nq, float (*p)[CHUNK], const char *const *values, int n, int D, float *const *out, int bf16) {
    int d = 0;
    if (nq == 1)
        for (; d + 8 * VL <= D; d += 8 * VL) mix_part(nq, 8, p, values, n, d, out, bf16);
    for (; d + 4 * VL <= D; d += 4 * VL) mix_part(nq, 4, p, values, n, d, out, bf16);
    for (; d + 2 * VL <= D; d += 2 * VL) mix_part(nq, 2, p, values, n, d, out, bf16);
    for (; d + VL <= D; d += VL) mix_part(nq, 1, p, values, n, d, out, bf16);
    for (; d < D; d++)
        for (int i = 0; i < nq; i++)
            for (int j = 0; j < n; j++) out[i][d] += p[i][j] * one_kv(values[j], d, bf16);
}

/* One more chunk for one query: scores s[0 : n] become weights, the state (max, sum, out [D]) takes them in. */
INLINE void update(float *s, int n, float *top, float *sum, float *out, int D) {
    vf high = splat(*top);
    for (int j = n; j % VL; j++) s[j] = -INFINITY;
    for (int j = 0; j < n; j += VL) {
        vf v = load(s + j);
        high = pick(v > high, v, high);
    }
    const float best = max_lanes(high);
    vf total = splat(0.0f);
    for (int j = 0; j < n; j += VL) {
        vf e = vexp(load(s + j) - best);
        store(s + j, e);
        total += e;
    }
    if (best > *top) {
        float old = vexp(splat(*top - best))[0];
        *sum *= old;
        for (int d = 0; d < D; d++) out[d] *= old;
        *top = best;
    }
    *sum += sum_lanes(total);
}

/* s[i][0 : n] = q[i] . keys of a tile */
INLINE void tile_dots(const int nq, const float *const *q, const float *tile, int n, int D, float (*s)[CHUNK]) {
    int j = 0;
    for (; j + 3 * VL < n; j += 4 * VL) dots(nq, 4, q, tile + j, D, (float(*)[CHUNK])(s[0] + j));
    for (; j < n; j += VL) dots(nq, 1, q, tile + j, D, (float(*)[CHUNK])(s[0] + j));
}

/* mix() for any number of queries up to QUERIES */
static void mix_some(
    int nq, float (*p)[CHUNK], const char *const *values, int n, int D, float *const *out, int bf16) {
#define MIX(N) \
    case N: \
        if (bf16) mix(N, p, values, n, D, out, 1); \
        else mix(N, p, values, n, D, out, 0); \
        break
    switch (nq) {
        MIX(1); MIX(2); MIX(3);
#if VL == 16
        MIX(4); MIX(5); MIX(6);
#endif
    }
}

/* The n keys at ``keys`` [n, up to a multiple of VL] side by side in a tile. */
static void tile_keys(const char **keys, int n, int D, float *tile, int bf16) {
    for (int j = n; j % VL; j++) keys[j] = keys[n - 1]; /* computed, then masked */
    if (bf16) transpose(keys, n, D, tile, 1);
    else transpose(keys, n, D, tile, 0);
}
