"""llama.cpp's speed through its Python package, with the options and field names of `mica bench`; prints one JSON document.

usage: llama_cpp_speed.py GGUF -p PROMPT -g TOKENS [--depth N] [--batch B] [--threads N] [-n RUNS]
       llama_cpp_speed.py GGUF -p PROMPT --first-token [--threads N]      opens the file, reads the prompt and takes one token, once: what a process needs for its first answer"""
import argparse, json, resource, statistics, time
import llama_cpp as L
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("gguf")
parser.add_argument("-p", type=int, default=512)
parser.add_argument("-g", type=int, default=64)
parser.add_argument("-n", type=int, default=1)
parser.add_argument("--depth", type=int)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--first-token", action="store_true")
options = parser.parse_args()

UBATCH = 512
began = time.perf_counter()
L.llama_backend_init()
model_options = L.llama_model_default_params()
model_options.n_gpu_layers = 0
model = L.llama_model_load_from_file(options.gguf.encode(), model_options)
assert model, f"cannot open {options.gguf}"
depth = options.depth if options.depth is not None else options.p
context_options = L.llama_context_default_params()
context_options.n_ctx = (max(options.p, depth) + options.g + 64) * options.batch
context_options.n_seq_max = options.batch
context_options.n_batch, context_options.n_ubatch = 2048, UBATCH
context_options.n_threads = context_options.n_threads_batch = options.threads
context = L.llama_init_from_model(model, context_options)
memory = L.llama_get_memory(context)


def decode(rows):
    """Rows of (token, position, sequence); logits of the last of every sequence."""
    batch = L.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    last = {sequence: i for i, (_, _, sequence) in enumerate(rows)}
    for i, (token, position, sequence) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, int(last[sequence] == i)
    assert L.llama_decode(context, batch) == 0
    L.llama_synchronize(context)
    L.llama_batch_free(batch)


def prompt(length, sequence=0):
    tokens = [(i * 7919) % 15000 + 10 for i in range(length)]
    for start in range(0, length, UBATCH):
        decode([(token, start + i, sequence) for i, token in enumerate(tokens[start:start + UBATCH])])


def results(**fields):
    print(json.dumps(dict(fields, peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, version=L.__version__)))


if options.first_token:
    prompt(options.p)
    size = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    token = np.ctypeslib.as_array(L.llama_get_logits_ith(context, -1), (size,)).argmax()
    results(token=int(token), first_token_s=time.perf_counter() - began)
    raise SystemExit
prefill, generation = [], []
prompt(min(options.p, UBATCH))  # warms up: longer ones are more of these
for _ in range(options.n):
    L.llama_memory_clear(memory, True)
    start = time.perf_counter()
    prompt(options.p)
    prefill.append(options.p / (time.perf_counter() - start))
if depth != options.p or options.batch > 1:
    L.llama_memory_clear(memory, True)
    for sequence in range(options.batch):
        prompt(depth, sequence)
for _ in range(options.n + 1):
    start = time.perf_counter()
    for i in range(options.g):
        decode([(100 + i + sequence, depth + i, sequence) for sequence in range(options.batch)])
    generation.append(options.g * options.batch / (time.perf_counter() - start))
    for sequence in range(options.batch):
        assert L.llama_memory_seq_rm(memory, sequence, depth, -1)
results(prompt_tps=statistics.median(prefill), generation_tps=statistics.median(generation[1:]))
