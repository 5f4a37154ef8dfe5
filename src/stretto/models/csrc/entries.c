/* Rows that enter in mid-stack: the last rows of the batch, so that those of a layer are the first ones. */
#include "native.h"

int64_t rows_at(const Batch *b, int layer) {
    for (int64_t e = 0; e < b->n_entries; e++)
        if (b->entries[e].layer > layer) return b->entries[e].first;
    return b->n;
}

/* Entries must be by layer, their rows the last in a row, their sources there before, and no row may see one that
   enters later than itself. */
int bad_entries(const Model *m, const Batch *b) {
    int64_t next = b->n;
    for (int64_t e = b->n_entries; e-- > 0; next = b->entries[e].first) {
        const Entry *x = &b->entries[e];
        if (x->layer < 0 || x->layer > m->layers_n || x->n < 1 || x->first < 0 || x->first + x->n != next) return 1;
        if (e && x->layer < b->entries[e - 1].layer) return 1;
        const int64_t before = rows_at(b, x->layer - 1);
        for (int32_t i = 0; i < x->n; i++)
            if (x->sources[i] < 0 || x->sources[i] >= before) return 1;
    }
    if (!b->n_entries) return 0;
    for (int64_t i = 0, e = -1; i < b->n; i++) {
        while (e + 1 < b->n_entries && i >= b->entries[e + 1].first) e++;
        const int64_t seen = rows_at(b, e < 0 ? -1 : b->entries[e].layer);
        for (int32_t j = b->local_ptr[i]; j < b->local_ptr[i + 1]; j++)
            if (b->local[j] >= seen) return 1;
    }
    return 0;
}

void enter_rows(Run *r, int *phase, int thread, int layer, float *x) {
    const int H = r->m->H;
    for (int64_t e = 0; e < r->b->n_entries; e++) {
        const Entry *n = &r->b->entries[e];
        if (n->layer != layer) continue;
        Product p = {n->matrix, x, n->sources, x + (int64_t)n->first * H, n->n, H, H, STORE, NULL, 0, NULL};
        product(r, phase, thread, &p);
    }
}
