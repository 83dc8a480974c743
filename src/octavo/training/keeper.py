"""What a run keeps of its training: checkpoints, validations, samples, and a line about each."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from octavo import disk
from octavo.adapting.classify import Classifier
from octavo.adapting.lora import trainable_parameters
from octavo.checkpoint import Run
from octavo.errors import DataError, MissingExtraError, NonFiniteError, OctavoError, ResourceError
from octavo.evaluating.hellaswag import HellaSwag
from octavo.evaluating.perplexity import Score
from octavo.generating.engine import TorchEngine
from octavo.generating.recording import WatchedEngine
from octavo.generating.sampling import PRESETS
from octavo.generating.writing import complete
from octavo.language_model import load, start_ids
from octavo.model.counts import count_parameters
from octavo.reporting.confusion import draw_confusion
from octavo.reporting.report import draw_run, write_report
from octavo.training.deadline import Deadline
from octavo.training.display import Display
from octavo.training.hardware import flops_a_token, peak_flops, peak_memory
from octavo.training.judge import judge, was_judged
from octavo.training.learner import Learner, Step, choose_precision
from octavo.training.metrics import MetricsLog, environment
from octavo.training.packing import pack_run, weights_of
from octavo.training.rewind import FOLDER, rewind, write_spike
from octavo.training.sharded import by_first, save
from octavo.training.spike import Spike

MAX_FAILED_SAVES = 3
SPIKE_TEXT = 300  # characters of the worst row in the log; the report has all of it
LOGGED = ("loss", "grad_norm", "lr", "layers", "updates")  # of a step
REFRESH = 20.0  # seconds between drawings of the report, and a hundred times what the last one took


class Keeper:
    """Saves, validates and samples a learner; writes each event to the log and the terminal."""

    def __init__(
        self,
        learner: Learner,
        run: Run,
        log: MetricsLog,
        display: Display,
        hellaswag: HellaSwag | None = None,
        began: float | None = None,
    ) -> None:
        """``began``, a `time.monotonic`: where a budget counts from; None: from now."""
        self.learner, self.run, self.log, self.display = learner, run, log, display
        self.hellaswag, step = hellaswag, learner.progress.step
        self._leads = learner.ranks.leads  # what is written is written once
        was = hellaswag and learner.ranks.first(lambda: was_judged(run.path, step))
        self._judged_step = step if was else -1
        self._saved_step = learner.progress.step or -1
        self._failed_saves = 0
        self._refused: set[str] = set()
        self._started = time.monotonic() - learner.progress.seconds
        before = time.monotonic() if began is None else began
        self._deadline = Deadline(learner.task.config.train, before - learner.progress.seconds)
        self._busy_seconds, self._busy_tokens = 0.0, 0
        self._counted_tokens = learner.progress.tokens
        self._draw_at = 0.0
        if step:
            learner.horizon = self._horizon()
        config, device = learner.task.config, learner.device
        self._peak = peak_flops(device, choose_precision(config.train.precision, device))
        cost = flops_a_token(learner.model, config, learner.task.batches.block_size)
        # At an MFU of 1.
        self._best_speed = learner.ranks.size * self._peak / cost if self._peak and cost else None

    def announce(self) -> None:
        """Say what is about to happen."""
        task, progress = self.learner.task, self.learner.progress
        config, count = task.config, count_parameters(task.config.model)
        model, rows = config.model, config.train.batch_size
        about = "about " if config.train.budget else ""
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
            f"{about}{self.learner.horizon * rows / task.batches.windows:.1f} epochs in all"
        )
        resumed = {"resumed_from": progress.step} if progress.step else {}
        self._write(
            "start",
            settings=dataclasses.asdict(config),
            environment=environment(self.learner.device)
            | ({"peak": f"{self._peak / 1e12:.3g} TFLOP/s"} if self._peak else {}),
            parameters=count.total,
            data=task.data,
            **resumed,
        )
        self.display.start(progress.step, self.learner.horizon)

    def step(self, step: Step, seconds: float) -> None:
        """Count a step that took ``seconds``; log it when due, and look out for bad ones."""
        progress, config = self.learner.progress, self.learner.task.config
        progress.seconds = time.monotonic() - self._started
        self.learner.horizon = self._horizon()
        self._busy_seconds += seconds
        self._busy_tokens += progress.tokens - self._counted_tokens
        self._counted_tokens = progress.tokens
        if not step.taken:
            self._note_bad(step)
        elif due(progress.step, config.log.every) or progress.step == self.learner.horizon:
            speed = self._busy_tokens / self._busy_seconds
            self._busy_seconds, self._busy_tokens = 0.0, 0
            values = {name: vars(step)[name] for name in LOGGED if vars(step)[name] != {}}
            values |= {"tokens_per_s": round(speed, 1)}
            values |= {"mfu": round(speed / self._best_speed, 4)} if self._best_speed else {}
            values |= {"memory_bytes": peak_memory(self.learner.device)}
            self._write("train", **values)
            self.display.advance(progress.step, self.learner.horizon, values)
            self._refresh()

    def _horizon(self) -> int:
        """The last step: the one that was asked for, or where there is a budget as many more as the
        rest of it allows at the pace so far.
        """
        progress, train = self.learner.progress, self.learner.task.config.train
        if not train.budget:
            return train.max_steps
        val, a_token = self.learner.task.val, progress.seconds / progress.tokens
        # A forward pass alone is a third of what a step does with as many tokens.
        scoring = val[0].size * a_token / 3 if val else 0.0
        more = self._deadline.steps_left(progress.seconds / progress.step, scoring)
        return self.learner.ranks.first(lambda: progress.step + more)

    def went_back(self, step: Step) -> bool:
        """Write a spike down; whether the run went back to a checkpoint before it."""
        if step.spike is None:
            return False
        self._note_spike(step.spike)
        spiked_at = self.learner.progress.step
        if not (step.spike.rewinds and rewind(self.learner, self.run, self.display, step.spike)):
            return False
        progress = self.learner.progress
        self._saved_step, self._judged_step = progress.step, -1
        self._counted_tokens = progress.tokens
        self._write("rewind", spiked_at=spiked_at, skipped_rows=progress.skipped_rows)
        return True

    def save(self, at_last: bool = False) -> bool:
        """Write a checkpoint of this step once; says whether there is one now.

        A full disk is survived twice in a row, but not ``at_last``: what ends must be saved.
        """
        progress, started = self.learner.progress, time.monotonic()
        if self._saved_step == progress.step:
            return True
        with self._surviving(at_last):
            path = save(self.learner, self.run)
            self._saved_step, self._failed_saves = progress.step, 0
            took = round(time.monotonic() - started, 3)
            self._write("save", checkpoint=path.name, save_seconds=took)
        return self._saved_step == progress.step

    def validate(self) -> None:
        """Score the fixed validation windows; the best step so far is saved and named."""
        learner, progress = self.learner, self.learner.progress
        if learner.task.val is None or progress.evaluated_step == progress.step:
            return
        disk.failpoint("validating")
        with self._deadline.lasting("validation"):
            score = by_first(learner, validate)
        best = progress.best_val_loss is None or score.loss < progress.best_val_loss
        progress.evaluated_step = progress.step
        progress.evals_since_best = 0 if best else progress.evals_since_best + 1
        figures = {"val_loss": score.loss, "val_ppl": score.perplexity}
        if isinstance(learner.model, Classifier):
            report = by_first(learner, lambda whole: whole.task.judge(whole.model))
            figures |= {"val_accuracy": report.accuracy, "val_macro_f1": report.macro_f1}
            # A picture more, where matplotlib is.
            with contextlib.suppress(MissingExtraError), self._if_the_disk_allows("confusion.png"):
                if self._leads:
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
            self._keep_best(score.loss)

    def _keep_best(self, loss: float) -> None:
        """Save this step and name it the best; where the disk refuses, the best stays as it was."""
        progress = self.learner.progress
        before = progress.best_step, progress.best_val_loss
        progress.best_step, progress.best_val_loss = progress.step, loss
        if self.save():
            with self._surviving():
                self.learner.ranks.first(lambda: self.run.mark_best(progress.step, loss))
                return
        progress.best_step, progress.best_val_loss = before

    def judge(self, stopped: Callable[[], bool]) -> bool:
        """Put HellaSwag's items to the model, once a step; False where ``stopped`` cut it short.

        Too little memory is said and does no harm.
        """
        learner, step = self.learner, self.learner.progress.step
        if self.hellaswag is None or self._judged_step == step:
            return True
        hellaswag = self.hellaswag
        score = by_first(learner, lambda whole: judge(hellaswag, whole, stopped))
        if score is None:
            return False
        if isinstance(score, str):
            self.display.say(f"warning: not judged: {score}; training goes on")
            return True
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
        prompt = self.learner.task.config.log.sample_prompt
        with self._deadline.lasting("sample"):
            text = by_first(self.learner, lambda learner: sample(learner, self._keep_attention))
        self._write("sample", prompt=prompt, text=text)
        if not self._leads:
            return
        path, head = self.run.path / "samples.txt", f"--- step {self.learner.progress.step} ---"
        allowed = self._if_the_disk_allows(path.name)
        with allowed, disk.errors(f"write {path}"), path.open("a", encoding="utf-8") as file:
            file.write(f"{head}\n{prompt}{text}\n\n")

    def _keep_attention(self, watched: WatchedEngine) -> None:
        path = self.run.path / "attention" / f"step-{self.learner.progress.step:08d}.npz"
        with self._if_the_disk_allows("attention"):
            watched.save(path, self.learner.task.tokenizer)

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

    def draw(self) -> None:
        """Draw the report of what was logged so far."""
        if self._leads:
            with self._if_the_disk_allows("report.html"):
                draw_run(self.run.path)

    def pack(self) -> None:
        """Pack the best weights to `train.quantize`; a failure is said and does no harm."""
        precision = self.learner.task.config.train.quantize
        if precision is None or not self._leads:
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

    def _refresh(self) -> None:
        """Draw the page of a run that goes on, seldom enough not to be noticed."""
        started = time.monotonic()
        if self._leads and started >= self._draw_at:
            with self._if_the_disk_allows("report.html"):
                write_report(self.run.path, alive=True)
            now = time.monotonic()
            self._draw_at = now + max(REFRESH, 100 * (now - started))

    def _note_spike(self, spike: Spike) -> None:
        worst = next(iter(spike.report.get("worst", [])), {})
        what, began = spike.report["what"], spike.report["began"]
        facts: dict[str, Any] = {"reason": what, "began": began, "row": worst.get("row")}
        facts |= {"where": worst.get("where"), "text": worst.get("text", "")[:SPIKE_TEXT]}
        with self._if_the_disk_allows(FOLDER):
            if self._leads:
                facts["report"] = write_spike(self.run.path, spike)
        self._write("spike", **facts)
        layer = f"; began in {began.partition(':')[0]}" if began else ""
        see = f"; see {self.run.path / facts['report']}" if "report" in facts else ""
        self.display.say(f"spike at step {spike.report['step']:,}: {what}{layer}{see}")

    def _write(self, event: str, **values: Any) -> None:
        progress = self.learner.progress
        with self._if_the_disk_allows(self.log.path.name):
            self.log.write(event, progress.step, progress.tokens, progress.seconds, **values)

    @contextlib.contextmanager
    def _surviving(self, at_last: bool = False) -> Iterator[None]:
        """A save that the disk refuses is told of; fatal ``at_last`` or the third time in a row."""
        try:
            yield
        except ResourceError as error:
            self._failed_saves += 1
            if at_last or self._failed_saves >= MAX_FAILED_SAVES:
                raise
            self.display.say(f"warning: not saved: {error}; training goes on")

    @contextlib.contextmanager
    def _if_the_disk_allows(self, what: str) -> Iterator[None]:
        """A run does without ``what`` where the disk refuses it, and says so once."""
        try:
            yield
        except (ResourceError, DataError) as error:  # the latter: a log that cannot be read back
            if what not in self._refused:
                self.display.say(f"warning: {error}; training goes on")
            self._refused.add(what)

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
    with learner.autocast():
        return learner.task.score(learner.model)


def sample(learner: Learner, keep: Callable[[WatchedEngine], None] | None = None) -> str:
    """What the model writes now, by the nucleus preset and the run's seed.

    With log.attention ``keep`` is given the engine, which knows what the heads looked at.
    """
    config, tokenizer, model = learner.task.config, learner.task.tokenizer, learner.body
    assert tokenizer is not None
    settings = dataclasses.replace(PRESETS["nucleus"], seed=config.train.seed)
    prompt = start_ids(tokenizer, config.log.sample_prompt or None)
    engine = TorchEngine(model, slots=1, vocab=tokenizer.vocab_size)
    writer = WatchedEngine(engine) if keep and config.log.attention else engine
    model.eval()
    try:
        text = complete(writer, tokenizer, [prompt], settings, config.log.sample_tokens)[0]
    finally:
        model.train()
    if keep and isinstance(writer, WatchedEngine):
        keep(writer)
    return text
