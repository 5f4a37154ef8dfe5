/* Linears over weights repacked in panels. Each output is the sum over k in order, in blocks of KB: one accumulator
   runs through a block, then joins the row's tile. Rows and panels only decide which accumulators run together, so a
   row's bits are those it has alone. A block of weights is read from memory once for up to MB rows. */
#include "native.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define MR 12 /* rows of a register block: 2 MR accumulators; these machines have 32 vector registers */
#else
#define MR 6
#endif
#define KB 256 /* inputs of a block: 16 KB of float32 weights on AVX2, half of L1 */
#define MB 96  /* rows of a tile */
#define AHEAD 131072 /* bytes of the next weights that a waiting thread fetches, at most */
#define NEAR (VL == 16 ? 2048 : 4096) /* bytes ahead that are fetched into L1 when rows are few */

int panels(const Mat *m) { return m->gated ? (m->n + VL - 1) / VL : (m->n + PW - 1) / PW; }

/* tile[r] = x[r][k0 : k0 + kb] W, or += unless k0 = 0, for mr rows and np neighbouring panels; mr, np and bf16 are constants of each
   instance. Meanwhile fetches ``ahead`` into L1, ``step`` bytes for each k, and on VL = 16, where it was measured,
   ``far`` into L2. */
INLINE void block(
    const int mr, const int np, const int bf16, const float *const *x, int k0, int kb, const char *w, size_t panel,
    float *tile, const char *ahead, size_t step, const char *far) {
    const size_t line = PW * (bf16 ? 2 : 4);
    vf acc[MR][4];
    UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < 2 * np; c++) acc[r][c] = splat(0.0f);
    for (int k = 0; k < kb; k++) {
        vf wv[4];
        UNROLL for (int p = 0; p < np; p++) {
            const char *at = w + p * panel + k * line;
            if (bf16) {
                vu u;
                memcpy(&u, at, sizeof u);
                wv[2 * p] = (vf)(u << 16);
                wv[2 * p + 1] = (vf)(u & 0xffff0000u);
            } else {
                wv[2 * p] = load((const float *)at);
                wv[2 * p + 1] = load((const float *)at + VL);
            }
            KEEP(wv[2 * p]);
            KEEP(wv[2 * p + 1]);
            __builtin_prefetch(ahead + p * panel + k * step, 0, 3);
            if (VL == 16) __builtin_prefetch(far + p * panel + k * line, 0, 2);
        }
        UNROLL for (int r = 0; r < mr; r++) {
            float xv = x[r][k0 + k];
            UNROLL for (int c = 0; c < 2 * np; c++) acc[r][c] += xv * wv[c];
        }
    }
    UNROLL for (int r = 0; r < mr; r++) UNROLL for (int c = 0; c < 2 * np; c++) {
        float *t = tile + (c / 2) * MB * PW + r * PW + (c % 2) * VL;
        store(t, k0 ? load(t) + acc[r][c] : acc[r][c]);
    }
}

INLINE void rows_block(
    int mr, int np, const int bf16, const float *const *x, int k0, int kb, const char *w, size_t panel, float *tile,
    const char *ahead, size_t step, const char *far) {
#define CASE(R) \
    case R: block(R, 1, bf16, x, k0, kb, w, panel, tile, ahead, step, far); break
    if (np == 2) {
        if (mr == 1) block(1, 2, bf16, x, k0, kb, w, panel, tile, ahead, step, far);
        else block(2, 2, bf16, x, k0, kb, w, panel, tile, ahead, step, far);
        return;
    }
    switch (mr) {
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#if MR > 6
        CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#endif
    }
}

INLINE vf silu(vf x) { return x / (vexp(-x) + 1.0f); }

/* Scale (times ``factors`` [rows], if there are any), bias, activation, and the way out of one panel of a tile. */
void finish_panel(const Product *p, int panel, int64_t row0, int rows, const float *tile, const float *factors) {
    const Mat *m = p->m;
    const int width = m->gated ? VL : PW, col = panel * width;
    const int cols = m->n - col < width ? m->n - col : width;
    const float *bias = m->bias ? m->bias + panel * PW : NULL;
    for (int r = 0; r < rows; r++) {
        vf a = load(tile + r * PW), b = load(tile + r * PW + VL);
        if (factors) a *= factors[r] * m->scale, b *= factors[r] * m->scale;
        if (bias) a += load(bias), b += load(bias + VL);
        float y[PW], *out = p->out + (row0 + r) * p->ldo + col;
        if (m->gated) a = silu(a) * b;
        if (cols == width) {
            const int add = p->mode == ADD;
            store(out, add ? load(out) + a : a);
            if (!m->gated) store(out + VL, add ? load(out + VL) + b : b);
            continue;
        }
        store(y, a), store(y + VL, b);
        if (p->mode == STORE)
            for (int j = 0; j < cols; j++) out[j] = y[j];
        else
            for (int j = 0; j < cols; j++) out[j] += y[j];
    }
}

INLINE void part(const Product *p, int first, int last, const char *after, const int bf16) {
    const Mat *m = p->m;
    const size_t line = PW * (bf16 ? 2 : 4), panel = line * m->k;
    float tile[2 * MB * PW] __attribute__((aligned(64)));
    const float *x[MB];
    for (int64_t row0 = 0; row0 < p->n; row0 += MB) {
        const int rows = p->n - row0 < MB ? (int)(p->n - row0) : MB;
        const int blocks = (rows + MR - 1) / MR;
        for (int r = 0; r < rows; r++) x[r] = p->x + (p->gather ? p->gather[row0 + r] : row0 + r) * p->ldx;
        for (int j = first; j < last;) {
            const int np = rows <= 2 && j + 1 < last ? 2 : 1;
            for (int k0 = 0; k0 < m->k; k0 += KB) {
                const int kb = m->k - k0 < KB ? m->k - k0 : KB;
                const char *w = (const char *)m->w + j * panel + k0 * line;
                for (int i = 0; i < blocks; i++) { /* rows in blocks of nearly equal size */
                    const int a = rows * i / blocks, e = rows * (i + 1) / blocks;
                    /* few rows: some lines ahead in the stream; many: a slice of the next block each */
                    const size_t step = line / blocks;
                    const char *ahead = blocks == 1 ? w + NEAR : w + kb * line + i * kb * step, *far = i ? w : NEXT_BLOCK(w, line);
                    rows_block(e - a, np, bf16, x + a, k0, kb, w, panel, tile + a * PW, ahead, step, far);
                }
            }
            for (int c = 0; c < np; c++) finish_panel(p, j + c, row0, rows, tile + c * MB * PW, NULL);
            j += np;
        }
    }
}

void product_part(const Product *p, int first, int last, const char *after) {
    if (p->m->format == BFLOAT) part(p, first, last, after, 1);
    else part(p, first, last, after, 0);
}

/* Panels handed out at once: 64 KB of weights at least, and about a dozen items a thread at most. */
int chunk_panels(const Mat *m, int threads) {
    const int all = panels(m);
    const int64_t each = (int64_t)all * m->k * PW * (m->format == FLOAT ? 4 : 2) / threads / 65536;
    const int items = (each < 1 ? 1 : each > 12 ? 12 : (int)each) * threads;
    return (all + items - 1) / items;
}

static size_t panel_bytes(const Mat *m) {
    return (size_t)PW * (m->format == HALVES ? m->k + m->k % 2 : m->k) * (m->format == FLOAT ? 4 : 2);
}

/* Where the weights begin that are this thread's share, and where it may stop to fetch them in advance. */
static const char *share(const Mat *m, int threads, int thread, const char **end) {
    const int all = panels(m), chunk = chunk_panels(m, threads);
    const int64_t items = (all + chunk - 1) / chunk, first = items * thread / threads * chunk;
    const int64_t last = items * (thread + 1) / threads * chunk;
    const size_t bytes = (size_t)((last < all ? last : all) - first) * panel_bytes(m);
    const char *start = (const char *)m->w + first * panel_bytes(m);
    *end = start + (bytes < AHEAD ? bytes : AHEAD);
    return start;
}

/* y = x / rms(x) * weight over n values */
void rms_norm(const float *x, const float *weight, int n, float eps, float *y) {
    vf a = splat(0.0f), b = a;
    int i = 0;
    float tail = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        vf u = load(x + i), v = load(x + i + VL);
        a += u * u, b += v * v;
    }
    for (; i < n; i++) tail += x[i] * x[i];
    const float scale = 1.0f / sqrtf((sum_lanes(a + b) + tail) / n + eps);
    for (int j = 0; j < n; j++) y[j] = x[j] * scale * weight[j];
}

/* What prepare() may write for n rows of k inputs. */
size_t own_bytes(int64_t n, int64_t k) { return ((size_t)n * k * 4 + half_bytes(n, k) + 63) / 64 * 64; }

/* Rows first..last-1 of p as the kernels read them: normed into ``own``, then packed behind that. */
static void prepare_rows(const Product *p, int64_t first, int64_t last, char *own) {
    Product q = *p;
    if (p->norm) {
        const int64_t k = p->m->k;
        for (int64_t i = first; i < last; i++)
            rms_norm(p->x + (p->gather ? p->gather[i] : i) * p->ldx, p->norm, k, p->eps, (float *)own + i * k);
        q.x = (float *)own, q.ldx = k, q.gather = NULL;
    }
    if (p->m->format == HALVES) half_pack(&q, first, last, own + (p->norm ? p->n * p->m->k * 4 : 0));
}

/* Prepares all rows; where they are then. */
static char *prepare(Run *r, int *phase, int thread, const Product *p) {
    if (p->n <= FEW) {
        char *own = r->own + thread * r->own_each;
        prepare_rows(p, 0, p->n, own);
        return own;
    }
    Items it = items_of(r, (*phase)++, thread, (p->n + 3) / 4);
    for (int64_t i; (i = take(&it)) >= 0;) prepare_rows(p, 4 * i, 4 * i + 4 < p->n ? 4 * i + 4 : p->n, r->own);
    finish_phase(&it);
    return r->own;
}

void product(Run *r, int *phase, int thread, const Product *p) {
    const int all = panels(p->m), chunk = chunk_panels(p->m, r->team->threads), half = p->m->format == HALVES;
    Product q = *p;
    char *own = p->norm || half ? prepare(r, phase, thread, p) : NULL;
    if (p->norm) q.x = (float *)own, q.ldx = p->m->k, q.gather = NULL, own += p->n * p->m->k * 4;
    const char *next = p->then ? share(p->then, r->team->threads, thread, &r->more_end) : NULL;
    Items it = items_of(r, (*phase)++, thread, (all + chunk - 1) / chunk);
    for (int64_t i; (i = take(&it)) >= 0;) {
        const int first = (int)i * chunk, last = first + chunk < all ? first + chunk : all;
        const int more = !it.shift && i + 1 < it.items * (thread + 1) / r->team->threads; /* of its own share */
        const char *after = more ? (const char *)p->m->w + last * panel_bytes(p->m) : next;
        if (half) half_part(&q, own, first, last, after);
        else product_part(&q, first, last, after);
    }
    r->more = next;
    finish_phase(&it);
}
