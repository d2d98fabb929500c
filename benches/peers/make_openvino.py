"""A model folder for OpenVINO, by optimum-intel: 4 bits in groups of 64 with zero points, as its command line does with `--weight-format int4 --group-size 64 --ratio 1.0`.

By that program's rule the embedding and the output head are in 8 bits.

usage: make_openvino.py MODEL OUT        in the environment of openvino"""
import os, sys

os.environ["HF_HUB_OFFLINE"] = "1"


def convert(model, out):
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    weights = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)
    made = OVModelForCausalLM.from_pretrained(os.path.abspath(model), export=True, stateful=True, compile=False, quantization_config=weights)
    made.save_pretrained(out)


if __name__ == "__main__":
    convert(*sys.argv[1:])
