"""OpenVINO's speed on the processor, with the options and field names of `mica bench`; prints one JSON document.

Everything is as its runtime chooses it for low latency (keys and values in 8 bits, activations quantized in groups),
with one thing that openvino_genai adds to what optimum saves: logits of the last position alone.

usage: openvino_speed.py FOLDER -p PROMPT -g TOKENS [--depth N] [--batch B] [--threads N] [-n RUNS]      FOLDER: see make_openvino.py"""
import argparse, json, os, resource, statistics, time
import numpy as np
import openvino as ov
from openvino import opset13 as ops

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("-p", type=int, default=512)
parser.add_argument("-g", type=int, default=64)
parser.add_argument("-n", type=int, default=1)
parser.add_argument("--depth", type=int)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()


def only_last_logits(model):
    """Cuts the last position out of what goes into the output head."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input_value(0)
    if rows.get_partial_shape().rank.get_length() != 3:
        raise SystemExit("the output head takes no rows of [batch, length, width]")
    number = lambda value: ops.constant(np.array([value], np.int64))
    last = ops.slice(rows, number(-1), number(-2), number(-1), number(1))
    node.input(0).replace_source_output(last.output(0))


model = ov.Core().read_model(f"{options.model}/openvino_model.xml")
only_last_logits(model)
compiled = ov.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options.threads})
request = compiled.create_infer_request()
names = {name for entry in compiled.inputs for name in entry.get_names()}
depth = options.depth if options.depth is not None else options.p
cached = 0


def feed(rows):
    """Rows of tokens, one a sequence."""
    global cached
    batch, length = rows.shape
    inputs = {"input_ids": rows, "attention_mask": np.ones((batch, cached + length), np.int64), "beam_idx": np.arange(batch, dtype=np.int32)}
    if "position_ids" in names:
        inputs["position_ids"] = np.tile(np.arange(cached, cached + length, dtype=np.int64), (batch, 1))
    request.infer(inputs)
    cached += length


def prompt(length, batch=1):
    global cached
    request.reset_state()
    cached = 0
    feed(np.tile((np.arange(length, dtype=np.int64) * 7919) % 15000 + 10, (batch, 1)))


def generate():
    start = time.perf_counter()
    for i in range(options.g):
        feed(100 + i + np.arange(options.batch, dtype=np.int64)[:, None])
    return options.g * options.batch / (time.perf_counter() - start)


prompt(8, options.batch)
generate()  # warms up, as the first prompt does
prefill, generation = [], []
for _ in range(options.n + 1):
    start = time.perf_counter()
    prompt(options.p)
    prefill.append(options.p / (time.perf_counter() - start))
for _ in range(options.n):
    if depth != options.p or options.batch > 1 or generation:
        prompt(depth, options.batch)
    generation.append(generate())
print(json.dumps(dict(prompt_tps=statistics.median(prefill[1:]), generation_tps=statistics.median(generation), weights_gb=os.path.getsize(f"{options.model}/openvino_model.bin") / 1e9,
                      peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, version=ov.get_version())))
