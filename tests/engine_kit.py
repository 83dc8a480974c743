"""Tiny models, the engines that write with them, and what they write."""

from functools import partial

import torch
from model_kit import random_model

from octavo.generating.engine import TorchEngine
from octavo.generating.native import NativeEngine, NativeModel, as_stored
from octavo.generating.sampling import PRESETS, Sampling, pick
from octavo.generating.writing import Slot
from octavo.model_config import ModelConfig

VOCAB = 29
GREEDY = PRESETS["greedy"]
SAMPLED = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2)
PROMPTS = [[3], [1, 2, 3, 4, 5], list(range(13)), [5, 4] * 20, [9, 9, 9]]


def make_model(seed=0, **settings):
    shape = {"vocab_size": VOCAB, "block_size": 16, "n_layer": 2, "n_head": 2, "d_model": 16}
    return random_model(ModelConfig(**{**shape, **settings}), seed)


def native_model(model):
    """A PyTorch model's own weights for the native engine."""
    state = model.state_dict()
    return NativeModel(model.config, {n: as_stored(t.detach().numpy()) for n, t in state.items()})


def native_engine(model, slots=1, threads=2, **options):
    return NativeEngine(native_model(model), slots, threads=threads, **options)


ENGINES = {
    "torch": TorchEngine,
    "uncached": partial(TorchEngine, use_cache=False),
    "native": native_engine,
}


def make_slot(index, prompt, sampling=SAMPLED, n=0, **more):
    return Slot(index, list(prompt), n, sampling, len(prompt), **more)


def written(engine, prompts, count, sampling=SAMPLED, most=1, n=0, logprobs=0):
    """What is written after each prompt when all are stepped together; with it each id's top."""
    slots = [make_slot(i, p, sampling, n, logprobs=logprobs) for i, p in enumerate(prompts)]
    tops = [[] for _ in slots]
    while active := [slot for slot in slots if len(slot.ids) < slot.prompt_length + count]:
        for slot in active:
            slot.left = slot.prompt_length + count - len(slot.ids)
        for slot, ids in zip(active, engine.step(active, most), strict=True):
            assert 1 <= len(ids) <= min(most, slot.left)
            slot.ids.extend(ids)
            tops[slot.index].extend(slot.top)
    for slot in slots:
        engine.release(slot.index)
    texts = [slot.ids[slot.prompt_length :] for slot in slots]
    return (texts, tops) if logprobs else texts


def by_hand(model, prompt, count, sampling):
    """The rule in plain words: read the window, draw, drop its oldest half when it overflows."""
    model.eval()
    block, ids, window = model.config.block_size, list(prompt), list(prompt)
    for _ in range(count):
        while len(window) > block:
            window = window[max(1, block // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1].numpy()
        token = pick(logits, ids, sampling, 0, len(ids), len(prompt))
        ids.append(token)
        window.append(token)
    return ids[len(prompt) :]
