/* The forward: one parallel region, in phases whose items go to whichever thread is free. */
#include "native.h"
#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() (void)0
#endif
#include <sched.h>

#define SPINS 4000    /* before a waiting thread offers its core to others: some 50 us */
#define PHASES 16     /* of a layer, at most */
#define ALIGN(x) (((size_t)(x) + 63) / 64 * 64)

void finish_phase(Items *it) {
    Run *r = it->r;
    Counter *c = &r->counters[it->phase];
    if (it->mine) __atomic_fetch_add(&c->done, it->mine, __ATOMIC_RELEASE);
    for (int i = 0; __atomic_load_n(&c->done, __ATOMIC_ACQUIRE) < it->items; i++) {
        if (r->more < r->more_end) __builtin_prefetch(r->more, 0, 2), r->more += 64;
        else if (i < SPINS) PAUSE();
        else sched_yield();
    }
}

static void enter(void *p) {
    Run *r = p;
    r->body(r, __atomic_fetch_add(&r->ticket, 1, __ATOMIC_RELAXED));
}

void run_team(Run *r) {
    r->ticket = 0;
    if (r->team->threads > 1 && r->team->parallel) r->team->parallel(enter, r, r->team->threads, 0);
    else enter(r);
}

/* ---- pieces of a layer ---- */

typedef struct {
    float *x, *qkv, *att, *act, *y, *scores, *weights; /* see layout() */
    int32_t *chosen, *row_of, *place, *starts;
    char *attention;
    int64_t keys; /* the longest list of visible keys, where a window needs it */
    size_t attention_each;
    int32_t act_ld, scores_ld;
} Work;

/* Which of the given embeddings row i has, or -1. */
static int64_t given(const Batch *b, int64_t i) {
    for (int64_t e = 0; e < b->n_embeds; e++)
        if (b->embed_rows[e] == i) return e;
    return -1;
}

static void embed(Run *r, int phase, int thread) {
    const Model *m = r->m;
    const Batch *b = r->b;
    const int H = m->H;
    Work *w = r->work;
    Items it = items_of(r, phase, thread, b->n);
    for (int64_t i; (i = take(&it)) >= 0;) {
        float *x = w->x + i * H;
        const int64_t e = given(b, i);
        if (e >= 0) memcpy(x, b->embeds + e * H, H * sizeof *x);
        else if (m->embed_bf16)
            for (int j = 0; j < H; j++) x[j] = bf16_to_float(((const uint16_t *)m->embed)[b->tokens[i] * H + j]);
        else memcpy(x, (const float *)m->embed + b->tokens[i] * H, H * sizeof *x);
    }
    finish_phase(&it);
}

/* The states of all rows to a tap, normed by ``weight`` if there is one */
static void tap_rows(Run *r, int *phase, int thread, const float *weight, float *tap) {
    const int H = r->m->H;
    const Work *w = r->work;
    if (!tap) return;
    Items it = items_of(r, (*phase)++, thread, r->b->n);
    for (int64_t i; (i = take(&it)) >= 0;) {
        if (weight) rms_norm(w->x + i * H, weight, H, r->m->eps, tap + i * H);
        else memcpy(tap + i * H, w->x + i * H, H * sizeof(float));
    }
    finish_phase(&it);
}

/* Softmax over the experts, the top_k of it (lowest number first among equals) */
static void route_rows(Run *r, int phase, int thread, const Layer *l) {
    Work *w = r->work;
    const int E = l->experts, K = l->top_k, ld = w->scores_ld;
    Items it = items_of(r, phase, thread, r->b->n);
    for (int64_t i; (i = take(&it)) >= 0;) {
        float *s = w->scores + i * ld, *weights = w->weights + i * K, top = s[0], total;
        vf sum = splat(0.0f);
        for (int e = 1; e < E; e++) top = s[e] > top ? s[e] : top;
        for (int e = E; e < ld; e++) s[e] = -INFINITY;
        for (int e = 0; e < ld; e += VL) {
            vf p = vexp(load(s + e) - top);
            store(s + e, p);
            sum += p;
        }
        total = sum_lanes(sum);
        float kept = 0;
        for (int j = 0; j < K; j++) {
            int best = 0;
            for (int e = 1; e < E; e++) best = s[e] > s[best] ? e : best;
            w->chosen[i * K + j] = best;
            kept += weights[j] = s[best] / total;
            s[best] = -1;
        }
        if (l->renormalize)
            for (int j = 0; j < K; j++) weights[j] /= kept;
    }
    finish_phase(&it);
}

/* Rows sorted by expert: starts [E + 1], row_of [place], place [row * K + j]. */
static void group(const Run *r, const Layer *l) {
    Work *w = r->work;
    const int64_t pairs = r->b->n * l->top_k;
    memset(w->starts, 0, (l->experts + 1) * sizeof *w->starts);
    for (int64_t p = 0; p < pairs; p++) w->starts[w->chosen[p] + 1]++;
    for (int e = 0; e < l->experts; e++) w->starts[e + 1] += w->starts[e];
    for (int64_t p = 0; p < pairs; p++) {
        int32_t at = w->starts[w->chosen[p]]++;
        w->row_of[at] = (int32_t)(p / l->top_k);
        w->place[p] = at;
    }
    for (int e = l->experts; e > 0; e--) w->starts[e] = w->starts[e - 1];
    w->starts[0] = 0;
}

/* One product for each expert that has rows. up: from h by row_of into act; else from act into y. */
static void expert_products(Run *r, int phase, int thread, const Layer *l, int up) {
    Work *w = r->work;
    const Mat *mats = up ? l->expert_gate_up : l->expert_down;
    const int all = panels(mats), chunk = chunk_panels(mats, 1), chunks = (all + chunk - 1) / chunk;
    const int H = r->m->H;
    const int64_t items = (int64_t)chunks * l->experts;
    const float *h = (float *)(r->own + (r->b->n <= FEW ? thread * r->own_each : 0)); /* as the router read it */
    Items it = items_of(r, phase, thread, items);
    for (int64_t i; (i = take(&it)) >= 0;) {
        const int e = (int)(i / chunks), first = (int)(i % chunks) * chunk;
        const int64_t at = w->starts[e], n = w->starts[e + 1] - at;
        if (!n) continue;
        Product p = {&mats[e], h, w->row_of + at, w->act + at * w->act_ld, n, H, w->act_ld, STORE, NULL, 0, NULL};
        if (!up) p = (Product){&mats[e], w->act + at * w->act_ld, NULL, w->y + at * H, n, w->act_ld, H, STORE, NULL, 0, NULL};
        product_part(&p, first, first + chunk < all ? first + chunk : all, NULL);
    }
    finish_phase(&it);
}

static void combine_rows(Run *r, int phase, int thread, const Layer *l) {
    Work *w = r->work;
    const int H = r->m->H, K = l->top_k;
    Items it = items_of(r, phase, thread, r->b->n);
    for (int64_t i; (i = take(&it)) >= 0;) {
        for (int j = 0; j < H; j++) {
            float sum = 0;
            for (int k = 0; k < K; k++) sum += w->weights[i * K + k] * w->y[(int64_t)w->place[i * K + k] * H + j];
            w->x[i * H + j] += sum;
        }
    }
    finish_phase(&it);
}

static void mlp(Run *r, int *phase, int thread, const Layer *l, const Mat *then) {
    const int H = r->m->H;
    const int64_t n = r->b->n;
    const float eps = r->m->eps;
    Work *w = r->work;
    if (!l->experts) {
        Product up = {&l->gate_up, w->x, NULL, w->act, n, H, w->act_ld, STORE, l->norm2, eps, &l->down};
        Product down = {&l->down, w->act, NULL, w->x, n, w->act_ld, H, ADD, NULL, 0, then};
        product(r, phase, thread, &up);
        product(r, phase, thread, &down);
        return;
    }
    Product router = {&l->router, w->x, NULL, w->scores, n, H, w->scores_ld, STORE, l->norm2, eps, NULL};
    product(r, phase, thread, &router);
    route_rows(r, (*phase)++, thread, l);
    Items it = items_of(r, (*phase)++, thread, 1);
    if (take(&it) == 0) group(r, l);
    finish_phase(&it);
    expert_products(r, (*phase)++, thread, l, 1);
    expert_products(r, (*phase)++, thread, l, 0);
    combine_rows(r, (*phase)++, thread, l);
}

static int64_t largest(const float *row, int64_t columns) {
    float best = row[0];
    int64_t j = 0;
    vf high = splat(best);
    for (; j + VL <= columns; j += VL) {
        vf v = load(row + j);
        high = pick(v > high, v, high);
    }
    for (; j < columns; j++) best = row[j] > best ? row[j] : best;
    for (int l = 0; l < VL; l++) best = high[l] > best ? high[l] : best;
    for (j = 0; j < columns - 1 && row[j] != best;) j++;
    return j;
}

/* Ids that nobody knows, the best of each row of logits, and how sure it is */
static void close_rows(Run *r, int phase, int thread) {
    const Batch *b = r->b;
    Items it = items_of(r, phase, thread, b->k);
    for (int64_t i; (i = take(&it)) >= 0;) {
        float *row = b->logits + i * r->m->V;
        for (int64_t j = b->known; j < r->m->V; j++) row[j] = -INFINITY;
        b->best[i] = largest(row, b->known);
        if (b->sure) b->sure[i] = sure(row, b->known, row[b->best[i]]);
    }
    finish_phase(&it);
}

static void body(Run *r, int thread) {
    const Model *m = r->m;
    const Batch *whole = r->b, *b = whole;
    Work *w = r->work;
    const int H = m->H, width = (m->A + 2 * m->G) * m->D;
    int phase = 0;
    Batch there = *b; /* the rows that take part so far; counters are shared, so each thread may have its own */
    Run some = *r;
    there.n = rows_at(b, -1), some.b = b = &there, r = &some;
    embed(r, phase++, thread);
    for (int i = 0; i < m->layers_n; i++) {
        there.n = rows_at(whole, i);
        enter_rows(r, &phase, thread, i, w->x);
        const Layer *l = &m->layers[i];
        Product qkv = {&l->qkv, w->x, NULL, w->qkv, b->n, H, width, STORE, l->norm1, m->eps, &l->o};
        Product o = {&l->o, w->att, NULL, w->x, b->n, m->A * m->D, H, ADD, NULL, 0, l->experts ? NULL : &l->gate_up};
        tap_rows(r, &phase, thread, NULL, b->taps[i]);
        product(r, &phase, thread, &qkv);
        attention(r, &phase, thread, i, w->qkv, w->att, w->attention + thread * w->attention_each, w->keys);
        product(r, &phase, thread, &o);
        mlp(r, &phase, thread, l, i + 1 < m->layers_n ? &m->layers[i + 1].qkv : b->k ? &m->head : NULL);
    }
    there.n = rows_at(whole, m->layers_n);
    enter_rows(r, &phase, thread, m->layers_n, w->x);
    tap_rows(r, &phase, thread, NULL, b->taps[m->layers_n]);
    tap_rows(r, &phase, thread, m->norm, b->taps[m->layers_n + 1]);
    if (!b->k) return;
    Product head = {&m->head, w->x, b->logit_rows, b->logits, b->k, H, m->V, STORE, m->norm, m->eps, NULL};
    product(r, &phase, thread, &head);
    close_rows(r, phase++, thread);
}

/* ---- entry points ---- */

static int outside(const int32_t *x, int64_t n, int64_t limit) {
    int bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= x[i] < 0 || x[i] >= limit;
    return bad;
}

/* Are these the n + 1 borders of n parts of ``total`` things? */
static int no_borders(const int32_t *x, int64_t n, int64_t total) {
    int bad = x[0] != 0 || x[n] != total;
    for (int64_t i = 0; i < n; i++) bad |= x[i] > x[i + 1];
    return bad;
}

/* 0, or what is wrong with the runs: 1 a position beyond the angles, 7 anything else. */
static int bad_runs(const Model *m, const Batch *b) {
    if (!b->n_runs) return 0;
    if (no_borders(b->run_ptr, b->n, b->n_runs)) return 7;
    for (int64_t i = 0; i < b->n; i++) {
        const int q = b->context_of[i];
        const int32_t keys = b->context_ptr[q + 1] - b->context_ptr[q] + b->local_ptr[i + 1] - b->local_ptr[i];
        for (int32_t r = b->run_ptr[i], before = 0; r < b->run_ptr[i + 1]; before = b->run_start[r++])
            if (b->run_start[r] < before || b->run_start[r] > keys || b->run_at[r] < 0 ||
                (r == b->run_ptr[i] && b->run_start[r])) return 7;
    }
    return outside(b->run_at, b->n_runs, m->angles);
}

/* Sets the pointers to the integer arrays. 0, or what is wrong: 1 a position beyond the angles, 2 a token, 3 a slot,
   4 a context, 5 a local, logit or embedding row, 6 an entry, 7 a run. */
static int open_batch(const Model *m, Batch *b) {
    const int64_t n = b->n;
    b->positions = b->ints, b->slots = b->positions + n, b->context_of = b->slots + n;
    b->context_ptr = b->context_of + n, b->local_ptr = b->context_ptr + b->contexts + 1;
    b->context = b->local_ptr + n + 1, b->local = b->context + b->n_context;
    b->logit_rows = b->local + b->n_local, b->embed_rows = b->logit_rows + b->k;
    if (outside(b->slots, n, b->S)) return 3;
    if (outside(b->context_of, n, b->contexts) || outside(b->context, b->n_context, b->S) ||
        no_borders(b->context_ptr, b->contexts, b->n_context)) return 4;
    if (outside(b->local, b->n_local, n) || no_borders(b->local_ptr, n, b->n_local) ||
        outside(b->logit_rows, b->k, n) || outside(b->embed_rows, b->n_embeds, n)) return 5;
    if (bad_entries(m, b)) return 6;
    for (int64_t i = 0; i < n; i++)
        if ((b->tokens[i] < 0 || b->tokens[i] >= m->V) && given(b, i) < 0) return 2;
    return outside(b->positions, n, m->angles) ? 1 : bad_runs(m, b);
}

/* Places of all buffers in one piece of memory; its size. */
static size_t layout(const Model *m, const Batch *b, Work *w, char *at) {
    const int64_t n = b->n, pairs = n * (m->top_k ? m->top_k : 1);
    const size_t start = (size_t)at;
    w->keys = 0;
    for (int l = 0; l < m->layers_n; l++)
        if (m->layers[l].window) w->keys = 1;
    if (w->keys)
        for (int64_t i = 0; i < n; i++) {
            int64_t q = b->context_of[i];
            int64_t keys = b->context_ptr[q + 1] - b->context_ptr[q] + b->local_ptr[i + 1] - b->local_ptr[i] + 1;
            w->keys = keys > w->keys ? keys : w->keys;
        }
    w->act_ld = m->I, w->scores_ld = (m->experts + PW - 1) / PW * PW;
    w->attention_each = attention_bytes(m, w->keys);
#define TAKE(field, count) w->field = (void *)at, at += ALIGN((count) * 4)
    TAKE(x, n * m->H);
    TAKE(qkv, n * (m->A + 2 * m->G) * m->D);
    TAKE(att, n * m->A * m->D);
    TAKE(act, pairs * w->act_ld);
    TAKE(y, m->experts ? pairs * m->H : 0);
    TAKE(scores, n * w->scores_ld);
    TAKE(weights, pairs);
    TAKE(chosen, pairs);
    TAKE(row_of, pairs);
    TAKE(place, pairs);
    TAKE(starts, m->experts + 1);
    w->attention = at;
    return (size_t)at + w->attention_each * m->team.threads - start;
}

/* The memory of a forward, kept for the next; NULL when there is none. */
static char *scratch(Model *m, size_t bytes) {
    if (bytes > m->scratch_bytes) {
        free(m->scratch);
        m->scratch_bytes = bytes + bytes / 4;
        if (posix_memalign(&m->scratch, 64, m->scratch_bytes)) m->scratch = NULL, m->scratch_bytes = 0;
    }
    return m->scratch;
}

void stretto_free(Model *m) {
    free(m->scratch);
    m->scratch = NULL, m->scratch_bytes = 0;
}

int stretto_lanes(void) { return VL; }

/* 0, the code of open_batch(), or -1: out of memory. */
int stretto_forward(Model *m, Batch *b) {
    Work w;
    const int wrong = open_batch(m, b);
    if (wrong || !b->n) return wrong;
    const int64_t phases = ((m->layers_n + 1) * PHASES + 2 * b->n_entries + 15) / 16 * 16;
    const int64_t rows = b->n > b->k ? b->n : b->k;
    const int widest = m->A * m->D > m->I ? m->A * m->D : m->I, k = widest > m->H ? widest : m->H;
    const size_t counters = phases * sizeof(Counter), taken = ALIGN(m->team.threads * phases * 4);
    const size_t own_each = own_bytes(rows < FEW ? rows : FEW, k), all = own_bytes(rows, k);
    const size_t own = own_each * m->team.threads > all ? own_each * m->team.threads : all, bytes = layout(m, b, &w, 0);
    char *memory = scratch(m, counters + taken + own + bytes);
    if (!memory) return -1;
    layout(m, b, &w, memory + counters + taken + own);
    memset(memory, 0, counters + taken);
    for (int64_t i = 0; i < b->n; i++) b->pool_positions[b->slots[i]] = b->positions[i];
    Run r = {
        .body = body, .team = &m->team, .counters = (Counter *)memory, .taken = (int32_t *)(memory + counters),
        .phases = phases, .own = memory + counters + taken, .own_each = own_each, .m = m, .b = b, .work = &w};
    run_team(&r);
    return 0;
}

int stretto_halves(void) { return HALF; }

static void product_body(Run *r, int thread) {
    int phase = 0;
    Run own = *r;
    product(&own, &phase, thread, r->work);
}

/* out [n, N] = x [n, K] of the linear; 0, or -1: out of memory */
int stretto_linear(Team *team, const Mat *m, const float *x, int64_t n, float *out) {
    const size_t counters = 16 * sizeof(Counter), taken = ALIGN(team->threads * 16 * 4);
    const size_t own_each = own_bytes(n < FEW ? n : FEW, m->k), all = own_bytes(n, m->k);
    const size_t own = own_each * team->threads > all ? own_each * team->threads : all;
    void *memory;
    if (posix_memalign(&memory, 64, counters + taken + own)) return -1;
    memset(memory, 0, counters + taken);
    Product p = {m, x, NULL, out, n, m->k, m->n, STORE, NULL, 0, NULL};
    Run r = {
        .body = product_body, .team = team, .counters = memory, .taken = (int32_t *)((char *)memory + counters),
        .phases = 16, .own = (char *)memory + counters + taken, .own_each = own_each, .work = &p};
    run_team(&r);
    free(memory);
    return 0;
}

/* out [n]: the column of each row's largest value, the lowest of equals */
void stretto_argmax(const float *x, int64_t n, int64_t columns, int64_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = largest(x + i * columns, columns);
}
