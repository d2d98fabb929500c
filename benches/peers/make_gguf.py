"""A model folder as GGUF, by llama.cpp's own converter (with a tokenizer that it does not know), and quantized.

usage: make_gguf.py LLAMA_CPP_SOURCE MODEL OUT.gguf        in the environment of torch
       make_gguf.py --quantize IN.gguf OUT.gguf            in the environment of llama.cpp: Q4_0"""
import runpy, sys

if sys.argv[1] == "--quantize":
    import llama_cpp as L
    options = L.llama_model_quantize_default_params()
    options.ftype = 2
    sys.exit(L.llama_model_quantize(sys.argv[2].encode(), sys.argv[3].encode(), options))
source, model, out = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]
import conversion.base as base
for thing in vars(base).values():
    if isinstance(thing, type) and hasattr(thing, "get_vocab_base_pre"):
        thing.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
