"""Tables and pictures of the study: the CSV of study.py becomes the part of study.md between the
marks, and one picture a budget and buffer.   make study-report
Intervals: 95 %, bootstrap over documents, paired where two policies are compared."""
import argparse
import collections
import csv
import pathlib

import numpy as np

import texts

KINDS = ["prose", "code", "traces"]
NAMES = {"rkv": "R-KV", "wide": "R-KV, wide", "snapkv": "SnapKV", "memory_traces": "memory, traces",
         "memory_prose": "memory, prose", "memory_wide": "memory, wide", "h2o": "H2O",
         "triattention": "TriAttention", "streaming": "StreamingLLM", "random": "random"}
PIN = ["-", "pinned"]
BEGIN, END = "<!-- tables: made by report.py -->", "<!-- end of tables -->"
RESAMPLES = 10000


class Results:
    """measure[size, kind][policy, pin][document] = (loss - full, KL); only documents that were read
    under every policy and pin of that size."""

    def __init__(self, path, which):
        self.lines = [r for r in csv.DictReader(open(path)) if r["set"] == which]
        cells = collections.defaultdict(lambda: collections.defaultdict(dict))
        for r in self.lines:
            size = (int(r["budget"]), int(r["buffer"]))
            cells[size, r["kind"]][r["policy"], int(r["pinned"])][r["document"]] = r
        self.cells = {}
        for at, by_policy in cells.items():
            common = set.intersection(*(set(d) for d in by_policy.values()))
            self.cells[at] = {p: {k: d[k] for k in sorted(common)} for p, d in by_policy.items()}
        self.sizes = sorted({size for size, _ in cells},
                            key=lambda s: (s != (256, 128), -s[1], -s[0]))

    def documents(self, size, kind):
        by_policy = self.cells.get((size, kind), {})
        return len(next(iter(by_policy.values()), {}))

    def losses(self, size, kind, only=""):
        """{(policy, pin): [loss - full] of the documents}"""
        return {p: np.array([float(r["nll"]) - float(r["nll_full"])
                             for name, r in rows.items() if only in name])
                for p, rows in self.cells[size, kind].items()}

    def divergences(self, size, kind):
        return {p: np.array([float(r["kl"]) for r in rows.values()])
                for p, rows in self.cells[size, kind].items()}


def interval(values):
    """Mean, and the 95 % interval of the mean over documents."""
    rng = np.random.default_rng(1)
    draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return values.mean(), low, high


def show(values, sign=""):
    mean, low, high = (round(v, 3) + 0.0 for v in interval(values))  # no -0.000
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def best_other(losses, cell):
    """The policy with the least mean loss, of the others with the same pin."""
    others = [c for c in losses if c[1] == cell[1] and c[0] != cell[0]]
    return min(others, key=lambda c: losses[c].mean(), default=cell)


def ordered(losses):
    return [(p, pin) for pin in (0, 1) for p in NAMES if (p, pin) in losses]


# ---- Tables -------------------------------------------------------------------------------------

def table(results, size, kind):
    losses, kl = results.losses(size, kind), results.divergences(size, kind)
    read = list(next(iter(results.cells[size, kind].values())).values())
    full = np.mean([float(r["nll_full"]) for r in read])
    out = [f"**{kind}**, {len(read)} documents, {sum(int(r['tokens']) for r in read)} tokens; loss "
           f"of the full cache {full:.3f}", "",
           "| policy | prompt | loss - full | KL | - R-KV | - the best other |",
           "|---|---|--:|--:|--:|--:|"]
    for cell in ordered(losses):
        other = best_other(losses, cell)
        rkv = losses.get(("rkv", cell[1]), losses[cell])
        versus_rkv = "-" if rkv is losses[cell] else show(losses[cell] - rkv, "+")
        out.append(f"| {NAMES[cell[0]]} | {PIN[cell[1]]} | {show(losses[cell])} | "
                   f"{show(kl[cell])} | {versus_rkv} | "
                   f"{show(losses[cell] - losses[other], '+')} {NAMES[other[0]]} |")
    return out + [""]


def overview(results, size):
    """Loss above the full cache's: policies down, kinds across; the least of a column in bold."""
    kinds = [k for k in KINDS if results.documents(size, k)]
    losses = {k: results.losses(size, k) for k in kinds}
    out = ["| loss - full | prompt | " + " | ".join(kinds) + " |",
           "|---|---|" + "--:|" * len(kinds)]
    for cell in ordered(losses[kinds[0]]):
        shown = []
        for k in kinds:
            least = min(v.mean() for v in losses[k].values())
            mean = losses[k][cell].mean()
            shown.append(f"**{mean:.3f}**" if mean == least else f"{mean:.3f}")
        out.append(f"| {NAMES[cell[0]]} | {PIN[cell[1]]} | " + " | ".join(shown) + " |")
    return out + [""]


def by_filler(results, size):
    """Traces whose fillers repeat, and traces whose fillers never do."""
    of = {f: results.losses(size, "traces", f) for f in ("repeating", "unique")}
    if not all(len(v) for d in of.values() for v in d.values()):
        return []
    out = [f"traces by their fillers: {len(next(iter(of['repeating'].values())))} documents with "
           f"repeating ones, {len(next(iter(of['unique'].values())))} with unique ones", "",
           "| policy | prompt | repeating | unique |", "|---|---|--:|--:|"]
    for cell in ordered(of["unique"]):
        out.append(f"| {NAMES[cell[0]]} | {PIN[cell[1]]} | {show(of['repeating'][cell])} | "
                   f"{show(of['unique'][cell])} |")
    return out + [""]


def share(rows, classes):
    """Recall over documents: [document] of (kept, solved by the full cache)."""
    return np.array([[sum(int(r[f"{what}_{c}"]) for c in classes) for what in ("kept", "full")]
                     for r in rows.values()])


def percent(pairs):
    """Kept of those that the full cache solves, %, with an interval over documents."""
    if pairs[:, 1].sum() == 0:
        return "-"
    rng = np.random.default_rng(1)
    drawn = pairs[rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))].sum(1)
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(100 * drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    kept, full = pairs.sum(0)
    return f"{100 * kept / full:.0f} ({low:.0f} to {high:.0f})"


def recall_table(results, size):
    by_policy = results.cells.get((size, "recall"))
    if not by_policy:
        return []
    first = next(iter(by_policy.values()))
    solved = [share(first, [c])[:, 1].sum() for c in texts.CLASSES]
    asked = sum(int(r["asked_prompt"]) for r in first.values())
    out = [f"**recall**, % of the questions that the full cache solves ({len(first)} documents, "
           f"{asked} questions of each kind; the full cache solves " +
           ", ".join(f"{n} of {c}" for n, c in zip(solved, texts.CLASSES)) + ")", "",
           "| policy | prompt | facts of the prompt | of the middle | restated | all |",
           "|---|---|--:|--:|--:|--:|"]
    for cell in ordered(by_policy):
        shown = [percent(share(by_policy[cell], [c])) for c in texts.CLASSES]
        shown.append(percent(share(by_policy[cell], texts.CLASSES)))
        out.append(f"| {NAMES[cell[0]]} | {PIN[cell[1]]} | " + " | ".join(shown) + " |")
    return out + [""]


def tables(results, name):
    out = []
    for size in results.sizes:
        out += [f"### Budget {size[0]}, buffer {size[1]}", "",
                f"![Loss by policy]({name}-{size[0]}-{size[1]}.svg)", ""]
        out += overview(results, size)
        for kind in KINDS:
            if results.documents(size, kind):
                out += table(results, size, kind)
        if results.documents(size, "traces"):
            out += by_filler(results, size)
        out += recall_table(results, size)
    return "\n".join(out)


# ---- Pictures -----------------------------------------------------------------------------------

LEFT, PANEL, GAP, TOP, LINE = 120, 190, 30, 82, 26


def picture(results, size):
    """A panel for each kind: a dot a policy, full without and hollow with the prompt pinned."""
    kinds = [k for k in KINDS if results.documents(size, k)]
    policies = [p for p in NAMES if (p, 0) in results.losses(size, kinds[0])]
    width = LEFT + len(kinds) * (PANEL + GAP)
    height = TOP + LINE * len(policies) + 44
    title = f"Loss over the full cache, budget {size[0]}, buffer {size[1]}"
    out = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' "
           f"aria-label='{title}' font-family='system-ui,sans-serif' font-size='12' "
           f"fill='#222222' style='max-width:{width}px;width:100%'>",
           f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
           f"<text x='12' y='22' font-weight='600' font-size='15'>{title}</text>",
           "<text x='12' y='40'>Nats a token, 95 % intervals over documents, cut at twice the loss "
           "of StreamingLLM.</text>",
           "<text x='12' y='56'>Full dots: nothing pinned. Hollow dots: the prompt pinned.</text>"]
    for i, policy in enumerate(policies):
        out.append(f"<text x='{LEFT - 8}' y='{TOP + LINE * i + 17}' text-anchor='end'>"
                   f"{NAMES[policy]}</text>")
    for i, kind in enumerate(kinds):
        out += panel(results, size, kind, policies, LEFT + i * (PANEL + GAP))
    return "\n".join(out + ["</svg>", ""])


def panel(results, size, kind, policies, left):
    losses = results.losses(size, kind)
    most = 2 * losses.get(("streaming", 0), max(losses.values(), key=np.mean)).mean()
    bottom = TOP + LINE * len(policies)
    x = lambda v: left + PANEL * min(max(v, 0), most) / most
    out = [f"<text x='{left}' y='{TOP - 8}' font-weight='600'>{kind}</text>"]
    tick = next(t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if most / t < 6)
    for k in range(int(most / tick) + 1):
        at = tick * k
        out.append(f"<line x1='{x(at):.1f}' y1='{TOP}' x2='{x(at):.1f}' y2='{bottom}' "
                   f"stroke='#dddddd'/><text x='{x(at):.1f}' y='{bottom + 16}' "
                   f"text-anchor='middle' font-size='11'>{at:.2f}</text>")
    for i, policy in enumerate(policies):
        for pin, dy, fill in ((0, 9, "#1f5fa8"), (1, 18, "#ffffff")):
            if (policy, pin) not in losses:
                continue
            mean, low, high = interval(losses[policy, pin])
            y = TOP + LINE * i + dy
            if mean > most:
                out.append(f"<text x='{x(most):.1f}' y='{y + 4}' text-anchor='end' font-size='10'>"
                           f"{mean:.2f} &#8594;</text>")
                continue
            out.append(f"<line x1='{x(low):.1f}' y1='{y}' x2='{x(high):.1f}' y2='{y}' "
                       f"stroke='#1f5fa8'/><circle cx='{x(mean):.1f}' cy='{y}' r='3.5' "
                       f"fill='{fill}' stroke='#1f5fa8'/>")
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("csv", type=pathlib.Path)
    p.add_argument("--set", default="report")
    p.add_argument("--markdown", type=pathlib.Path, help="a file with the two marks; else printed")
    args = p.parse_args()
    results = Results(args.csv, args.set)
    text = tables(results, args.csv.stem)
    for size in results.sizes:
        if any(results.documents(size, k) for k in KINDS):
            args.csv.with_name(f"{args.csv.stem}-{size[0]}-{size[1]}.svg").write_text(
                picture(results, size))
    if args.markdown is None:
        print(text)
        return
    old = args.markdown.read_text()
    head, rest = old.split(BEGIN)
    args.markdown.write_text(head + BEGIN + "\n\n" + text + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
