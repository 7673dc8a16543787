"""Train the small language model that ships with Ecotone, then its drafter, each saved as a Hugging Face directory.

    python examples/train_tiny_llm.py --data tinyshakespeare.txt --out tiny-llm
    python examples/train_tiny_llm.py --data tinyshakespeare.txt --out drafter --teacher tiny-llm --width 96 --layers 1

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

END, WINDOW, BATCH = "<|end|>", 512, 4
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
def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:  # mean nats per token, windows that do not overlap
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)) / len(windows)


def train(data: str, out: str, teacher: str, width: int, layers: int, vocabulary: int, steps: int) -> None:
    torch.manual_seed(0)
    text = Path(data).read_text()
    own, early, late = (text[int(a * len(text)) : int(b * len(text))] for a, b in ((0, 0.85), (0.85, 0.9), (0.9, 1)))
    pairs = AutoTokenizer.from_pretrained(teacher) if teacher else make_tokenizer(own, vocabulary)
    parts = own, own.replace("\n\n", END + "\n\n"), early, late
    plain, ended, choosing, held_out = (torch.tensor(pairs.encode(part, verbose=False)) for part in parts)
    config = LlamaConfig(
        vocab_size=len(pairs), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 96, intermediate_size=width * 8 // 3, tie_word_embeddings=True, bos_token_id=None,
        max_position_embeddings=1024, eos_token_id=pairs.eos_token_id, pad_token_id=pairs.eos_token_id,
    )  # fmt: skip
    model, best = LlamaForCausalLM(config), float("inf")
    guide = LlamaForCausalLM.from_pretrained(teacher).float().eval() if teacher else None
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(plain) - WINDOW, (BATCH, 1))
        batch = (plain, ended)[step % 2][starts + torch.arange(WINDOW)]
        with torch.autocast("cpu", torch.bfloat16):
            right = guide(batch).logits[:, :-1].detach().softmax(-1) if guide else batch[:, 1:]
            loss = cross_entropy(model.train()(batch).logits[:, :-1].flatten(0, 1).float(), right.flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for act in (optimiser.step, optimiser.zero_grad, schedule.step):
            act()
        if (step % 100 == 0 or step == steps) and (chosen := loss_of(model.eval(), choosing)) < best:
            best = chosen
            deepcopy(model).bfloat16().save_pretrained(out)
            print(f"step {step} of {steps}: {chosen:.3f} nats per token, kept", flush=True)
    pairs.save_pretrained(out)
    kept = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    size = f"{kept.num_parameters():,} parameters, {len(parts[3]) / len(held_out):.2f} characters per token"
    print(f"{size}, held-out loss {loss_of(kept, held_out):.3f} nats per token")


if __name__ == "__main__":
    parser, texts = argparse.ArgumentParser(), {"data": "tinyshakespeare.txt", "out": "tiny-llm", "teacher": ""}
    for name, default in (texts | {"width": 192, "layers": 4, "vocabulary": 1024, "steps": 2600}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    train(**vars(parser.parse_args()))
