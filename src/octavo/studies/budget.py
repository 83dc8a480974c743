"""What a time buys: the model, the batch and the length of the run of `octavo train --budget`.

Trials of seconds tell how fast this machine trains models of each width. A law that was fitted to
octavo's own runs tells what loss is to be expected of a model of N parameters after D bytes of
text, of which U are different ones: Hoffmann et al. 2022 for N and D, Muennighoff et al. 2023 for
what bytes are worth when they come again. The model with the lowest expected loss is trained.
"""

import dataclasses
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from octavo.config import KNOWN, RECIPES, Config, load_config
from octavo.errors import ConfigError
from octavo.language_model import choose_device
from octavo.model.counts import count_parameters
from octavo.model_config import ModelConfig
from octavo.settings import canonical, parse_override
from octavo.text.files import counted
from octavo.training.display import Display, clock
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.source import Source, read_source
from octavo.training.task import prepare

LAYERS = {32: 2, 64: 3, 96: 4, 128: 4, 192: 5, 256: 6, 320: 6, 384: 6, 512: 8, 640: 10, 768: 12}
"""How deep a model of each width is."""
CONTEXT, SHORT = 256, 128  # tokens, where the text is long enough
FEW_TOKENS = 3e6  # up to which the short one teaches more
TRIAL_TOKENS, WARMING, TIMED = 2048, 2, 5  # in a step of a trial; its steps
TRYING = 0.05  # of the time: no further trial is begun
MANY_THREADS, THREADS_PAY = 4, 1.05  # from so many on fewer are tried; how much faster they must be
STEPPING = 0.93  # of what is left after the trials goes into steps
VALIDATING, MOST_VALIDATIONS = 0.03, 10  # and so much at most into validations
STEP = 1.4  # a step's tokens, over the square root of all there are
MOST_TOKENS = 8192  # in one forward pass
RATE_TOKENS, MOST_STRETCH = 768, 2.0  # in a step that the recipe's rates are for; how far they rise
A, ALPHA, B, BETA = 6.0e3, 0.6, 4.8e4, 0.3  # the law's constants
AGAIN = 15.4  # epochs after which a text read once more teaches little
DROPOUT = ((30, 0.2), (18, 0.1))  # from so much strain on
DECAY, DECAY_AN_EPOCH, MOST_DECAY = 0.1, 0.05, 0.4
"""Weight decay against learning by heart: the least, how it grows with the epochs, the most."""
SEEN = 100_000  # tokens whose bytes are counted


@dataclass(frozen=True)
class Choice:
    """A model that may be trained, and what is expected of it."""

    words: list[str]
    """The settings that make it."""
    model: ModelConfig
    speed: float
    """Tokens a second."""
    tokens: float
    """How many there is time for."""
    unique: int
    """How many the text has."""
    token_bytes: float
    """Bytes that one of them stands for, on average."""

    @property
    def epochs(self) -> float:
        """How often each token of the text is read."""
        return self.tokens / self.unique

    @property
    def strain(self) -> float:
        """How near it comes to knowing the text by heart: parameters a byte, times epochs."""
        return self._parameters / (self.unique * self.token_bytes) * self.epochs

    @property
    def _parameters(self) -> int:
        count = count_parameters(self.model)
        return count.attention + count.mlp

    @property
    def excess(self) -> float:
        """The expected loss less what no model gets below, in nats a byte."""
        worth = min(self.epochs, 1 + AGAIN * (1 - math.exp(-max(self.epochs - 1, 0) / AGAIN)))
        read = self.unique * self.token_bytes * worth
        return (A / self._parameters) ** ALPHA + (B / read) ** BETA

    def __str__(self) -> str:
        return (
            f"{self.model.n_layer} layers of width {self.model.d_model} "
            f"({count_parameters(self.model).total / 1e6:.2f} M parameters): "
            f"{self.speed:,.0f} tokens a second, {self.epochs:.1f} epochs"
            + (f", dropout {self.model.dropout}" if self.model.dropout else "")
        )


def bytes_of_a_token(source: Source) -> float:
    """How much text a token stands for, on average; of ids alone it is a guess."""
    if source.tokenizer is None:
        return 4.0
    ids = np.asarray(source.train[:SEEN])
    return max(float(source.tokenizer.byte_lengths()[ids].mean()), 1.0)


def choose(
    config: Config, settings: list[str], out: Path, began: float, display: Display
) -> tuple[Config, Source]:
    """The run that makes the most of ``config.train.budget`` seconds since ``began``, and its text.

    ``config`` is what was wished for in so many ``settings``, which hold whatever is chosen.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a model for a time is chosen by one process",
            fix="name a CONFIG.yaml with --budget, or leave torchrun out",
        )
    budget = config.train.budget
    source = read_source(config, out, None)
    display.say(f"{source.data['description']}; trying models for {clock(budget)}:")
    search = Search(config, settings, source, began, display)
    best = search.fewer_threads(search.shorter_context(*search.best_width()))
    display.say(f"best for the time: {best}")
    windows = min(config.eval.windows * best.model.block_size, len(source.val))
    return search.wish([*best.words, *schedule(best, budget, windows)]), source


class Search:
    """Trials on this machine, each beside the best so far, and what they let expect."""

    def __init__(
        self, config: Config, settings: list[str], source: Source, began: float, display: Display
    ) -> None:
        self.config, self.settings, self.source, self.display = config, settings, source, display
        self.device = choose_device(config.train.device)
        self.end = began + config.train.budget
        self.token_bytes = bytes_of_a_token(source)

    def wish(self, words: list[str]) -> Config:
        """The modern recipe with these settings, and the user's own above them."""
        wished = load_config(None, ["recipe=modern", *words, *self.settings])
        return dataclasses.replace(wished, data=self.config.data)

    def expected(self, words: list[str], model: ModelConfig, speed: float) -> Choice:
        """What comes of the time that is left at so many tokens a second."""
        left = max(self.end - time.monotonic(), 0.0)
        tokens = max(STEPPING * speed * left, 1.0)
        return Choice(words, model, speed, tokens, len(self.source.train), self.token_bytes)

    def tried(self, words: list[str], rival: "Trial | None") -> tuple[Choice, "Trial"]:
        """What these settings let expect, by a trial beside the rival's."""
        trial = Trial(self.wish([*words, "train.compile=false"]), self.source, self.device)
        return self.expected(words, trial.model, race(trial, rival)), trial

    def best_width(self) -> tuple[Choice, "Trial"]:
        """The model with the lowest expected loss: wider and wider ones, up to the first worse."""
        known = (canonical(parse_override(word), KNOWN) for word in self.settings)
        given = {name for settings_of in known for name in settings_of.get("model", {})}
        best: Choice | None = None
        leader: Trial | None = None
        trying = time.monotonic()
        for width in [0] if {"d_model", "n_layer", "n_head"} & given else LAYERS:
            choice, trial = self.tried(shape(width, len(self.source.val)), leader)
            if dropout := dropout_for(choice.strain):  # which takes time of its own
                speed = choice.speed / trial.speed  # from one rival to the other
                choice, trial = self.tried([*choice.words, f"model.dropout={dropout}"], trial)
                choice = self.expected(choice.words, choice.model, choice.speed * speed)
            self.display.say(f"  {choice}")
            if best and leader:  # which raced in the same seconds, not in those of its own trial
                best = self.expected(best.words, best.model, leader.speed)
                if choice.excess >= best.excess:
                    break
            best, leader = choice, trial
            if time.monotonic() - trying > TRYING * self.config.train.budget:
                break
        assert best is not None
        assert leader is not None
        return best, leader

    def shorter_context(self, best: Choice, leader: "Trial") -> Choice:
        """The same model; in little time it sees less at once, and more often something else."""
        words = [*best.words, *of_context(SHORT)]
        if best.tokens > FEW_TOKENS or self.wish(words).model.block_size >= best.model.block_size:
            return best
        return self.tried(words, leader)[0]

    def fewer_threads(self, best: Choice) -> Choice:
        """The same model on half the CPU threads, and on half of these, as long as it is faster.

        A small model's threads wait for each other; on many cores that can take most of a step.
        """
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        if threads < MANY_THREADS:
            return best
        trying, micro = time.monotonic(), f"train.micro_batch_size={batch(best)[0]}"
        _, leader = self.tried([*best.words, micro], None)
        while threads > 1 and time.monotonic() - trying < TRYING * self.config.train.budget:
            threads //= 2
            fewer = [*best.words, f"train.threads={threads}"]
            choice, trial = self.tried([*fewer, micro], leader)
            gain = choice.speed / leader.speed
            self.display.say(f"  on {counted(threads, 'thread')} {gain:.2f} times as fast")
            if gain < THREADS_PAY:
                break
            best, leader = self.expected(fewer, best.model, best.speed * gain), trial
        return self.expected(best.words, best.model, best.speed)  # in the time that is left now


def of_context(context: int) -> list[str]:
    """The settings of a model that sees so many tokens, and of its trial."""
    rows = max(TRIAL_TOKENS // context, 1)
    return [f"model.block_size={context}", f"train.micro_batch_size={rows}"]


def shape(width: int, val_tokens: int) -> list[str]:
    """The settings of a model of this width, 0 for the user's; with little text it sees less."""
    words = of_context(min(CONTEXT, 2 ** int(math.log2(max(val_tokens / 4, 16)))))
    if width:
        heads = width // (32 if width < 256 else 64)
        words += [f"model.d_model={width}", f"model.n_head={heads}"]
        words += [f"model.n_layer={LAYERS[width]}"]
    return words


def dropout_for(strain: float) -> float:
    """What keeps a model from learning its text by heart; where it need not, it only hinders."""
    return next((rate for least, rate in DROPOUT if strain >= least), 0.0)


class Trial:
    """A model that takes some steps, to see how long they take."""

    def __init__(self, config: Config, source: Source, device: torch.device) -> None:
        task = prepare(config, device.type, Path(), source=source)
        self._learner = build_learner(task, device, Display(quiet=True))
        self.model = self._learner.body.config
        self.rates: list[float] = []
        """Tokens a second of each step."""
        for _ in range(WARMING):
            optimizer_step(self._learner)

    @property
    def speed(self) -> float:
        """Tokens a second, of the middle one of its steps."""
        return statistics.median(self.rates)

    def step(self) -> None:
        """Take one, and the time."""
        started, before = time.perf_counter(), self._learner.progress.tokens
        optimizer_step(self._learner)
        tokens = self._learner.progress.tokens - before
        self.rates.append(tokens / (time.perf_counter() - started))


def race(trial: Trial, rival: Trial | None) -> float:
    """The tokens a second of ``trial``, beside a ``rival`` whose speed is known already.

    They step by turns: a machine that is twice as fast in the next second says nothing about
    which of two models is the faster.
    """
    for _ in range(TIMED):
        trial.step()
        if rival:
            rival.step()
    if not rival:
        return trial.speed
    pairs = zip(trial.rates[-TIMED:], rival.rates[-TIMED:], strict=True)
    return rival.speed * statistics.median(ours / its for ours, its in pairs)


def batch(choice: Choice) -> tuple[int, int]:
    """Rows in a forward pass, and passes in a step."""
    T = choice.model.block_size
    rows = max(round(STEP * math.sqrt(choice.tokens) / T), 1)
    accum = math.ceil(rows * T / MOST_TOKENS)
    return math.ceil(rows / accum), accum


def schedule(choice: Choice, budget: float, scored: int) -> list[str]:
    """How large a step is, its rates, how many there are, and when ``scored`` tokens are validated
    on. Rates rise with the root of a step's tokens (benchmarks/rates.py), weight decay with epochs.
    """
    T = choice.model.block_size
    micro, accum = batch(choice)
    steps = max(round(choice.tokens / (micro * accum * T)), 1)
    stretch = min(math.sqrt(micro * accum * T / RATE_TOKENS), MOST_STRETCH)
    rates = {name: RECIPES["modern"]["optim"][name] * stretch for name in ("lr", "muon_lr")}
    decay = min(max(DECAY_AN_EPOCH * choice.epochs, DECAY), MOST_DECAY)
    often = VALIDATING * budget * 3 * choice.speed / scored  # the forward pass is a third
    every = math.ceil(1.15 * steps / min(max(often, 1), MOST_VALIDATIONS))  # the last at the end
    return [
        f"train.micro_batch_size={micro}",
        f"train.grad_accum={accum}",
        f"train.max_steps={steps}",
        f"optim.weight_decay={decay:.2g}",
        *(f"optim.{name}={rate:.3g}" for name, rate in rates.items()),
        *(f"{what}={every}" for what in ("eval.every", "checkpoint.every", "log.sample_every")),
    ]
