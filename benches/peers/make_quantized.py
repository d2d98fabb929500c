"""Random 4-bit weights in the shape of Llama-3.1-8B, without the 16 GB that quantizing would take: a folder as MLX saves it, Q4_0 as llama.cpp's quantizer writes it (its output head in Q6_K), or OpenVINO's as make_openvino.py has them.

usage: make_quantized.py SMALLER OUT                          in the environment of torch
       make_quantized.py SMALLER.gguf OUT.gguf
       make_quantized.py SMALLER OUT-openvino                 in the environment of openvino
Tokenizer and settings are those of SMALLER, a model of the same family."""
import json, os, shutil, sys, tempfile
import numpy as np

smaller, out = sys.argv[1:]
HIDDEN, LAYERS, INNER, HEADS, KV_HEADS, HEAD, GROUP = 4096, 32, 14336, 32, 8, 128, 64
NORM = None
rng = np.random.default_rng(7)


def weights(vocabulary):
    """Of every weight its name in Hugging Face's files, its name in GGUF, and its shape; NORM stands for a vector of ones."""
    yield "model.embed_tokens", "token_embd", (vocabulary, HIDDEN)
    for layer in range(LAYERS):
        there, here = f"model.layers.{layer}", f"blk.{layer}"
        yield f"{there}.input_layernorm", f"{here}.attn_norm", NORM
        yield f"{there}.post_attention_layernorm", f"{here}.ffn_norm", NORM
        yield f"{there}.self_attn.q_proj", f"{here}.attn_q", (HEADS * HEAD, HIDDEN)
        yield f"{there}.self_attn.k_proj", f"{here}.attn_k", (KV_HEADS * HEAD, HIDDEN)
        yield f"{there}.self_attn.v_proj", f"{here}.attn_v", (KV_HEADS * HEAD, HIDDEN)
        yield f"{there}.self_attn.o_proj", f"{here}.attn_output", (HIDDEN, HEADS * HEAD)
        yield f"{there}.mlp.gate_proj", f"{here}.ffn_gate", (INNER, HIDDEN)
        yield f"{there}.mlp.up_proj", f"{here}.ffn_up", (INNER, HIDDEN)
        yield f"{there}.mlp.down_proj", f"{here}.ffn_down", (HIDDEN, INNER)
    yield "model.norm", "output_norm", NORM
    yield "lm_head", "output", (vocabulary, HIDDEN)


def spread(codes):
    """The standard deviation of whole numbers that are uniform over so many values. Divided by it and by the root of its width, a row gives values as large as those it takes."""
    return ((codes**2 - 1) / 12) ** 0.5


def bf16(value, shape):
    return np.full(shape, np.float32(value).view(np.uint32) >> 16, np.uint16)


def settings(**more):
    with open(f"{smaller}/config.json") as file:
        config = json.load(file)
    config.update(hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD,
                  tie_word_embeddings=False, **more)
    return config


def save(folder, config, tensors):
    """A folder as Hugging Face saves it; a tensor is its name, dtype, shape, and how to make it. One that nothing makes is of zeros, a hole that takes no place on the disk."""
    os.makedirs(folder, exist_ok=True)
    for file in os.listdir(smaller):
        if file != "config.json" and not file.endswith(".safetensors"):
            shutil.copy(f"{smaller}/{file}", folder)
    header, at = {"__metadata__": {"format": "mlx" if "quantization" in config else "pt"}}, 0
    for key, dtype, shape, _ in tensors:
        size = int(np.prod(shape)) * (4 if dtype == "U32" else 2)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(f"{folder}/model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + at)
        for key, *_, make in tensors:
            if make:
                file.seek(8 + len(text) + header[key]["data_offsets"][0])
                file.write(make().tobytes())
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file, indent=2)


def mlx():
    quantization = dict(group_size=GROUP, bits=4, mode="affine")
    config = settings(quantization=quantization, quantization_config=quantization)
    tensors = []

    def linear(key, rows, columns):
        scale = columns ** -0.5 / spread(16)
        groups = (rows, columns // GROUP)
        tensors.append((f"{key}.weight", "U32", [rows, columns // 8], lambda: rng.integers(0, 2**32, (rows, columns // 8), np.uint32)))
        tensors.append((f"{key}.scales", "BF16", groups, lambda: bf16(scale, groups)))
        tensors.append((f"{key}.biases", "BF16", groups, lambda: bf16(-7.5 * scale, groups)))

    for key, _, shape in weights(config["vocab_size"]):
        if shape is NORM:
            tensors.append((f"{key}.weight", "BF16", [HIDDEN], lambda: bf16(1, HIDDEN)))
        else:
            linear(key, *shape)
    save(out, config, tensors)


def openvino():
    """Converts a model of zeros, whose layers share what is stored, and gives every layer random weights of its own. Names, types, shapes and operations are those of a conversion of real ones."""
    import xml.etree.ElementTree as xml
    from make_openvino import convert

    config, tensors, part = settings(), [], f"{out}.part"
    for key, _, shape in weights(config["vocab_size"]):
        one = (f"{key}.weight", "BF16", [HIDDEN], lambda: bf16(1, HIDDEN))
        tensors.append(one if shape is NORM else (f"{key}.weight", "BF16", shape, None))
    with tempfile.TemporaryDirectory() as zeros:
        save(zeros, config, tensors)
        convert(zeros, part)
    os.rename(f"{part}/openvino_model.xml", f"{part}/zeros.xml")
    os.rename(f"{part}/openvino_model.bin", f"{part}/zeros.bin")
    tree = xml.parse(f"{part}/zeros.xml")
    # Of every constant its name, number type, shape, and place in the file.
    constants = [(layer.get("name"), layer.find("data")) for layer in tree.getroot().find("layers") if layer.get("type") == "Const"]
    shapes = {name: [int(n) for n in data.get("shape").split(",") if n] for name, data in constants}
    WEIGHT, ZERO, SCALE = "_openvino_orig_weight", "_openvino_orig_weight/zero_point", "_openvino_orig_weight/scale"
    stored = np.memmap(f"{part}/zeros.bin", np.uint8, "r")
    with open(f"{part}/openvino_model.bin", "wb") as file:
        for name, data in constants:
            size, dtype = int(data.get("size")), data.get("element_type")
            if name.endswith(WEIGHT):
                made = rng.integers(0, 256, size, np.uint8)
            elif name.endswith(ZERO):  # in turn below and above the middle
                made = np.tile(np.uint8([0x78, 0x78] if dtype == "u4" else [127, 128]), size // 2)
            elif name.endswith(SCALE):
                shape = shapes[name.removesuffix(SCALE) + WEIGHT]
                made = np.full(size // 2, np.prod(shape[1:]) ** -0.5 / spread(16 if len(shape) == 3 else 256), np.float16)
            else:
                made = stored[int(data.get("offset")):][:size]
            file.write(bytes(-file.tell() % 64))
            data.set("offset", str(file.tell()))
            file.write(made.tobytes())
    tree.write(f"{part}/openvino_model.xml", xml_declaration=True)
    os.remove(f"{part}/zeros.bin")
    os.remove(f"{part}/zeros.xml")
    os.rename(part, out)


def gguf():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, GGUFReader, GGUFValueType, GGUFWriter

    def blocks(rows, columns, kind):
        """Bytes of a row's blocks; scales of either sign, as in real files, keep the mean at zero."""
        length, size = GGML_QUANT_SIZES[kind]
        made = rng.integers(0, 256, (rows, columns // length, size), np.uint8)
        sign = 1 - 2 * rng.integers(0, 2, (rows, columns // length, 1), np.int8)
        if kind == Type.Q4_0:  # the scale, then codes
            made[..., :2] = (sign * np.float16(columns ** -0.5 / spread(16))).astype(np.float16).view(np.uint8)
        else:  # Q6_K: low and high bits of codes, a whole factor for each 16 of them, and the scale
            made[..., -18:-2] = 64
            made[..., -2:] = (sign * np.float16(columns ** -0.5 / spread(64) / 64)).astype(np.float16).view(np.uint8)
        return made.reshape(rows, -1)

    model = GGUFReader(smaller)
    changed = {"general.name": "Llama 8b", "general.size_label": "8B", "llama.block_count": LAYERS, "llama.embedding_length": HIDDEN, "llama.feed_forward_length": INNER,
               "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS, "llama.attention.key_length": HEAD, "llama.attention.value_length": HEAD, "llama.rope.dimension_count": HEAD}
    writer = GGUFWriter(f"{out}.part", "llama")
    for name, field in model.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, changed.get(name, field.contents()), field.types[0], inner)
    tensors = []
    for _, key, shape in weights(model.fields["llama.vocab_size"].contents()):
        name, kind = f"{key}.weight", Type.Q6_K if key == "output" else Type.Q4_0
        if shape is NORM:
            writer.add_tensor_info(name, [HIDDEN], np.dtype(np.float32), HIDDEN * 4)
            tensors.append(lambda: np.ones(HIDDEN, np.float32))
        else:
            length, size = GGML_QUANT_SIZES[kind]
            rows, columns = shape
            bytes_of_row = columns // length * size
            writer.add_tensor_info(name, [rows, bytes_of_row], np.dtype(np.uint8), rows * bytes_of_row, kind)
            tensors.append(lambda shape=shape, kind=kind: blocks(*shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in tensors:
        writer.write_tensor_data(make())
    writer.close()
    os.rename(f"{out}.part", out)


(gguf if out.endswith(".gguf") else openvino if out.endswith("-openvino") else mlx)()
