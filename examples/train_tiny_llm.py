"""Train the small language model that ships with Ecotone (and its drafter), saved as a Hugging Face directory.

    python examples/train_tiny_llm.py --data tinyshakespeare.txt --out tiny-llm
    python examples/train_tiny_llm.py --data tinyshakespeare.txt --out drafter --tokenizer tiny-llm --width 96 --layers 1

The last 10 % of the text are held out: nothing is fitted to them or chosen by them. The 5 % before choose the step that
is kept. Half of the windows end every speech with <|end|>, so that an answer in the chat template ends too.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, WINDOW, BATCH = "<|end|>", 128, 16
TURN = "{{ message['role'] | upper }}:\n{{ message['content'] }}<|end|>\n\n"
TEMPLATE = f"{{% for message in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:\n{{% endif %}}"


def make_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level pairs learned from `text`: every string has tokens, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    known = {"special_tokens": [END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocabulary, **known))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=1024)
    fast.chat_template = TEMPLATE
    return fast


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:  # mean nats per token, windows that do not overlap
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(32)) / len(windows)


def train(data: str, out: str, tokenizer: str, width: int, layers: int, vocabulary: int, steps: int) -> None:
    torch.manual_seed(0)
    text = Path(data).read_text()
    first, second = int(0.85 * len(text)), int(0.9 * len(text))
    pairs = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else make_tokenizer(text[:first], vocabulary)
    parts = text[:first], text[:first].replace("\n\n", END + "\n\n"), text[first:second], text[second:]
    plain, ended, choosing, held_out = (torch.tensor(pairs.encode(part, verbose=False)) for part in parts)
    heads = width // 32
    config = LlamaConfig(
        vocab_size=len(pairs), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // (3 if heads % 2 else 2), intermediate_size=width * 8 // 3, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=pairs.eos_token_id, pad_token_id=pairs.eos_token_id,
    )  # fmt: skip
    model, best = LlamaForCausalLM(config), float("inf")
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(plain) - WINDOW, (BATCH, 1))
        batch = (plain, ended)[step % 2][starts + torch.arange(WINDOW)]
        with torch.autocast("cpu", torch.bfloat16):
            model.train()(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for act in (optimiser.step, optimiser.zero_grad, schedule.step):
            act()
        if (step % 100 == 0 or step == steps) and (loss := loss_of(model.eval(), choosing)) < best:
            best = loss
            deepcopy(model).bfloat16().save_pretrained(out)
            print(f"step {step} of {steps}: {loss:.3f} nats per token, kept", flush=True)
    pairs.save_pretrained(out)
    kept = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    size = (
        f"{sum(p.numel() for p in kept.parameters()):,} parameters, {len(parts[3]) / len(held_out):.2f} characters per token"
    )
    print(f"{size}, held-out loss {loss_of(kept, held_out):.3f} nats per token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small Llama.")
    for name, default in {"data": "", "out": "tiny-llm", "tokenizer": ""}.items():
        parser.add_argument(f"--{name}", default=default, required=name == "data")
    for name, number in {"width": 192, "layers": 4, "vocabulary": 1024, "steps": 1600}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    train(**vars(parser.parse_args()))
