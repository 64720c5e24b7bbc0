"""The engine and the GGUF files of examples/ponder/ beside another runtime: Hugging Face
transformers reads the same file, and has to think the same chain of thought, word for word.

    make test-peer MODEL=FILE.gguf      (needs python3 with torch, transformers, accelerate, gguf)
"""

import os
import shutil
import subprocess
import sys
import tempfile

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

PROMPTS = (
    "A c 4 ; start a 5 ; C d #a ; D e 2 ; F b #d ? E f #c ; think",
    "start i 3 ; G h 7 ; H b #i ; I g 0 ; B e #g ; E a 9 ? think",
    "D f #c ; start c 1 ; C e 8 ; E d #c ; B a #f ? F b #e ; think",
)


def read_words(path):
    field = GGUFReader(path).fields["tokenizer.ggml.tokens"]
    return [bytes(field.parts[i]).decode() for i in field.data]


def think_here(demo, path, prompt, page):
    """The words that our engine prints with every token kept."""
    command = [demo, "--model", path, "--prompt", prompt, "--problems", "0"]
    command += ["--budget", "100", "--html", page]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = out[out.index("The problem:") :].split("\n")[2:]
    end = next(i for i, line in enumerate(lines) if line.startswith("R-KV "))
    return " ".join(line.split("  full ")[0] for line in lines[:end]).split()


def think_there(model, words, prompt, n_words):
    """Greedy, from the same prompt."""
    tokens = [words.index(word) for word in ["<s>"] + prompt.split()]
    cache, last, out = None, torch.tensor([tokens]), []
    with torch.no_grad():
        while len(out) < n_words:
            result = model(last, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            last = result.logits[:, -1:].argmax(-1)
            out.append(words[last.item()])
    return out


def main():
    demo, path = sys.argv[1:]
    words = read_words(path)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, os.path.join(folder, "model.gguf"))
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32
        )
        for prompt in PROMPTS:
            here = think_here(demo, path, prompt, os.path.join(folder, "page.html"))
            there = think_there(model, words, prompt, len(here))
            same = sum(a == b for a, b in zip(here, there))
            failed += same < len(here)
            print(f"{same} of {len(here)} words agree, ending in: {' '.join(here[-4:])}")
    print(f"{len(PROMPTS) - failed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
