"""A training step of transformers (+ peft) + torch.optim.AdamW, with the options and field names of `mica bench --train`; prints one JSON document.

usage: torch_train_speed.py MODEL [--fine-tune-type lora|full] [--batch B] [--seq T] [--labelled R] [--steps N] [--num-layers L] [--lora-keys q_proj,v_proj] [--threads N] [--dtype bfloat16]"""
import argparse, json, resource, statistics, time
import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--fine-tune-type", choices=["lora", "full"], default="lora")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--seq", type=int, default=1024)
parser.add_argument("--labelled", type=float, default=1.0)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--num-layers", type=int, default=-1)
parser.add_argument("--lora-keys", default="q_proj,v_proj")
parser.add_argument("--lora-rank", type=int, default=8)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--dtype", default="bfloat16")
options = parser.parse_args()

torch.set_num_threads(options.threads)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
model.config.use_cache = False
model.train()
if options.fine_tune_type == "lora":
    from peft import LoraConfig, get_peft_model
    layers = model.config.num_hidden_layers
    first = 0 if options.num_layers == -1 else layers - options.num_layers
    adapter = LoraConfig(r=options.lora_rank, lora_alpha=20 * options.lora_rank, lora_dropout=0.0, target_modules=options.lora_keys.split(","), layers_to_transform=list(range(first, layers)))
    model = get_peft_model(model, adapter)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
tokens = torch.randint(10, min(model.config.vocab_size, 15000), (options.batch, options.seq))
labels = tokens.clone()
labels[:, :options.seq - max(1, round(options.labelled * options.seq))] = -100  # no loss there
seconds, losses = [], []
for _ in range(options.steps + 1):  # the first warms up
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    seconds.append(time.perf_counter() - start)
step = statistics.median(seconds[1:])
print(json.dumps(dict(step_s=step, tokens_per_s=options.batch * options.seq / step, trainable=sum(p.numel() for p in trained), labelled=int((labels != -100).sum()),
                      peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, loss_first=losses[0], loss_last=losses[-1], version=torch.__version__)))
