"""octavo: a small, well-bound GPT. Train, fine-tune, measure, compress, explain and serve one.

>>> import octavo
>>> lm = octavo.load("runs/quickstart")  # doctest: +SKIP
>>> lm.generate("The ", max_new_tokens=100)  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.commands.export import to_huggingface as to_huggingface
    from octavo.config import Config as Config
    from octavo.config import ModelConfig as ModelConfig
    from octavo.exchanging.huggingface import from_huggingface as from_huggingface
    from octavo.language_model import LanguageModel as LanguageModel
    from octavo.language_model import load as load
    from octavo.model.gpt import GPT as GPT
    from octavo.training.loop import train as train

__version__ = "0.1.0"

# Names are fetched on first use, so that `import octavo` costs nothing and writing needs no torch.
_HOMES = {
    "Config": "octavo.config",
    "ModelConfig": "octavo.model_config",
    "GPT": "octavo.model.gpt",
    "LanguageModel": "octavo.language_model",
    "load": "octavo.language_model",
    "train": "octavo.training.loop",
    "from_huggingface": "octavo.exchanging.huggingface",
    "to_huggingface": "octavo.commands.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
