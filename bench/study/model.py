"""A GGUF of llama architecture in PyTorch, for many streams that read the same tokens, each over a
cache of its own; and its tokenizer (byte-level BPE)."""
import re

import torch
import torch.nn.functional as F


def contents(reader, key, default=None):
    field = reader.fields.get(key)
    return default if field is None else field.contents()


class Model:
    """precision "bf16": matrix products of the weights in bf16 with sums in f32, the type that such
    models are published in; attention, norms and the residual stream stay f32."""

    def __init__(self, path, precision):
        import gguf
        reader = gguf.GGUFReader(path)
        if contents(reader, "general.architecture") != "llama":
            raise SystemExit(f"{path}: not of llama architecture")
        get = lambda key, default=None: contents(reader, f"llama.{key}", default)
        self.n_layers, self.width = get("block_count"), get("embedding_length")
        self.heads = get("attention.head_count")
        self.kv_heads = get("attention.head_count_kv", self.heads)
        self.dim = get("attention.key_length", self.width // self.heads)
        self.eps = get("attention.layer_norm_rms_epsilon", 1e-5)
        self.rope_dims = get("rope.dimension_count", self.dim)
        self.rope_base = get("rope.freq_base", 10000.0)
        if get("rope.scaling.type", "none") != "none":
            raise SystemExit(f"{path}: scaled rotary embedding is not supported")
        self.type = torch.bfloat16 if precision == "bf16" else torch.float32
        tensors = {t.name: t for t in reader.tensors}
        if "rope_freqs.weight" in tensors:
            raise SystemExit(f"{path}: a table of rotary frequencies is not supported")

        def load(name):
            t = tensors[name]
            return torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).float()

        self.embedding = load("token_embd.weight")
        self.head = load("output.weight") if "output.weight" in tensors else self.embedding
        self.head = self.head.to(self.type)
        self.last_norm = load("output_norm.weight")
        self.layers = []
        for l in range(self.n_layers):
            part = lambda name: load(f"blk.{l}.{name}.weight")
            self.layers.append({
                "norm": part("attn_norm"), "ffn_norm": part("ffn_norm"),
                "qkv": torch.cat([part("attn_q"), part("attn_k"), part("attn_v")]).to(self.type),
                "out": part("attn_output").to(self.type),
                "gate_up": torch.cat([part("ffn_gate"), part("ffn_up")]).to(self.type),
                "down": part("ffn_down").to(self.type)})
        self.tokenizer = Tokenizer(reader)

    def rotation(self, first, n):
        """The turns of positions first, first + 1, ... as complex numbers: [n][1][rope_dims / 2].
        Frequencies as rkv.h has them: rounded to f32, and the angles in double."""
        f = torch.arange(0, self.rope_dims, 2, dtype=torch.float64) / self.rope_dims
        frequency = (self.rope_base ** -f).float().double()
        angle = torch.arange(first, first + n, dtype=torch.float64)[:, None] * frequency
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]

    def rotate(self, x, rotation):
        """x [stream][token][head][dim], in place; llama's GGUF pairs adjacent numbers."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        pairs[..., : self.rope_dims // 2].mul_(rotation)

    def linear(self, x, weight):
        return F.linear(x.to(self.type), weight).float()

    def norm(self, x, weight):
        return F.rms_norm(x, (self.width,), weight, self.eps)

    def forward(self, tokens, first, keys, values, rows):
        """Reads the tokens at positions first, first + 1, ... in every stream. keys, values:
        [layer][stream][kv head][capacity][dim] with `rows` rows in use, the same in every stream;
        the new rows are appended. Returns the last hidden states [stream][token][width] and the
        queries [layer][stream][head][token][dim]."""
        n, streams = len(tokens), keys.shape[1]
        end = rows + n
        rotation = self.rotation(first, n)
        # Every cached row is older than the chunk; within the chunk attention is causal. The query
        # heads of a KV head stand below each other, so that it is read once for all of them.
        group = self.heads // self.kv_heads
        mask = torch.full((n, end), float("-inf")).triu(rows + 1).repeat(group, 1)
        hidden = self.embedding[tokens].repeat(streams, 1)
        queries = torch.empty(self.n_layers, streams, self.heads, n, self.dim)
        for l, w in enumerate(self.layers):
            qkv = self.linear(self.norm(hidden, w["norm"]), w["qkv"])
            qkv = qkv.view(streams, n, -1, self.dim)
            self.rotate(qkv[:, :, : self.heads + self.kv_heads], rotation)
            q, k, v = qkv.transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], 1)
            queries[l] = q
            keys[l, :, :, rows:end] = k
            values[l, :, :, rows:end] = v
            mixed = F.scaled_dot_product_attention(
                queries[l].view(streams, self.kv_heads, group * n, self.dim),
                keys[l, :, :, :end], values[l, :, :, :end], attn_mask=mask)
            mixed = mixed.view(streams, self.heads, n, self.dim)
            mixed = mixed.transpose(1, 2).reshape(streams * n, self.heads * self.dim)
            hidden = hidden + self.linear(mixed, w["out"])
            x = F.linear(self.norm(hidden, w["ffn_norm"]).to(self.type), w["gate_up"])
            half = x.shape[-1] // 2
            hidden = hidden + self.linear(F.silu(x[:, :half]) * x[:, half:], w["down"])
        return self.norm(hidden, self.last_norm).view(streams, n, -1), queries

    def logits(self, hidden):
        return F.linear(hidden.to(self.type), self.head).float()

    def log_sums(self, hidden, block=512):
        """logsumexp of the logits of each row, a block of the vocabulary at a time: three times as
        fast as over all logits, which no cache holds."""
        hidden = hidden.to(self.type)
        parts = [torch.logsumexp(F.linear(hidden, rows).float(), -1)
                 for rows in self.head.split(block)]
        return torch.logsumexp(torch.stack(parts), 0)


# ---- Tokenizer ----------------------------------------------------------------------------------

WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def byte_letters():
    """GPT-2's spelling of bytes as printable letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """Byte-level BPE as GPT-2 has it; with "smollm" every digit stands alone. Other splitting rules
    of llama.cpp are not distinguished: they would cut some words elsewhere."""

    def __init__(self, reader):
        if contents(reader, "tokenizer.ggml.model") != "gpt2":
            raise SystemExit("the tokenizer is not byte-level BPE")
        self.tokens = contents(reader, "tokenizer.ggml.tokens")
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        merges = contents(reader, "tokenizer.ggml.merges")
        self.ranks = {tuple(m.split(" ", 1)): r for r, m in enumerate(merges)}
        self.digits_alone = contents(reader, "tokenizer.ggml.pre") == "smollm"
        self.letters = byte_letters()
        self.cache = {}

    def encode(self, text):
        parts = re.split(r"(\d)", text) if self.digits_alone else [text]
        return [i for part in parts for word in WORDS.findall(part) for i in self.encode_word(word)]

    def encode_word(self, word):
        if word not in self.cache:
            pieces = [self.letters[b] for b in word.encode()]
            while len(pieces) > 1:
                rank, at = min((self.ranks.get(pair, 1 << 30), i)
                               for i, pair in enumerate(zip(pieces, pieces[1:])))
                if rank == 1 << 30:
                    break
                pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            self.cache[word] = [self.ids[p] for p in pieces]
        return self.cache[word]
