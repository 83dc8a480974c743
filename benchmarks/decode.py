"""Tokens a second of writing: octavo's PyTorch engine beside nanoGPT's and transformers' generate.

nanoGPT's larger character model (6 layers, 6 heads, width 384, context 256; GELU, LayerNorm,
learned positions, no biases), fp32, one row, greedy: 112 tokens after 16, with a cache of keys and
values and without. All write with the same weights, and must write the same tokens before anything
is timed.

    python benchmarks/decode.py --nanogpt PATH     # a clone of github.com/karpathy/nanoGPT
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from measure import Work, measure, options, timed
from record import versions

PROMPT, NEW_TOKENS = list(range(16)), 112


def model() -> Any:
    """Random weights, larger than a fresh model's: what it writes is then decided clearly."""
    import torch

    from octavo.model.gpt import GPT
    from octavo.model_config import ModelConfig

    shape = {"vocab_size": 65, "block_size": 256, "n_layer": 6, "n_head": 6, "d_model": 384}
    ours = GPT(ModelConfig(**shape, position="learned", norm="layernorm", mlp="gelu"))
    generator = torch.Generator().manual_seed(1337)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1, generator=generator)
    return ours.eval()


def octavo_work(use_cache: bool) -> Work:
    """Our reference engine."""
    from octavo.generating.engine import TorchEngine
    from octavo.generating.sampling import PRESETS
    from octavo.generating.writing import write

    engine = TorchEngine(model(), use_cache=use_cache)

    def run() -> list[int]:
        pieces = write(engine, None, [PROMPT], PRESETS["greedy"], NEW_TOKENS)
        return [piece.id for piece in pieces if piece.id is not None]

    return work(run)


def nanogpt_work(clone: Path) -> Work:
    """nanoGPT has no cache, and no greedy but its top 1."""
    import torch

    theirs = peers.to_nanogpt(model(), clone).eval()
    prompt = torch.tensor([PROMPT])
    return work(lambda: theirs.generate(prompt, NEW_TOKENS, top_k=1)[0, len(PROMPT) :].tolist())


def transformers_work(use_cache: bool) -> Work:
    """GPT2LMHeadModel's generate, with its default cache or none."""
    import torch

    theirs: Any = peers.to_transformers(model())
    theirs.generation_config.eos_token_id = None  # GPT-2's is outside this vocabulary
    theirs.generation_config.pad_token_id = 0
    prompt = torch.tensor([PROMPT])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": use_cache}
    settings["attention_mask"] = torch.ones_like(prompt)
    return work(lambda: theirs.generate(prompt, **settings)[0, len(PROMPT) :].tolist())


def work(run: Callable[[], list[int]]) -> Work:
    """What is written as the answer; a round writes it once more."""
    return Work(run(), functools.partial(timed, run, NEW_TOKENS))


def equal_tokens(answers: dict[str, list[int]]) -> None:
    """Raise unless all peers wrote the same."""
    reference = answers["octavo, cached"]
    for what, tokens in answers.items():
        if tokens != reference:
            pairs = zip(tokens, reference, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
            raise SystemExit(f"error: {what} writes something else from token {at} on")
    print(f"{len(reference)} greedy tokens agree, {len(set(reference))} different ones")


if __name__ == "__main__":
    parser = options("tokens a second of writing")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    asked = parser.parse_args()
    asked.versions = versions("octavo", "torch", "transformers")
    asked.versions["nanoGPT"] = peers.version_of(asked.nanogpt)
    contestants = {
        "octavo, cached": functools.partial(octavo_work, True),
        "octavo, no cache": functools.partial(octavo_work, False),
        "nanoGPT, no cache": functools.partial(nanogpt_work, asked.nanogpt),
        "transformers, cached": functools.partial(transformers_work, True),
        "transformers, no cache": functools.partial(transformers_work, False),
    }
    measure("decode", contestants, equal_tokens, "tokens/s", asked)
