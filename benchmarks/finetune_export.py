"""One model's whole journey: fine-tuned on another text, to PEFT and back, merged, exported.

    python benchmarks/finetune_export.py runs/quickstart shakespeare.txt --record

Each figure is what `octavo ... --json` printed; with --llama PYTHON, an interpreter that has
llama-cpp-python, the GGUF file also writes greedily there and must write what octavo writes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import machine, row, versions, write

from octavo.adapting.lora import trainable_parameters
from octavo.language_model import load

PROMPT, TOKENS = "The ", 32
LLAMA = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=128, verbose=False, n_threads=1)
ids = model.tokenize(sys.argv[2].encode(), add_bos=False)
for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
    ids.append(token)
    if len(ids) >= int(sys.argv[3]) + len(sys.argv[2]):
        break
print(json.dumps(model.detokenize(ids).decode()))
"""


def octavo(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "octavo", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) if done.stdout.startswith("{") else {}


def journey(run: str, text: str, folder: Path, steps: int, llama: str | None) -> dict[str, float]:
    tuned, merged, gguf = (str(folder / name) for name in ("tuned", "merged", "m.gguf"))
    settings = ["lora.rank=4", "lora.targets=[q_proj,v_proj]", f"train.max_steps={steps}"]
    whole, unseen = Path(text).read_text(encoding="utf-8"), folder / "unseen.txt"
    unseen.write_text(whole[int(len(whole) * 0.9) :], encoding="utf-8")  # what is never trained on
    before = octavo("eval", run, "--perplexity", str(unseen), "--json")
    octavo("finetune", run, text, "--out", tuned, "--quiet", "optim.lr=3e-3", *settings)
    after = octavo("eval", tuned, "--perplexity", str(unseen), "--json")
    parameters = octavo("plan", run, "--no-probe", "--json")["parameters_total"]
    trained = trainable_parameters(load(tuned).model)
    peft = octavo("export", tuned, "--to", "peft", str(folder / "peft"), "--json")
    back = octavo("import", str(folder / "peft"), str(folder / "b"), "--base", run, "--json")
    octavo("merge", tuned, "--out", merged)
    hf = octavo("export", merged, "--to", "hf", str(folder / "hf"), "--json")
    file = octavo("export", merged, "--to", "gguf", gguf, "--type", "F32", "--json")
    figures = {
        "perplexity of the base on the unseen tenth of the text": before["perplexity"],
        "perplexity fine-tuned, there": after["perplexity"],
        "share of the weights that stood still": 1 - trained / (parameters + trained),
        "difference to PEFT's logits": peft["difference_to_peft"],
        "difference after PEFT and back, merged": back["largest_change_of_a_logit"],
        "difference to transformers' logits": hf["largest_difference"],
        "perplexity in transformers": hf["perplexity_there"],
        "perplexity of the GGUF file": file["perplexity_of_the_file"],
    }
    if llama:
        words = ["generate", merged, "--prompt", PROMPT, "--preset", "greedy", "--json"]
        ours = octavo(*words, "--max-new-tokens", str(TOKENS))["texts"][0]
        command = [llama, "-c", LLAMA, gguf, PROMPT, str(TOKENS)]
        theirs = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
        print(repr(ours), repr(theirs), sep="\n")
        figures["greedy characters equal to llama.cpp's"] = sum(
            a == b for a, b in zip(PROMPT + ours, theirs, strict=False)
        ) - len(PROMPT)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = journey(args.run, args.text, Path(folder), args.steps, args.llama)
    results = [row(what, "", value) for what, value in figures.items()]
    for what, value in figures.items():
        print(f"{what:<50} {value:.6g}")
    if args.record:
        record = {"name": "finetune-export", "machine": machine(), "rounds": 1}
        names = ("octavo", "torch", "transformers", "peft", "gguf")
        command = "python benchmarks/finetune_export.py RUN TEXT --record"
        print(
            write(record | {"versions": versions(*names), "command": command, "results": results})
        )


if __name__ == "__main__":
    main()
