"""The study: what each policy of rkv.h costs a real model.   make study

Every document is read token by token (teacher-forced) under every policy, all policies side by side
in one batch, each over a cache of its own. Tokens keep their true positions; when budget + buffer
rows are in use, rkv.h chooses and moves the rows of every layer and KV head, in PyTorch's memory.
Measured over the tokens that come after the first round: loss above the full cache's, KL divergence
from the full cache, and whether facts are recalled. Needs the PyPI packages torch, numpy and gguf.

One line per document, policy, pin, budget and buffer goes to a CSV; what is there is not run again.
report.py makes the tables and pictures."""
import argparse
import csv
import os
import pathlib
import subprocess
import sys
import time
import zlib

import torch

import library
import model as models
import texts

POLICIES = ["rkv", "wide", "snapkv", "memory_traces", "memory_prose", "memory_wide", "h2o",
            "triattention", "streaming", "random"]
PRESETS = {"rkv": "default"}  # rkv_config_<name> where the names differ
KEY = ["model", "precision", "set", "kind", "document", "budget", "buffer", "policy", "pinned"]
COLUMNS = KEY + ["prompt", "tokens", "nll_full", "nll", "kl"] + [
    f"{what}_{c}" for c in texts.CLASSES for what in ("asked", "full", "kept")]


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="build/models/smollm2-135m.gguf")
    p.add_argument("--library", dest="rkv", default="build/study/librkv.so")
    p.add_argument("--texts", default="build/study/texts", help="where packages are unpacked")
    p.add_argument("--csv", default="build/study.csv")
    p.add_argument("--set", default="report", choices=["choose", "report"])
    p.add_argument("--sizes", default="256/128,512/128,128/128,256/64,512/64,128/64",
                   help="budget/buffer, in the order in which they are run")
    p.add_argument("--documents", type=int, default=texts.DOCUMENTS, help="of each kind")
    p.add_argument("--kinds", default=",".join(texts.KINDS))
    p.add_argument("--policies", default=",".join(POLICIES),
                   help="also with other settings: memory_prose+votes=128+protect=64")
    p.add_argument("--precision", default="f32", choices=["f32", "bf16"],
                   help="of the products with weights; bf16 is fast where the CPU has it (AMX)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(),
                   help="processes of one thread each: on a shared machine faster than threads")
    p.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    p.add_argument("--minutes", type=float, default=0, help="stop then; 0: when all is done")
    p.add_argument("--quick", action="store_true", help="one document of each kind, 128/128")
    p.add_argument("--check", action="store_true", help="check the harness, measure nothing")
    return p.parse_args()


# ---- The full cache -----------------------------------------------------------------------------

class Full:
    """A document read with the full cache: hidden states of all tokens, keys and values, and the
    queries of the first tokens, up to where eviction begins."""

    def __init__(self, model, tokens, first, chunk=512):
        n = len(tokens)
        shape = (model.n_layers, 1, model.kv_heads, n, model.dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        hidden, queries = [], []
        for at in range(0, n, chunk):
            part = tokens[at : at + chunk]
            h, q = model.forward(part, at, self.keys, self.values, at)
            hidden.append(h[0])
            if at < first:
                queries.append(q[:, 0, :, : first - at])
        self.hidden = torch.cat(hidden)
        self.queries = torch.cat(queries, dim=2)  # [layer][head][first][dim]


class Judge:
    """Loss, KL and answers of hidden states against the full cache's, a chunk at a time. Both sides
    use the same rounded operands, so that equal hidden states give a KL of 0."""

    def __init__(self, model, full, document):
        self.model, self.full = model, full
        self.next = torch.tensor(document.tokens[1:])
        self.weights = model.head.float()
        self.is_answer = torch.zeros(len(document.tokens), dtype=torch.bool)
        for _, begin, end in document.probes:
            self.is_answer[begin:end] = True

    def start(self, begin, end):
        """Tokens [begin, end) have been read, and say what [begin + 1, end + 1) are."""
        self.begin, self.end = begin, min(end, len(self.next))
        hidden = self.full.hidden[begin : self.end]
        # KL and cross entropy need the vocabulary's mean row alone: sum of p * logit = h . mean.
        self.mean = torch.softmax(self.model.logits(hidden), -1) @ self.weights
        self.nll_full, self.cross_full = self.measure(hidden)
        self.right_full = self.answers(hidden)

    def measure(self, hidden):
        """NLL of the next tokens, and the cross entropy with the full cache."""
        log_sum = self.model.log_sums(hidden.flatten(0, -2)).view(hidden.shape[:-1])
        hidden = hidden.to(self.model.type).float()
        target = self.weights[self.next[self.begin : self.end]]
        return log_sum - (hidden * target).sum(-1), log_sum - (hidden * self.mean).sum(-1)

    def answers(self, hidden):
        """Which tokens of answers have the largest logit; True for all others."""
        asked = self.is_answer[self.begin + 1 : self.end + 1]
        right = torch.ones(hidden.shape[:-1], dtype=torch.bool)
        if asked.any():
            best = self.model.logits(hidden[..., asked, :]).argmax(-1)
            right[..., asked] = best == self.next[self.begin : self.end][asked]
        return right

    def judge(self, hidden):
        """hidden [..., token, width]: (NLL, KL, right) of the tokens [begin + 1, end + 1)."""
        hidden = hidden[..., : self.end - self.begin, :]
        nll, cross = self.measure(hidden)
        return nll, cross - self.cross_full, self.answers(hidden)


# ---- One document under all policies ------------------------------------------------------------

def allocate(*shape):
    return torch.zeros(shape)


def allocate_bytes(n):
    return torch.empty(n, dtype=torch.uint8)


def configure(lib, policy, is_pinned, document, budget, buffer):
    """The preset as it is; only the pin and, where the preset's comment asks for it, the buffer are
    told."""
    seed = zlib.crc32(document.name.encode())
    policy, *changes = policy.split("+")
    config = lib.preset(PRESETS.get(policy, policy), budget, seed)
    if policy in ("h2o", "memory_wide"):
        config.votes = buffer
    if is_pinned:
        config.pinned = max(config.pinned, prompt_rows(document, budget))
    if policy == "streaming":
        config.window = budget - config.pinned  # the sinks and the newest: nothing is chosen
    for change in changes:
        field, _, value = change.partition("=")
        try:
            setattr(config, field, type(getattr(config, field))(float(value)))
        except (AttributeError, TypeError, ValueError):
            raise SystemExit(f"{policy}+{change}: not a field of rkv_config and a number")
    return config


def prompt_rows(document, budget):
    """The prompt, but at most a quarter of the budget."""
    return min(document.prompt, budget // 4)


class Batch:
    """All streams of a document: keys, values and positions in one block of memory, a view of it
    for each stream."""

    def __init__(self, lib, model, full, configs, budget, buffer):
        self.model, self.budget, self.buffer = model, budget, buffer
        self.capacity = first = budget + buffer
        shape = (model.n_layers, len(configs), model.kv_heads, first, model.dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.keys.copy_(full.keys[:, :, :, :first].expand(shape))
        self.values.copy_(full.values[:, :, :, :first].expand(shape))
        self.positions = torch.arange(first, dtype=torch.int32).expand(shape[:4]).contiguous()
        rope = library.Rope(library.PAIRING_ADJACENT, model.rope_dims, model.rope_base, None)
        means = None
        self.streams = []
        for s, config in enumerate(configs):
            stream = library.Stream(lib, config, self.keys[:, s], self.values[:, s],
                                    self.positions[:, s], rope, allocate)
            if config.policy == library.TRIATTENTION:
                if means is None:
                    means = self.first_means(lib, stream, full.queries[:, :, :first])
                stream.use_query_means(means.clone())
            stream.queries, stream.n_new = full.queries[:, :, budget:first], first
            self.streams.append(stream)
        self.rows = self.round()

    def first_means(self, lib, stream, queries):
        floats = lib.c.rkv_query_means_floats(self.model.heads, self.model.dim)
        means = torch.zeros(self.model.n_layers, floats)
        for l in range(self.model.n_layers):
            stream.update_means(queries[l], 0, means[l])
        return means

    def round(self):
        kept = {s.round(self.capacity, allocate_bytes) for s in self.streams}
        assert kept == {self.budget}
        return self.budget

    def read(self, tokens, position):
        """Hidden states [stream][token][width] of at most `buffer` tokens."""
        n = len(tokens)
        hidden, queries = self.model.forward(tokens, position, self.keys, self.values, self.rows)
        self.positions[..., self.rows : self.rows + n] = torch.arange(
            position, position + n, dtype=torch.int32)
        for s, stream in enumerate(self.streams):
            stream.add(queries[:, s], position, n)
        self.rows += n
        if self.rows == self.capacity:
            self.rows = self.round()
        return hidden


def run_document(lib, model, document, budget, buffer, cells):
    """cells: (policy, is_pinned) pairs. Returns a row of measures for each."""
    tokens, first = torch.tensor(document.tokens), budget + buffer
    full = Full(model, tokens, first)
    configs = [configure(lib, p, pin, document, budget, buffer) for p, pin in cells]
    batch = Batch(lib, model, full, configs, budget, buffer)
    judge = Judge(model, full, document)
    parts, full_parts = [], []
    for at in range(first, len(tokens), buffer):
        hidden = batch.read(tokens[at : at + buffer], at)
        judge.start(at, at + buffer)
        full_parts.append((judge.nll_full, torch.zeros_like(judge.nll_full), judge.right_full))
        parts.append(judge.judge(hidden))
    of_full = summary(document, first, full_parts)
    columns = [torch.cat(column, -1) for column in zip(*parts)]
    return [row(document, budget, summary(document, first, [of]), of_full) for of in zip(*columns)]


def summary(document, first, parts):
    """Means over the tokens that count, and which probes are solved."""
    nll, kl, right = (torch.cat(column) for column in zip(*parts))
    counts = torch.tensor(document.scored[first + 1 :])
    solved = [bool(right[begin - first - 1 : end - first - 1].all())
              for _, begin, end in document.probes]
    return {"tokens": int(counts.sum()), "nll": nll[counts].double().mean().item(),
            "kl": kl[counts].double().mean().item(), "solved": solved}


def row(document, budget, measured, of_full):
    out = {"prompt": prompt_rows(document, budget), "tokens": measured["tokens"],
           "nll_full": f"{of_full['nll']:.6f}", "nll": f"{measured['nll']:.6f}",
           "kl": f"{measured['kl']:.6f}"}
    for c in texts.CLASSES:
        of_class = [i for i, probe in enumerate(document.probes) if probe[0] == c]
        by_full = [i for i in of_class if of_full["solved"][i]]
        out[f"asked_{c}"], out[f"full_{c}"] = len(of_class), len(by_full)
        out[f"kept_{c}"] = sum(measured["solved"][i] for i in by_full)
    return out


# ---- The run ------------------------------------------------------------------------------------

def finished(path):
    if not path.exists():
        return set()
    with path.open() as f:
        return {tuple(line[k] for k in KEY) for line in csv.DictReader(f)}


def append(path, lines):
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


def available(lib, names):
    bases = {n.split("+")[0] for n in names}
    missing = [n for n in bases if not hasattr(lib.c, f"rkv_config_{PRESETS.get(n, n)}")]
    if missing:
        raise SystemExit(f"rkv.h has no preset for: {', '.join(missing)}")
    return names


def tasks(args, lib, documents):
    """(budget, buffer, document, cells still to be run, their keys); the same list whatever is
    done, so that parts of it stay disjoint."""
    done = finished(pathlib.Path(args.csv))
    cells = [(p, pin) for pin in (0, 1) for p in available(lib, args.policies.split(","))]
    for size in args.sizes.split(","):
        budget, buffer = map(int, size.split("/"))
        for document in documents:
            base = (pathlib.Path(args.model).name, args.precision, args.set, document.kind,
                    document.name, str(budget), str(buffer))
            keys = {cell: base + (cell[0], str(cell[1])) for cell in cells}
            left = [cell for cell in cells if keys[cell] not in done]
            yield budget, buffer, document, left, keys


def run(args, lib, model, documents):
    part, parts = map(int, args.part.split("/"))
    todo = [task for task in list(tasks(args, lib, documents))[part::parts] if task[3]]
    began = time.monotonic()
    for i, (budget, buffer, document, cells, keys) in enumerate(todo):
        rows = run_document(lib, model, document, budget, buffer, cells)
        append(pathlib.Path(args.csv),
               [{**dict(zip(KEY, keys[cell])), **r} for cell, r in zip(cells, rows)])
        spent = time.monotonic() - began
        print(f"{args.part}: {i + 1}/{len(todo)}  {budget}/{buffer} {document.name}  "
              f"{spent / (i + 1):.0f} s each, {spent / (i + 1) * (len(todo) - i - 1) / 60:.0f} min "
              "to go", flush=True)
        if args.minutes and spent > 60 * args.minutes:
            break


def in_parts(n):
    """The same command n times, each with a part of what is to be done."""
    processes = [subprocess.Popen([sys.executable, *sys.argv, "--part", f"{i}/{n}"])
                 for i in range(n)]
    return max(p.wait() for p in processes)


def main():
    args = options()
    torch.set_num_threads(1)
    if not pathlib.Path(args.model).exists():
        raise SystemExit(f"no {args.model}: run make llama-models, or give --model FILE.gguf")
    lib = library.Library(args.rkv)
    model = models.Model(args.model, args.precision)
    if args.quick:
        args.documents, args.sizes = 1, "128/128"
    documents = texts.documents(texts.Files(args.texts), model.tokenizer, args.set,
                                args.kinds.split(","), args.documents)
    with torch.inference_mode():
        if (args.check or args.quick) and args.part == "0/1":
            import check
            check.run(lib, model, documents[0])
        if not args.check and args.jobs > 1 and args.part == "0/1":
            return in_parts(args.jobs)
        if not args.check:
            run(args, lib, model, documents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
