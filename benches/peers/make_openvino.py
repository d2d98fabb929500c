"""A model folder for OpenVINO, by optimum-intel: 4 bits in groups of 64 with zero points, as its command line does with `--weight-format int4 --group-size 64 --ratio 1.0`.

By that program's rule the embedding and the output head are in 8 bits.

usage: make_openvino.py MODEL OUT        in the environment of openvino"""
import argparse, os

os.environ["HF_HUB_OFFLINE"] = "1"
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
options = parser.parse_args()

weights = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)
model = OVModelForCausalLM.from_pretrained(os.path.abspath(options.model), export=True, stateful=True, compile=False, quantization_config=weights)
model.save_pretrained(options.out)
