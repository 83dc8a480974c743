"""HellaSwag beside training: read before step 0, put to the model when due, never a run's end."""

from collections.abc import Callable
from pathlib import Path

from octavo.errors import ConfigError, first_line
from octavo.evaluating.hellaswag import HellaSwag, HellaSwagScore, read_items
from octavo.reporting.report import read_metrics
from octavo.training.learner import Learner
from octavo.training.task import Task


def read_hellaswag(task: Task) -> HellaSwag | None:
    """The items that the settings name, in the run's tokens; None where they name none.

    Raises `ConfigError` where they cannot be put to this model, and as `read_items` does.
    """
    settings = task.config.eval
    if settings.hellaswag is None:
        if settings.hellaswag_every:
            raise ConfigError(
                f"eval.hellaswag_every={settings.hellaswag_every} has no items to judge by",
                fix="eval.hellaswag=FILE.jsonl, or eval.hellaswag=download",
            )
        return None
    if task.tokenizer is None or task.config.finetune.labels:
        raise ConfigError(
            "HellaSwag judges models that write texts, which this one will not",
            fix="leave eval.hellaswag out",
        )
    items = read_items(settings.hellaswag, settings.hellaswag_items)
    return HellaSwag(items, task.tokenizer, settings.hellaswag_protocol)


def judge(
    hellaswag: HellaSwag, learner: Learner, stopped: Callable[[], bool]
) -> HellaSwagScore | str | None:
    """What ``learner`` scores now; None where ``stopped`` said so first; in words why it cannot."""

    def watch(done: int, of: int) -> None:
        if stopped():
            raise _Stopped

    try:
        with learner.autocast():
            return hellaswag.score(learner.body, watch)
    except _Stopped:
        return None
    except (MemoryError, RuntimeError) as error:  # the latter is what torch raises
        return first_line(error, "out of memory")


def was_judged(run: Path, step: int) -> bool:
    """Whether an earlier session of this run wrote down its score at ``step``."""
    return any(event["event"] == "judge" and event["step"] == step for event in read_metrics(run))


class _Stopped(Exception):  # noqa: N818 - no error: somebody wants the run to stop
    pass
