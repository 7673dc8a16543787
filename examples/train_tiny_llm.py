"""Train the small language model that ships with Ecotone, then its drafter, each saved as a Hugging Face directory.

    python examples/train_tiny_llm.py --out short && python examples/train_tiny_llm.py --start short --window 512 --steps 400
    python examples/train_tiny_llm.py --out drafter --teacher tiny-llm --width 96 --layers 1 --window 512
The last 10 % of the text are held out; the 5 % before choose the step that is kept. Half of the windows end every speech
with <|end|>, so that a chat's answer ends. With a teacher its tokenizer is shared and its probabilities are learned.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, BATCH_TOKENS = "<|end|>", 2048
TURN = "{{ message['role'] | upper }}:\n{{ message['content'] }}<|end|>\n\n"
TEMPLATE = f"{{% for message in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:\n{{% endif %}}"


def make_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    known = {"special_tokens": [END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocabulary, **known))
    more = {"eos_token": END, "pad_token": END, "model_max_length": 1024, "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, window: int = 512) -> float:  # mean nats per token
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)) / len(windows)


def train(o: argparse.Namespace) -> None:
    torch.manual_seed(0)
    text = Path(o.data).read_text()
    own, early, late = (text[int(a * len(text)) : int(b * len(text))] for a, b in ((0, 0.85), (0.85, 0.9), (0.9, 1)))
    pairs = AutoTokenizer.from_pretrained(known) if (known := o.start or o.teacher) else make_tokenizer(own, o.vocabulary)
    parts = (own, own.replace("\n\n", END + "\n\n"), early, late)
    plain, ended, choosing, held_out = (torch.tensor(pairs.encode(part, verbose=False)) for part in parts)
    config = LlamaConfig(
        vocab_size=len(pairs), hidden_size=o.width, num_hidden_layers=o.layers, num_attention_heads=o.width // 32,
        num_key_value_heads=o.width // 64, intermediate_size=o.width * 8 // 3, tie_word_embeddings=True, bos_token_id=None,
        max_position_embeddings=1024, eos_token_id=pairs.eos_token_id, pad_token_id=pairs.eos_token_id,
    )  # fmt: skip
    model, best = LlamaForCausalLM.from_pretrained(o.start).float() if o.start else LlamaForCausalLM(config), float("inf")
    guide = LlamaForCausalLM.from_pretrained(o.teacher, use_safetensors=True).float().eval() if o.teacher else None
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, o.peak, total_steps=o.steps, pct_start=0.05)
    for step in range(1, o.steps + 1):
        begins = torch.randint(0, len(plain) - o.window, (BATCH_TOKENS // o.window, 1))
        batch = (plain, ended)[step % 2][begins + torch.arange(o.window)]
        with torch.autocast("cpu", torch.bfloat16):
            right = guide(batch).logits[:, :-1].detach().softmax(-1) if guide else batch[:, 1:]
            loss = cross_entropy(model.train()(batch).logits[:, :-1].flatten(0, 1).float(), right.flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        _ = optimiser.step(), optimiser.zero_grad(), schedule.step()
        if (step % 100 == 0 or step == o.steps) and (loss := loss_of(model.eval(), choosing, o.window)) < best:
            best = loss
            deepcopy(model).bfloat16().save_pretrained(o.out)
            print(f"step {step} of {o.steps}: {loss:.3f} nats per token, kept", flush=True)
    pairs.save_pretrained(o.out)
    kept = LlamaForCausalLM.from_pretrained(o.out, dtype=torch.float32).eval()
    size = f"{kept.num_parameters():,} parameters, {len(late) / len(held_out):.2f} characters per token"
    print(f"{size}, held-out loss {loss_of(kept, held_out):.3f} nats per token")


if __name__ == "__main__":
    parser, texts = argparse.ArgumentParser(), {"data": "tinyshakespeare.txt", "out": "tiny-llm", "start": "", "teacher": ""}
    sizes = {"width": 192, "layers": 4, "vocabulary": 1024, "window": 128, "steps": 1600, "peak": 4e-3}
    for name, default in (texts | sizes).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    if not Path((options := parser.parse_args()).data).is_file():
        parser.error(f"{options.data} is missing; give --data a file of plain text")
    train(options)
