"""Checks of the harness itself: make study STUDY=--check"""
import torch
import torch.nn.functional as F

import library
import study

WINDOW, POOL, LAMBDA, THRESHOLD = 8, 7, 0.1, 0.5


def plain_rkv(keys, queries, budget):
    """R-KV as published, the plain way: keys [head][n][dim], queries [head][group][window][dim].
    The rows that stay, ascending: [head][budget]."""
    heads, n, dim = keys.shape
    logits = queries @ keys[:, None, : n - WINDOW].mT / dim**0.5
    attention = torch.softmax(logits.amax(1), -1).mean(1)
    importance = F.max_pool1d(attention, POOL, 1, POOL // 2)
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.mT
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    latest = torch.where(cosine > THRESHOLD, torch.arange(n), 0).amax(-1, keepdim=True)
    cosine.scatter_(-1, latest, 0.0)
    redundancy = torch.softmax(cosine.mean(1), -1)[:, : n - WINDOW]
    score = LAMBDA * importance - (1 - LAMBDA) * redundancy
    best = score.topk(budget - WINDOW, -1).indices.sort(-1).values
    return torch.cat([best, torch.arange(n - WINDOW, n).expand(heads, WINDOW)], -1)


def rows_agree(lib, model, document, budget=256, buffer=128):
    """The rows that rkv.h keeps and moves are those of plain_rkv, in every layer and KV head."""
    first = budget + buffer
    full = study.Full(model, torch.tensor(document.tokens), first)
    config = lib.preset("default", budget, 0)
    batch = study.Batch(lib, model, full, [config], budget, buffer)
    different, most = 0, 0
    for l in range(model.n_layers):
        keys = full.keys[l, 0, :, :first].double()
        queries = full.queries[l, :, first - WINDOW : first].double()
        kept = plain_rkv(keys, queries.view(model.kv_heads, -1, WINDOW, model.dim), budget)
        ours = batch.positions[l, 0, :, :budget]
        for h in range(model.kv_heads):
            wrong = len(set(kept[h].tolist()) ^ set(ours[h].tolist())) // 2
            different, most = different + wrong, max(most, wrong)
            # Keys and values lie where the positions say.
            at = ours[h].long()
            assert torch.equal(batch.keys[l, 0, h, :budget], full.keys[l, 0, h, at])
            assert torch.equal(batch.values[l, 0, h, :budget], full.values[l, 0, h, at])
    total = model.n_layers * model.kv_heads * budget
    print(f"# R-KV in 15 lines of PyTorch (in double) keeps the same rows but for {different} of "
          f"{total}")
    assert different <= total // 5000


def full_agrees(model, document, n=512, chunk=64):
    """A cache that is read in chunks and never compressed gives what one pass gives, and a KL of 0
    against itself."""
    tokens = torch.tensor(document.tokens[:n])
    one, many = study.Full(model, tokens, n, chunk=n), study.Full(model, tokens, n, chunk=chunk)
    nll = [F.cross_entropy(model.logits(f.hidden)[:-1], tokens[1:]) for f in (one, many)]
    print(f"# full cache, loss of the first {n} tokens: in one pass {nll[0]:.5f}, "
          f"in chunks {nll[1]:.5f}")
    assert abs(nll[0] - nll[1]) < (1e-4 if model.type == torch.float32 else 1e-2)
    document_part = type(document)(document.kind, document.name, document.tokens[:n], 0)
    judge = study.Judge(model, many, document_part)
    judge.start(n - chunk, n)
    kl = judge.judge(many.hidden[n - chunk :])[1].abs().max().item()
    print(f"# its KL from itself: {kl:.1e}")
    assert kl < 1e-5


def run(lib, model, document):
    full_agrees(model, document)
    rows_agree(lib, model, document)
