/* Attention through slots: softmax over each row's own list of keys (its context, then its local rows), CHUNK keys at
   a time with a running maximum. Chunks are counted from the start of the list, of what the window leaves of it, so a
   row's bits do not depend on where context ends and local rows begin, nor on who else is in the batch.

   A query is one head of one row. An item of work is one kv head of some neighbouring rows; of these, the queries
   that see the same chunk share its keys, laid side by side in a tile, and run QUERIES at a time. A score is a sum
   over the head's dimensions in order. */
#include "native.h"
#define CHUNK 64 /* keys: 16 KB each of K and V at D = 64 */
#define GROUPS (CHUNK / VL)
#define QUERIES (VL == 16 ? 6 : 3) /* with 4 vectors of keys, or of a value: 24 accumulators of 32, or 12 of 16 */
#define ROWS 16 /* rows of an item, at most */

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

/* The slots of keys first..first+n-1; ``buffer`` [n] may hold them. */
static const int32_t *list_slots(const List *l, const Batch *b, int64_t first, int n, int32_t *buffer) {
    if (l->kept) return l->kept + first;
    if (first + n <= l->n_context) return l->context + first;
    for (int j = 0; j < n; j++) {
        int64_t t = first + j;
        buffer[j] = t < l->n_context ? l->context[t] : b->slots[l->local[t - l->n_context]];
    }
    return buffer;
}

/* Does row i read its keys in runs, each with the query turned to a position of its own? */
INLINE int in_runs(const Batch *b, int64_t i) { return b->n_runs && b->run_ptr[i] < b->run_ptr[i + 1]; }

/* How far a row has read its list: the next key, where its run ends, and the next run. */
typedef struct {
    int64_t next, end;
    int32_t run;
} Cursor;

/* The running softmax of one query. */
typedef struct {
    const float *q; /* [D], times the softmax scale */
    float *out;     /* [D], not yet divided by sum */
    float top, sum;
} Query;

INLINE void some_queries(
    const int nq, Query *const *query, const float *tile, const char *const *values, int n, int D, int bf16) {
    float s[QUERIES][CHUNK] __attribute__((aligned(64)));
    const float *q[QUERIES];
    float *out[QUERIES];
    for (int i = 0; i < nq; i++) q[i] = query[i]->q, out[i] = query[i]->out;
    int j = 0;
    for (; j + 3 * VL < n; j += 4 * VL) dots(nq, 4, q, tile + j, D, (float(*)[CHUNK])(s[0] + j));
    for (; j < n; j += VL) dots(nq, 1, q, tile + j, D, (float(*)[CHUNK])(s[0] + j));
    for (int i = 0; i < nq; i++) update(s[i], n, &query[i]->top, &query[i]->sum, out[i], D);
    mix(nq, s, values, n, D, out, bf16);
}

/* One more chunk for all queries that see it: n keys in slots. base: where slot 0 of this kv head starts. */
static void chunk_queries(
    Query *const *queries, int count, const int32_t *slots, int n, const char *k_base, const char *v_base,
    int64_t pitch, int D, int bf16, float *tile) {
    const char *keys[CHUNK], *values[CHUNK];
    for (int j = 0; j < n; j++) keys[j] = k_base + slots[j] * pitch, values[j] = v_base + slots[j] * pitch;
    for (int j = n; j % VL; j++) keys[j] = keys[n - 1]; /* computed, then masked */
    if (bf16) transpose(keys, n, D, tile, 1);
    else transpose(keys, n, D, tile, 0);
    const int blocks = (count + QUERIES - 1) / QUERIES;
    for (int i = 0; i < blocks; i++) { /* blocks of nearly equal size */
        const int at = count * i / blocks, nq = count * (i + 1) / blocks - at;
#define CASE(N) \
    case N: \
        if (bf16) some_queries(N, queries + at, tile, values, n, D, 1); \
        else some_queries(N, queries + at, tile, values, n, D, 0); \
        break
        switch (nq) {
            CASE(1); CASE(2); CASE(3);
#if VL == 16
            CASE(4); CASE(5); CASE(6);
#endif
        }
    }
}

/* Scratch of one thread: a tile of keys; for each of ROWS rows R queries, their outputs and turned copies of them, and
   the kept lists. */
static size_t query_bytes(const Model *m) { return (size_t)ROWS * (m->A / m->G) * (sizeof(Query) + sizeof(Query *)); }
static size_t out_bytes(const Model *m) { return (size_t)ROWS * (m->A / m->G) * m->D * 4; }

size_t attention_bytes(const Model *m, int64_t keys) {
    return ((size_t)m->D * CHUNK * 4 + query_bytes(m) + 2 * out_bytes(m) + ROWS * keys * 4 + 63) / 64 * 64;
}

/* Rotate the two halves of one head; then times ``scale``. */
static void rotate(float *x, const float *cos, const float *sin, int half, float scale) {
    for (int j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = (a * cos[j] - b * sin[j]) * scale;
        x[j + half] = (b * cos[j] + a * sin[j]) * scale;
    }
}

/* Go to the run that holds the next key of row i: its R queries q [R, D], not rotated yet, to ``to`` as it wants them. */
static void enter_run(const Model *m, const Batch *b, int64_t i, int64_t keys, Cursor *c, const float *q, float *to) {
    const int D = m->D, R = m->A / m->G;
    while (c->next == c->end) {
        const int32_t run = c->run++;
        c->end = run + 1 < b->run_ptr[i + 1] ? b->run_start[run + 1] : keys;
        if (c->next == c->end) continue;
        const int64_t at = (int64_t)b->run_at[run] * (D / 2);
        memcpy(to, q, sizeof(float) * R * D);
        for (int h = 0; h < R; h++) rotate(to + h * D, m->cos + at, m->sin + at, D / 2, 1.0f);
    }
}

/* Kv head g of rows row0 .. row0 + rows - 1. qkv [n, (A + 2 G) D], out [n, A D]. */
static void item(
    const Model *m, const Batch *b, int layer, int g, int64_t row0, int rows, const float *qkv, float *out,
    char *scratch, int64_t keys) {
    const int D = m->D, R = m->A / m->G, es = b->kv_bf16 ? 2 : 4;
    const int64_t base = ((int64_t)layer * b->S * m->G + g) * D * es, pitch = (int64_t)m->G * D * es;
    float *tile = (float *)scratch;
    scratch += (size_t)D * CHUNK * 4;
    Query *queries = (Query *)scratch, **chosen = (Query **)(queries + ROWS * R);
    float *outs = (float *)(scratch + query_bytes(m)), *turns = (float *)(scratch + query_bytes(m) + out_bytes(m));
    int32_t *kept = (int32_t *)(scratch + query_bytes(m) + 2 * out_bytes(m));
    List lists[ROWS];
    Cursor cursors[ROWS];
    memset(outs, 0, sizeof(float) * rows * R * D);
    for (int i = 0; i < rows; i++) {
        const int runs = in_runs(b, row0 + i);
        const float *q = qkv + ((row0 + i) * (m->A + 2 * m->G) + g * R) * D;
        lists[i] = row_list(b, row0 + i, m->layers[layer].window, kept + i * keys);
        cursors[i] = (Cursor){0, runs ? 0 : lists[i].n, runs ? b->run_ptr[row0 + i] : 0};
        for (int h = 0; h < R; h++)
            queries[i * R + h] = (Query){
                runs ? turns + (i * R + h) * D : q + h * D, outs + (i * R + h) * D, -INFINITY, 0};
    }
    for (int more = 1; more;) {
        int32_t buffer[2][CHUNK];
        const int32_t *slots = NULL;
        int count = 0, n = 0;
        more = 0;
        for (int i = 0; i < rows; i++) { /* neighbours with the same keys go together */
            Cursor *c = &cursors[i];
            if (c->next >= lists[i].n) continue;
            if (c->next == c->end) {
                const float *q = qkv + ((row0 + i) * (m->A + 2 * m->G) + g * R) * D;
                enter_run(m, b, row0 + i, lists[i].n, c, q, turns + i * R * D);
            }
            const int64_t first = c->next, left = c->end - first;
            const int n_i = left < CHUNK ? (int)left : CHUNK;
            const int32_t *slots_i = list_slots(&lists[i], b, first, n_i, buffer[slots == buffer[0]]);
            c->next += n_i, more = 1;
            if (count && (n_i != n || (slots_i != slots && memcmp(slots_i, slots, n * sizeof *slots)))) {
                chunk_queries(
                    chosen, count, slots, n, (char *)b->k_pool + base, (char *)b->v_pool + base, pitch, D, b->kv_bf16, tile);
                count = 0;
            }
            if (!count) slots = slots_i, n = n_i;
            for (int h = 0; h < R; h++) chosen[count++] = &queries[i * R + h];
        }
        if (count)
            chunk_queries(
                chosen, count, slots, n, (char *)b->k_pool + base, (char *)b->v_pool + base, pitch, D, b->kv_bf16, tile);
    }
    for (int e = 0; e < rows * R; e++) {
        float *o = out + ((row0 + e / R) * m->A + g * R + e % R) * D;
        const float inverse = queries[e].sum > 0 ? 1 / queries[e].sum : 0; /* a row that sees nothing gives 0 */
        for (int d = 0; d < D; d++) o[d] = queries[e].out[d] * inverse;
    }
}

static void put_kv(void *pool, int64_t at, const float *x, int n, int bf16) {
    if (bf16)
        for (int j = 0; j < n; j++) ((uint16_t *)pool)[at + j] = float_to_bf16(x[j]);
    else memcpy((float *)pool + at, x, n * sizeof *x);
}

/* Kv head g of row i and the queries that share it: norm and rotation of q and k in place (q also times the softmax
   scale; not rotated where each of its runs wants it otherwise); k and v to their slot. */
static void rope(const Model *m, const Batch *b, int layer, int64_t i, int g, float *qkv) {
    const Layer *l = &m->layers[layer];
    const int D = m->D, A = m->A, G = m->G, R = A / G;
    float *row = qkv + i * (A + 2 * G) * D, *k = row + (A + g) * D;
    const float *cos = m->cos + (int64_t)b->positions[i] * (D / 2), *sin = m->sin + (int64_t)b->positions[i] * (D / 2);
    const int runs = in_runs(b, i);
    for (int h = 0; h <= R; h++) {
        float *x = h < R ? row + (g * R + h) * D : k;
        const float *weight = h < R ? l->q_norm : l->k_norm;
        if (weight) rms_norm(x, weight, D, m->eps, x);
        if (h < R && runs)
            for (int d = 0; d < D; d++) x[d] *= m->scale;
        else rotate(x, cos, sin, D / 2, h < R ? m->scale : 1.0f);
    }
    const int64_t at = (((int64_t)layer * b->S + b->slots[i]) * G + g) * D;
    put_kv(b->k_pool, at, k, D, b->kv_bf16);
    put_kv(b->v_pool, at, k + G * D, D, b->kv_bf16);
}

/* qkv [n, (A + 2 G) D], changed in place; out [n, A D]. Few rows: an item is a kv head of all of them, so it has all new
   keys that it needs; else the keys of all rows come first. */
void attention(Run *r, int *phase, int thread, int layer, float *qkv, float *out, void *scratch, int64_t keys) {
    const Model *m = r->m;
    const Batch *b = r->b;
    const int together = b->n <= ROWS && m->G % r->team->threads == 0;
    int64_t rows = b->n * m->G / (4 * r->team->threads); /* about four items a thread */
    rows = together ? b->n : rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
    const int64_t blocks = (b->n + rows - 1) / rows;
    if (!together) {
        Items it = items_of(r, (*phase)++, thread, b->n);
        for (int64_t i; (i = take(&it)) >= 0;)
            for (int g = 0; g < m->G; g++) rope(m, b, layer, i, g, qkv);
        finish_phase(&it);
    }
    Items it = items_of(r, (*phase)++, thread, blocks * m->G);
    for (int64_t i; (i = take(&it)) >= 0;) {
        const int64_t row0 = i % blocks * rows;
        const int count = (int)(b->n - row0 < rows ? b->n - row0 : rows), g = (int)(i / blocks);
        if (together)
            for (int j = 0; j < count; j++) rope(m, b, layer, j, g, qkv);
        item(m, b, layer, g, row0, count, qkv, out, scratch, keys);
    }
    finish_phase(&it);
}
