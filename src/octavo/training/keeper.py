"""What a run keeps of its training: checkpoints, validations, samples, and a line about each."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from octavo.adapting.classify import Classifier, evaluate_labels
from octavo.adapting.lora import trainable_parameters
from octavo.checkpoint import Run
from octavo.errors import MissingExtraError, NonFiniteError, OctavoError, ResourceError
from octavo.evaluating.hellaswag import HellaSwag
from octavo.evaluating.perplexity import Score, score_windows
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import PRESETS
from octavo.generating.writing import complete
from octavo.language_model import load, start_ids
from octavo.model.counts import count_parameters
from octavo.reporting.confusion import draw_confusion
from octavo.training.display import Display
from octavo.training.judge import judge, was_judged
from octavo.training.learner import Learner, Step
from octavo.training.metrics import MetricsLog, environment
from octavo.training.packing import pack_run, weights_of

MAX_FAILED_SAVES = 3


class Keeper:
    """Saves, validates and samples a learner; writes each event to the log and the terminal."""

    def __init__(
        self,
        learner: Learner,
        run: Run,
        log: MetricsLog,
        display: Display,
        hellaswag: HellaSwag | None = None,
    ) -> None:
        self.learner, self.run, self.log, self.display = learner, run, log, display
        self.hellaswag, step = hellaswag, learner.progress.step
        self._judged_step = step if hellaswag and was_judged(run.path, step) else -1
        self._saved_step = learner.progress.step or -1
        self._failed_saves = 0
        self._started = time.monotonic() - learner.progress.seconds
        self._busy_seconds, self._busy_tokens = 0.0, 0
        self._counted_tokens = learner.progress.tokens

    def announce(self) -> None:
        """Say what is about to happen."""
        task, progress = self.learner.task, self.learner.progress
        config, count = task.config, count_parameters(task.config.model)
        model, rows = config.model, config.train.batch_size
        self.display.say(
            f"model: {count.total:,} parameters ({model.n_layer} layers of width {model.d_model}, "
            f"{model.n_head} heads, vocabulary {model.vocab_size:,})"
        )
        if (trained := trainable_parameters(self.learner.model)) < count.total:
            self.display.say(
                f"trained: {trained:,} of them or beside them ({trained / count.total:.2%}); "
                f"the rest is {config.finetune.base}, frozen"
            )
        self.display.say(
            f"text: {task.data['tokens']:,} tokens to learn from, {task.data['val_tokens']:,} to "
            f"validate; {rows:,} rows a step, "
            f"{config.train.max_steps * rows / task.batches.windows:.1f} epochs in all"
        )
        resumed = {"resumed_from": progress.step} if progress.step else {}
        self._write(
            "start",
            settings=dataclasses.asdict(config),
            environment=environment(self.learner.device),
            parameters=count.total,
            data=task.data,
            **resumed,
        )
        self.display.start(progress.step, config.train.max_steps)

    def step(self, step: Step, seconds: float) -> None:
        """Count a step that took ``seconds``; log it when due, and look out for bad ones."""
        progress, config = self.learner.progress, self.learner.task.config
        progress.seconds = time.monotonic() - self._started
        self._busy_seconds += seconds
        self._busy_tokens += progress.tokens - self._counted_tokens
        self._counted_tokens = progress.tokens
        if not step.taken:
            self._note_bad(step)
        elif due(progress.step, config.log.every) or progress.step == config.train.max_steps:
            speed = self._busy_tokens / self._busy_seconds
            self._busy_seconds, self._busy_tokens = 0.0, 0
            values = {
                name: value for name, value in vars(step).items() if name != "taken" and value != {}
            }
            self._write("train", **values, tokens_per_s=round(speed, 1))
            self.display.advance(progress.step, config.train.max_steps, step.loss, speed)

    def save(self) -> None:
        """Write a checkpoint of this step once; a full disk is survived twice in a row."""
        progress, started = self.learner.progress, time.monotonic()
        if self._saved_step == progress.step:
            return
        model, optimizer = self.learner.tensors()
        keep = self.learner.task.config.checkpoint.keep
        try:
            path = self.run.save(progress.step, model, optimizer, self.learner.state(), keep=keep)
        except ResourceError as error:
            self._failed_saves += 1
            if self._failed_saves >= MAX_FAILED_SAVES:
                raise
            self.display.say(f"warning: not saved: {error}; training goes on")
            return
        self._saved_step, self._failed_saves = progress.step, 0
        took = round(time.monotonic() - started, 3)
        self._write("save", checkpoint=path.name, save_seconds=took)

    def validate(self) -> None:
        """Score the fixed validation windows; the best step so far is saved and named."""
        learner, progress = self.learner, self.learner.progress
        if learner.task.val is None or progress.evaluated_step == progress.step:
            return
        score = validate(learner)
        best = progress.best_val_loss is None or score.loss < progress.best_val_loss
        progress.evaluated_step = progress.step
        progress.evals_since_best = 0 if best else progress.evals_since_best + 1
        if best:
            progress.best_step, progress.best_val_loss = progress.step, score.loss
        figures = {"val_loss": score.loss, "val_ppl": score.perplexity}
        if isinstance(learner.model, Classifier):
            report = evaluate_labels(learner.model, *learner.task.val)
            figures |= {"val_accuracy": report.accuracy, "val_macro_f1": report.macro_f1}
            with contextlib.suppress(MissingExtraError):  # a picture more, where matplotlib is
                draw_confusion(report, self.run.path / "confusion.png")
            self.display.say(
                f"step {progress.step:,}: {report.accuracy:.1%} right, "
                f"macro-F1 {report.macro_f1:.3f}"
            )
        elif score.bytes:
            figures["val_bpb"] = score.bits_per_byte
        self._write("eval", **figures)
        self.display.validated(progress.step, score, best)
        if best:
            self.save()
            if self._saved_step == progress.step:
                self.run.mark_best(progress.step, score.loss)

    def judge(self, stopped: Callable[[], bool]) -> bool:
        """Put HellaSwag's items to the model, once a step; False where ``stopped`` cut it short.

        Too little memory is said and does no harm.
        """
        learner, step = self.learner, self.learner.progress.step
        if self.hellaswag is None or self._judged_step == step:
            return True
        try:
            score = judge(self.hellaswag, learner, stopped)
        except (MemoryError, RuntimeError) as error:  # the latter is what torch raises
            reason = (str(error).splitlines() or ["out of memory"])[0]
            self.display.say(f"warning: not judged: {reason}; training goes on")
            return True
        if score is None:
            return False
        self._judged_step = step
        self._write(
            "judge",
            hellaswag_acc=score.acc,
            hellaswag_acc_norm=score.acc_norm,
            stderr=score.stderr,
            n=score.n,
            protocol=score.protocol,
        )
        self.display.say(f"step {step:,}: {score.line()}")
        return True

    def sample(self) -> None:
        """Let the model write a little, into samples.txt and the log, if it writes texts."""
        if isinstance(self.learner.model, Classifier) or self.learner.task.tokenizer is None:
            return
        prompt, text = self.learner.task.config.log.sample_prompt, sample(self.learner)
        self._write("sample", prompt=prompt, text=text)
        with (self.run.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {self.learner.progress.step} ---\n{prompt}{text}\n\n")

    def end(self, reason: str) -> None:
        """Write the last line."""
        progress = self.learner.progress
        self._write(
            "end",
            reason=reason,
            best_step=progress.best_step,
            best_val_loss=progress.best_val_loss,
            skipped=progress.skipped,
        )

    def pack(self) -> None:
        """Pack the best weights to `train.quantize`; a failure is said and does no harm."""
        precision = self.learner.task.config.train.quantize
        if precision is None:
            return
        try:
            lm = load(self.run.path, device="cpu", speculate="off")
            facts = pack_run(lm, weights_of(lm), precision)
        except OctavoError as error:
            again = f"octavo quantize {self.run.path} --to {precision}"
            self.display.say(f"warning: not packed: {error}; try again with: {again}")
            return
        self.display.say(
            f"packed step {facts['step']:,} to {precision}: {facts['packed_bytes'] / 1e6:,.1f} MB, "
            f"{facts['fp32_bytes'] / facts['packed_bytes']:.1f} times smaller"
        )

    def _write(self, event: str, **values: Any) -> None:
        progress = self.learner.progress
        self.log.write(event, progress.step, progress.tokens, progress.seconds, **values)

    def _note_bad(self, step: Step) -> None:
        progress, limit = self.learner.progress, self.learner.task.config.train.max_bad_steps
        reason = f"loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}"
        self._write("skip", reason=reason)
        self.display.say(f"step {progress.step:,} skipped: {reason}")
        if progress.bad_in_a_row >= limit:
            raise NonFiniteError(
                f"{limit} steps in a row were not finite ({reason})",
                f"step {progress.step} of {self.run.path}",
                "lower optim.lr or choose train.precision=fp32; the last good checkpoint is kept",
            )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def validate(learner: Learner) -> Score:
    """Loss on the task's fixed validation windows."""
    task = learner.task
    assert task.val is not None
    with learner.autocast():
        return score_windows(learner.model, *task.val, task.byte_lengths, eot_id=task.mask_id)


def sample(learner: Learner) -> str:
    """What the model writes now, by the nucleus preset and the run's seed."""
    config, tokenizer, model = learner.task.config, learner.task.tokenizer, learner.body
    assert tokenizer is not None
    settings = dataclasses.replace(PRESETS["nucleus"], seed=config.train.seed)
    prompt = start_ids(tokenizer, config.log.sample_prompt or None)
    engine = TorchEngine(model, slots=1, vocab=tokenizer.vocab_size)
    model.eval()
    try:
        return complete(engine, tokenizer, [prompt], settings, config.log.sample_tokens)[0]
    finally:
        model.train()
