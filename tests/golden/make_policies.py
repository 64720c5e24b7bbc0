#!/usr/bin/env python3
"""Writes the golden vectors of the policies, policy_*.rkvp: see README.md beside this file.

    python3 tests/golden/make_policies.py [directory]       (numpy; some seconds)

Written from the definitions alone, in float64; it knows no line of rkv.h or of the oracle of the
tests. A case whose kept sets hang on less than rounding can turn takes the next seed.
"""
import os
import struct
import sys

import numpy as np

RKV, TRACES, PROSE, H2O, TRIATTENTION, RANDOM, OWN_SCORE = range(7)
PUBLISHED, PAPER = range(2)
PER_HEAD, PER_LAYER = range(2)
F32, F16, BF16 = range(3)
UNKNOWN, NONE, HALVES, ADJACENT = range(4)

COSINE_ERROR = 8e-6  # what a float implementation may get wrong
RELATIVE_ERROR = 2e-5


class Undecided(Exception):
    """The answer hangs on rounding."""


# ---- number formats ------------------------------------------------------------------------------
def to_bf16(x):
    """The 16 bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    sixteen, one = np.uint64(16), np.uint64(1)
    return ((bits + np.uint64(0x7FFF) + ((bits >> sixteen) & one)) >> sixteen).astype("<u2")


def encode(x, dtype):
    if dtype == F32:
        return np.asarray(x).astype("<f4")
    return np.asarray(x).astype("<f2") if dtype == F16 else to_bf16(x)


def decode(code, dtype):
    if dtype == BF16:
        return (code.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return code.astype(np.float64)


# ---- rotary embedding ----------------------------------------------------------------------------
def frequencies_of(c):
    """Radians per position of each pair, as the floats that an engine has."""
    if c["table"] is not None:
        return c["table"].astype(np.float64)
    f = np.arange(c["dims"] // 2)
    return (c["base"] ** (-2.0 * f / c["dims"])).astype(np.float32).astype(np.float64)


def pairs_of(c, x):
    """The turned part of rows x as complex numbers [..., dims / 2]."""
    x = x[..., : c["dims"]]
    if c["pairing"] == ADJACENT:
        return x[..., 0::2] + 1j * x[..., 1::2]
    return x[..., : c["dims"] // 2] + 1j * x[..., c["dims"] // 2 :]


def with_pairs(c, x, z):
    """Rows x with these complex numbers in the place of the turned part."""
    out = x.copy()
    if c["pairing"] == ADJACENT:
        out[..., 0 : c["dims"] : 2], out[..., 1 : c["dims"] : 2] = z.real, z.imag
    else:
        out[..., : c["dims"] // 2], out[..., c["dims"] // 2 : c["dims"]] = z.real, z.imag
    return out


def rotate(c, x, positions):
    """Rows x [..., n, dim] at these positions [n]; a negative sign of the positions turns back."""
    if c["pairing"] == NONE:
        return x.copy()
    angles = np.asarray(positions, np.float64)[:, None] * frequencies_of(c)
    return with_pairs(c, x, pairs_of(c, x) * np.exp(1j * angles))


# ---- parts of the policies -----------------------------------------------------------------------
def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def logits(c, query, keys):
    x = keys @ query * (c["scale"] or 1 / np.sqrt(c["dim"]))
    return c["softcap"] * np.tanh(x / c["softcap"]) if c["softcap"] else x


def ranks(x):
    """How many are smaller; of equal ones the later ranks higher."""
    rank = np.empty(len(x), np.int64)
    rank[np.argsort(x, kind="stable")] = np.arange(len(x))
    return rank


def may_swap(x, relative, absolute):
    """How many others might change places with each one."""
    near = relative * (np.abs(x)[:, None] + np.abs(x)[None, :]) + 2 * absolute
    return np.sum(np.abs(x[:, None] - x[None, :]) <= near, axis=1) - 1


def votes_of_heads(c, queries, keys, n_new):
    """For each new query that votes and each query head: its row, its probabilities [row + 1]."""
    n = len(keys)
    for age in range(min(c["votes"], n_new)):
        row = n - 1 - age
        for head in queries:  # [votes][dim], the newest last
            yield row, softmax(logits(c, head[len(head) - 1 - age], keys[: row + 1]))


def unit(rows):
    return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-8)


def remember(c, state, queries, keys, positions, n_new):
    """State [floats][rows] after a round, from that before it, in which new rows are 0."""
    state = state.copy()
    if c["policy"] == H2O:
        for row, p in votes_of_heads(c, queries, keys, n_new):
            state[0, : row + 1] += p
        return state
    state[0] *= c["decay"] ** n_new
    for row, p in votes_of_heads(c, queries, keys, n_new):
        state[0, :row] = np.maximum(state[0, :row], p[:row])
    plain = unit(rotate(c, keys, -np.asarray(positions)))
    for new in range(len(keys) - n_new, len(keys)):
        state[1, :new] = np.maximum(state[1, :new], plain[:new] @ plain[new])
    return state


def memory_score(c, state, m):
    """(score, tolerance) of the candidates. With a share of one half the scores of traces are
    exact, and so are their ties."""
    importance, copies, share = state[0, :m], state[1, :m], c["lambda"]
    tolerance = share * may_swap(importance, RELATIVE_ERROR, 0) / m
    if c["policy"] == TRACES:
        score = (share * ranks(importance) - (1 - share) * ranks(copies)) / m
        tolerance = tolerance + (1 - share) * may_swap(copies, 0, COSINE_ERROR) / m
        return score, tolerance + (0 if share == 0.5 else 1e-6)
    score = share * ranks(importance) / m - (1 - share) * copies
    return score, tolerance + (1 - share) * COSINE_ERROR


def query_means(c, queries, positions):
    """E[q'] [heads][dim], E|q'_f| [heads][dim / 2] and the number of tokens, as one list."""
    taken = np.asarray(positions) >= 4
    plain = rotate(c, queries, -np.asarray(positions))[:, taken]
    mean, size = plain.mean(axis=1), np.zeros((len(queries), c["dim"] // 2))
    if c["pairing"] != NONE:
        size[:, : c["dims"] // 2] = np.abs(pairs_of(c, plain)).mean(axis=1)
    return mean, size, int(np.sum(taken))


def triattention_score(c, mean, size, keys, newest, m):
    """mean [group][dim], size [group][dim / 2], of the query heads that read these keys."""
    best, tolerance = np.full(m, -np.inf), 0.0
    for q, length in zip(mean, size):
        u = q.copy()
        spread = np.zeros(m)
        if c["pairing"] != NONE:
            turned = [rotate(c, q[None], [newest + 2**k])[0] for k in range(10)]
            u = np.mean(turned, axis=0)
            extra = length[: c["dims"] // 2] - np.abs(pairs_of(c, q))
            spread = np.abs(pairs_of(c, keys[:m])) @ extra
        s = (keys[:m] @ u + spread) / np.sqrt(c["dim"])
        deviation = np.sqrt(np.mean((s - s.mean()) ** 2))
        best = np.maximum(best, (s - s.mean()) / deviation)
        tolerance = max(tolerance, 1e-5 * np.max(np.abs(s)) / deviation + 1e-5)
    return best, np.full(m, tolerance)


def random_score(c, head, positions, m):
    mask = (1 << 64) - 1
    score = np.zeros(m)
    for i in range(m):
        h = (c["seed"] * 0x9E3779B97F4A7C15 + ((c["layer"] << 40) ^ (head << 32))) & mask
        h ^= int(positions[i]) & 0xFFFFFFFF
        h ^= h >> 30
        h = h * 0xBF58476D1CE4E5B9 & mask
        h ^= h >> 27
        h = h * 0x94D049BB133111EB & mask
        h ^= h >> 31
        score[i] = (h >> 40) / 2.0**24
    return score, np.zeros(m)


def pooled(c, x):
    left, right = c["pool"] // 2, (c["pool"] - 1) // 2
    out = np.empty(len(x))
    for j in range(len(x)):
        part = x[max(0, j - left) : j + right + 1]
        out[j] = part.sum() / c["pool"] if c["mean_pool"] else part.max()
    return out


def rkv_score(c, queries, keys, m):
    n = len(keys)
    importance = np.zeros(m)
    for age in range(c["votes"]):
        row = n - 1 - age
        seen = min(m, row + 1)
        group = [logits(c, head[len(head) - 1 - age], keys[:seen]) for head in queries]
        p = np.zeros(m)
        p[:seen] = softmax(np.max(group, axis=0))
        importance += (pooled(c, p) if c["variant"] == PAPER else p) / c["votes"]
    if c["variant"] == PUBLISHED:
        importance = pooled(c, importance)
    span = n if c["variant"] == PUBLISHED else m
    redundancy = softmax(similarity(c, keys[:span]))[:m]
    score = c["lambda"] * importance - (1 - c["lambda"]) * redundancy
    error = 1e-5 * (c["lambda"] * importance.max() + (1 - c["lambda"]) * redundancy.max())
    return score, np.full(m, error)


def similarity(c, keys):
    """Mean cosine of each row to the others, less the exempt entries."""
    n = len(keys)
    cosines = unit(keys) @ unit(keys).T
    np.fill_diagonal(cosines, 0)
    for i in range(n):
        found = 0
        for j in range(n - 1, -1, -1):
            if j != i and abs(cosines[i, j] - c["threshold"]) < 1e-5:
                raise Undecided
            if cosines[i, j] > c["threshold"]:
                cosines[i, j] = 0
                found += 1
                if found == c["recent"]:
                    break
        if found == 0 and c["variant"] == PUBLISHED:
            cosines[i, 0] = 0
    return cosines.mean(axis=0 if c["variant"] == PUBLISHED else 1)


# ---- a round -------------------------------------------------------------------------------------
def keep(c, score, tolerance, n):
    """The rows of one set; raises Undecided if rounding may change it."""
    protect = max(c["protect"], c["window"])
    choices = np.arange(c["pinned"], n - protect)
    places = c["budget"] - c["pinned"] - protect
    order = sorted(choices, key=lambda i: (-score[i], -i))
    chosen, rest = order[:places], order[places:]
    for i in chosen:
        gap, slack = score[i] - score[rest], tolerance[i] + tolerance[rest]
        if np.any((gap <= slack) & ((gap != 0) | (slack != 0))):  # an exact tie is decided
            raise Undecided
    rows = list(range(c["pinned"])) + chosen + list(range(n - protect, n))
    return np.sort(np.array(rows))


def head_score(c, h, cache, queries, means):
    """(state, score, tolerance) of one KV head."""
    keys, positions, n = cache["keys"][h], cache["positions"][h], len(cache["keys"][h])
    m, group = n - c["window"], slice(h * c["group"], (h + 1) * c["group"])
    state, policy = cache["state"][h], c["policy"]
    if policy in (TRACES, PROSE, H2O):
        state = remember(c, state, queries[group], keys, positions, cache["n_new"])
    if policy in (TRACES, PROSE):
        score, tolerance = memory_score(c, state, m)
    elif policy == H2O:
        score, tolerance = state[0, :m], RELATIVE_ERROR * state[0, :m]
    elif policy == TRIATTENTION:
        mean, size = means[0][group], means[1][group]
        score, tolerance = triattention_score(c, mean, size, keys, positions[-1], m)
    elif policy == RANDOM:
        score, tolerance = random_score(c, h, positions, m)
    elif policy == RKV:
        score, tolerance = rkv_score(c, queries[group], keys, m)
    else:
        score, tolerance = np.zeros(m), np.zeros(m)
    if c["bias"]:
        score, tolerance = score + cache["bias"][h][:m], tolerance + 1e-7
    return state, score, tolerance


def play(c, cache, queries, means):
    """One round: (state, score, kept [sets][budget]); the cache is compacted."""
    results = [head_score(c, h, cache, queries, means) for h in range(c["kv_heads"])]
    state = np.array([r[0] for r in results])
    score = np.array([r[1] for r in results])
    tolerance = np.array([r[2] for r in results])
    n = len(cache["keys"][0])
    if c["scope"] == PER_HEAD:
        kept = [keep(c, score[h], tolerance[h], n) for h in range(c["kv_heads"])]
    else:
        kept = [keep(c, score.mean(axis=0), tolerance.mean(axis=0), n)]
    for h in range(c["kv_heads"]):
        rows = kept[h if c["scope"] == PER_HEAD else 0]
        for name in ("keys", "positions", "bias"):
            cache[name][h] = cache[name][h][rows]
        cache["state"][h] = state[h][:, rows]
    return state, score, np.array(kept)


# ---- inputs --------------------------------------------------------------------------------------
def make_rows(r, c, n, positions, heads, basis, spread):
    """Rows of a few directions plus noise before rotary embedding; then turned."""
    content = r.standard_normal((heads, n, basis.shape[1])) * spread
    content[:, n // 2 :: 3] = content[:, : len(range(n // 2, n, 3))]  # said before
    rows = content @ basis + basis[:, :1] + 0.4 * r.standard_normal((heads, n, c["dim"]))
    return decode(encode(rotate(c, rows, positions), c["dtype"]), c["dtype"])


def floats_of(c):
    return {TRACES: 2, PROSE: 2, H2O: 1}.get(c["policy"], 0)


def reads_queries(c):
    return c["policy"] in (RKV, TRACES, PROSE, H2O)


def next_positions(r, c, first, n):
    """Ascending, mostly one by one."""
    steps = np.where(r.random(n) < 0.05, r.integers(2, 40, n), 1)
    return first + np.cumsum(steps) - 1 if c["gaps"] else first + np.arange(n)


def header(c):
    whole = ("policy variant scope kv_heads group dim n_tokens budget window protect pinned votes "
             "pool mean_pool recent dtype rounds pairing dims").split()
    numbers = [c[name] for name in whole]
    numbers += [int(c["table"] is not None), int(c["bias"]), c["layer"]]
    out = b"RKVGOLDP" + struct.pack("<23i", 1, *numbers) + struct.pack("<I", c["seed"])
    out += struct.pack("<6f", *[c[k] for k in "lambda threshold decay scale softcap base".split()])
    return out + (b"" if c["table"] is None else c["table"].astype("<f4").tobytes())


def make_means(r, c, basis, out):
    """A stream of queries from position 0 on, and its means."""
    n = 40
    queries = make_rows(r, c, n, np.arange(n), c["kv_heads"] * c["group"], basis, 0.6)
    mean, size, count = query_means(c, queries, np.arange(n))
    out += [struct.pack("<i", n), encode(queries, c["dtype"]).tobytes()]
    out += [mean.astype("<f4").tobytes(), size.astype("<f4").tobytes(), struct.pack("<f", count)]
    return mean.astype(np.float32).astype(np.float64), size.astype(np.float32).astype(np.float64)


def make_case(c, attempt):
    r = np.random.default_rng([c["number"], attempt])
    heads, query_heads = c["kv_heads"], c["kv_heads"] * c["group"]
    basis = r.standard_normal((heads, 4, c["dim"])) * 0.5
    group_basis = np.repeat(basis, c["group"], axis=0)
    means, out = None, []
    if c["policy"] == TRIATTENTION:
        means = make_means(r, c, group_basis, out)
    cache = {"keys": [np.zeros((0, c["dim"]))] * heads, "positions": [np.zeros(0, int)] * heads,
             "bias": [np.zeros(0)] * heads, "state": [np.zeros((floats_of(c), 0))] * heads}
    ring = np.zeros((query_heads, c["votes"], c["dim"]))
    position, tokens = c["first"], 0
    for k in range(c["rounds"]):
        n = c["n_tokens"] if k == 0 else c["appended"]
        positions = next_positions(r, c, position, n)
        position = int(positions[-1]) + 1
        keys = make_rows(r, c, n, positions, heads, basis, 1.0)
        queries = make_rows(r, c, n, positions, query_heads, group_basis, c["sharp"])
        bias = (0.2 * r.standard_normal((heads, n))).astype(np.float32).astype(np.float64)
        for t in range(n):
            ring[:, (tokens + t) % c["votes"]] = queries[:, t]
        tokens += n
        first_query = tokens % c["votes"]
        for h in range(heads):
            cache["keys"][h] = np.concatenate([cache["keys"][h], keys[h]])
            cache["positions"][h] = np.concatenate([cache["positions"][h], positions])
            cache["bias"][h] = np.concatenate([cache["bias"][h], bias[h]])
            new = np.zeros((floats_of(c), n))
            cache["state"][h] = np.concatenate([cache["state"][h], new], axis=1)
        cache["n_new"] = n
        newest_last = np.roll(ring, -first_query, axis=1)
        state, score, kept = play(c, cache, newest_last, means)
        out += [struct.pack("<2i", n, first_query)]
        if reads_queries(c):
            out += [encode(ring, c["dtype"]).tobytes()]
        out += [encode(keys, c["dtype"]).tobytes(), positions.astype("<i4").tobytes()]
        if c["bias"]:
            out += [bias.astype("<f4").tobytes()]
        out += [state.astype("<f4").tobytes(), score.astype("<f4").tobytes()]
        out += [kept.astype("<i4").tobytes()]
    return header(c) + b"".join(out)


# ---- cases ---------------------------------------------------------------------------------------
USUAL = dict(variant=PUBLISHED, scope=PER_HEAD, kv_heads=2, group=2, dim=64, n_tokens=120,
             budget=64, window=8, protect=0, pinned=0, votes=0, pool=7, mean_pool=0, recent=1,
             dtype=F32, rounds=1, appended=32, pairing=HALVES, dims=0, table=False, bias=False,
             layer=0, seed=0, threshold=0.5, decay=0.995, scale=0.0, softcap=0.0, base=10000.0,
             sharp=1.2, first=0, gaps=False)
USUAL["lambda"] = 0.5

CASES = [
    ("traces_gqa4_d64",
     dict(policy=TRACES, votes=32, group=4)),
    ("traces_multi_adjacent_f16",
     dict(policy=TRACES, votes=32, rounds=6, dtype=F16, dims=48, pairing=ADJACENT, gaps=True,
          pinned=7)),
    ("traces_multi_few_votes_bf16",
     dict(policy=TRACES, rounds=4, votes=5, dtype=BF16, group=1, first=70000, decay=0.9)),
    ("traces_layer_multi_f16",
     dict(policy=TRACES, votes=32, rounds=4, scope=PER_LAYER, dtype=F16, bias=True)),
    ("prose_norope_d40",
     dict(policy=PROSE, votes=32, pairing=NONE, dim=40, protect=20)),
    ("prose_multi_table_bf16",
     dict(policy=PROSE, votes=32, rounds=6, dtype=BF16, table=True, pinned=12, group=3,
          softcap=4.0, gaps=True)),
    ("prose_multi_votes_f16",
     dict(policy=PROSE, rounds=4, votes=48, appended=20, dtype=F16, kv_heads=1, group=7,
          base=500000.0)),
    ("h2o_mqa_d96_f16",
     dict(policy=H2O, kv_heads=1, group=8, dim=96, votes=120, protect=32, dtype=F16)),
    ("h2o_multi_f16",
     dict(policy=H2O, rounds=6, dtype=F16, votes=32, protect=24, pinned=4)),
    ("h2o_multi_few_votes_bf16",
     dict(policy=H2O, rounds=4, dtype=BF16, votes=9, window=1, bias=True, scale=0.2)),
    ("triattention_gqa4_d64",
     dict(policy=TRIATTENTION, group=4, pinned=4)),
    ("triattention_multi_adjacent_bf16",
     dict(policy=TRIATTENTION, rounds=4, dtype=BF16, dims=48, pairing=ADJACENT, gaps=True,
          pinned=4)),
    ("triattention_table_f16",
     dict(policy=TRIATTENTION, dtype=F16, table=True, first=9000, pinned=4)),
    ("triattention_norope",
     dict(policy=TRIATTENTION, pairing=NONE, group=1, dim=40)),
    ("random_multi",
     dict(policy=RANDOM, rounds=4, seed=4000000007, layer=2, dim=4, gaps=True, pinned=10,
          kv_heads=3)),
    ("own_score_multi_f16",
     dict(policy=OWN_SCORE, rounds=4, bias=True, dtype=F16, dim=16)),
    ("wide_gqa4_d64",
     dict(policy=RKV, group=4, votes=64, pool=5, mean_pool=1)),
    ("wide_multi_f16",
     dict(policy=RKV, rounds=4, votes=64, pool=5, mean_pool=1, dtype=F16, pinned=5, bias=True)),
    ("wide_paper_bf16",
     dict(policy=RKV, variant=PAPER, votes=60, pool=4, dtype=BF16, window=3)),
    ("wide_mean_pool_4",
     dict(policy=RKV, votes=8, pool=4, mean_pool=1, softcap=2.0, recent=2)),
]


def complete(number, changes):
    c = dict(USUAL, number=number, **changes)
    if c["policy"] == PROSE:
        c["lambda"] = 0.3
    for name in ("lambda", "threshold", "decay", "scale", "softcap", "base"):
        c[name] = float(np.float32(c[name]))
    c["votes"] = c["votes"] or c["window"]
    if c["pairing"] != NONE:
        c["dims"] = c["dims"] or c["dim"]
    f = np.arange(c["dims"] // 2)
    scaled = c["base"] ** (-2.0 * f / max(c["dims"], 1)) / (1 + 7.0 * (f > 8))
    c["table"] = scaled.astype(np.float32) if c["table"] else None
    return c


def main():
    directory = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    total = 0
    for number, (name, changes) in enumerate(CASES):
        attempt, data = 0, None
        while data is None:
            try:
                data = make_case(complete(number, changes), attempt)
            except Undecided:
                attempt += 1
        with open(os.path.join(directory, "policy_" + name + ".rkvp"), "wb") as file:
            file.write(data)
        total += len(data)
        print(f"policy_{name}: {len(data)} bytes, attempt {attempt}")
    print(f"{len(CASES)} files, {total} bytes")


if __name__ == "__main__":
    main()
