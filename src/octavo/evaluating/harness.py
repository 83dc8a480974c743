"""A model in the hands of lm-evaluation-harness: any of its tasks, by its rules (Gao et al. 2021).

Texts are cut into tokens and windows as its own HFLM does it, so figures compare; what a context is
asked for more than once, as by the choices of one question, is computed once.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    OctavoError,
    ResourceError,
    first_line,
)
from octavo.evaluating.continuations import Request, continuation_likelihoods, refuse_classifier
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import Sampling
from octavo.generating.writing import Piece, start_ids, write
from octavo.model.gpt import GPT
from octavo.text.files import did_you_mean
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

SLOTS = 16  # rows written side by side
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
USUAL_LENGTH = 256  # tokens written where a task does not say


def run_tasks(
    model: GPT, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None = None
) -> dict[str, Any]:
    """What lm_eval finds for ``tasks``, by name or as paths of YAML files.

    ``limit`` takes so many items of each. Raises `MissingExtraError` without lm_eval, `ConfigError`
    for an unknown task or one that it cannot run, `ResourceError` where data cannot be had.
    """
    judged = adapt(model, tokenizer)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its retries is a line
    named = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(named))  # to know its own takes it seconds
    for task in named:
        if task not in manager.task_index:
            otherwise = "see lm_eval ls tasks, or name a .yaml file"
            fix = did_you_mean(task, manager.task_index, otherwise)
            raise ConfigError(f"lm_eval has no task {task!r}", fix=fix)
    try:
        found = simple_evaluate(
            judged, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except OctavoError:
        raise
    except OSError as error:  # that is what datasets and its network library raise
        raise ResourceError(
            f"the data of {', '.join(tasks)} cannot be had: {first_line(error)}",
            fix="try again with a network, or name a .yaml file with dataset_path: json",
        ) from error
    except Exception as error:  # a task is anybody's code
        raise ConfigError(
            f"lm_eval cannot run {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}",
            fix="--debug shows where",
        ) from error
    assert found is not None  # only other ranks than the first get nothing
    return dict(found)


def as_table(found: dict[str, Any]) -> str:
    """What `run_tasks` found, as lm_eval prints it."""
    from lm_eval.utils import make_table

    tables = [make_table(found, column) for column in ("results", "groups") if found.get(column)]
    return "\n".join(tables)


def adapt(model: GPT, tokenizer: Tokenizer) -> "LM":
    """A model and what it reads as the model object that ``lm_eval.simple_evaluate`` takes."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        from tqdm import tqdm
    except ImportError:
        raise MissingExtraError("eval", "lm-evaluation-harness") from None
    refuse_classifier(model)

    class Adapted(TemplateLM):
        """TemplateLM parts texts into contexts and continuations; this knows their tokens."""

        max_length = model.config.block_size
        eot_token_id = start_ids(tokenizer, None)[0]  # what an empty context is taken for

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs: list[Request] = [(context, ending) for _, context, ending in requests]
            for text, context, ending in requests:
                if not context or not ending:
                    raise DataError("nothing is left of a context or a choice", f"in {text!r:.80}")
            with tqdm(total=len(pairs), desc="Scoring continuations", disable=None) as bar:
                found = continuation_likelihoods(
                    model, pairs, lambda done, _: bar.update(done - bar.n)
                )
            return list(zip(found.logprobs.tolist(), found.greedy.tolist(), strict=True))

        def loglikelihood_rolling(
            self, requests: "list[Instance]", disable_tqdm: bool = False
        ) -> list[float]:
            prefix, length = self.prefix_token_id, self.max_length
            texts = [self.tok_encode(request.args[0]) for request in requests]
            cut = [list(get_rolling_token_windows(ids, prefix, length, 1)) for ids in texts]
            windows = [("", *make_disjoint_window(window)) for text in cut for window in text]
            found = iter(self._loglikelihood_tokens(windows))
            return [sum((next(found)[0] for _ in text), 0.0) for text in cut]

        def generate_until(
            self, requests: "list[Instance]", disable_tqdm: bool = False
        ) -> list[str]:
            return _write_all(model, tokenizer, [request.args for request in requests])

    return Adapted()


def _write_all(model: GPT, tokenizer: Tokenizer, asked: Sequence[Any]) -> list[str]:
    """The continuation of each (context, generation_kwargs)."""
    from tqdm import tqdm

    alike: dict[str, list[int]] = {}  # only what is drawn in the same way goes together
    for number, (_, kwargs) in enumerate(asked):
        alike.setdefault(repr(kwargs), []).append(number)
    texts = [""] * len(asked)
    with tqdm(total=len(asked), desc="Writing", disable=None) as bar:
        for numbers in alike.values():
            contexts = [asked[number][0] for number in numbers]
            for piece in _write(model, tokenizer, contexts, asked[numbers[0]][1]):
                texts[numbers[piece.row]] += piece.text
                bar.update(piece.finished is not None)
    return texts


def _write(
    model: GPT, tokenizer: Tokenizer, contexts: list[str], asked: dict[str, Any]
) -> Iterator[Piece]:
    """Continue the contexts as a task's generation_kwargs ask; unless they sample, greedily.

    A context is cut on the left so that what is written still fits beside it.
    """
    given = [int(asked[name]) for name in LENGTH_NAMES if asked.get(name) is not None]
    most, block_size = (given or [USUAL_LENGTH])[0], model.config.block_size
    kept = block_size - most if most < block_size else max(block_size // 2, 1)
    temperature = float(asked.get("temperature") or 0)
    numbers = {name: asked[name] for name in ("top_k", "top_p", "min_p") if asked.get(name)}
    sampling = Sampling(temperature=temperature if asked.get("do_sample", True) else 0.0, **numbers)
    until = asked.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    beginning = start_ids(tokenizer, None)
    prompts = [tokenizer.encode(context)[-kept:] or beginning for context in contexts]
    engine = TorchEngine(model, min(len(prompts), SLOTS), tokenizer.vocab_size)
    return write(engine, tokenizer, prompts, sampling, most, stops)
