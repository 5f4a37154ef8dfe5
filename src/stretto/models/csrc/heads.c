/* Chains of guesses by light parts, for one text: Clover's heads, EAGLE's layer. A guess is the best token of its law;
   the next one knows it. */
#include "native.h"

int stretto_forward(Model *m, Batch *b);
int stretto_linear(Team *team, const Mat *m, const float *x, int64_t n, float *out);
void stretto_argmax(const float *x, int64_t n, int64_t columns, int64_t *out);

typedef struct { /* what Python fills in (native_library.py), like the structures below */
    int64_t most, known, classes; /* known: columns of the head that count */
    const Mat *head;
    const float *borders, *rates; /* [classes - 1] ascending, [most][classes] */
    float *logits;                /* [columns of the head] */
    int64_t *tokens;              /* [most] */
    float *sure;                  /* [most]: probabilities of the guesses */
    float gain, least; /* ends behind the guess with which gain * (product of its rates) < least */
} Guesses;

typedef struct {
    int64_t version, H, A, root;
    const float *e, *keys, *values; /* [V, H] of the vocabulary; keys of length 1 in each of A parts */
    const float *norm, *out_norm;   /* [H]; out_norm: version 2 */
    const Mat *query, *mats;        /* mats: version 1: one a depth; version 2: the first, and that of all later ones */
    float *work;                    /* [5 H]: h, g and e, a product, the head's input */
    float eps, unused;
} Heads;

typedef struct {
    const void *embed; /* [V, H] of the target */
    int64_t embed_bf16, normed; /* normed: the head reads the final-normed output */
    const Mat *entry;  /* [embedding; feature] -> input of the layer */
    const int64_t *zeros; /* [given] */
    float *features;   /* [given, H]; the first row is written over */
    float *inputs, *x, *out; /* [given, 2 H], [given, H], [given, H]: out is a tap of the batch */
    float *final;      /* [given, H]: the other tap, where ``normed`` */
} Features;

/* Guess number ``i`` from the head's input x: 0 = go on, 1 = the last, -1 = out of memory */
static int guess(Team *team, Guesses *g, int64_t i, const float *x) {
    if (stretto_linear(team, g->head, x, 1, g->logits)) return -1;
    stretto_argmax(g->logits, 1, g->known, g->tokens + i);
    const float p = sure(g->logits, g->known, g->logits[g->tokens[i]]);
    int64_t k = 0;
    while (k < g->classes - 1 && p >= g->borders[k]) k++;
    g->sure[i] = p;
    g->gain *= g->rates[i * g->classes + k];
    return i + 1 == g->most || g->gain < g->least;
}

/* g = h + cos(q, k) v in each of the A parts */
static void attend(const Heads *c, const float *h, const float *q, int64_t token, float *g) {
    const int64_t D = c->H / c->A;
    const float *k = c->keys + token * c->H, *v = c->values + token * c->H;
    for (int64_t a = 0; a < c->H; a += D) {
        float dot = 0, square = 0;
        for (int64_t j = a; j < a + D; j++) dot += q[j] * k[j], square += q[j] * q[j];
        const float length = sqrtf(square), weight = dot / (length > 1e-12f ? length : 1e-12f);
        for (int64_t j = a; j < a + D; j++) g[j] = h[j] + weight * v[j];
    }
}

/* The state of depth ``i`` from the one before, in h; 0, or -1: out of memory */
static int advance(Team *team, const Heads *c, int64_t i, int64_t token) {
    const int64_t H = c->H;
    float *h = c->work, *g = h + H, *y = h + 3 * H, *x = h + 4 * H;
    if (c->version == 2 && !i) {
        if (stretto_linear(team, c->mats, h, 1, y)) return -1;
        memcpy(h, y, H * sizeof *h);
        return 0;
    }
    rms_norm(h, c->norm, (int)H, c->eps, x);
    if (stretto_linear(team, c->query, x, 1, y)) return -1;
    attend(c, h, y, token, g);
    if (c->version == 2) {
        memcpy(g + H, c->e + token * H, H * sizeof *h);
        return stretto_linear(team, c->mats + 1, g, 1, h);
    }
    if (stretto_linear(team, c->mats + i, g, 1, y)) return -1;
    for (int64_t j = 0; j < H; j++) h[j] = g[j] + y[j] / (1 + expf(-y[j]));
    return 0;
}

/* How many tokens Clover's heads guessed behind ``root`` from h_0 (the first H of work), or -1: out of memory */
int64_t stretto_heads(Team *team, Heads *c, Guesses *g) {
    Team alone = {NULL, 1};
    float *x = c->work + 4 * c->H;
    for (int64_t i = 0;; i++) {
        if (advance(&alone, c, i, i ? g->tokens[i - 1] : c->root)) return -1;
        if (c->version == 2) rms_norm(c->work, c->out_norm, (int)c->H, c->eps, x);
        const int end = guess(team, g, i, c->version == 2 ? x : c->work);
        if (end) return end < 0 ? -1 : i + 1;
    }
}

/* How many tokens EAGLE's layer guessed, or -1 - code as stretto_chain() does */
int64_t stretto_features(Model *m, Batch *b, Chain *c, Features *f, Guesses *g) {
    const int64_t H = m->H;
    Team alone = {NULL, 1};
    for (int64_t i = 0;; i++) {
        const int64_t rows = i ? 1 : c->given, at = i ? c->given + i - 1 : 0;
        for (int64_t r = 0; r < rows; r++) {
            float *in = f->inputs + r * 2 * H;
            const int64_t first = c->tokens[at + r] * H;
            for (int64_t j = 0; j < H; j++)
                in[j] = f->embed_bf16 ? bf16_to_float(((const uint16_t *)f->embed)[first + j]) : ((const float *)f->embed)[first + j];
            memcpy(in + H, f->features + r * H, H * sizeof *in);
        }
        if (stretto_linear(rows > 4 ? &m->team : &alone, f->entry, f->inputs, rows, f->x)) return -1;
        int32_t *end = lay_chain(b, c, at, rows);
        for (int64_t r = 0; r < rows; r++) end[r] = (int32_t)r;
        b->k = 0, b->tokens = f->zeros, b->n_embeds = rows, b->embeds = f->x;
        const int code = stretto_forward(m, b);
        if (code) return code < 0 ? -1 : -1 - code;
        const float *last = f->out + (rows - 1) * H;
        memcpy(f->features, last, H * sizeof *last);
        const int over = guess(&m->team, g, i, f->normed ? f->final + (rows - 1) * H : last);
        c->tokens[c->given + i] = g->tokens[i];
        if (over) return over < 0 ? -1 : i + 1;
    }
}
