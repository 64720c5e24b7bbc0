"""R-KV in PyTorch, the plain formulation of bench/peer_torch.py, on the GPU that bench_cuda times.
make bench-cuda   (or: python3 bench/peer_torch_cuda.py build/cuda/peer_torch.tsv)

Layer by layer, as the published code runs; a few layers are timed and multiplied up. Writes one
line per case, its name and the microseconds of all its layers, which bench_cuda then prints."""
import sys

import torch

from peer_torch import WINDOW, scores

# name, layers, batch, kv heads, group, head dim, n, kept, type, mean cosine: as in bench_cuda.cu
CASES = (
    ("28 layers, batch 1", 28, 1, 2, 6, 128, 1152, 1024, torch.bfloat16, 0.7),
    ("28 layers, batch 16", 28, 16, 2, 6, 128, 1152, 1024, torch.bfloat16, 0.7),
    ("32 layers, batch 1", 32, 1, 8, 4, 128, 1152, 1024, torch.bfloat16, 0.7),
    ("32 layers, batch 16", 32, 16, 8, 4, 128, 1152, 1024, torch.bfloat16, 0.7),
    ("32 layers, batch 1, f16", 32, 1, 8, 4, 128, 1152, 1024, torch.float16, 0.7),
    ("32 layers, batch 1, f32", 32, 1, 8, 4, 128, 1152, 1024, torch.float32, 0.7),
    ("32 layers, batch 16, f32", 32, 16, 8, 4, 128, 1152, 1024, torch.float32, 0.7),
    ("32 layers, batch 1, none similar", 32, 1, 8, 4, 128, 1152, 1024, torch.bfloat16, 0.0),
    ("32 layers, batch 16, none similar", 32, 16, 8, 4, 128, 1152, 1024, torch.bfloat16, 0.0),
    ("36 layers, long", 36, 1, 8, 4, 128, 16807, 8403, torch.bfloat16, 0.7),
    ("36 layers, long, none similar", 36, 1, 8, 4, 128, 16807, 8403, torch.bfloat16, 0.0),
)
TIMED_LAYERS = 8


def make_layer(heads, group, dim, n, dtype, cosine):
    """Random keys around a direction per head, values, queries."""
    normal = lambda *shape: torch.randn(*shape, device="cuda")
    keys = cosine**0.5 * normal(heads, 1, dim) + (1 - cosine) ** 0.5 * normal(heads, n, dim)
    return (keys.to(dtype), normal(heads, n, dim).to(dtype),
            normal(heads, group, WINDOW, dim).to(dtype))


def compress(keys, values, queries, budget):
    """The rows that stay, in cache order."""
    heads, n, dim = keys.shape
    best = scores(keys, queries).topk(budget - WINDOW, dim=-1).indices
    window = torch.arange(n - WINDOW, n, device=keys.device).expand(heads, WINDOW)
    kept = torch.cat([best.sort(dim=-1).values, window], dim=-1)
    rows = kept[..., None].expand(heads, budget, dim)
    return keys.gather(1, rows), values.gather(1, rows)


def time_layers(layers, budget):
    """Median microseconds of a pass over all the layers; the first passes warm up."""
    times = []
    for turn in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for keys, values, queries in layers:
            compress(keys, values, queries, budget)
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def main():
    if not torch.cuda.is_available():
        print("skip  PyTorch formulation: no CUDA device")
        return
    with torch.no_grad(), open(sys.argv[1], "w", encoding="ascii") as out:
        for name, n_layers, batch, heads, group, dim, n, budget, dtype, cosine in CASES:
            timed = 2 if n > 4096 else TIMED_LAYERS
            layers = [make_layer(heads, group, dim, n, dtype, cosine) for _ in range(timed)]
            try:
                microseconds = time_layers(layers, budget) * n_layers * batch / timed
            except torch.cuda.OutOfMemoryError:
                print(f"skip  PyTorch formulation, {name}: out of memory")
                continue
            out.write(f"{name}\t{microseconds:.1f}\n")
            del layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
