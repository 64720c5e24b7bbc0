"""rkv.h through ctypes: mirrors of its structs, checked against the compiler's layout, and a cache
of one stream, in the caller's memory, that the library compresses in place."""
import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p

OK, F32 = 0, 0
PAIRING_HALVES, PAIRING_ADJACENT = 2, 3
RANDOM, TRIATTENTION = 5, 4


class Error(ctypes.Structure):
    _fields_ = [("rule", c_char_p), ("status", c_int32), ("layer", c_int32), ("head", c_int32),
                ("token", c_int32)]


class Rope(ctypes.Structure):
    _fields_ = [("pairing", c_int), ("dims", c_int), ("base", c_float), ("frequencies", c_void_p)]


class Config(ctypes.Structure):
    _fields_ = [
        ("budget", c_int), ("pinned", c_int), ("error", POINTER(Error)), ("scope", c_int),
        ("n_threads", c_int), ("parallel_for", c_void_p), ("pool_handle", c_void_p),
        ("window", c_int), ("protect", c_int), ("pool", c_int), ("mean_pool", c_int),
        ("recent", c_int), ("lambda", c_float), ("threshold", c_float), ("variant", c_int),
        ("policy", c_int), ("votes", c_int), ("decay", c_float), ("seed", c_uint32),
        ("device_error", c_void_p)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("dtype", c_int), ("heads", c_int), ("tokens", c_int), ("dim", c_int),
        ("head_stride", c_int64), ("token_stride", c_int64), ("dim_stride", c_int64),
        ("element_bytes", c_int), ("block_table", c_void_p), ("block_tokens", c_int),
        ("block_stride", c_int64), ("load", c_void_p), ("load_user", c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("keys", Tensor), ("values", Tensor), ("queries", Tensor), ("n_tokens", c_int),
        ("n_kept", c_int), ("positions", c_void_p), ("pins", c_void_p), ("row_stride", c_int),
        ("scale", c_float), ("softcap", c_float), ("sequence", c_int), ("kept", c_void_p),
        ("scores", c_void_p), ("shared_scores", c_void_p), ("bias", c_void_p), ("state", c_void_p),
        ("n_new", c_int), ("first_query", c_int), ("rope", Rope), ("query_means", c_void_p)]


class Field(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("offset", c_int32), ("size", c_int32)]


MIRRORS = {"rkv_error": Error, "rkv_rope": Rope, "rkv_config": Config, "rkv_tensor": Tensor,
           "rkv_layer": Layer}


class Library:
    """The shared library that `make study` builds from study.c."""

    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        self._check_layout()
        self.c.rkv_explain.restype = c_char_p
        self.c.rkv_query_means_floats.restype = c_size_t
        self.error = Error()

    def _check_layout(self):
        """Every field of every mirror lies where the compiler has put it, and none is left out."""
        n = c_int32()
        self.c.study_layout.restype = POINTER(Field)
        fields = self.c.study_layout(ctypes.byref(n))
        theirs = {f.name.decode(): (f.offset, f.size) for f in fields[: n.value]}
        ours = {}
        for name, mirror in MIRRORS.items():
            ours[name] = (0, ctypes.sizeof(mirror))
            for field in mirror._fields_:
                at = getattr(mirror, field[0])
                ours[f"{name}.{field[0]}"] = (at.offset, at.size)
        if ours != theirs:
            wrong = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise SystemExit(f"library.py does not mirror rkv.h: {', '.join(wrong)}")

    def preset(self, name, budget, seed):
        """rkv_config_<name>, with an error record."""
        make = getattr(self.c, f"rkv_config_{name}")
        make.restype = Config
        config = make(c_int(budget), c_uint32(seed)) if name == "random" else make(c_int(budget))
        config.error = ctypes.pointer(self.error)
        return config

    def check(self, status, doing):
        if status != OK:
            text = ctypes.create_string_buffer(256)
            self.c.rkv_explain(ctypes.byref(self.error), text, c_size_t(256))
            raise RuntimeError(f"{doing}: status {status}: {text.value.decode()}")


def view(tensor, first=0, tokens=None):
    """rkv_tensor of a torch tensor [head][token][dim], f32, any head and token stride."""
    heads, rows, dim = tensor.shape
    assert tensor.stride(2) == 1 and tensor.element_size() == 4
    out = Tensor()
    out.data = tensor.data_ptr() + 4 * first * tensor.stride(1)
    out.dtype, out.heads, out.tokens, out.dim = F32, heads, tokens or rows - first, dim
    out.head_stride, out.token_stride = tensor.stride(0), tensor.stride(1)
    return out


class Stream:
    """One sequence under one policy. keys, values: [layer][kv head][capacity][dim], positions:
    [layer][kv head][capacity], all torch tensors that stay alive; queries: of the newest chunk,
    [layer][query head][chunk][dim]; rope: Rope. round() chooses and moves the rows in place."""

    def __init__(self, library, config, keys, values, positions, rope, allocate):
        self.rkv, self.config, self.rope = library, config, rope
        self.keys, self.positions = keys, positions
        n_layers, kv_heads, capacity, dim = keys.shape
        self.layers = (Layer * n_layers)()
        floats = library.c.rkv_state_floats(ctypes.byref(config))
        self.state = allocate(n_layers, kv_heads, floats, capacity)
        self.means = None
        self.n_new = 0
        for l, layer in enumerate(self.layers):
            layer.keys, layer.values = view(keys[l]), view(values[l])
            layer.positions = positions[l].data_ptr()
            layer.rope = rope
            if floats:
                layer.state = self.state[l].data_ptr()
        self.workspace = None

    def use_query_means(self, means):
        """Running means of the queries: [layer][rkv_query_means_floats], zeros at first."""
        self.means = means
        for l, layer in enumerate(self.layers):
            layer.query_means = means[l].data_ptr()

    def add(self, queries, first_position, n_new):
        """The chunk's queries and how many rows it has added. A model whose rows have seen a
        round of its own updates its own means."""
        self.n_new += n_new
        self.queries = queries
        if self.means is not None:
            for l in range(len(self.layers)):
                self.update_means(queries[l], first_position, self.means[l])

    def update_means(self, queries, position, means):
        of = view(queries)
        status = self.rkv.c.rkv_query_means_update(
            None, ctypes.byref(self.config), ctypes.byref(self.rope), ctypes.byref(of), c_int(0),
            c_int(queries.shape[1]), c_int(position), c_void_p(means.data_ptr()))
        self.rkv.check(status, "rkv_query_means_update")

    def round(self, rows, allocate_bytes):
        """One round over all layers; returns the rows that stay."""
        votes = self.config.votes or self.config.window
        for l, layer in enumerate(self.layers):
            if self.config.pinned + self.config.window < self.config.budget:
                layer.queries = view(self.queries[l], self.queries.shape[2] - votes, votes)
            layer.n_tokens, layer.n_new, layer.first_query = rows, self.n_new, 0
        n, bytes_ = len(self.layers), c_size_t()
        c, config = self.rkv.c, ctypes.byref(self.config)
        if self.workspace is None:
            status = c.rkv_workspace_size(None, config, self.layers, n, ctypes.byref(bytes_))
            self.rkv.check(status, "rkv_workspace_size")
            self.workspace = allocate_bytes(bytes_.value)
        status = c.rkv_compress(None, config, self.layers, n, c_void_p(self.workspace.data_ptr()),
                                c_size_t(self.workspace.numel()))
        self.rkv.check(status, "rkv_compress")
        self.n_new = 0
        return self.layers[0].n_tokens
