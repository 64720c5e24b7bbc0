/* Policies beside R-KV, biases, and R-KV with more votes than the window: rkv_cuda.cu against the
 * CPU, over several rounds of one cache. Included by test_cuda.cc, whose `mirrored` it uses.
 * Every round starts on the CPU from what the device holds, so errors do not add up, and what the
 * device carries is what the next round works on. */
#ifndef RKV_TESTS_CUDA_POLICIES_H
#define RKV_TESTS_CUDA_POLICIES_H

/* One layer with all it points to, in host memory. */
struct policy_layer {
    view keys, values, queries;
    std::vector<int32_t> positions, kept;
    std::vector<uint8_t> pins;
    std::vector<float> state, bias, scores, shared, means;
    rkv_layer layer;
};
struct policy_trial {
    rkv_config config;
    std::vector<float> frequencies;
    std::vector<policy_layer> cpu, gpu, whole; /* whole: rkv_compress instead of three stages */
    int capacity, next_position, first_query;
};

static bool remembers(const rkv_config &config)
{
    return rkv_state_floats(&config) == 2;
}
static int votes_of(const rkv_config &config)
{
    return config.votes ? config.votes : config_window(&config);
}
template <typename T> static T *data_of(std::vector<T> &list)
{
    return list.empty() ? NULL : list.data();
}
static size_t product(int a, int b)
{
    return static_cast<size_t>(a) * static_cast<size_t>(b);
}

struct policy_shape {
    int heads, group, dim, value_dim;
    rkv_dtype dtype, key_dtype;
    layout keys, values, queries;
    bool leads, biased, pinned_rows;
    rkv_rope rope;
    float scale, softcap;
};

static void policy_layer_make(policy_layer *out, rng *r, const policy_trial &t,
                              const policy_shape &s)
{
    const rkv_config &config = t.config;
    const size_t capacity = static_cast<size_t>(t.capacity);
    const int sets = config.scope == RKV_PER_HEAD ? s.heads : s.leads;
    const int stride = t.capacity + 3;
    const size_t candidates = capacity;
    rkv_layer *layer = &out->layer;
    memset(layer, 0, sizeof *layer);
    view_make(&out->keys, r, s.keys, s.key_dtype, 0, s.heads, t.capacity, s.dim, 0);
    view_make(&out->values, r, s.values, s.key_dtype, 0, s.heads, t.capacity, s.value_dim, 0);
    view_make(&out->queries, r, s.queries, s.dtype, 0, s.heads * s.group, votes_of(config), s.dim,
              0);
    out->positions.assign(product(sets, stride), 0);
    out->kept.assign(product(sets, config.budget), -1);
    out->pins.assign(s.pinned_rows ? product(sets, stride) : 0, 0);
    out->state.assign(product(s.heads * rkv_state_floats(&config), stride), 7.0f);
    out->bias.assign(s.biased ? product(s.heads, stride) : 0, 0);
    out->scores.assign(static_cast<size_t>(s.heads) * candidates, NAN);
    out->shared.assign(sets && config.scope != RKV_PER_HEAD ? candidates : 0, NAN);
    out->means.assign(rkv_query_means_floats(s.heads * s.group, s.dim), 0);
    for (size_t i = 0; i < out->means.size(); i++)
        out->means[i] = static_cast<float>(rng_normal(r));
    layer->scale = s.scale;
    layer->softcap = s.softcap;
    layer->rope = s.rope;
    layer->row_stride = stride;
    layer->sequence = 1;
}

/* Pointers to this copy's own memory. */
static void policy_layer_point(policy_layer *l)
{
    rkv_layer *layer = &l->layer;
    layer->keys = l->keys.tensor;
    layer->values = l->values.tensor;
    layer->queries = l->queries.tensor;
    layer->positions = data_of(l->positions);
    layer->kept = data_of(l->kept);
    layer->pins = data_of(l->pins);
    layer->state = data_of(l->state);
    layer->bias = data_of(l->bias);
    layer->scores = data_of(l->scores);
    layer->shared_scores = data_of(l->shared);
    layer->query_means = data_of(l->means);
}
static void policy_layer_copy(policy_layer *to, const policy_layer &from)
{
    memcpy(to->keys.memory.data, from.keys.memory.data, from.keys.memory.bytes);
    memcpy(to->values.memory.data, from.values.memory.data, from.values.memory.bytes);
    memcpy(to->queries.memory.data, from.queries.memory.data, from.queries.memory.bytes);
    to->positions = from.positions;
    to->kept = from.kept;
    to->pins = from.pins;
    to->state = from.state;
    to->bias = from.bias;
    to->scores = from.scores;
    to->shared = from.shared;
    to->means = from.means;
    to->layer = from.layer;
    policy_layer_point(to);
}
static void policy_free(policy_trial *t)
{
    std::vector<policy_layer> *const sides[] = { &t->cpu, &t->gpu, &t->whole };
    for (std::vector<policy_layer> *side : sides)
        for (policy_layer &l : *side) {
            view_free(&l.keys);
            view_free(&l.values);
            view_free(&l.queries);
        }
}

/* Every byte that a call may write, and what it reads. */
static void expect_same_layers(const char *at, const policy_layer &a, const policy_layer &b)
{
    expect_bytes(at, a.keys.memory.data, b.keys.memory.data, a.keys.memory.bytes);
    expect_bytes(at, a.values.memory.data, b.values.memory.data, a.values.memory.bytes);
    expect_bytes(at, a.positions.data(), b.positions.data(), a.positions.size() * 4);
    expect_bytes(at, a.pins.data(), b.pins.data(), a.pins.size());
    expect_bytes(at, a.bias.data(), b.bias.data(), a.bias.size() * 4);
    expect_bytes(at, a.state.data(), b.state.data(), a.state.size() * 4);
    expect_bytes(at, a.kept.data(), b.kept.data(), a.kept.size() * 4);
    expect_int(at, 0, a.layer.n_tokens, b.layer.n_tokens);
    expect_int(at, 1, a.layer.n_kept, b.layer.n_kept);
    expect_int(at, 2, a.layer.n_new, b.layer.n_new);
}

static void store_row(view *v, int head, int token, const std::vector<float> &row)
{
    std::vector<unsigned char> bytes(row_bytes(v->tensor.dtype, v->tensor.dim) + 1);
    encode_row(v->tensor.dtype, row.data(), v->tensor.dim, bytes.data());
    for (int i = 0; i < v->n_elements; i++)
        memcpy(view_at(v, head, token, i), &bytes[static_cast<size_t>(i) * v->element], v->element);
}

/* A row of a head: something common, something of its own; some say an earlier thing again. */
static std::vector<float> any_row(rng *r, int dim, int head)
{
    std::vector<float> row(static_cast<size_t>(dim));
    const int topic = rng_below(r, 12);
    rng common = rng_seed(static_cast<uint64_t>(100 + head));
    rng of_topic = rng_seed(static_cast<uint64_t>(1000 + 50 * head + topic));
    for (float &x : row)
        x = static_cast<float>(0.6 * rng_normal(&common) + 0.5 * rng_normal(&of_topic) +
                               (topic ? 0.3 : 1.0) * rng_normal(r));
    return row;
}

/* n new tokens in all layers of the device's side, and a ring of queries. */
static void policy_append(policy_trial *t, rng *r, int n)
{
    const int first = t->gpu[0].layer.n_tokens, votes = votes_of(t->config);
    t->first_query = rng_below(r, votes);
    for (policy_layer &l : t->gpu) {
        rkv_layer *layer = &l.layer;
        const size_t stride = static_cast<size_t>(layer->row_stride);
        for (int row = first; row < first + n; row++) {
            for (int h = 0; h < layer->keys.heads; h++) {
                store_row(&l.keys, h, row, any_row(r, layer->keys.dim, h));
                store_row(&l.values, h, row, any_row(r, layer->values.dim, h));
            }
            const size_t at = static_cast<size_t>(row);
            for (size_t i = at; i < l.positions.size(); i += stride)
                l.positions[i] = t->next_position + row - first;
            for (size_t i = at; i < l.pins.size(); i += stride) l.pins[i] = rng_below(r, 40) == 0;
            for (size_t i = at; i < l.bias.size(); i += stride)
                l.bias[i] = static_cast<float>(0.05 * rng_normal(r));
        }
        for (int h = 0; h < layer->queries.heads; h++)
            for (int slot = 0; slot < votes; slot++)
                store_row(&l.queries, h, slot, any_row(r, layer->keys.dim, h));
        layer->first_query = t->first_query;
        layer->n_tokens += n;
        if (rkv_state_floats(&t->config)) layer->n_new += n;
    }
    t->next_position += n;
}

static rkv_status policy_call(stage_function call, const rkv_backend *backend,
                              const rkv_config &config, std::vector<policy_layer> *side)
{
    std::vector<rkv_layer> layers;
    std::vector<unsigned char> workspace;
    size_t bytes = 0;
    for (policy_layer &l : *side) {
        policy_layer_point(&l);
        layers.push_back(l.layer);
    }
    const int n = static_cast<int>(layers.size());
    rkv_status status = rkv_workspace_size(backend, &config, layers.data(), n, &bytes);
    workspace.resize(bytes);
    if (status == RKV_OK)
        status = call(backend, &config, layers.data(), n, workspace.data(), bytes);
    for (size_t i = 0; i < layers.size(); i++) (*side)[i].layer = layers[i];
    return status;
}

/* ---- Judging a round ------------------------------------------------------------------------- */

/* ranks[i]: of x[i] among n; of equal ones the more recent is above. */
static std::vector<int> ranks_of(const float *x, int n)
{
    std::vector<int> ranks(static_cast<size_t>(n), 0);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            ranks[static_cast<size_t>(i)] += x[j] < x[i] || (!(x[i] < x[j]) && j < i);
    return ranks;
}
static int near_to(const float *x, int n, int i, double within)
{
    int count = 0;
    for (int j = 0; j < n; j++)
        count += fabs(static_cast<double>(x[j]) - static_cast<double>(x[i])) <= within;
    return count;
}

static double largest_of(const float *x, int n)
{
    double largest = 0;
    for (int j = 0; j < n; j++) largest = fmax(largest, fabs(static_cast<double>(x[j])));
    return largest;
}

/* MEMORY: scores follow exactly from the device's own state; they differ from the CPU's where ranks
 * of near ties do. Returns by how much at most. */
static double judge_ranks(const policy_trial &t, const policy_layer &gpu, const policy_layer &cpu,
                          int h, int n, const float *got, const float *want)
{
    const bool ranked = t.config.policy == RKV_POLICY_MEMORY_TRACES;
    const size_t stride = static_cast<size_t>(gpu.layer.row_stride);
    const size_t at = static_cast<size_t>(2 * h) * stride;
    const float *importance = &gpu.state[at], *similarity = &gpu.state[at + stride];
    const float *of_cpu = &cpu.state[at], *later = &cpu.state[at + stride];
    const float lambda = t.config.lambda, share = 1.0f / static_cast<float>(n);
    const float *bias = gpu.bias.empty() ? NULL : &gpu.bias[static_cast<size_t>(h) * stride];
    const std::vector<int> a = ranks_of(importance, n), b = ranks_of(similarity, n);
    double most = 1e-5;
    for (int j = 0; j < n; j++) {
        const size_t i = static_cast<size_t>(j);
        const float other = ranked ? static_cast<float>(b[i]) : similarity[j];
        float score = fmaf(-(1.0f - lambda), other,
                           (ranked ? lambda : lambda * share) * static_cast<float>(a[i]));
        if (ranked) score *= share;
        if (bias) score += bias[j];
        if (!expect_near("score, given the state", j, static_cast<double>(got[j]),
                         static_cast<double>(score), 1e-6))
            return most;
        const double near_ties = near_to(of_cpu, n, j, 2e-5) + near_to(later, n, j, 2e-5) - 2;
        const double tolerance = near_ties / n + 2e-5;
        most = fmax(most, tolerance);
        if (!expect_near("score", j, static_cast<double>(got[j]), static_cast<double>(want[j]),
                         tolerance))
            return most;
    }
    return most;
}

static double judge_policy_scores(const policy_trial &t, const policy_layer &gpu,
                                  const policy_layer &cpu, int h)
{
    const int n = gpu.layer.n_tokens - config_window(&t.config);
    const size_t at = static_cast<size_t>(h) * static_cast<size_t>(n);
    const float *got = &gpu.scores[at], *want = &cpu.scores[at];
    if (remembers(t.config)) return judge_ranks(t, gpu, cpu, h, n, got, want);
    if (t.config.policy == RKV_POLICY_RKV) return judge_scores("score", &t.config, got, want, n);
    const double tolerance = 1e-5 * fmax(largest_of(want, n), 1e-6);
    for (int j = 0; j < n; j++) {
        worst_score =
            fmax(worst_score, 1e-5 / tolerance *
                                  fabs(static_cast<double>(got[j]) - static_cast<double>(want[j])));
        if (!expect_near("score", j, static_cast<double>(got[j]), static_cast<double>(want[j]),
                         tolerance))
            break;
    }
    return tolerance;
}

static void judge_policy_state(const policy_trial &t, const policy_layer &gpu,
                               const policy_layer &cpu)
{
    const int planes = gpu.layer.keys.heads * rkv_state_floats(&t.config);
    for (int plane = 0; plane < planes; plane++) {
        const size_t at = product(plane, gpu.layer.row_stride);
        const double largest = fmax(largest_of(&cpu.state[at], gpu.layer.n_tokens), 1e-6);
        for (int j = 0; j < gpu.layer.row_stride; j++)
            if (!expect_near(plane % 2 ? "state, odd planes" : "state, even planes", j,
                             static_cast<double>(gpu.state[at + static_cast<size_t>(j)]),
                             static_cast<double>(cpu.state[at + static_cast<size_t>(j)]),
                             1e-5 * largest))
                break;
    }
}

/* The kept set of the device follows from its own scores; what only one of the two keeps is a near
 * tie. */
static void judge_policy_set(const policy_trial &t, const policy_layer &gpu,
                             const policy_layer &cpu, int set, int n_tokens, double tolerance)
{
    const rkv_config &config = t.config;
    const int n = n_tokens - config_window(&config);
    const size_t at = product(set, config.budget), row_at = product(set, gpu.layer.row_stride);
    const bool per_head = config.scope == RKV_PER_HEAD;
    const float *got = per_head ? &gpu.scores[product(set, n)] : gpu.shared.data();
    const float *want = per_head ? &cpu.scores[product(set, n)] : cpu.shared.data();
    const uint8_t *pins = gpu.pins.empty() ? NULL : &gpu.pins[row_at];
    std::vector<double> exact(got, got + n);
    std::vector<int32_t> chosen(static_cast<size_t>(n_tokens));
    std::vector<char> differs(static_cast<size_t>(n_tokens), 0);
    double gap, cut = INFINITY;
    const int n_kept = oracle_select(&config, exact.data(), pins, n_tokens, chosen.data(), &gap);
    for (int k = 0; k < n_kept; k++) {
        const size_t i = static_cast<size_t>(k);
        const int32_t row = cpu.kept[at + i];
        if (!expect_int("kept, given the scores", k, gpu.kept[at + i], chosen[i])) return;
        differs[static_cast<size_t>(chosen[i])] ^= 1;
        differs[static_cast<size_t>(row)] ^= 1;
        if (row >= config.pinned && row < n_tokens - config_protect(&config) &&
            !(pins && pins[row]))
            cut = fmin(cut, static_cast<double>(want[row]));
    }
    bool equal = true;
    for (int j = 0; j < n; j++)
        if (differs[static_cast<size_t>(j)]) {
            equal = false;
            expect_near("kept by one only, so near the cut", j, static_cast<double>(want[j]), cut,
                        2 * tolerance);
        }
    (equal ? sets_equal : sets_differ_in_ties)++;
}

/* Scores and states after rkv_score; the largest tolerance of each layer's heads. */
static std::vector<double> judge_scored(const policy_trial &t)
{
    std::vector<double> tolerances;
    double sum = 0;
    const int n = t.gpu[0].layer.n_tokens - config_window(&t.config);
    for (size_t l = 0; l < t.gpu.size(); l++) {
        double most = 0;
        judge_policy_state(t, t.gpu[l], t.cpu[l]);
        for (int h = 0; h < t.gpu[l].layer.keys.heads; h++)
            most = fmax(most, judge_policy_scores(t, t.gpu[l], t.cpu[l], h));
        tolerances.push_back(most);
        sum += most;
    }
    for (size_t l = 0; l < t.gpu.size(); l++) {
        if (t.config.scope == RKV_PER_LAYER) sum = tolerances[l];
        if (t.config.scope == RKV_PER_HEAD || t.gpu[l].shared.empty()) continue;
        tolerances[l] = sum + 1e-6;
        for (int j = 0; j < n; j++)
            if (!expect_near(
                    "shared score", j, static_cast<double>(t.gpu[l].shared[static_cast<size_t>(j)]),
                    static_cast<double>(t.cpu[l].shared[static_cast<size_t>(j)]), tolerances[l]))
                break;
    }
    return tolerances;
}

static bool policy_round(policy_trial *t)
{
    const rkv_backend *best = rkv_backend_find(NULL);
    const int n = t->gpu[0].layer.n_tokens;
    const bool scored =
        n > t->config.budget && t->config.budget > config_protect(&t->config) + t->config.pinned;
    for (size_t l = 0; l < t->gpu.size(); l++) {
        policy_layer_copy(&t->cpu[l], t->gpu[l]);
        policy_layer_copy(&t->whole[l], t->gpu[l]);
    }
    const rkv_status want = policy_call(rkv_score, best, t->config, &t->cpu);
    if (!expect_status("rkv_score on the CPU", want, RKV_OK)) return false;
    if (!expect_status("rkv_score", policy_call(rkv_score, &mirrored, t->config, &t->gpu), want))
        return false;
    std::vector<double> tolerances(t->gpu.size(), 0);
    if (scored) tolerances = judge_scored(*t);
    const rkv_status selected = policy_call(rkv_select, best, t->config, &t->cpu);
    expect_status("rkv_select", policy_call(rkv_select, &mirrored, t->config, &t->gpu), selected);
    if (selected != RKV_OK) return false; /* too many pins */
    for (size_t l = 0; l < t->gpu.size(); l++) {
        const int sets = static_cast<int>(t->gpu[l].kept.size()) / t->config.budget;
        for (int set = 0; set < sets && scored; set++)
            judge_policy_set(*t, t->gpu[l], t->cpu[l], set, n, tolerances[l]);
        t->cpu[l].kept = t->gpu[l].kept;
        t->cpu[l].state = t->gpu[l].state;
    }
    expect_status("rkv_compact on the CPU", policy_call(rkv_compact, best, t->config, &t->cpu),
                  RKV_OK);
    expect_status("rkv_compact", policy_call(rkv_compact, &mirrored, t->config, &t->gpu), RKV_OK);
    expect_status("rkv_compress", policy_call(rkv_compress, &mirrored, t->config, &t->whole),
                  RKV_OK);
    for (size_t l = 0; l < t->gpu.size(); l++) {
        expect_same_layers("compacted", t->gpu[l], t->cpu[l]);
        expect_same_layers("in one call", t->whole[l], t->gpu[l]);
    }
    return true;
}

/* ---- Generated histories --------------------------------------------------------------------- */

static rkv_rope any_rope(rng *r, policy_trial *t, int dim)
{
    static const int bases[] = { 0, 0, 500000, 10 };
    rkv_rope rope;
    memset(&rope, 0, sizeof rope);
    rope.pairing = static_cast<rkv_pairing>(RKV_ROPE_NONE + rng_below(r, 3));
    if (dim < 2) rope.pairing = RKV_ROPE_NONE;
    rope.base = static_cast<float>(RNG_PICK(r, bases));
    if (dim % 2 || rng_below(r, 3) == 0) rope.dims = dim < 2 ? 0 : 2 + 2 * rng_below(r, dim / 2);
    if (rng_below(r, 3) || rope.pairing == RKV_ROPE_NONE) return rope;
    if (t->frequencies.empty())
        for (int f = 0; f < 300; f++)
            t->frequencies.push_back(static_cast<float>(exp(-0.1 * f) * rng_unit(r)));
    rope.frequencies = t->frequencies.data();
    return rope;
}

static rkv_config any_policy_config(rng *r, rkv_policy policy)
{
    static const int windows[] = { 0, 0, 1, 2, 17 }, votes[] = { 0, 1, 3, 32, 32, 40 };
    static const int pools[] = { 0, 1, 5, 6 }, lambdas[] = { 10, 30, 50, 50, 100 };
    static const int budgets[] = { 48, 64, 80, 130 };
    rkv_config c = rkv_config_default(RNG_PICK(r, budgets));
    c.policy = policy;
    c.window = RNG_PICK(r, windows);
    c.pinned = rng_below(r, 3) ? 0 : 4;
    c.protect = rng_below(r, 3) ? 0 : c.budget / 2;
    c.votes = RNG_PICK(r, votes);
    c.pool = RNG_PICK(r, pools);
    c.mean_pool = rng_below(r, 2);
    c.lambda = static_cast<float>(RNG_PICK(r, lambdas)) / 100.0f;
    c.variant = static_cast<rkv_variant>(rng_below(r, 3) == 0);
    c.decay = rng_below(r, 2) ? 0.0f : 0.9f;
    c.seed = static_cast<uint32_t>(rng_next(r));
    c.scope = static_cast<rkv_scope>(rng_below(r, 2) ? 0 : rng_below(r, 3));
    return c;
}

static policy_shape any_policy_shape(rng *r, policy_trial *t, bool leads)
{
    static const int dims[] = { 8, 16, 31, 64, 64, 80, 128 }, groups[] = { 1, 2, 4, 7 };
    static const rkv_dtype types[] = { RKV_F32, RKV_F16, RKV_BF16 };
    static const rkv_dtype others[] = { RKV_F8_E4M3, RKV_F8_E5M2, RKV_Q8_0, RKV_F16 };
    policy_shape s;
    memset(&s, 0, sizeof s);
    s.heads = 1 + rng_below(r, 2);
    s.group = RNG_PICK(r, groups);
    s.dim = RNG_PICK(r, dims);
    s.value_dim = 1 + rng_below(r, 20);
    s.dtype = s.key_dtype = types[rng_below(r, 3)];
    if (rng_below(r, 4) == 0) s.key_dtype = others[rng_below(r, 4)];
    if (s.key_dtype == RKV_Q8_0) s.dim = (s.dim + 31) / 32 * 32, s.value_dim = 32;
    s.keys = static_cast<layout>(rng_below(r, N_KEY_LAYOUTS));
    s.values = static_cast<layout>(rng_below(r, N_KEY_LAYOUTS));
    s.queries = static_cast<layout>(rng_below(r, N_KEY_LAYOUTS));
    s.leads = leads;
    s.biased = rng_below(r, 2);
    s.pinned_rows = leads && rng_below(r, 3) == 0;
    s.rope = any_rope(r, t, s.dim);
    s.scale = rng_below(r, 3) ? 0.0f : 0.2f;
    s.softcap = rng_below(r, 4) ? 0.0f : 3.0f;
    return s;
}

static void policy_trial_make(policy_trial *t, rng *r, rkv_policy policy)
{
    const int n_layers = 1 + rng_below(r, 2);
    t->config = any_policy_config(r, policy);
    t->capacity = t->config.budget + 40 + rng_below(r, 90);
    t->next_position = rng_below(r, 3) ? 0 : 1000000;
    t->first_query = 0;
    for (int l = 0; l < n_layers; l++) {
        const bool leads = l == 0 || t->config.scope != RKV_PER_SEQUENCE;
        const policy_shape s = any_policy_shape(r, t, leads);
        rng again[3] = { *r, *r, *r };
        std::vector<policy_layer> *const sides[] = { &t->cpu, &t->gpu, &t->whole };
        for (int side = 0; side < 3; side++) {
            policy_layer made;
            policy_layer_make(&made, &again[side], *t, s);
            sides[side]->push_back(made);
            policy_layer_point(&sides[side]->back());
        }
        *r = again[0];
    }
}

static const char *policy_name(rkv_policy policy)
{
    static const char *const names[] = { "R-KV",         "MEMORY_TRACES", "MEMORY_PROSE", "H2O",
                                         "TRIATTENTION", "RANDOM",        "OWN_SCORE" };
    return names[policy];
}

static void test_policy(uint64_t seed)
{
    enum { ROUNDS = 3 };
    rng r = rng_seed(seed);
    policy_trial t;
    policy_trial_make(&t, &r, static_cast<rkv_policy>(seed % 7));
    const rkv_layer &layer = t.gpu[0].layer;
    const rkv_config &c = t.config;
    case_begin("build/tests/test_cuda policy %lu 1: %s H%d G%d d%d keys %s queries %s, pairing %d "
               "dims %d budget %d window %d votes %d protect %d lambda %.2f scope %d, %d layers",
               static_cast<unsigned long>(seed), policy_name(c.policy), layer.keys.heads,
               layer.queries.heads / layer.keys.heads, layer.keys.dim, dtype_name(layer.keys.dtype),
               dtype_name(layer.queries.dtype), layer.rope.pairing, layer.rope.dims, c.budget,
               c.window, c.votes, c.protect, static_cast<double>(c.lambda), c.scope,
               static_cast<int>(t.gpu.size()));
    shim_order_is(static_cast<int>(seed / 7 % 6));
    for (int round = 0; round < ROUNDS; round++) {
        const int room = t.capacity - t.gpu[0].layer.n_tokens;
        policy_append(&t, &r, round == 0 || rng_below(&r, 3) == 0 ? room : 1 + rng_below(&r, room));
        if (!policy_round(&t)) break;
    }
    shim_order_is(0);
    case_end();
    policy_free(&t);
}

/* ---- Chosen histories ------------------------------------------------------------------------ */

static policy_shape plain_policy_shape(int heads, int group, int dim, rkv_dtype dtype)
{
    policy_shape s;
    memset(&s, 0, sizeof s);
    s.heads = heads;
    s.group = group;
    s.dim = dim;
    s.value_dim = 4;
    s.dtype = s.key_dtype = dtype;
    s.leads = true;
    s.rope.pairing = RKV_ROPE_HALVES;
    return s;
}
static void policy_trial_plain(policy_trial *t, rng *r, const rkv_config &config, int capacity,
                               const policy_shape &s, int n_layers)
{
    t->config = config;
    t->capacity = capacity;
    t->next_position = t->first_query = 0;
    for (int l = 0; l < n_layers; l++) {
        std::vector<policy_layer> *const sides[] = { &t->cpu, &t->gpu, &t->whole };
        const rng before = *r;
        for (std::vector<policy_layer> *side : sides) {
            policy_layer made;
            *r = before;
            policy_layer_make(&made, r, *t, s);
            side->push_back(made);
            policy_layer_point(&side->back());
        }
    }
}
static rkv_config preset(rkv_policy policy, int budget)
{
    switch (policy) {
    case RKV_POLICY_RKV: return rkv_config_wide(budget);
    case RKV_POLICY_MEMORY_TRACES: return rkv_config_memory_traces(budget);
    case RKV_POLICY_MEMORY_PROSE: return rkv_config_memory_prose(budget);
    case RKV_POLICY_H2O: return rkv_config_h2o(budget);
    case RKV_POLICY_TRIATTENTION: return rkv_config_triattention(budget);
    case RKV_POLICY_RANDOM: return rkv_config_random(budget, 7);
    case RKV_POLICY_OWN_SCORE: break;
    }
    rkv_config own = rkv_config_default(budget);
    own.policy = RKV_POLICY_OWN_SCORE;
    return own;
}

/* More rows than are sorted at a time. */
static void test_long_policies()
{
    for (int policy = RKV_POLICY_MEMORY_TRACES; policy <= RKV_POLICY_MEMORY_PROSE; policy++) {
        const int n = on_gpu ? 16807 : 4200;
        rng r = rng_seed(5);
        policy_trial t;
        policy_shape s = plain_policy_shape(1, 1, 8, RKV_F16);
        rkv_config config = preset(static_cast<rkv_policy>(policy), n / 2);
        config.votes = 2;
        case_begin("%s, %d rows", policy_name(config.policy), n);
        policy_trial_plain(&t, &r, config, n, s, 1);
        policy_append(&t, &r, n - 100);
        t.gpu[0].layer.n_new = 90; /* the others have a state */
        for (float &x : t.gpu[0].state) x = static_cast<float>(rng_unit(&r));
        policy_round(&t);
        case_end();
        policy_free(&t);
    }
}

/* Every preset gives the same bits in whatever order blocks and threads run. */
static void test_policy_determinism()
{
    for (int policy = RKV_POLICY_RKV; policy <= RKV_POLICY_OWN_SCORE; policy++) {
        rng r = rng_seed(21);
        policy_trial t;
        policy_shape s = plain_policy_shape(2, 4, 64, RKV_BF16);
        s.biased = true;
        case_begin("%s, five runs, the same bits", policy_name(static_cast<rkv_policy>(policy)));
        policy_trial_plain(&t, &r, preset(static_cast<rkv_policy>(policy), 150), 400, s, 2);
        policy_append(&t, &r, 390);
        for (int run = 0; run < 5; run++) {
            std::vector<policy_layer> &side = run ? t.whole : t.cpu; /* cpu: the first run's */
            for (size_t l = 0; l < t.gpu.size(); l++) policy_layer_copy(&side[l], t.gpu[l]);
            shim_order_is(run);
            expect_status("run", policy_call(rkv_compress, &mirrored, t.config, &side), RKV_OK);
            for (size_t l = 0; l < t.gpu.size() && run; l++) {
                const std::vector<float> &a = t.cpu[l].scores, &b = t.whole[l].scores;
                expect_same_layers("run", t.whole[l], t.cpu[l]);
                expect_bytes("scores", b.data(), a.data(), a.size() * 4);
            }
        }
        shim_order_is(0);
        case_end();
        policy_free(&t);
    }
}

/* All of the budget is pinned or protected: nothing is scored, but the rows move, and the state of
 * the new ones begins. */
static void test_unscored_state()
{
    for (int policy = RKV_POLICY_MEMORY_TRACES; policy <= RKV_POLICY_H2O; policy++) {
        rng r = rng_seed(8);
        policy_trial t;
        rkv_config config = preset(static_cast<rkv_policy>(policy), 60);
        config.pinned = 10;
        config.protect = 50;
        case_begin("%s, nothing to choose", policy_name(config.policy));
        policy_trial_plain(&t, &r, config, 100, plain_policy_shape(2, 2, 16, RKV_F32), 2);
        for (int round = 0; round < 2; round++) {
            policy_append(&t, &r, round ? 20 : 90);
            policy_round(&t);
        }
        case_end();
        policy_free(&t);
    }
}

/* A captured round, replayed on new data. */
static void test_policy_graph()
{
    for (int policy = RKV_POLICY_RKV; policy <= RKV_POLICY_OWN_SCORE; policy++) {
        rkv_config config = preset(static_cast<rkv_policy>(policy), 128);
        policy_shape s = plain_policy_shape(2, 2, 64, RKV_F16);
        rng r = rng_seed(33);
        policy_trial t;
        rkv_backend backend;
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        mirror m, work;
        size_t bytes = 0;
        s.biased = true;
        case_begin("%s, captured and replayed", policy_name(config.policy));
        policy_trial_plain(&t, &r, config, 256, s, 1);
        policy_append(&t, &r, 250);
        must("a stream", cudaStreamCreate(&stream) == cudaSuccess);
        must("a table", rkv_cuda_backend(&backend, stream, NULL) == RKV_OK);
        policy_layer_point(&t.gpu[0]);
        rkv_layer layer = mirror_layer(&m, &config, t.gpu[0].layer, true);
        expect_status("size", rkv_workspace_size(&backend, &config, &layer, 1, &bytes), RKV_OK);
        char *workspace = work.reserve(static_cast<char *>(NULL), bytes, false);
        must("capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
        expect_status("captured", rkv_compress(&backend, &config, &layer, 1, workspace, bytes),
                      RKV_OK);
        must("end of capture", cudaStreamEndCapture(stream, &graph) == cudaSuccess);
        must("instance", cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
        for (int replay = 0; replay < 2; replay++) {
            policy_layer *live = &t.gpu[0];
            live->layer.n_tokens = live->layer.n_new = 0;
            t.next_position = 0;
            policy_append(&t, &r, 250);
            for (policy_layer *l : { &t.whole[0], &t.cpu[0] }) {
                policy_layer_copy(l, *live);
                l->layer.first_query = layer.first_query;
            }
            mirror fresh;
            mirror_layer(&fresh, &config, t.whole[0].layer, true);
            for (size_t i = 0; i < m.pieces.size(); i++) {
                m.pieces[i].host = fresh.pieces[i].host;
                to_device(m.pieces[i].device, m.pieces[i].host, m.pieces[i].bytes);
            }
            must("replay", cudaGraphLaunch(exec, stream) == cudaSuccess &&
                               cudaStreamSynchronize(stream) == cudaSuccess);
            m.copy_back();
            expect_status("launched", policy_call(rkv_compress, &mirrored, config, &t.cpu), RKV_OK);
            t.whole[0].layer = t.cpu[0].layer;
            policy_layer_point(&t.whole[0]);
            expect_same_layers("replayed", t.whole[0], t.cpu[0]);
        }
        case_end();
        (void)cudaGraphExecDestroy(exec);
        (void)cudaGraphDestroy(graph);
        (void)cudaStreamDestroy(stream);
        policy_free(&t);
    }
}

/* ---- Faults ---------------------------------------------------------------------------------- */

enum policy_fault {
    BAD_KEY,
    BAD_QUERY,
    BAD_OLD_QUERY, /* of a token that does not vote */
    BAD_LOGITS,
    BAD_STATE,
    BAD_LATER_STATE,
    BAD_BIAS,
    BAD_WINDOW_BIAS,
    BAD_MEANS,
    BAD_FREQUENCY,
    N_POLICY_FAULTS
};

static void put_policy_fault(policy_trial *t, rng *r, policy_fault fault)
{
    policy_layer *l = &t->gpu[static_cast<size_t>(rng_below(r, static_cast<int>(t->gpu.size())))];
    const int n = l->layer.n_tokens, votes = votes_of(t->config), dim = l->layer.keys.dim;
    const int heads = l->layer.keys.heads, h = rng_below(r, heads);
    const int query_head = rng_below(r, l->layer.queries.heads);
    const size_t stride = static_cast<size_t>(l->layer.row_stride);
    const int planes = rkv_state_floats(&t->config);
    const float bad = rng_below(r, 2) ? NAN : INFINITY;
    std::vector<float> huge(static_cast<size_t>(dim), 1e17f);
    switch (fault) {
    case BAD_KEY: view_store_one(&l->keys, h, rng_below(r, n), rng_below(r, dim), bad); break;
    case BAD_QUERY:
        view_store_one(&l->queries, query_head, rng_below(r, votes), rng_below(r, dim), bad);
        break;
    case BAD_OLD_QUERY:
        view_store_one(&l->queries, query_head, l->layer.first_query, rng_below(r, dim), NAN);
        break;
    case BAD_LOGITS:
        if (l->keys.tensor.dtype != RKV_F32 || l->queries.tensor.dtype != RKV_F32) return;
        for (int row = 0; row < 3; row++) store_row(&l->keys, h, row, huge);
        for (int slot = 0; slot < votes; slot++)
            store_row(&l->queries, h * (l->layer.queries.heads / heads), slot, huge);
        for (policy_layer &each : t->gpu) each.layer.scale = 100.0f, each.layer.softcap = 0;
        break;
    case BAD_STATE:
    case BAD_LATER_STATE:
        if (planes == 0 || (fault == BAD_LATER_STATE && planes < 2)) return;
        l->state[static_cast<size_t>(h * planes + (fault == BAD_LATER_STATE)) * stride +
                 static_cast<size_t>(rng_below(r, n - l->layer.n_new))] =
            rng_below(r, 2) ? -1.0f : bad;
        break;
    case BAD_BIAS:
    case BAD_WINDOW_BIAS:
        if (l->bias.empty()) return;
        l->bias[static_cast<size_t>(h) * stride +
                static_cast<size_t>(fault == BAD_BIAS ? rng_below(r, n) : n - 1)] = NAN;
        break;
    case BAD_MEANS: l->means[product(query_head, dim)] = bad; break;
    case BAD_FREQUENCY:
        if (t->frequencies.empty()) return;
        t->frequencies[static_cast<size_t>(rng_below(r, 4))] = rng_below(r, 2) ? -1.0f : 5.0f;
        break;
    case N_POLICY_FAULTS: break;
    }
}

/* Device and CPU find the same fault in the same data, or none, and then nothing has changed. */
static void expect_same_fault(policy_trial *t, stage_function call)
{
    rkv_error on_cpu, on_device = { NULL, RKV_OK, -1, -1, -1 };
    rkv_config config = t->config;
    for (size_t l = 0; l < t->gpu.size(); l++) {
        policy_layer_copy(&t->cpu[l], t->gpu[l]);
        policy_layer_copy(&t->whole[l], t->gpu[l]); /* as it was */
    }
    config.error = &on_cpu;
    const rkv_status want = policy_call(call, rkv_backend_find(NULL), config, &t->cpu);
    config.error = NULL;
    config.device_error = &on_device;
    expect_status("CUDA", policy_call(call, &mirrored, config, &t->gpu), want);
    expect_record("the device's record", &on_device, &on_cpu);
    for (size_t l = 0; l < t->gpu.size() && want != RKV_OK; l++) {
        expect_same_layers("a refused call", t->gpu[l], t->whole[l]);
        expect_bytes("scores", t->gpu[l].scores.data(), t->whole[l].scores.data(),
                     t->whole[l].scores.size() * 4);
    }
}

static void test_policy_fault(uint64_t seed)
{
    rng r = rng_seed(seed);
    policy_trial t;
    const policy_fault fault = static_cast<policy_fault>(seed / 7 % N_POLICY_FAULTS);
    policy_trial_make(&t, &r, static_cast<rkv_policy>(seed % 7));
    case_begin("policy fault %lu: %s, fault %d, %s keys", static_cast<unsigned long>(seed),
               policy_name(t.config.policy), fault, dtype_name(t.gpu[0].layer.keys.dtype));
    policy_append(&t, &r, t.capacity);
    for (policy_layer &l : t.gpu)
        if (l.layer.n_new) l.layer.n_new = 1 + rng_below(&r, t.capacity - 1);
    put_policy_fault(&t, &r, fault);
    shim_order_is(static_cast<int>(seed / 7 % 6));
    expect_same_fault(&t, seed % 2 ? rkv_score : rkv_compress);
    shim_order_is(0);
    case_end();
    policy_free(&t);
}

/* ---- Means of queries ------------------------------------------------------------------------ */

/* The function on device memory, by way of host memory. */
static rkv_status means_on_device(const rkv_config &given, const rkv_rope &host_rope,
                                  const rkv_tensor &host, int slot, int n, int position,
                                  std::vector<float> *means, rkv_error *found)
{
    mirror m;
    rkv_config config = given;
    rkv_rope rope = host_rope;
    const rkv_tensor queries = mirror_tensor(&m, host, host.tokens, false);
    const size_t pairs = static_cast<size_t>(rope.dims ? rope.dims : host.dim) / 2;
    float *on_device = m.add(means->data(), means->size() * 4, true);
    rope.frequencies = m.add(rope.frequencies, pairs * 4, false);
    config.error = NULL;
    config.device_error = m.add(found, sizeof *found, true);
    const rkv_status status =
        rkv_query_means_update(cuda(), &config, &rope, &queries, slot, n, position, on_device);
    expect_status("synchronize", cuda()->synchronize(cuda()), RKV_OK);
    m.copy_back();
    return status;
}

static void test_query_means(uint64_t seed)
{
    static const int dims[] = { 2, 7, 16, 64, 80, 128, 130 };
    static const rkv_dtype types[] = { RKV_F32,     RKV_F16,     RKV_BF16,
                                       RKV_F8_E4M3, RKV_F8_E5M2, RKV_Q8_0 };
    rng r = rng_seed(seed);
    policy_trial t; /* for its frequencies */
    int dim = RNG_PICK(&r, dims), position = rng_below(&r, 2) ? 0 : 5000000;
    const rkv_dtype dtype = types[rng_below(&r, 6)];
    const int heads = 1 + rng_below(&r, 6), rows = 40;
    const layout l = static_cast<layout>(rng_below(&r, N_KEY_LAYOUTS));
    if (dtype == RKV_Q8_0) dim = (dim + 31) / 32 * 32;
    const rkv_rope rope = any_rope(&r, &t, dim);
    const size_t used = product(heads, dim) + product(heads, dim / 2) + 1;
    rkv_config config = rkv_config_triattention(100);
    rkv_error on_cpu, on_device = { NULL, RKV_OK, -1, -1, -1 };
    view v;
    case_begin("query means %lu: %d heads, dim %d, %s, %s, pairing %d, dims %d",
               static_cast<unsigned long>(seed), heads, dim, dtype_name(dtype), layout_name(l),
               rope.pairing, rope.dims);
    view_make(&v, &r, l, dtype, 0, heads, rows, dim, 0);
    for (int h = 0; h < heads; h++)
        for (int row = 0; row < rows; row++) store_row(&v, h, row, any_row(&r, dim, h));
    std::vector<float> cpu(rkv_query_means_floats(heads, dim), 0), gpu = cpu;
    config.error = &on_cpu;
    shim_order_is(static_cast<int>(seed % 6));
    for (int call = 0; call < 5; call++) {
        const int n = call == 3 ? 1 : 1 + rng_below(&r, rows), slot = rng_below(&r, rows - n + 1);
        const std::vector<float> before = gpu;
        if (call == 4 && dtype != RKV_Q8_0)
            view_store_one(&v, rng_below(&r, heads), rng_below(&r, rows), rng_below(&r, dim),
                           dtype == RKV_F8_E4M3 ? NAN : INFINITY);
        const rkv_status want = rkv_query_means_update(rkv_backend_find(NULL), &config, &rope,
                                                       &v.tensor, slot, n, position, cpu.data());
        expect_status("CUDA",
                      means_on_device(config, rope, v.tensor, slot, n, position, &gpu, &on_device),
                      RKV_OK);
        expect_record("the device's record", &on_device, &on_cpu);
        position += n;
        if (want != RKV_OK) {
            expect_bytes("a refused call", gpu.data(), before.data(), before.size() * 4);
            break;
        }
        const double largest = largest_of(cpu.data(), static_cast<int>(used) - 1);
        for (size_t i = 0; i < used; i++)
            if (!expect_near("mean", static_cast<int>(i), static_cast<double>(gpu[i]),
                             static_cast<double>(cpu[i]), 1e-6 * fmax(largest, 1e-3)))
                break;
        expect_int("tokens", call, static_cast<int>(gpu[used - 1]),
                   static_cast<int>(cpu[used - 1]));
    }
    shim_order_is(0);
    case_end();
    view_free(&v);
}

static void test_chosen_policies()
{
    test_long_policies();
    test_policy_determinism();
    test_unscored_state();
    test_policy_graph();
    for (uint64_t seed = 0; seed < 70; seed++) test_policy_fault(seed);
    for (uint64_t seed = 1; seed <= 30; seed++) test_query_means(seed);
}

#endif
