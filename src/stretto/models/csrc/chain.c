/* A greedy continuation of one text: forwards one after the other, the best token of each the row of the next. */
#include "native.h"

int stretto_forward(Model *m, Batch *b);

/* The batch of ``rows`` causal rows from token number ``at`` on, over everything before them; where its integers for
   rows with logits begin, of which the last row is the only one */
int32_t *lay_chain(Batch *b, const Chain *c, int64_t at, int64_t rows) {
    const int64_t keys = c->cached + at;
    int32_t *i = c->ints;
    b->n = rows, b->contexts = 1, b->n_context = keys, b->n_local = rows * (rows + 1) / 2, b->k = 1;
    b->tokens = c->tokens + at, b->ints = i;
    for (int64_t r = 0; r < rows; r++) *i++ = (int32_t)(c->position + at + r);
    for (int64_t r = 0; r < rows; r++) *i++ = c->slots[at + r];
    for (int64_t r = 0; r < rows; r++) *i++ = 0;
    *i++ = 0, *i++ = (int32_t)keys;
    for (int64_t r = 0; r <= rows; r++) *i++ = (int32_t)(r * (r + 1) / 2);
    memcpy(i, c->context, c->cached * sizeof *i), i += c->cached;
    memcpy(i, c->slots, at * sizeof *i), i += at;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j <= r; j++) *i++ = (int32_t)j;
    *i = (int32_t)(rows - 1);
    return i;
}

/* How many tokens were made, or -1 - code with the code of stretto_forward(), -1 - 0 for -1: out of memory. */
int64_t stretto_chain(Model *m, Batch *b, Chain *c) {
    for (int64_t made = 0; made < c->most; made++) {
        lay_chain(b, c, made ? c->given + made - 1 : 0, made ? 1 : c->given);
        const int code = stretto_forward(m, b);
        if (code) return code < 0 ? -1 : -1 - code;
        const int64_t best = *b->best;
        c->tokens[c->given + made] = best;
        if (!c->classes) continue;
        const float p = sure(b->logits, b->known, b->logits[best]);
        int32_t k = 0;
        while (k < c->classes - 1 && p >= c->borders[k]) k++;
        c->found[made] = k;
        c->gain *= c->rates[k];
        if (c->gain * c->rates[k] < c->least) return made + 1;
    }
    return c->most;
}
