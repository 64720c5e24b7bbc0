"""The documents of the study: prose and code as Debian packages and this repository have them,
reasoning traces and recall probes from generators with seeds. Two disjoint sets: "choose", for
settings, and "report", for the tables."""
import gzip
import hashlib
import pathlib
import random
import subprocess

LENGTH = 2048         # tokens of a document
RECALL_LENGTH = 1024  # of one with recall probes: of facts further back small models know little
PROMPT = 64           # tokens of running text that count as its prompt
DOCUMENTS = 12        # of each kind and set

# package, version, file, first digits of the sha256 of the unpacked file: as in the tables
PROSE = [("developers-reference", "12.18",
          "usr/share/developers-reference/developers-reference.txt.gz", "6e16d3fba905b0ac"),
         ("debian-history", "2.28", "usr/share/doc/debian-history/docs/project-history.en.txt.gz",
          "0ecbf384a8ecba95")]
PYTHON = ("libpython3.11-stdlib", "3.11.2-6+deb12u6")
PYTHON_FILES = {
    "choose": {"tarfile": "d9723b216cb90b9e", "typing": "ed0a1062b1d0a0c8",
               "ast": "51c96d6b6701a83c", "difflib": "0c6afc23568d55b3",
               "ftplib": "672300f448249dfd", "shutil": "b9599d3ce4e706f1"},
    "report": {"argparse": "9cad2261a804a55d", "zipfile": "b689fb6775a0668e",
               "mailbox": "e695a76d936f009d", "inspect": "75147eb66270082c",
               "optparse": "07d224301cba312f", "configparser": "d1529aa3309cdc96"}}
HEADER = "573373f:rkv.h"  # a commit of this repository


class Document:
    """tokens; prompt: how many of them are the prompt; scored[i]: token i counts in the loss;
    probes: (class, first, end) of answers."""

    def __init__(self, kind, name, tokens, prompt, scored=None, probes=()):
        self.kind, self.name, self.tokens, self.prompt = kind, name, tokens, prompt
        self.scored = scored or [True] * len(tokens)
        self.probes = list(probes)


# ---- Files --------------------------------------------------------------------------------------

class Files:
    """Files of Debian packages: those installed, else the package is fetched and unpacked (not
    installed) under `folder`."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.used = {}

    def read(self, package, version, path, digest=""):
        for at in (self.folder / path, pathlib.Path("/") / path):
            if at.exists():
                break
        else:
            at = self.fetch(package, version, path)
        data = at.read_bytes()
        if path.endswith(".gz"):
            data = gzip.decompress(data)
        found = hashlib.sha256(data).hexdigest()[:16]
        if digest and found != digest:
            print(f"# {at} is not the file of the published tables ({package} {version})")
        self.used[path] = found
        return data.decode()

    def fetch(self, package, version, path):
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"# fetching the Debian package {package} {version}")
        subprocess.run(["apt-get", "download", "-q", f"{package}={version}"], cwd=self.folder,
                       capture_output=True)
        for deb in self.folder.glob(f"{package}_*.deb"):
            subprocess.run(["dpkg-deb", "-x", deb, self.folder])
        if not (self.folder / path).exists():
            raise SystemExit(f"no {path}: install the Debian package {package} ({version}), or "
                             f"unpack it under {self.folder}")
        return self.folder / path


def pieces(tokens, length, skip):
    """Consecutive documents' worth of tokens, without the first `skip`."""
    n = len(tokens) // length
    return [tokens[i * length : (i + 1) * length] for i in range(skip, n)]


def half(items, which):
    middle = len(items) // 2
    return items[:middle] if which == "choose" else items[middle:]


def take_turns(lists):
    """The first of each list, the second of each, ..."""
    longest = max(map(len, lists))
    return [one[i] for i in range(longest) for one in lists if i < len(one)]


def prose_pieces(files, tokenizer, which, parity):
    """(name, tokens): every other piece of the half of each file that is this set's. The first two
    pieces of the reference are its table of contents."""
    found = []
    for (package, version, path, digest), skip in zip(PROSE, (2, 0)):
        cut = pieces(tokenizer.encode(files.read(package, version, path, digest)), LENGTH, skip)
        named = [(f"{package}-{skip + i}", tokens) for i, tokens in enumerate(cut)]
        found.append(half(named, which)[parity::2])
    return take_turns(found)


def prose(files, tokenizer, which, n):
    return [Document("prose", name, tokens, PROMPT)
            for name, tokens in prose_pieces(files, tokenizer, which, 0)[:n]]


def code(files, tokenizer, which, n):
    """Python modules, the second piece of each, and the C of this repository's header."""
    modules = []
    for module, digest in PYTHON_FILES[which].items():
        text = files.read(*PYTHON, f"usr/lib/python3.11/{module}.py", digest)
        modules.append((f"{module}.py-1", pieces(tokenizer.encode(text), LENGTH, 1)[0]))
    header = subprocess.run(["git", "show", HEADER], capture_output=True)
    if header.returncode:
        raise SystemExit(f"code: git show {HEADER} needs a clone with its history")
    text = header.stdout.decode()
    cut = pieces(tokenizer.encode(text[text.index("#ifdef RKV_IMPLEMENTATION") :]), LENGTH, 0)
    c = [(f"rkv.h-{i}", tokens) for i, tokens in enumerate(cut)]
    c = half(c, which)[:: max(len(c) // 2 // ((n + 1) // 2), 1)]  # spread over the file
    return [Document("code", name, tokens, PROMPT) for name, tokens in take_turns([c, modules])[:n]]


# ---- Reasoning traces ---------------------------------------------------------------------------

REPEATED = ["Wait, let me check that step again.", "Hmm, that looks right.",
            "So far so good, let me go on.", "Let me think about what comes next.",
            "Okay, I am fairly sure about that.", "Alright, next step."]
ADJECTIVES = """old quiet red broken narrow distant heavy pale early hidden wooden cold bright empty
    slow iron green hollow late gentle""".split()
NOUNS = """ladder harbour kettle window orchard engine letter bridge lantern garden piano basket
    river candle wagon mirror chimney blanket compass violin""".split()
VERBS = """follows carries forgets answers crosses repairs borrows paints measures hides praises
    lifts ignores finds remembers turns""".split()
PLACES = ["behind the mill", "near the station", "under the stairs", "before the storm",
          "after lunch", "beside the canal", "without a sound", "in the attic", "at the market",
          "on the hill"]


def filler(rng, repeats, seen):
    """A sentence that carries nothing: one of a few, or one that is never said twice."""
    if repeats:
        return rng.choice(REPEATED)
    while True:
        parts = [rng.choice(words) for words in (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS)]
        said = "The {} {} {} the {} {} {}.".format(*parts, rng.choice(PLACES))
        if said not in seen:
            seen.add(said)
            return said


def pick(rng, names, n_given):
    """An earlier variable: recent (half of the time), any, or one that the problem gives."""
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(names[-3:])
    return rng.choice(names if draw < 0.8 else names[:n_given])


def step(rng, names, values, n_given, new):
    """A line of the chain that defines variable `new`. Values stay below 100."""
    a, b = pick(rng, names, n_given), pick(rng, names, n_given)
    x, y = values[a], values[b]
    kind = rng.randrange(3)
    if kind == 0 and x + y < 100:
        values[new] = x + y
        return f"{new} = {a} + {b}. Since {a} is {x} and {b} is {y}, {new} = {x} + {y} = {x + y}."
    if kind == 1:
        low = min(x, y)
        values[new] = low
        return (f"{new} is the smaller of {a} and {b}. We know {a} = {x} and {b} = {y}, "
                f"so {new} = {low}.")
    limit, add = rng.randrange(20, 80), rng.randrange(2, 20)
    is_above = x > limit
    values[new] = x - add if is_above else x + add
    sign = "-" if is_above else "+"
    return (f"If {a} is above {limit} then {new} = {a} - {add}, otherwise {new} = {a} + {add}. "
            f"{a} is {x}, which is {'above' if is_above else 'not above'} {limit}, "
            f"so {new} = {x} {sign} {add} = {values[new]}.")


def variable_names():
    """a, b, ..., z, aa, ab, ... without those that are words of the sentences."""
    letters = "abcdefghjklmnpqrstuvwxyz"
    return list(letters) + [p + q for p in "ktuvw" for q in letters]


def trace(tokenizer, seed, repeats):
    """A long chain of small steps. Half of the steps are followed by fillers, a quarter by a check
    that says the result again."""
    rng = random.Random(seed)
    names, values, free, seen = [], {}, variable_names(), set()
    n_given = 5
    for _ in range(n_given):
        names.append(free.pop(0))
        values[names[-1]] = rng.randrange(10, 60)
    given = ", ".join(f"{v} = {values[v]}" for v in names)
    prompt = f"Problem: {given}. Work out every variable below.\n"
    text, n_prompt = prompt, len(tokenizer.encode(prompt))
    while len(tokenizer.encode(text)) < LENGTH + 64 and free:
        new = free.pop(0)
        text += step(rng, names, values, n_given, new) + "\n"
        names.append(new)
        if rng.random() < 0.25:
            text += f"Let me verify: {new} = {values[new]}. Yes.\n"
        if rng.random() < 0.5:
            text += " ".join(filler(rng, repeats, seen) for _ in range(rng.randrange(1, 4))) + "\n"
    return tokenizer.encode(text)[:LENGTH], n_prompt


def traces(files, tokenizer, which, n):
    """In turns with fillers that repeat and with fillers that never do."""
    documents = []
    for i in range(n):
        repeats = i % 2 == 0
        tokens, n_prompt = trace(tokenizer, f"{which}-trace-{i}", repeats)
        name = f"trace-{i}-{'repeating' if repeats else 'unique'}"
        documents.append(Document("traces", name, tokens, n_prompt))
    return documents


# ---- Recall probes ------------------------------------------------------------------------------

THINGS = """harbour bridge tower garden library station museum market castle chapel factory school
    theatre airport prison hotel bakery forest island valley stadium bank farm mine""".split()
CLASSES = ("prompt", "middle", "restated")
EACH = 3  # probes of each class in a document


def say(thing, value):
    return f" The code of the {thing} is {value}."


def ends_of_sentences(tokenizer, tokens):
    """Where a sentence can be put in: after a full stop that follows letters."""
    text = [tokenizer.tokens[t] for t in tokens]
    return [i + 1 for i in range(1, len(text) - 1)
            if text[i] == "." and text[i - 1][-1].isalpha() and text[i + 1][0] in "\u0120\u010a"]


def recall_document(tokenizer, body, seed, name):
    """Facts in the prompt, facts said once in the first 60 % of the text, facts said early and
    changed later, and at the end all of them asked for. The loss counts the text alone."""
    rng = random.Random(seed)
    things = rng.sample(THINGS, 3 * EACH)
    value = {t: rng.randrange(1000, 10000) for t in things}
    of_class = {c: things[i * EACH : (i + 1) * EACH] for i, c in enumerate(CLASSES)}
    prompt = tokenizer.encode("Remember these codes." +
                              "".join(say(t, value[t]) for t in of_class["prompt"]) + "\n")
    asked = [(c, t) for c in CLASSES for t in of_class[c]]
    rng.shuffle(asked)
    questions, probes = tokenizer.encode("\n\n"), []
    for c, t in asked:
        questions += tokenizer.encode(f"The code of the {t} is ")
        answer = tokenizer.encode(f"{value[t]}")
        probes.append((c, len(questions), len(questions) + len(answer)))
        questions += answer + tokenizer.encode(".\n")
    inserted = [(rng.uniform(0.10, 0.60), say(t, value[t])) for t in of_class["middle"]]
    for t in of_class["restated"]:
        inserted.append((rng.uniform(0.05, 0.35), say(t, rng.randrange(1000, 10000))))
        inserted.append((rng.uniform(0.40, 0.75), say(t, value[t])))
    facts = [(at, tokenizer.encode(said)) for at, said in sorted(inserted)]
    room = RECALL_LENGTH - len(prompt) - len(questions) - sum(len(f) for _, f in facts)
    tokens, scored, last = list(prompt), [False] * len(prompt), 0
    stops = ends_of_sentences(tokenizer, body[:room])
    for at, fact in facts:
        cut = max(last, min(stops, key=lambda i: abs(i - at * room)))  # after a sentence
        tokens += body[last:cut] + fact
        scored += [True] * (cut - last) + [False] * len(fact)
        last = cut
    tokens += body[last:room]
    scored += [True] * (room - last)
    probes = [(c, first + len(tokens), end + len(tokens)) for c, first, end in probes]
    return Document("recall", name, tokens + questions, len(prompt),
                    scored + [False] * len(questions), probes)


def recall(files, tokenizer, which, n):
    """In the pieces of prose that the prose documents leave out."""
    bodies = prose_pieces(files, tokenizer, which, 1)[:n]
    return [recall_document(tokenizer, body, f"{which}-recall-{i}", f"recall-{name}")
            for i, (name, body) in enumerate(bodies)]


KINDS = {"prose": prose, "code": code, "traces": traces, "recall": recall}


def documents(files, tokenizer, which, kinds, n):
    """The first n of each kind, in turns, so that a run cut short has some of each."""
    return take_turns([KINDS[kind](files, tokenizer, which, DOCUMENTS)[:n] for kind in kinds])
