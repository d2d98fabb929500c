#!/usr/bin/env bash
# The programs that mica is measured against, and models of real shapes with random weights, in a folder of their own.
# usage: benches/peers/setup.sh FOLDER [NAME…]      names as in make_model.py; qwen3-0.6b and tiny if none is given
# llama-8b is made with 4-bit weights alone, after llama-1b, whose tokenizer it takes.
# Needs Python 3.10 or newer with venv, a C++ compiler, and about 30 GB with all shapes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: setup.sh FOLDER [NAME…]}
shift
mkdir -p "$folder"/{env,models,src}
cd "$folder"

environment() {
    [ -x "env/$1/bin/python" ] || python3 -m venv "env/$1"
    "env/$1/bin/pip" install --quiet --upgrade "${@:2}"
}
environment torch torch transformers peft tokenizers safetensors gguf sentencepiece protobuf
CMAKE_ARGS=-DGGML_NATIVE=ON environment llama llama-cpp-python numpy
# optimum-intel wants an older transformers than torch's environment has; torch itself, 5 GB, is shared.
if [ ! -x env/openvino/bin/python ]; then
    python3 -m venv env/openvino
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    env/torch/bin/python -c "$packages" > "$(env/openvino/bin/python -c "$packages")/torch.pth"
fi
environment openvino 'optimum-intel[openvino]' nncf

version=$(env/llama/bin/python -c 'import llama_cpp; print(llama_cpp.__version__)')
if [ ! -d "src/llama_cpp_python-$version" ]; then
    env/llama/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest src "llama-cpp-python==$version"
    tar xzf "src/llama_cpp_python-$version.tar.gz" -C src
fi
[ $# -gt 0 ] || set -- qwen3-0.6b tiny
model() {
    local model=models/$1
    if [ "$1" = llama-8b ]; then
        model llama-1b
        [ -f "$model-4bit/config.json" ] || env/torch/bin/python "$here/make_quantized.py" models/llama-1b "$model-4bit"
        [ -f "$model-q4_0.gguf" ] || env/torch/bin/python "$here/make_quantized.py" models/llama-1b-q4_0.gguf "$model-q4_0.gguf"
        [ -f "$model-openvino/openvino_model.xml" ] || env/openvino/bin/python "$here/make_quantized.py" models/llama-1b "$model-openvino"
        return
    fi
    [ -f "$model/config.json" ] || env/torch/bin/python "$here/make_model.py" models "$1"
    case $1 in lfm2* | tiny) return ;; esac
    if [ ! -f "$model-q4_0.gguf" ]; then
        env/torch/bin/python "$here/make_gguf.py" "src/llama_cpp_python-$version/vendor/llama.cpp" "$model" "$model-bf16.gguf"
        env/llama/bin/python "$here/make_gguf.py" --quantize "$model-bf16.gguf" "$model-q4_0.gguf"
        rm "$model-bf16.gguf"
    fi
    [ -f "$model-openvino/openvino_model.xml" ] || env/openvino/bin/python "$here/make_openvino.py" "$model" "$model-openvino"
}
for name in "$@"; do model "$name"; done
# GCC before 13 does not see that llama.cpp's AMX code reads its tile configuration, and drops it: with such a build
# the first product ends in a segmentation fault. Rebuild with a newer compiler, or with
# CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-mno-amx-tile -DCMAKE_C_FLAGS=-mno-amx-tile".
echo "cargo run --release --package xtask -- peers --dir $folder"
