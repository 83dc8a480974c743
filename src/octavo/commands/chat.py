"""`octavo chat`: talk with a model on the terminal."""

from argparse import Namespace

from octavo.commands.generate import add_writing_options, sampling_given
from octavo.commands.shared import one_run

WORDS = "RUN"
PAGE = """\
Talk with a model. It remembers what was said, as much as its context holds.

  octavo chat runs/my-chat
  octavo chat runs/my-chat --temperature 0.7 --top-p 0.9
  octavo chat runs/my --preset nucleus --max-new-tokens 100

A run that was fine-tuned on messages answers by its chat template; a base model simply goes on with
the text. Ctrl-C stops an answer, Ctrl-D or /quit ends. /help lists what else there is: /reset,
/seed, /set temperature 0.7, /save FILE. Without RUN the newest one under runs/ is taken. The same
words and the same seed give the same answers."""
add_options = add_writing_options


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.generating.conversation import Conversation
    from octavo.language_model import load, make_sampling

    path = one_run(args.words)
    lm = load(path, device=args.device, base=args.base, speculate="off", weights=args.weights)
    sampling = make_sampling(**sampling_given(args))
    Conversation(lm, sampling, args.max_new_tokens, args.stop).hold()
