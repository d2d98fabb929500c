"""A folder with random 4-bit weights in the shape of Llama-3.1-8B, as MLX saves them: without the 16 GB that quantizing would take.

usage: make_quantized.py MODELS NAME SMALLER      writes MODELS/NAME; tokenizer and settings are those of the folder MODELS/SMALLER of the same family"""
import json, os, shutil, sys
import numpy as np

models, name, smaller = sys.argv[1:]
HIDDEN, LAYERS, INNER, HEADS, KV_HEADS, HEAD, GROUP = 4096, 32, 14336, 32, 8, 128, 64
rng = np.random.default_rng(7)
with open(f"{models}/{smaller}/config.json") as file:
    config = json.load(file)
config.update(hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, tie_word_embeddings=False)
vocabulary = config["vocab_size"]
tensors = []  # name, dtype, shape, how to make it


def bf16(value, shape):
    return np.full(shape, np.float32(value).view(np.uint32) >> 16, np.uint16)


def linear(key, rows, columns):
    # Codes are uniform over 0 to 15: these scales and biases give weights of mean 0 and variance 1 / columns.
    scale = columns ** -0.5 / 4.61
    tensors.append((f"{key}.weight", "U32", [rows, columns // 8], lambda: rng.integers(0, 2**32, (rows, columns // 8), np.uint32)))
    tensors.append((f"{key}.scales", "BF16", [rows, columns // GROUP], lambda: bf16(scale, (rows, columns // GROUP))))
    tensors.append((f"{key}.biases", "BF16", [rows, columns // GROUP], lambda: bf16(-7.5 * scale, (rows, columns // GROUP))))


def norm(key):
    tensors.append((f"{key}.weight", "BF16", [HIDDEN], lambda: bf16(1, HIDDEN)))


linear("model.embed_tokens", vocabulary, HIDDEN)
for layer in range(LAYERS):
    at = f"model.layers.{layer}"
    norm(f"{at}.input_layernorm")
    norm(f"{at}.post_attention_layernorm")
    for part, rows, columns in [("q", HEADS * HEAD, HIDDEN), ("k", KV_HEADS * HEAD, HIDDEN), ("v", KV_HEADS * HEAD, HIDDEN), ("o", HIDDEN, HEADS * HEAD)]:
        linear(f"{at}.self_attn.{part}_proj", rows, columns)
    for part, rows, columns in [("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)]:
        linear(f"{at}.mlp.{part}_proj", rows, columns)
norm("model.norm")
linear("lm_head", vocabulary, HIDDEN)

folder = f"{models}/{name}"
os.makedirs(folder, exist_ok=True)
for file in os.listdir(f"{models}/{smaller}"):
    if not file.endswith(".safetensors"):
        shutil.copy(f"{models}/{smaller}/{file}", folder)
with open(f"{folder}/config.json", "w") as file:
    json.dump(config, file, indent=2)
header, at = {"__metadata__": {"format": "mlx"}}, 0
for key, dtype, shape, _ in tensors:
    size = int(np.prod(shape)) * (4 if dtype == "U32" else 2)
    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
    at += size
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(f"{folder}/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for *_, make in tensors:
        file.write(make().tobytes())
