"""The README.md of an exported model: only numbers that were counted, measured or recorded.

What is not known is left out; the licence and the intended use are the author's to write.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.checkpoint import Run
from octavo.exchanging.parity import TOLERANCE
from octavo.manifest import read_json
from octavo.model.counts import count_parameters
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer


def facts_of(run: Run, checkpoint: Path) -> dict[str, str]:
    """What a run recorded about the weights in ``checkpoint``: its data, steps, validation."""
    data = read_json(run.path / "data.json") if (run.path / "data.json").exists() else {}
    saved = run.load(checkpoint)
    facts = {}
    if "imported" in data:
        facts["Imported from"] = f"{data['name']} ({data['architecture']})"
    if "sha256" in data:
        facts["Text"] = f"{data['name']}, {data['tokens']:,} tokens"
        facts["SHA-256 of that text"] = f"`{data['sha256']}`"
    if saved.step:
        facts["Steps"] = f"{saved.step:,}"
        facts["Tokens learned from"] = f"{saved.state['tokens']:,}"
    if found := _validation(run.path / "metrics.jsonl", saved.step):
        facts["Validation loss"] = f"{found['val_loss']:.4f} nats a token"
        facts["Validation perplexity"] = f"{found['val_ppl']:.3f}"
        if found.get("val_bpb") is not None:
            facts["Validation bits per byte"] = f"{found['val_bpb']:.4f}"
    return facts


def write_card(
    name: str,
    architecture: str,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    facts: Mapping[str, str],
    parity: Mapping[str, Any],
) -> str:
    """The card in Markdown, with the metadata the hub reads at its head; ``parity`` by `check`."""
    kinds = {"char": "characters", "byte": "bytes", "bpe": "byte-pair encoding"}
    table = {
        "Parameters": f"{count_parameters(config).total:,}",
        "Architecture": f"`{architecture}`, {config.n_layer} layers of width {config.d_model}, "
        f"{config.n_head} heads",
        "Context": f"{config.block_size:,} tokens",
        "Vocabulary": f"{config.vocab_size:,}"
        + (f", {kinds[tokenizer.kind]}" if tokenizer else "; takes and gives ids"),
        **facts,
    }
    rows = "\n".join(f"| {what} | {value} |" for what, value in table.items())
    return CARD.format(
        title=name,
        rows=rows,
        tolerance=TOLERANCE,
        usage=USE_TEXT if tokenizer else USE_IDS,
        **parity,
    )


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [octavo]
---

# {title}

A GPT exported by octavo.

| | |
|---|---|
{rows}

```python
{usage}```

## Checked at export

These files were loaded by {against} and compared with the original on {tokens:,} tokens ({text}):
the logits differ by at most {largest_difference:.1e} of the largest ({tolerance:g} is allowed), the
perplexity is {perplexity_there:.6g} beside {perplexity:.6g}, and
{greedy_tokens} tokens of greedy text are the same.
"""
USE_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
"""
USE_IDS = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
"""


def _validation(metrics: Path, step: int) -> dict[str, Any] | None:
    """The last validation at ``step`` in a run's metrics; lines torn by a kill are passed over."""
    found = None
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        with suppress(ValueError):
            event = json.loads(line)
            if (event.get("event"), event.get("step")) == ("eval", step):
                found = event if event.get("val_loss") is not None else None
    return found
