"""`octavo import`: a model from elsewhere becomes a run."""

import shlex
from argparse import Namespace
from pathlib import Path

from octavo.commands.shared import Option, add_common, exactly, print_facts
from octavo.errors import ConfigError

WORDS = "SOURCE RUN"
PAGE = """\
A model from elsewhere becomes a run: to write with, to measure, to fine-tune.

  octavo import SmolLM2-135M/ runs/smol             a Hugging Face directory
  octavo import HuggingFaceTB/SmolLM2-135M runs/s   the same by name, where there is a network
  octavo import out/ckpt.pt runs/nano --tokenizer input.txt
  octavo import peft-adapter/ runs/voice --base runs/my   merged into the run it belongs to

GPT-2, Llama, Qwen3, StarCoder2, StableLM, GPT-NeoX and GPTBigCode in safetensors, and nanoGPT's
ckpt.pt. No code that comes with a model is run. Where transformers is installed its logits are
compared with octavo's first, and nothing is written if they differ."""


def add_options(option: Option) -> None:
    option(
        "--tokenizer",
        metavar="T",
        help="gpt2, a tokenizer.json, or the text whose characters nanoGPT learned",
    )
    option("--base", metavar="RUN", help="the run that PEFT's adapter belongs to")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    source, target = exactly(args.words, WORDS)
    if (Path(source) / "adapter_config.json").exists():
        from octavo.language_model import load
        from octavo.training.merging import import_adapter

        if not args.base:
            raise ConfigError("an adapter needs its base", fix="name its run with --base RUN")
        facts = import_adapter(source, load(args.base, device="cpu"), target)
    else:
        from octavo.exchanging.importing import import_model

        facts = import_model(source, target, args.tokenizer)
    known = {name: value for name, value in facts.items() if value is not None}
    print_facts({"run": target, **known}, args.json)
    if not args.json:
        print(f"write:  octavo generate {shlex.quote(target)} --max-new-tokens 100")
