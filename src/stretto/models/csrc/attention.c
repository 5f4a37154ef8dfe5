/* Attention through slots: softmax over each row's own list of keys (its context, then its local rows), CHUNK keys at
   a time with a running maximum. Chunks are counted from the start of the list, of what the window leaves of it, so a
   row's bits do not depend on where context ends and local rows begin, nor on who else is in the batch. An item of
   work is one kv head of some neighbouring rows: rows that share keys read them from the nearest cache. */
#include "native.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define CHUNK 64 /* keys: 16 KB each of K and V at D = 64 */
#define KEYS 8   /* keys whose dot products run together */
#define ROWS 16  /* rows of an item, at most */

INLINE vf load_kv(const char *p, int i, const int bf16) {
    if (!bf16) return load((const float *)p + i);
    vh h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

INLINE float one_kv(const char *p, int i, const int bf16) {
    return bf16 ? bf16_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* out[j] = sum of the lanes of a[j] */
INLINE void sum_each(const vf a[KEYS], float *out) {
#if defined(__AVX__) && VL >= 8
    __m256 h[8];
    for (int j = 0; j < 8; j++) {
#if VL == 8
        h[j] = (__m256)a[j];
#else
        float part[VL];
        store(part, a[j]);
        h[j] = _mm256_add_ps(_mm256_loadu_ps(part), _mm256_loadu_ps(part + 8));
#endif
    }
    __m256 u = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(h[4], h[5]), _mm256_hadd_ps(h[6], h[7]));
    _mm256_storeu_ps(
        out, _mm256_add_ps(_mm256_permute2f128_ps(u, v, 0x20), _mm256_permute2f128_ps(u, v, 0x31)));
#else
    for (int j = 0; j < KEYS; j++) out[j] = sum_lanes(a[j]);
#endif
}

/* out[j] = q . keys[j] for KEYS keys */
INLINE void dots(const float *q, const char *const *keys, int D, float *out, const int bf16) {
    vf a[KEYS];
    int d = 0;
    UNROLL for (int j = 0; j < KEYS; j++) a[j] = splat(0.0f);
    for (; d + VL <= D; d += VL) {
        vf qv = load(q + d);
        UNROLL for (int j = 0; j < KEYS; j++) a[j] += qv * load_kv(keys[j], d, bf16);
    }
    sum_each(a, out);
    for (; d < D; d++)
        for (int j = 0; j < KEYS; j++) out[j] += q[d] * one_kv(keys[j], d, bf16);
}

/* out[d : d + nv VL] += sum over n keys of p[j] values[j] */
INLINE void mix_part(const int nv, const float *p, const char *const *values, int n, int d, float *out, const int bf16) {
    vf a[8];
    UNROLL for (int i = 0; i < nv; i++) a[i] = load(out + d + i * VL);
    for (int j = 0; j < n; j++) UNROLL for (int i = 0; i < nv; i++) a[i] += p[j] * load_kv(values[j], d + i * VL, bf16);
    UNROLL for (int i = 0; i < nv; i++) store(out + d + i * VL, a[i]);
}

INLINE void mix(const float *p, const char *const *values, int n, int D, float *out, const int bf16) {
    int d = 0;
    for (; d + 8 * VL <= D; d += 8 * VL) mix_part(8, p, values, n, d, out, bf16);
    for (; d + 4 * VL <= D; d += 4 * VL) mix_part(4, p, values, n, d, out, bf16);
    for (; d + VL <= D; d += VL) mix_part(1, p, values, n, d, out, bf16);
    for (; d < D; d++)
        for (int j = 0; j < n; j++) out[d] += p[j] * one_kv(values[j], d, bf16);
}

/* One more chunk for one query: scores s[0 : n] become weights, the state (max, sum, out [D]) takes them in. */
INLINE void update(float *s, int n, float *top, float *sum, float *out, int D) {
    vf high = splat(*top);
    for (int j = n; j < CHUNK; j++) s[j] = -INFINITY;
    for (int j = 0; j < CHUNK; j += VL) {
        vf v = load(s + j);
        high = pick(v > high, v, high);
    }
    float lanes[VL], best;
    store(lanes, high);
    best = lanes[0];
    for (int i = 1; i < VL; i++) best = lanes[i] > best ? lanes[i] : best;
    vf total = splat(0.0f);
    for (int j = 0; j < CHUNK; j += VL) {
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

typedef struct {
    const int32_t *context, *local, *kept; /* kept: the list after the window, else NULL */
    int64_t n_context, n;
} List;

/* The keys that row i sees; ``kept`` has room for them. */
static List row_list(const Batch *b, int64_t i, int window, int32_t *kept) {
    const int q = b->context_of[i], at = b->context_ptr[q], local = b->local_ptr[i];
    List l = {b->context + at, b->local + local, NULL, b->context_ptr[q + 1] - at, 0};
    l.n = l.n_context + b->local_ptr[i + 1] - local;
    const int32_t here = b->positions[i];
    if (!window || here < window) return l; /* positions start at 0: nothing is that far away */
    int64_t n = 0;
    for (int64_t j = 0; j < l.n; j++) {
        int32_t slot = j < l.n_context ? l.context[j] : b->slots[l.local[j - l.n_context]];
        kept[n] = slot;
        n += here - b->pool_positions[slot] < window;
    }
    l.kept = kept, l.n = n;
    return l;
}

/* slots of keys first..first+n-1 */
static void list_slots(const List *l, const Batch *b, int64_t first, int n, int32_t *out) {
    if (l->kept) {
        memcpy(out, l->kept + first, n * sizeof *out);
        return;
    }
    for (int j = 0; j < n; j++) {
        int64_t t = first + j;
        out[j] = t < l->n_context ? l->context[t] : b->slots[l->local[t - l->n_context]];
    }
}

/* Scratch of one thread: for each of ROWS rows the R states and outputs, and the kept lists. */
static int64_t state_floats(const Model *m) { return (int64_t)ROWS * (m->A / m->G) * (m->D + 2); }

size_t attention_bytes(const Model *m, int64_t keys) {
    return ((state_floats(m) + ROWS * keys) * 4 + 63) / 64 * 64;
}

/* Kv head g of rows row0 .. row0 + rows - 1. qkv [n, (A + 2 G) D], out [n, A D]. */
INLINE void item(
    const Model *m, const Batch *b, int layer, int g, int64_t row0, int rows, const float *qkv, float *out,
    float *scratch, int64_t keys, const int bf16) {
    const int D = m->D, R = m->A / m->G, es = bf16 ? 2 : 4;
    const int64_t base = ((int64_t)layer * b->slots_n * m->G + g) * D * es, pitch = (int64_t)m->G * D * es;
    const char *k_base = (const char *)b->k_pool + base, *v_base = (const char *)b->v_pool + base;
    float *tops = scratch, *sums = tops + ROWS * R, *outs = sums + ROWS * R;
    int32_t *kept = (int32_t *)(scratch + state_floats(m));
    List lists[ROWS];
    int64_t most = 0;
    for (int i = 0; i < rows; i++) {
        lists[i] = row_list(b, row0 + i, m->layers[layer].window, kept + i * keys);
        most = lists[i].n > most ? lists[i].n : most;
        for (int h = 0; h < R; h++) tops[i * R + h] = -INFINITY, sums[i * R + h] = 0;
    }
    memset(outs, 0, sizeof(float) * rows * R * D);
    for (int64_t first = 0; first < most; first += CHUNK) {
        for (int i = 0; i < rows; i++) {
            const int n = lists[i].n - first < CHUNK ? (int)(lists[i].n - first) : CHUNK;
            if (n <= 0) continue;
            int32_t slots[CHUNK];
            const char *at_k[CHUNK], *at_v[CHUNK];
            list_slots(&lists[i], b, first, n, slots);
            for (int j = 0; j < n; j++) at_k[j] = k_base + slots[j] * pitch, at_v[j] = v_base + slots[j] * pitch;
            for (int j = n; j % KEYS; j++) at_k[j] = at_k[n - 1]; /* computed, then masked */
            for (int h = 0; h < R; h++) {
                const int e = i * R + h;
                const float *q = qkv + (row0 + i) * (m->A + 2 * m->G) * D + (g * R + h) * D;
                float s[CHUNK];
                for (int j = 0; j < n; j += KEYS) dots(q, at_k + j, D, s + j, bf16);
                update(s, n, &tops[e], &sums[e], outs + e * D, D);
                mix(s, at_v, n, D, outs + e * D, bf16);
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < R; h++) {
            float *o = out + (row0 + i) * m->A * D + (g * R + h) * D, *e = outs + (i * R + h) * D;
            float inv = sums[i * R + h] > 0 ? 1 / sums[i * R + h] : 0; /* a row that sees nothing gives 0 */
            for (int d = 0; d < D; d++) o[d] = e[d] * inv;
        }
}

void attention(Run *r, int phase, int layer, const float *qkv, float *out, void *scratch, int64_t keys) {
    const Model *m = r->m;
    const Batch *b = r->b;
    int64_t rows = b->n * m->G / (4 * r->threads); /* about four items a thread */
    rows = rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
    const int64_t blocks = (b->n + rows - 1) / rows;
    for (int64_t i; (i = claim(r, phase)) < blocks * m->G;) {
        const int64_t row0 = i % blocks * rows;
        const int count = (int)(b->n - row0 < rows ? b->n - row0 : rows), g = (int)(i / blocks);
        if (b->kv_bf16) item(m, b, layer, g, row0, count, qkv, out, scratch, keys, 1);
        else item(m, b, layer, g, row0, count, qkv, out, scratch, keys, 0);
    }
}
