"""How far logits are from those of the same weights in f32: of mica (as `mica logits` writes them) and of llama.cpp.

usage: logits_error.py tokens N VOCABULARY              prints N token ids for --tokens
       logits_error.py gguf IN.gguf MODEL OUT           OUT: a folder like MODEL with the weights of the file in f32
       logits_error.py affine IN.gguf MODEL OUT         OUT: the same with Q4_0 tensors as MLX's 4 bits in groups of 32, bit for bit
       logits_error.py reference MODEL TOKENS OUT.npy   logits of a folder with plain weights, by transformers in f32
       logits_error.py llama IN.gguf TOKENS OUT.npy     logits of llama.cpp
       logits_error.py compare REFERENCE.npy F.npy…     relative L2 error, and the same of the worst row
The last but one in the environment of llama.cpp, the others in that of torch."""
import json, os, shutil, sys
import numpy as np


def tokens(n, vocabulary):
    print(",".join(str((i * 7919 + 11) % int(vocabulary)) for i in range(int(n))))


NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def hugging_face(name):
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]]


def folder(file, model, out, keep_codes):
    import gguf
    from safetensors.numpy import save_file
    tensors, layers = {}, {}
    for tensor in gguf.GGUFReader(file).tensors:
        name, shape = hugging_face(tensor.name), [int(n) for n in reversed(tensor.shape)]
        if keep_codes and tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            # Blocks of 32: a scale, then 16 bytes with values 0…15 in the low and 16…31 in the high halves; w = d (q - 8).
            blocks = np.ascontiguousarray(tensor.data).reshape(-1, 18)
            scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).reshape(shape[0], -1)
            codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.uint32).reshape(-1, 8)
            words = np.bitwise_or.reduce(codes << (4 * np.arange(8, dtype=np.uint32)), axis=1, dtype=np.uint32)
            tensors[f"{name}.weight"] = words.reshape(shape[0], -1)
            tensors[f"{name}.scales"], tensors[f"{name}.biases"] = scales, np.float16(-8) * scales
            layers[name] = True
        else:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
            tensors[f"{name}.weight"], layers[name] = values, False
    os.makedirs(out, exist_ok=True)
    save_file(tensors, f"{out}/model.safetensors", metadata={"format": "mlx" if keep_codes else "pt"})
    for name in os.listdir(model):
        if name.startswith("tokenizer"):
            shutil.copy(f"{model}/{name}", out)
    config = json.load(open(f"{model}/config.json"))
    config["torch_dtype"] = "float32"
    if keep_codes:
        config["quantization"] = {"group_size": 32, "bits": 4, **{name: False for name, packed in layers.items() if not packed and "norm" not in name}}
    json.dump(config, open(f"{out}/config.json", "w"), indent=1)


def reference(model, ids, out):
    import torch
    from transformers import AutoModelForCausalLM
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        np.save(out, made(torch.tensor([[int(i) for i in ids.split(",")]])).logits[0].numpy())


def llama(file, ids, out):
    import llama_cpp
    ids = [int(i) for i in ids.split(",")]
    made = llama_cpp.Llama(file, n_ctx=len(ids) + 8, logits_all=True, n_threads=2, n_threads_batch=2, verbose=False)
    made.eval(ids)
    np.save(out, np.array(made.scores[:len(ids)], dtype=np.float32))


def compare(expected, *files):
    expected = np.load(expected).astype(np.float64)
    for file in files:
        difference = np.load(file).astype(np.float64) - expected
        rows = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
        print(f"{file}: relative L2 {np.linalg.norm(difference) / np.linalg.norm(expected):.3e}, of the worst row {rows.max():.3e}")


task, *arguments = sys.argv[1:]
if task in ("gguf", "affine"):
    folder(*arguments, keep_codes=task == "affine")
else:
    {"tokens": tokens, "reference": reference, "llama": llama, "compare": compare}[task](*arguments)
