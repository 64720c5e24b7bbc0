"""R-KV written in PyTorch the plain way, n x n matrix and all, beside rkv_compress: same data, one
thread, in turns.   make bench   (or: python3 bench/peer_torch.py build/bench/libpeer.so)"""
import argparse
import csv
import ctypes
import math
import time

import torch

WINDOW, POOL, LAMBDA, THRESHOLD = 8, 7, 0.1, 0.5
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
KEYS = {"cosine 0.7": 0, "cosine 0.4": 1, "12% outliers": 2, "repeats": 3}
REAL = {  # the golden vectors with keys of SmolLM2-135M-Instruct
    "real L0": "real_prose_layer00_f16", "real L2": "real_prose_layer02_f16",
    "real L15": "real_prose_layer15_f16", "real L22": "real_trace_layer22_f16"}


class Shape(ctypes.Structure):
    """bench_shape of bench/job.h"""

    _fields_ = [(name, ctypes.c_int) for name in (
        "keys", "dtype", "n_tokens", "budget", "kv_heads", "group", "head_dim")]


def keep_memory():
    """Has glibc keep what it is given back: PyTorch's n x n matrices in fresh pages every time
    double its time, and that is not what is compared here."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def scores(keys, queries, pool):
    """keys [heads, n, d], queries [heads, group, window, d] -> [heads, n - window]"""
    heads, n, dim = keys.shape
    # Importance: the group's largest logit, softmax over the candidates, mean over the window.
    logits = queries @ keys[:, None, : n - WINDOW].transpose(-1, -2) / math.sqrt(dim)
    attention = torch.softmax(logits.amax(dim=1), dim=-1).mean(dim=1)
    importance = torch.nn.functional.max_pool1d(attention, pool, stride=1, padding=pool // 2)
    # Redundancy: cosines, of which each row leaves out its newest similar key (or column 0).
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    columns = torch.arange(n, device=keys.device)
    latest = torch.where(cosine > THRESHOLD, columns, 0).amax(dim=-1, keepdim=True)
    cosine.scatter_(-1, latest, 0.0)
    redundancy = torch.softmax(cosine.mean(dim=1), dim=-1)[:, : n - WINDOW]
    return LAMBDA * importance - (1 - LAMBDA) * redundancy


def compress(keys, values, queries, budget, pool):
    """The rows that stay, in cache order, and their indices [heads, budget]."""
    heads, n, dim = keys.shape
    best = scores(keys, queries, pool).topk(budget - WINDOW, dim=-1).indices
    window = torch.arange(n - WINDOW, n).expand(heads, WINDOW)
    kept = torch.cat([best.sort(dim=-1).values, window], dim=-1)
    rows = kept[..., None].expand(heads, budget, dim)
    return keys.gather(1, rows), values.gather(1, rows), kept


def differing(kept, other, keys, queries, pool):
    """Tokens that are in one set only, and the largest score difference to the cut among them,
    as a share of the spread of the scores: what separates rounding from disagreement."""
    z = scores(keys.double(), queries.double(), pool)
    count, worst = 0, 0.0
    for head in range(kept.shape[0]):
        ours, theirs = set(kept[head].tolist()), set(other[head].tolist())
        count += len(ours - theirs)
        spread = (z[head].max() - z[head].min()).item()
        cut = min(z[head][i].item() for i in theirs if i < z.shape[1])
        for i in ours ^ theirs:
            worst = max(worst, abs(z[head][i].item() - cut) / spread)
    return count, worst


def run_case(library, name, shape, pool, seconds):
    """One line of the table."""
    n = shape.n_tokens
    keys = torch.empty(shape.kv_heads, n, shape.head_dim)
    queries = torch.empty(shape.kv_heads, shape.group, WINDOW, shape.head_dim)
    values = torch.randn(shape.kv_heads, n, shape.head_dim)
    kept = torch.empty(shape.kv_heads, shape.budget, dtype=torch.int32)
    library.peer_fill(ctypes.byref(shape), ctypes.c_void_p(keys.data_ptr()),
                      ctypes.c_void_p(queries.data_ptr()))
    rkv_us = torch_us = math.inf
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        turns += 1
        before = time.perf_counter()
        _, _, reference = compress(keys, values, queries, shape.budget, pool)
        torch_us = min(torch_us, (time.perf_counter() - before) * 1e6)
        rkv_us = min(rkv_us, library.peer_compress(
            ctypes.byref(shape), ctypes.c_double(0.1), ctypes.c_void_p(kept.data_ptr())))
    count, worst = differing(kept, reference, keys, queries, pool)
    return name, n, rkv_us, torch_us, torch_us / rkv_us, count, worst


def cases(library):
    """Name, shape and pooling of every line; a real one is read when its turn comes."""
    for name, file in REAL.items():
        shape = Shape()
        pool = library.peer_read_real(file.encode(), ctypes.byref(shape))
        if pool:
            yield name, shape, pool
        else:
            print(f"# {name}: not run, tests/golden has no such file")
    for name, lengths in (("cosine 0.7", (640, 1152, 2176, 4224)), ("cosine 0.4", (1152, 4224)),
                          ("12% outliers", (1152, 4224)), ("repeats", (1152,))):
        for n in lengths:
            yield name, Shape(KEYS[name], 0, n, n - 128, 8, 4, 128), POOL


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", help="libpeer.so")
    parser.add_argument("--csv")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    options = parser.parse_args()
    memory = "kept" if keep_memory() else "as malloc hands it out"
    torch.set_num_threads(1)
    library = ctypes.CDLL(options.peer)
    library.peer_compress.restype = ctypes.c_double
    print(f"\n# PyTorch {torch.__version__}, the plain formulation, f32, the kv heads in one "
          f"batch, 1 thread; memory: {memory}\n"
          "# real: keys of SmolLM2-135M, 3 kv heads, group 3, d 64; others: 8 kv heads, group 4,\n"
          "# d 128, n - 128 kept\n"
          "# differ: tokens of all heads that only one of the two keeps; off: the largest distance\n"
          "# of such a token's score from the cut, in f64, as a share of the spread of the scores")
    print(f"# {'keys':<12} {'n':>6} {'rkv us':>12} {'torch us':>12} {'ratio':>8} {'differ':>7} "
          f"{'off':>9}")
    lines = []
    with torch.no_grad():
        for name, shape, pool in cases(library):
            lines.append(run_case(library, name, shape, pool, options.seconds))
            print("  {:<12} {:>6} {:>12.1f} {:>12.1f} {:>8.1f} {:>7} {:>9.1e}".format(
                *lines[-1]), flush=True)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="ascii") as file:
            writer = csv.writer(file)
            writer.writerow(["keys", "n", "rkv_us", "torch_us", "ratio", "differ", "off"])
            writer.writerows(lines)


if __name__ == "__main__":
    main()
