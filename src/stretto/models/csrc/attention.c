/* Attention through slots: softmax over each row's own list of keys (its context, then its local rows), CHUNK keys at
   a time with a running maximum. Chunks are counted from the start of the list, of what the window leaves of it, so a
   row's bits do not depend on where context ends and local rows begin, nor on who else is in the batch.

   A query is one head of one row. An item of work is one kv head of some neighbouring rows; of these, the queries
   that see the same chunk share its keys, laid side by side in a tile, and run QUERIES at a time. Where a context ends,
   rows of a tree or a chain see different keys: they share a tile of its end and one of the local rows (Joint). A score
   is a sum over the head's dimensions in order, wherever its key lies in a tile. */
#include "tiles.h"
#define ROWS 16 /* rows of an item, at most */

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
    tile_dots(nq, q, tile, n, D, s);
    for (int i = 0; i < nq; i++) update(s[i], n, &query[i]->top, &query[i]->sum, out[i], D);
    mix(nq, s, values, n, D, out, bf16);
}

/* One more chunk for all queries that see it: n keys in slots. base: where slot 0 of this kv head starts. */
static void chunk_queries(
    Query *const *queries, int count, const int32_t *slots, int n, const char *k_base, const char *v_base,
    int64_t pitch, int D, int bf16, float *tile) {
    const char *keys[CHUNK], *values[CHUNK];
    for (int j = 0; j < n; j++) keys[j] = k_base + slots[j] * pitch, values[j] = v_base + slots[j] * pitch;
    tile_keys(keys, n, D, tile, bf16);
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

/* The end of a context, and local rows behind it, as several rows of a tree or a chain read them: one tile of each for
   all, and every query takes the scores of its own list. */
typedef struct {
    const float *tiles;        /* of the end of the context, then of rows low .. low + span - 1 */
    const char *const *values; /* [tail] */
    const char *v_base;
    int64_t first, pitch; /* of the list: the chunk's first key; bytes from slot to slot */
    int32_t low, span, tail;
} Joint;

INLINE void joint_queries(const int nq, Query *query, int heads, const List *lists, const Batch *b, const Joint *t, int D) {
    float s[QUERIES][CHUNK] __attribute__((aligned(64))), near[QUERIES][CHUNK] __attribute__((aligned(64)));
    const float *q[QUERIES];
    float *out[QUERIES];
    for (int i = 0; i < nq; i++) q[i] = query[i].q, out[i] = query[i].out;
    tile_dots(nq, q, t->tiles, t->tail, D, s);
    tile_dots(nq, q, t->tiles + D * CHUNK, t->span, D, near);
    for (int i = 0; i < nq; i++) {
        const List *l = &lists[i / heads];
        const int n = l->n - t->first < CHUNK ? (int)(l->n - t->first) : CHUNK;
        const int32_t *local = l->local + t->first - l->n_context;
        for (int j = t->tail; j < n; j++) s[i][j] = near[i][local[j] - t->low];
        update(s[i], n, &query[i].top, &query[i].sum, out[i], D);
    }
    if (t->tail) mix_some(nq, s, t->values, t->tail, D, out, b->kv_bf16);
    for (int i = 0; i < nq; i += heads) {
        const List *l = &lists[i / heads];
        const int n = l->n - t->first < CHUNK ? (int)(l->n - t->first) : CHUNK;
        const int32_t *local = l->local + t->first - l->n_context;
        const char *values[CHUNK];
        for (int j = t->tail; j < n; j++) values[j] = t->v_base + b->slots[local[j]] * t->pitch;
        if (n > t->tail)
            mix_some(heads, (float(*)[CHUNK])(s[i] + t->tail), values + t->tail, n - t->tail, D, out + i, b->kv_bf16);
    }
}

/* How many rows from i on read their next chunk together: of one context that ends in it, local rows not far apart. */
static int joint_rows(
    const Batch *b, const List *lists, const Cursor *cursors, int64_t row0, int i, int rows, int32_t *low, int32_t *span) {
    const int64_t first = cursors[i].next, context = lists[i].n_context, from = first < context ? 0 : first - context;
    int32_t least = INT32_MAX, most = -1;
    int e = i;
    if (first + CHUNK <= context) return 0;
    for (; e < rows; e++) {
        const List *l = &lists[e];
        const int64_t end = (first + CHUNK < l->n ? first + CHUNK : l->n) - context;
        if (l->kept || in_runs(b, row0 + e) || cursors[e].next != first || first >= l->n) break;
        if (l->context != lists[i].context || l->n_context != context) break;
        int32_t a = least, z = most;
        for (int64_t j = from; j < end; j++) {
            a = l->local[j] < a ? l->local[j] : a;
            z = l->local[j] > z ? l->local[j] : z;
        }
        if (z - (int64_t)a >= CHUNK) break;
        least = a, most = z;
    }
    *low = least, *span = most < least ? 0 : most - least + 1;
    return e - i;
}

/* The next chunk of ``count`` rows, as joint_rows() found them; R queries each. */
static void joint_chunk(
    Query *queries, int count, int R, const List *lists, const Batch *b, Joint t, const char *k_base, int D, float *tiles) {
    const char *keys[CHUNK], *values[CHUNK];
    const int bf16 = b->kv_bf16;
    t.tail = t.first < lists->n_context ? (int)(lists->n_context - t.first) : 0, t.tiles = tiles, t.values = values;
    for (int j = 0; j < t.tail; j++) {
        const int64_t at = lists->context[t.first + j] * t.pitch;
        keys[j] = k_base + at, values[j] = t.v_base + at;
    }
    if (t.tail) tile_keys(keys, t.tail, D, tiles, bf16);
    for (int j = 0; j < t.span; j++) keys[j] = k_base + b->slots[t.low + j] * t.pitch;
    if (t.span) tile_keys(keys, t.span, D, tiles + D * CHUNK, bf16);
    const int together = R < QUERIES ? QUERIES / R : 1; /* rows that run together: whole ones */
    for (int i = 0; i < count; i += together)
        for (int h = 0; h < R; h += QUERIES) {
            const int heads = R - h < QUERIES ? R - h : QUERIES, rows = count - i < together ? count - i : together;
            Query *at = queries + i * R + h;
#undef CASE
#define CASE(N) \
    case N: joint_queries(N, at, heads, lists + i, b, &t, D); break
            switch (heads * rows) {
                CASE(1); CASE(2); CASE(3);
#if VL == 16
                CASE(4); CASE(5); CASE(6);
#endif
            }
        }
}

/* Scratch of one thread: two tiles of keys; for each of ROWS rows R queries, their outputs and turned copies of them, and
   the kept lists. */
static size_t query_bytes(const Model *m) { return (size_t)ROWS * (m->A / m->G) * (sizeof(Query) + sizeof(Query *)); }
static size_t out_bytes(const Model *m) { return (size_t)ROWS * (m->A / m->G) * m->D * 4; }

size_t attention_bytes(const Model *m, int64_t keys) {
    return ((size_t)m->D * CHUNK * 8 + query_bytes(m) + 2 * out_bytes(m) + ROWS * keys * 4 + 63) / 64 * 64;
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
    scratch += (size_t)D * CHUNK * 8;
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
            Joint t = {.v_base = (char *)b->v_pool + base, .first = c->next, .pitch = pitch};
            const int joint = joint_rows(b, lists, cursors, row0, i, rows, &t.low, &t.span);
            if (joint > 1) {
                joint_chunk(queries + i * R, joint, R, lists + i, b, t, (char *)b->k_pool + base, D, tile);
                for (int e = i + joint; i < e; i++) cursors[i].next += CHUNK;
                i--, more = 1;
                continue;
            }
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
