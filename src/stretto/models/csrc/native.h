/* The decoder's forward on a CPU: types, vectors and threads that linear.c, half.c, attention.c and forward.c share.

   Legend: n rows of the batch, k rows that need logits, H hidden, A heads, G kv heads (R = A / G query heads share
   one), D head_dim, I intermediate, V vocabulary, S slots of the K/V pool, T threads.

   Exactness. Every number of a row is a sum in an order that depends on the row alone: linears add over their inputs
   in order, in blocks of fixed size; attention adds over the row's own list of visible keys, in chunks counted from
   the start of that list. So a row's bits depend neither on the other rows nor on slots nor on threads. The model's
   arithmetic is float32, but for linears in half precision, which half.c describes. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef VL /* lanes of a vector */
#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#endif
#if VL == 16
#include <immintrin.h>
#endif
#define PW (2 * VL) /* columns of a panel of weights */
#if defined(__AVX512FP16__) && VL == 16
#define HALF 1 /* there are products in half precision */
#else
#define HALF 0
#endif
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Keeps v in a register: else the compiler loads it again at each use. */
#if defined(__x86_64__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) (void)0
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

/* ---- what Python fills in (the ctypes structures of native.py, field by field) ---- */

enum { FLOAT, BFLOAT, HALVES };

/* A linear y = W x + bias with n outputs and k inputs. w: panels of PW columns, [panel][k][PW], times ``scale``, in one
   of three formats. BFLOAT holds columns j and j + VL of a panel as the low and high half of word j; HALVES are
   [panel][pair of k][even columns, odd columns][VL][2], a last k of zeros added where k is odd. gated: n gates and
   n ups; a panel holds VL gates, then their VL ups, and the output is silu(gate) * up. bias: NULL or float32 in panel
   order. scale: 1 but for HALVES. */
typedef struct {
    const void *w;
    const float *bias;
    int32_t n, k, format, gated;
    float scale;
} Mat;

typedef struct {
    Mat qkv, o, gate_up, down, router;
    const Mat *expert_gate_up, *expert_down; /* [experts] */
    const float *norm1, *norm2, *q_norm, *k_norm; /* [H], [H], [D] or NULL, [D] or NULL */
    int32_t window; /* 0 = unlimited */
    int32_t experts, top_k, renormalize; /* experts: 0 = dense */
} Layer;

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or NULL */
    int32_t threads;
} Team;

typedef struct {
    Team team;
    int32_t layers_n, H, A, G, D, V, I, experts, top_k; /* I, experts, top_k: the largest of all layers */
    int32_t embed_bf16, angles; /* angles: rows of cos and sin */
    float eps, scale;
    const void *embed; /* [V, H] */
    const float *norm, *cos, *sin; /* [H], [angles, D / 2] */
    const Layer *layers;
    Mat head;
    void *scratch; /* written by C only */
    size_t scratch_bytes;
} Model;

/* Rows first .. first + n - 1 enter behind ``layer`` (0 = the embeddings) with matrix times the states of sources. */
typedef struct {
    int32_t layer, first, n, unused;
    const Mat *matrix;
    const int32_t *sources; /* [n] */
} Entry;

typedef struct { /* FlatBatch of batch.py, and where its results go */
    int64_t n, contexts, n_context, n_local, k, n_embeds, S, kv_bf16, n_entries;
    int64_t known; /* logits from this column on are -inf */
    const int64_t *tokens;
    const int32_t *ints; /* the integer arrays below, one behind the other, in this order */
    const float *embeds;
    void *k_pool, *v_pool; /* [layers, S, G, D] */
    int32_t *pool_positions; /* [S] */
    float *logits; /* [k, V] */
    int64_t *best; /* [k]: the column of each row's largest logit, the lowest of equals */
    float *const *taps; /* [layers + 2] of [n, H] or NULL; the last is the final-normed state */
    const Entry *entries; /* by layer; their rows are the last of the batch, in this order */
    const int32_t *positions, *slots, *context_of, *context_ptr, *local_ptr, *context, *local, *logit_rows, *embed_rows;
    int64_t n_runs; /* 0: every query at its row's position. Else row i reads its list in the runs run_ptr[i].. of it: */
    const int32_t *run_ptr, *run_start, *run_at; /* [n + 1]; the first key of a run, the query's position for it */
    float *sure; /* [k]: the probability of ``best``; NULL: nobody asks */
} Batch;

/* ---- vectors ---- */

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE float bf16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint16_t float_to_bf16(float f) { /* round to nearest even */
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* e^x to 2 ulp: x = n ln2 + r, |r| <= ln2 / 2, polynomial of e^r (Cephes expf). Below -87: exactly 0; above 88: as 88. */
INLINE vf vexp(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves n in the low bits */
    vi small = x < splat(-87.0f);
    x = pick(x > splat(88.0f), splat(88.0f), x);
    x = pick(small, splat(0.0f), x);
    vf t = x * 1.44269504088896341f + magic;
    vf n = t - magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf y = (vf)((vi)p + ((vi)t << 23));
    return pick(small, splat(0.0f), y);
}

#if VL == 16
INLINE float sum_lanes(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float max_lanes(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float sum_lanes(vf v) {
    float a[VL];
    store(a, v);
    for (int w = VL / 2; w; w /= 2)
        for (int i = 0; i < w; i++) a[i] += a[i + w];
    return a[0];
}

INLINE float max_lanes(vf v) {
    float most = v[0];
    for (int i = 1; i < VL; i++) most = v[i] > most ? v[i] : most;
    return most;
}
#endif

/* ---- threads: one parallel region a forward, of phases; a phase is over when all of its items are done ---- */

/* A thread takes the items of its own share, in order (so it reads memory in order, and the same memory in every
   forward), then what is left of the others', then waits for those that others still work on. Who does not come (on a
   busy machine a thread may not run for a while) is not waited for: it finds its phases done. */
typedef struct {
    int32_t done;
    char pad[60]; /* a cache line each */
} Counter;

typedef struct Run {
    void (*body)(struct Run *, int); /* called by every thread with its number */
    Team *team;
    int32_t ticket;
    Counter *counters; /* one a phase, zero at the start */
    int32_t *taken;    /* [threads][phases]: items taken of this thread's share; zero at the start */
    int64_t phases;    /* a multiple of 16 */
    char *own;         /* [threads][own_each]: what each thread prepares for its products */
    size_t own_each;
    const Model *m;
    const Batch *b;
    void *work;
    const char *more, *more_end; /* of a thread's own copy: weights that it fetches while it waits */
} Run;

typedef struct {
    Run *r;
    int64_t items;
    int phase, thread, shift, mine; /* shift: whose share it takes from, counted from itself */
} Items;

INLINE Items items_of(Run *r, int phase, int thread, int64_t items) { return (Items){r, items, phase, thread, 0, 0}; }

/* The next item, or -1. */
INLINE int64_t take(Items *it) {
    const int all = it->r->team->threads;
    for (; it->shift < all; it->shift++) {
        const int64_t whose = (it->thread + it->shift) % all;
        const int64_t first = it->items * whose / all, end = it->items * (whose + 1) / all;
        int32_t *taken = it->r->taken + whose * it->r->phases + it->phase;
        if (first + __atomic_load_n(taken, __ATOMIC_RELAXED) >= end) continue;
        const int64_t i = first + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
        if (i < end) return it->mine++, i;
    }
    return -1;
}

void finish_phase(Items *it);
void run_team(Run *r);

/* ---- linear.c, half.c ---- */

#define FEW 32 /* rows that every thread prepares for itself: cheaper than to wait for one another */

enum { STORE, ADD }; /* what becomes of a result: out = y, or out += y */

/* Rows of a product: row i reads x + index * ldx with index = gather[i], or i; it writes out + i * ldo. norm: NULL, or
   the weight [k] of the norm that rows pass first. then: NULL, or the weights that are read next. */
typedef struct {
    const Mat *m;
    const float *x;
    const int32_t *gather;
    float *out;
    int64_t n, ldx, ldo;
    int mode;
    const float *norm;
    float eps;
    const Mat *then;
} Product;

/* The next block that a thread reads: of the same panels, of the next ones, or ``after`` these. */
#define NEXT_BLOCK(w, line) \
    (k0 + kb < m->k ? w + kb * line : j + np < last ? (const char *)m->w + (j + np) * panel : after ? after : w)

int panels(const Mat *m);
int chunk_panels(const Mat *m, int threads);
void rms_norm(const float *x, const float *weight, int n, float eps, float *y);
size_t own_bytes(int64_t n, int64_t k);
void finish_panel(const Product *p, int panel, int64_t row0, int rows, const float *tile, const float *factors);
void product_part(const Product *p, int first, int last, const char *after); /* panels first..last-1; then ``after`` */
void product(Run *r, int *phase, int thread, const Product *p);

size_t half_bytes(int64_t n, int64_t k);
void half_pack(const Product *p, int64_t first, int64_t last, char *packed); /* first: a multiple of 4 */
void half_part(const Product *p, const char *packed, int first, int last, const char *after);

/* ---- entries.c ---- */

int bad_entries(const Model *m, const Batch *b);
int64_t rows_at(const Batch *b, int layer); /* how many rows take part behind ``layer`` */
void enter_rows(Run *r, int *phase, int thread, int layer, float *x);

/* ---- attention.c ---- */

size_t attention_bytes(const Model *m, int64_t keys);
void attention(Run *r, int *phase, int thread, int layer, float *qkv, float *out, void *scratch, int64_t keys);

/* ---- chain.c, heads.c ---- */

typedef struct { /* what Python fills in (Chain of native_library.py) */
    int64_t cached, given, most, position, classes; /* position: of the first given token */
    const int32_t *context, *slots; /* [cached], [given + most - 1]: slots of the rows, in order */
    int64_t *tokens;                /* [given + most]: the given ones; the new ones are written behind them */
    int32_t *ints;                  /* room for the integers of a batch of ``given`` rows over all keys */
    const float *borders, *rates;   /* [classes - 1] ascending, [classes]; classes 0: no end by doubt */
    int32_t *found;                 /* [most]: the class of each new token's probability */
    float gain, least; /* ends behind the token with which gain * (product of its rates) * rate < least */
} Chain;

int32_t *lay_chain(Batch *b, const Chain *c, int64_t at, int64_t rows);

/* The probability of the best token of a row */
INLINE float sure(const float *row, int64_t n, float best) {
    vf sum = splat(0.0f);
    float tail = 0;
    int64_t j = 0;
    for (; j + VL <= n; j += VL) sum += vexp(load(row + j) - best);
    for (; j < n; j++) tail += expf(row[j] - best);
    return 1.0f / (sum_lanes(sum) + tail);
}
