"""Drafters say what their model would say, whatever was refused, forgotten or crowded out; texts stay the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_chain import Chain as Shards

import ecotone
from ecotone.decoding.frame import FrameRow, Open
from ecotone.decoding.params import Grammar, SamplingParams
from ecotone.decoding.speculation import DraftAsk, Drafter, PromptLookup
from ecotone.decoding.step import Row
from ecotone.decoding.tail import Tail
from ecotone.llm.config import ModelError
from ecotone.llm.drafters import Chain, ModelDrafter, check_vocabularies, layers_drafter, model_drafter
from ecotone.llm.executors.native_library import compiler
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.grammar import Grammars
from ecotone.llm.sampling import make_chooser
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
pytestmark = pytest.mark.torch
ASSETS = Path(ecotone.__file__).parent / "assets"
MODEL, SMALL = Checkpoint.open(ASSETS / "tiny-llm"), Checkpoint.open(ASSETS / "tiny-drafter")
TEXT = TextModel.open(ASSETS / "tiny-llm")
PROMPT = tuple(TEXT.encode("ROMEO:\nWhat light through yonder window breaks? It is the east, and"))
GREEDY = SamplingParams(temperature=0.0)
VOCABULARY = 1024


def whole(kv_bytes: int = 1 << 21, context: int = 0, source: Checkpoint = MODEL, **more) -> ModelDrafter:
    return model_drafter(source, TEXT, "torch:fp32", context=context, kv_bytes=kv_bytes, **more)


def ask(tokens, count: int, request: int = 1, params: SamplingParams = GREEDY, prompt_length: int = len(PROMPT)) -> DraftAsk:
    return DraftAsk(
        request=request, ticket=1, tokens=tuple(tokens), num_settled=len(tokens), count=count, params=params,
        prompt_length=prompt_length,
    )  # fmt: skip


@pytest.fixture(scope="module")
def right() -> list[int]:
    """The model's own greedy answer to PROMPT."""
    return Shards(TorchShards("torch:fp32"), MODEL, context=1024).greedy(torch.tensor(PROMPT), 40)


def generate(
    drafter: Drafter | None, params: SamplingParams, count: int = 48, window: int = 4
) -> tuple[list[int], int, int]:
    """(text, drafts accepted, drafts judged) of the model with a window of drafts a round, as a tail judges them."""
    shards, tail = Shards(TorchShards("torch:fp32"), MODEL, context=1024), Tail(lambda p, n: make_chooser(p, n, VOCABULARY))
    tail.open(Open(1, len(PROMPT), params.to_bytes()))
    tokens, start, accepted, judged = list(PROMPT), 0, 0, 0
    while len(tokens) < len(PROMPT) + count:
        drafts = tuple(drafter.draft([ask(tokens, window, params=params)])[0]) if drafter else ()
        fed = (*tokens[start:], *drafts)
        logits = shards.run([Row(slot=1, start=start, count=len(fed), num_logits=1 + len(drafts))], torch.tensor(fed))
        found = tail.judge([FrameRow(1, start, fed, num_logits=1 + len(drafts))], logits)[0]
        start = len(tokens) + len(found.tokens) - 1
        tokens += found.tokens
        accepted, judged = accepted + len(found.tokens) - 1, judged + min(len(drafts), len(found.tokens))
    return tokens[len(PROMPT) : len(PROMPT) + count], accepted, judged


def test_drafts_are_the_models_own_words_however_they_are_asked_for(right: list[int]) -> None:
    drafter = whole()
    assert drafter.draft([ask(PROMPT, 5)]) == [right[:5]]
    wrong = [*right[:3], 7, 9, 11]  # refused later on
    drafter.draft([ask((*PROMPT, *wrong), 4)])
    assert drafter.draft([ask((*PROMPT, *right[:2]), 6)]) == [right[2:8]]
    assert drafter.draft([ask((*PROMPT, *right[:2]), 2)]) == [right[2:4]]
    several = [ask((*PROMPT, *right[:at]), 1 + at % 4, request=at) for at in range(12)]
    assert drafter.draft(several) == [right[at : at + 1 + at % 4] for at in range(12)]
    drafter.end(3)
    drafter.end(999)
    assert drafter.draft([ask((*PROMPT, *right[:9]), 3, request=3)]) == [right[9:12]]


@pytest.mark.skipif(not compiler(), reason="no C++ compiler here")
def test_a_shard_that_continues_by_itself_drafts_the_same_tokens(right: list[int]) -> None:
    """Native kernels choose several tokens in one call; with penalties and noise each is chosen as before."""
    drafter = model_drafter(MODEL, TEXT, "native:fp32", kv_bytes=1 << 21)
    calls: list[int] = []
    alone = drafter._shard.continue_greedily  # type: ignore[attr-defined]
    drafter._shard.continue_greedily = lambda *args: (calls.append(args[3]), alone(*args))[1]  # type: ignore[attr-defined]
    text = list(PROMPT) + right
    for known, count in ((len(PROMPT), 6), (len(PROMPT) + 3, 8), (len(PROMPT) + 20, 1), (len(PROMPT) + 5, 12)):
        assert list(drafter.draft([ask(text[:known], count)])[0]) == text[known : known + count]
    wrong = [*text[: len(PROMPT) + 4], (text[len(PROMPT) + 4] + 1) % VOCABULARY]
    assert drafter.draft([ask(wrong, 6)]) == whole().draft([ask(wrong, 6)])  # from what it holds, rolled back
    assert calls == [6, 8, 1, 12, 6]
    noisy = SamplingParams(seed=3, temperature=0.8, repetition_penalty=1.1)
    assert drafter.draft([ask(PROMPT, 5, 2, noisy)]) == whole().draft([ask(PROMPT, 5, 2, noisy)])
    assert drafter.draft([ask(PROMPT, 5, 3), ask(PROMPT[:30], 5, 4)])[0] == text[len(PROMPT) :][:5]
    assert len(calls) == 5  # several asks at once are computed together


def test_a_long_prompt_is_computed_in_chunks() -> None:
    prompt = (PROMPT * 40)[:900]
    made = Shards(TorchShards("torch:fp32"), MODEL, context=1024, cap_bytes=1 << 22).greedy(torch.tensor(prompt), 3)
    assert whole(kv_bytes=0).draft([ask(prompt, 3)]) == [made]


def test_little_memory_costs_drafts_and_never_more(right: list[int]) -> None:
    drafter = whole(kv_bytes=5 * 32 * MODEL.config.kv_bytes_per_token(4, 4))  # room for five blocks
    tables = drafter._shard.cache.tables
    for turn in range(4):
        asks = [ask((*PROMPT, *right[: turn + at]), 4, request=at) for at in range(6)]
        made = drafter.draft(asks)
        assert all(tuple(found) == tuple(right[turn + at : turn + at + len(found)]) for at, found in enumerate(made))
        assert any(made)
        assert len(drafter.draft([asks[5]])[0]) == 4  # alone it has room, after the others are forgotten
    assert drafter.draft([ask((PROMPT * 20)[:200], 4)]) == [()]  # does not fit at all
    for request in range(10):
        drafter.end(request)
    assert tables.num_free == tables.num_blocks


def test_the_context_and_tokens_it_does_not_know_end_its_drafts(right: list[int]) -> None:
    drafter = whole(context=len(PROMPT) + 3)
    assert drafter.draft([ask(PROMPT, 9)]) == [right[:4]]
    assert drafter.draft([ask((*PROMPT, *right[:4]), 9)]) == [()]
    assert drafter.draft([ask((*PROMPT, 1024), 2)]) == [()]
    narrow = ModelDrafter(whole()._shard, 100, 512)  # for a model with fewer tokens
    assert all(token < 100 for token in narrow.draft([ask([1, 2, 3], 8)])[0])


def test_so_many_requests_at_once_that_some_are_left_out() -> None:
    made = whole(kv_bytes=1 << 23).draft([ask((5, 6, 7), 1, request=number) for number in range(70)])
    assert [len(each) for each in made] == [1] * 64 + [0] * 6


def test_the_first_layers_are_those_of_the_model_with_its_norm_and_head() -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-llm", dtype=torch.float32)
    theirs.model.layers = theirs.model.layers[:2]
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(6):
            tokens.append(int(theirs(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert layers_drafter(MODEL, 2, "torch:fp32").draft([ask(PROMPT, 6)]) == [tokens[len(PROMPT) :]]
    with pytest.raises(ModelError, match="4 of 4 layers cannot draft; give 1 to 3"):
        layers_drafter(MODEL, 4, "torch:fp32")


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=3, temperature=0.8, top_p=0.95, repetition_penalty=1.1)])
def test_the_text_is_the_same_with_any_drafter(params: SamplingParams) -> None:
    plain, _, _ = generate(None, params)
    itself = generate(whole(), params)
    assert itself[0] == plain
    assert itself[1] == itself[2]  # the model agrees with itself, sampled or not
    text, accepted, judged = generate(Chain(PromptLookup(), whole(source=SMALL)), params)
    assert text == plain
    assert 0 < accepted < judged


def test_drafting_with_the_requests_noise_is_accepted_more_often_than_with_another() -> None:
    same = other = 0
    for seed in range(2):
        params = SamplingParams(seed=seed, temperature=1.0)
        _, accepted, judged = generate(whole(source=SMALL), params)
        same += accepted / judged
        drafter = whole(source=SMALL)

        class Another:
            def draft(self, asks, drafter=drafter, params=params):
                return drafter.draft([replace(a, params=replace(params, seed=params.seed + 100)) for a in asks])

        _, accepted, judged = generate(Another(), params)
        other += accepted / judged
    assert same > other + 0.2  # in sum of two


def test_a_drafter_that_knows_the_grammar_drafts_by_it() -> None:
    pytest.importorskip("llguidance", reason="the extra `llm` is not installed")
    params = SamplingParams(temperature=0.0, grammar=Grammar(kind="regex", text="(yes|no), my lord"), stop_tokens=(0,))
    made = whole(grammars=Grammars(TEXT, VOCABULARY)).draft([ask(PROMPT, 12, params=params)])[0]
    assert TEXT.decode(made) in ("yes, my lord", "no, my lord")
    assert whole().draft([ask(PROMPT, 2, params=params)])[0]  # without it: guesses all the same


def test_the_second_of_a_chain_is_asked_where_the_first_is_silent(right: list[int]) -> None:
    chain = Chain(PromptLookup(min_match=3), whole())
    repeating = [1, 2, 3, 4, 5, 1, 2, 3]
    made = chain.draft([ask(repeating, 2, request=1), ask(PROMPT, 2, request=2), ask(repeating, 2, request=3)])
    assert [tuple(each) for each in made] == [(4, 5), tuple(right[:2]), (4, 5)]
    chain.end(2)


def test_a_drafter_with_other_tokens_is_refused() -> None:
    small = TextModel.open(ASSETS / "tiny-drafter")
    check_vocabularies(TEXT, small)
    changed = {**small.tokenizer.get_vocab(), "zebra": 1024}
    other = TextModel(type("Other", (), {"get_vocab": lambda self: changed})(), "other-model")
    with pytest.raises(ModelError, match="1 tokens differ, such as 'zebra': id None and 1024"):
        check_vocabularies(TEXT, other)
    with pytest.raises(ModelError, match="cannot draft for other-model"):
        model_drafter(SMALL, other)
