"""Single ops and chains of ops in torch and NumPy, for `xtask micro`: a line of JSON in, a line of JSON out.

{"prepare": CASE} chooses a case and gives the libraries that have it as one call; {"samples": LIBRARY, "unordered":
BOOL} gives up to 64 values of each output, evenly spread; {"time": LIBRARY, "times": N} gives the seconds of one
call, the mean of N, with the freeing of the results. xtask/src/micro/cases.rs has the same cases, by name.
"""
import argparse
import json
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--threads", type=int, required=True)
threads = parser.parse_args().threads
for name in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]:
    os.environ[name] = str(threads)
# OpenBLAS's threads wait for more work by spinning, for 33 ms at 2 GHz: the next program would be short of a core.
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "20"

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(threads)
N = 2048


def hashes(seed, shape):
    place = np.arange(np.prod(shape), dtype=np.uint32)
    h = place * np.uint32(0x9E3779B1) + np.uint32(seed * 0x85EBCA77 & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (h ^ (h >> np.uint32(16))).reshape(shape)


def floats(seed, *shape):
    unit = (hashes(seed, shape) >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)
    return (unit - np.float32(0.5)) * np.float32(6.0)


def integers(seed, below, *shape):
    return (hashes(seed, shape) % np.uint32(below)).astype(np.int32)


def tensor(array):
    return torch.from_numpy(array)


def half(seed, *shape):
    return tensor(floats(seed, *shape)).to(torch.bfloat16)


def both(*arrays):
    """Operands for torch and for NumPy: the same memory."""
    return [tensor(array) for array in arrays], list(arrays)


def one():
    return both(floats(1, N, N))


def line():
    return both(floats(1, N * N))


def two():
    return both(floats(1, N, N), floats(2, N, N))


def halves():
    return [half(1, N, N), half(2, N, N)], None


# Name: operands, what torch does with its own, what NumPy does with its own if one call does it.
def ops():
    cases = {
        "add": (two, lambda a, b: a + b, lambda a, b: a + b),
        "add, bf16": (halves, lambda a, b: a + b, None),
        "add, int32": (lambda: both(integers(1, 1000, N, N), integers(2, 1000, N, N)), lambda a, b: a + b, lambda a, b: a + b),
        "divide": (lambda: both(floats(1, N, N), np.exp(floats(2, N, N))), lambda a, b: a / b, lambda a, b: a / b),
        "exp": (one, torch.exp, np.exp),
        "exp, bf16": (lambda: ([half(1, N, N)], None), torch.exp, None),
        "tanh": (one, torch.tanh, np.tanh),
        "sigmoid": (one, torch.sigmoid, None),
        "where": (lambda: both(floats(1, N, N) < floats(2, N, N), floats(1, N, N), floats(2, N, N)), torch.where, np.where),
        "float32 to bf16": (one, lambda a: a.to(torch.bfloat16), None),
        "sum": (one, torch.sum, np.sum),
        "sum, axis 0": (one, lambda a: a.sum(0), lambda a: a.sum(0)),
        "sum, axis 1": (one, lambda a: a.sum(1), lambda a: a.sum(1)),
        "max, axis 1": (one, lambda a: a.amax(1), lambda a: a.max(1)),
        "argmax, axis 1": (one, lambda a: a.argmax(1), lambda a: a.argmax(1)),
        "variance, axis 1": (one, lambda a: a.var(1, correction=0), lambda a: a.var(1)),
        "softmax": (one, lambda a: a.softmax(-1), None),
        "logsumexp": (one, lambda a: a.logsumexp(-1), None),
        "cumsum, axis 1": (one, lambda a: a.cumsum(1), lambda a: a.cumsum(1)),
        "cumsum, one line": (line, lambda a: a.cumsum(0), lambda a: a.cumsum(0)),
        "sort, axis 1": (one, lambda a: a.sort(1).values, lambda a: np.sort(a, 1)),
        "sort, one line": (line, lambda a: a.sort(0).values, lambda a: np.sort(a)),
        "argsort, axis 1": (one, lambda a: a.argsort(1), lambda a: np.argsort(a, 1)),
        "largest 50, axis 1": (one, lambda a: a.topk(50, 1, sorted=False).values, lambda a: np.partition(a, N - 50, 1)[:, N - 50 :]),
        "gather rows": (lambda: both(floats(1, N, N), integers(3, N, N)), lambda a, i: a[i], lambda a, i: a[i]),
        "gather along axis 1": (along, lambda a, i: a.gather(1, i), lambda a, i: np.take_along_axis(a, i, 1)),
        "transposed copy": (one, lambda a: a.T.contiguous(), lambda a: np.ascontiguousarray(a.T)),
        "concatenate, axis 1": (two, lambda a, b: torch.cat([a, b], 1), lambda a, b: np.concatenate([a, b], 1)),
        "layer norm": (lambda: both(floats(1, N, N), floats(2, N), floats(3, N)), lambda x, w, b: F.layer_norm(x, (N,), w, b, 1e-5), None),
        "rms norm": (lambda: both(floats(1, N, N), floats(2, N)), lambda x, w: F.rms_norm(x, (N,), w, 1e-5), None),
        "convolution 3 x 3, 64 to 64 channels": (lambda: images(64), lambda x, w: F.conv2d(x, w, padding=1).permute(0, 2, 3, 1), None),
        "convolution 3 x 3, each of 64 channels": (
            lambda: images(1),
            lambda x, w: F.conv2d(x, w, padding=1, groups=64).permute(0, 2, 3, 1),
            None,
        ),
    }
    for size in [512, 1024, 2048, 4096]:
        operands = lambda size=size: both(floats(1, size, size), floats(2, size, size))
        half_operands = lambda size=size: ([half(1, size, size), half(2, size, size)], None)
        cases[f"matmul {size}"] = (operands, torch.matmul, np.matmul)
        cases[f"matmul {size}, bf16"] = (half_operands, torch.matmul, None)
    return cases


def along():
    """torch takes 64-bit indices here; both get the type that they use themselves."""
    values, places = floats(1, N, N), integers(3, N, N, N).astype(np.int64)
    return both(values, places)


def images(depth):
    """torch's own layout, channels first; the numbers are those of mica's [batch, height, width, channels]."""
    images, kernel = tensor(floats(1, 16, 64, 64, 64)), tensor(floats(2, 64, 3, 3, depth))
    return [images.permute(0, 3, 1, 2).contiguous(), kernel.permute(0, 3, 1, 2).contiguous()], None


def by_rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def gelu(x):
    return (torch.tanh((x * x * x * 0.044715 + x) * 0.79788456) + 1.0) * x * 0.5


def adam(parameter, gradient, mean, square):
    mean = mean * 0.9 + gradient * 0.1
    square = square * 0.999 + gradient * gradient * 0.001
    return parameter - mean * 1e-3 / (square.sqrt() + 1e-8), mean, square


def rotary(x, cos, sin):
    low, high = x[..., :32], x[..., 32:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + 1e-5) * weight + bias


def huber(x, y):
    distance = (x - y).abs()
    return torch.where(distance <= 1.0, distance.square() * 0.5, distance - 0.5).mean()


def residual_norm(x, residual, weight):
    total = x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return total, (wide * scale).to(torch.bfloat16) * weight


def chains():
    def scores():
        places = np.arange(1024)
        return both(floats(1, 4, 1024, 1024), places[:, None] >= places)

    return {
        "GELU by tanh": (one, gelu, None),
        "SwiGLU, bf16": (halves, lambda gate, up: F.silu(gate) * up, None),
        "SwiGLU and RMS norm": (
            lambda: both(floats(1, N, N), floats(2, N, N), floats(3, N)),
            lambda gate, up, weight: by_rms(F.silu(gate) * up, weight),
            None,
        ),
        "softmax of scaled, masked scores": (
            scores,
            lambda x, mask: torch.where(mask, x * 0.125, -torch.inf).softmax(-1),
            None,
        ),
        "Adam step": (
            lambda: both(floats(1, N, N), floats(2, N, N), floats(3, N, N), np.square(floats(4, N, N))),
            adam,
            None,
        ),
        "rotary positions": (
            lambda: both(floats(1, 4, 16, 1024, 64), floats(2, 1024, 32), floats(3, 1024, 32)),
            rotary,
            None,
        ),
        "log-softmax, gather, mean": (
            lambda: both(floats(1, 1024, 4096), integers(2, 4096, 1024, 1).astype(np.int64)),
            lambda x, targets: -x.log_softmax(-1).gather(-1, targets).mean(),
            None,
        ),
        "layer norm by hand": (lambda: both(floats(1, N, N), floats(2, N), floats(3, N)), layer_norm, None),
        "mean Huber loss": (two, huber, None),
        "residual, RMS norm, bf16": (lambda: ([half(1, N, N), half(2, N, N), half(3, N)], None), residual_norm, None),
    }


def samples(outputs, unordered):
    values = []
    for output in outputs if isinstance(outputs, tuple) else [outputs]:
        output = output.float().numpy() if isinstance(output, torch.Tensor) else np.asarray(output)
        flat = (np.sort(output, -1) if unordered else output).ravel()
        count = min(64, flat.size)
        values += [float(flat[i * flat.size // count]) for i in range(count)]
    return values


def answer(document):
    print(json.dumps(document), flush=True)


@torch.inference_mode()
def main():
    cases = {**ops(), **chains()}
    work = {}
    answer({"versions": {"torch": torch.__version__, "NumPy": np.__version__}})
    for text in sys.stdin:
        question = json.loads(text)
        if "prepare" in question:
            work = {}
            if question["prepare"] in cases:
                operands, by_torch, by_numpy = cases[question["prepare"]]
                for_torch, for_numpy = operands()
                work["torch"] = lambda f=by_torch, x=for_torch: f(*x)
                if by_numpy:
                    work["NumPy"] = lambda f=by_numpy, x=for_numpy: f(*x)
            answer({"libraries": list(work)})
        elif "samples" in question:
            answer({"samples": samples(work[question["samples"]](), question["unordered"])})
        else:
            f = work[question["time"]]
            begun = time.perf_counter()
            for _ in range(question["times"]):
                f()  # the result is dropped at once
            answer({"seconds": (time.perf_counter() - begun) / question["times"]})


main()
