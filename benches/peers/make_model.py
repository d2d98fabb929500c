"""Folders with random weights in the shapes of real models, as Hugging Face saves them, with a tokenizer trained on Python's own sources.

usage: make_model.py FOLDER NAME…      names: qwen3-0.6b, llama-1b, lfm2-1.2b, tiny (llama-8b: see make_quantized.py)"""
import glob, json, os, sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
COMMON = dict(tie_word_embeddings=True, hidden_act="silu", attention_bias=False, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")
LLAMA = dict(COMMON, model_type="llama", num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, mlp_bias=False)
CONFIGS = {
    "qwen3-0.6b": dict(COMMON, model_type="qwen3", hidden_size=1024, num_hidden_layers=28, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                       rms_norm_eps=1e-6, vocab_size=151936, max_position_embeddings=40960, rope_theta=1e6),
    "llama-1b": dict(LLAMA, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, head_dim=64),
    "tiny": dict(COMMON, model_type="llama", hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
                 rms_norm_eps=1e-5, vocab_size=8192, max_position_embeddings=2048, rope_theta=10000.0, mlp_bias=False),
    "lfm2-1.2b": dict(model_type="lfm2", vocab_size=65536, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=128000,
                      norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_ff_dim=12288, block_multiple_of=256, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=True,
                      rope_theta=1e6, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16",
                      layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]),
}


def tokenizer(folder, vocabulary):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=min(vocabulary, 16000), special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train(sorted(glob.glob(os.path.dirname(os.__file__) + "/*.py")), trainer)
    made.save(f"{folder}/tokenizer.json")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], chat_template=template)
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump(settings, file, indent=1)


def make(folder, name):
    options = dict(CONFIGS[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 0.02 if "embed" in key else weight.shape[-1] ** -0.5)
    model.save_pretrained(f"{folder}/{name}", max_shard_size="100GB")
    tokenizer(f"{folder}/{name}", config.vocab_size)


for name in sys.argv[2:]:
    make(sys.argv[1], name)
