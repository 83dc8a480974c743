"""One model in every engine's own files, and each engine behind the same three questions.

`prepare` writes the same random GPT-2 as a run with packed weights, for transformers, for llama.cpp
and for ctranslate2. Each peer then answers `continue_greedily`, `read` a prompt, and `write_batch`.
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "124m": {"n_layer": 12, "n_head": 12, "d_model": 768, "block_size": 1024},
    "30m": {"n_layer": 6, "n_head": 6, "d_model": 384, "block_size": 1024},
    "char": {"n_layer": 6, "n_head": 6, "d_model": 384, "block_size": 256},
}
GGUF = ("F32", "F16", "Q8_0", "Q4_0")
PACKED = ("fp16", "int8", "int4")
END = "<|endoftext|>"


@dataclass(frozen=True)
class Writer:
    """An engine with its weights loaded."""

    write: Callable[[list[list[int]], int], list[list[int]]]
    """Greedily continues each prompt by so many tokens."""


def prepare(folder: Path, shape: str) -> None:
    """Write the model of ``shape`` into ``folder`` in every form, unless it is there."""
    from octavo.config import Config
    from octavo.model_config import ModelConfig
    from octavo.text.tokenizer import Tokenizer

    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.byte(separator=True) if shape == "char" else Tokenizer.gpt2()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        position="learned",
        norm="layernorm",
        mlp="gelu_tanh",  # the only GELU llama.cpp has
        **SHAPES[shape],  # type: ignore[arg-type]
    )
    _write_run(folder / "run", Config(model=config), tokenizer)
    _write_others(folder)
    (folder / "done").touch()


def _write_run(path: Path, config: Any, tokenizer: Any) -> None:
    """Random weights, larger than a fresh model's: what it writes is then decided clearly."""
    import torch

    from octavo.checkpoint import Run
    from octavo.model.gpt import GPT

    torch.manual_seed(1337)
    model = GPT(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1 if "emb" in name else 0.06)
    Run.create(path, config, tokenizer, {}, model.state_dict())


def _write_others(folder: Path) -> None:
    """The run packed, for transformers, for llama.cpp and for ctranslate2, by octavo's exports."""
    run = str(folder / "run")
    for precision in PACKED:
        _octavo("quantize", run, "--to", precision)
    _octavo("export", run, "--to", "hf", str(folder / "hf"))
    for kind in GGUF:
        _octavo("export", run, "--to", "gguf", str(folder / f"{kind}.gguf"), "--type", kind)
    import ctranslate2

    for quantization in ("float32", "int8"):
        converter = ctranslate2.converters.TransformersConverter(str(folder / "hf"))
        target = folder / f"ct2-{quantization}"
        converter.convert(str(target), quantization=quantization)
        config = target / "config.json"  # it does not read back a token that it writes as null
        known = {k: v for k, v in json.loads(config.read_text()).items() if v is not None}
        config.write_text(json.dumps({"bos_token": END, "unk_token": END} | known))


def _octavo(*words: str) -> None:
    import subprocess

    subprocess.run([sys.executable, "-m", "octavo", *words], check=True)


def octavo_writer(folder: Path, threads: int, weights: str | None) -> Writer:
    """The engine that `octavo generate` uses."""
    from octavo.language_model import load

    lm = load(folder / "run", device="cpu", weights=weights)
    return Writer(lambda prompts, n: lm.generate_ids(prompts, max_new_tokens=n, temperature=0))


def transformers_writer(folder: Path, threads: int, mode: str) -> Writer:
    """Its generate with the cache it takes by itself (dynamic), a static one, or compiled too."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "hf")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    settings: dict[str, Any] = {"do_sample": False}
    if mode != "dynamic":
        settings["cache_implementation"] = "static"
    if mode == "compiled":
        model.forward = torch.compile(model.forward, mode="default", fullgraph=True)

    def write(prompts: list[list[int]], n: int) -> list[list[int]]:
        ids = torch.tensor(prompts)  # of equal length
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n}
        return model.generate(ids, **given, **settings)[:, ids.shape[1] :].tolist()

    return Writer(write)


def llama_writer(folder: Path, threads: int, kind: str) -> Writer:
    """llama.cpp's decode and its greedy sampler, called as its own programs call them."""
    import ctypes

    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p())
    loaded = lib.llama_model_load_from_file(
        str(folder / f"{kind}.gguf").encode(), lib.llama_model_default_params()
    )
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 32 * 256, 2048, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = 32, threads, threads
    params.kv_unified = True
    context = lib.llama_init_from_model(loaded, params)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    greedy = lib.llama_sampler_init_greedy()

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch = lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        lib.llama_batch_free(batch)

    def write(prompts: list[list[int]], n: int) -> list[list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        rows: list[list[int]] = [[] for _ in prompts]
        last = []  # where in the batch each sequence's last token is
        reading = []
        for sequence, prompt in enumerate(prompts):
            reading += [
                (token, at, sequence, at == len(prompt) - 1) for at, token in enumerate(prompt)
            ]
            last.append(len(reading) - 1)
        decode(reading)
        for step in range(n):
            for sequence, row in enumerate(rows):
                row.append(lib.llama_sampler_sample(greedy, context, last[sequence]))
            if step + 1 < n:
                decode([(row[-1], len(prompts[s]) + step, s, True) for s, row in enumerate(rows)])
                last = list(range(len(rows)))
        assert silent  # llama.cpp calls it as long as it writes
        assert all(0 <= token < size for row in rows for token in row)
        return rows

    return Writer(write)


def ctranslate2_writer(folder: Path, threads: int, quantization: str) -> Writer:
    """Its Generator; it takes and gives tokens as strings."""
    import ctranslate2

    where = folder / f"ct2-{quantization}"
    generator = ctranslate2.Generator(str(where), device="cpu", intra_threads=threads)
    names = json.loads((where / "vocabulary.json").read_text(encoding="utf-8"))
    ids = {name: number for number, name in enumerate(names)}

    def write(prompts: list[list[int]], n: int) -> list[list[int]]:
        found = generator.generate_batch(
            [[names[token] for token in prompt] for prompt in prompts],
            max_length=n,
            min_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [[ids[token] for token in result.sequences[0]] for result in found]

    return Writer(write)


def nanogpt_writer(folder: Path, threads: int, clone: Path) -> Writer:
    """nanoGPT has no cache, and no greedy but its top 1."""
    import peers
    import torch

    from octavo.language_model import load

    theirs: Any = peers.to_nanogpt(load(folder / "run", device="cpu").model, clone).eval()

    def write(prompts: list[list[int]], n: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return theirs.generate(ids, n, top_k=1)[:, ids.shape[1] :].tolist()

    return Writer(write)


def prompts(folder: Path, rows: int, length: int) -> list[list[int]]:
    """``rows`` random prompts of ``length`` ids, the same for all."""
    from octavo.checkpoint import Run

    size = Run.open(folder / "run").config.model.vocab_size
    ids = np.random.default_rng(1337).integers(0, min(size, 50_000), (rows, length))
    return ids.tolist()


WRITERS: dict[str, Callable[..., Writer]] = {
    "octavo fp32": functools.partial(octavo_writer, weights=None),
    **{f"octavo {p}": functools.partial(octavo_writer, weights=p) for p in PACKED},
    **{
        f"transformers fp32, {mode}": functools.partial(transformers_writer, mode=mode)
        for mode in ("dynamic", "static", "compiled")
    },
    **{f"llama.cpp {kind}": functools.partial(llama_writer, kind=kind) for kind in GGUF},
    "ctranslate2 fp32": functools.partial(ctranslate2_writer, quantization="float32"),
    "ctranslate2 int8": functools.partial(ctranslate2_writer, quantization="int8"),
}
