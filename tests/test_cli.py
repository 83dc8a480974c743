"""The command line as people type it: sorted words, help that answers, errors of one line."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

import octavo
from octavo.cli import COMMANDS, main

TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells.\n" * 30
SMALL = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "train.max_steps=6", "train.micro_batch_size=4", "eval.windows=4",
    "log.sample_tokens=5", "eval.every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "sea.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    octavo_in(folder, "train", "sea.txt", *SMALL, "--out", "runs/sea")
    return folder / "runs" / "sea"


def octavo_in(folder, *words, **kwargs):
    command = [sys.executable, "-m", "octavo", *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=100, check=False, **kwargs
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def called(*words):
    """The exit code of a command called in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


def test_help_is_instant_and_imports_nothing_heavy(folder):
    script = "import sys; from octavo.cli import main\ntry: main([])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("octavo: a small")
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_page_without_torch(command, capsys):
    before = "torch" in sys.modules
    assert called(command, "--help") == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: octavo {command} ")
    assert f"\n  octavo {command} " in page
    assert ("torch" in sys.modules) == before
    if command == "train":
        assert "optim.lr=0.001" in page
        assert "Peak learning rate." in page


def test_train_then_generate_then_eval(run, here, capsys):
    assert (run / "report.html").exists()
    assert called("generate", "runs/sea", "--prompt", "She", "--max-new-tokens", "8") == 0
    first = capsys.readouterr().out
    assert called("generate", "--prompt", "She", "--max_tokens", "8", "runs/sea") == 0
    assert capsys.readouterr().out == first
    assert len(first) == 9
    assert called("generate", "runs/sea", "--prompt", "She", "--max-new-tokens", 8, "--json") == 0
    assert json.loads(capsys.readouterr().out)["texts"] == [first[:-1]]
    assert called("eval", "runs/sea", "--json") == 0
    judged = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    last = [event for event in logged if event["event"] == "eval"][-1]
    assert judged["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert called("eval", "runs/sea", "--perplexity", "sea.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len(TEXT) - 1


def test_the_seed_projects_flags_are_understood(run, here, capsys):
    words = ["--max_tokens", "20", "--temperature=0.9", "--top_k=50", "--top_p=0.95", "--stream"]
    assert called("generate", "runs/sea", "--prompt", "She", *words) == 0
    streamed = capsys.readouterr().out
    assert called("generate", "runs/sea", "--prompt", "She", *words[:-1]) == 0
    assert capsys.readouterr().out == streamed


def test_plan_counts_what_the_model_has(here, capsys):
    assert called("plan", "sea.txt", *SMALL, "--no-probe", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    config = octavo.ModelConfig(
        vocab_size=len(set(TEXT)), block_size=16, n_layer=1, n_head=2, d_model=16
    )
    assert plan["parameters_total"] == sum(p.numel() for p in octavo.GPT(config).parameters())
    assert plan["tokens_a_step"] == 4 * 16
    assert plan["tokens_in_all"] == 6 * 4 * 16


def test_the_mini_transformers_yaml_runs_as_it_stands(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(TEXT * 12, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        "model:\n"
        "  d_model: 256        # Model dimension\n"
        "  n_heads: 8          # Number of attention heads\n"
        "  n_layers: 6         # Number of transformer blocks\n"
        "  block_size: 256     # Context length\n"
        "  dropout: 0.1        # Dropout rate\n"
        "\n"
        "training:\n"
        "  batch_size: 32\n"
        "  learning_rate: 3.0e-4\n"
        "  max_iters: 10000\n",
        encoding="utf-8",
    )
    # Unchanged, but not for all of its 10,000 steps.
    words = ["train", "--config", "config.yaml", "train.max_steps=1", "eval.windows=2"]
    done = octavo_in(tmp_path, *words, "log.sample_tokens=3")
    assert done.returncode == 0, done.stderr
    assert "input.txt" in done.stdout
    settings = (tmp_path / "runs" / "config" / "config.yaml").read_text(encoding="utf-8")
    for line in ("d_model: 256", "n_head: 8", "micro_batch_size: 32", "lr: 0.0003"):
        assert line in settings
    again = octavo_in(tmp_path, *words, "--resume", "log.sample_tokens=3")
    assert "is finished" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tran"], 2, "did you mean octavo train?"),
        (["train"], 2, "nothing to train on"),
        (["train", "sea.txt", "optim.lrr=3"], 2, "did you mean optim.lr?"),
        (["train", "sea.txt", "model.d_model=wide"], 2, "model.d_model"),
        (["train", "sea.txt", "model.d_model=100", "model.n_head=3"], 2, "not divisible"),
        (["train", "sea.txt", "model.d_model=9", "model.n_head=3"], 2, "RoPE"),
        (["train", "sea.txt", "model.block_size=100000"], 3, "100001"),
        (["train", "nowhere.txt"], 3, "nowhere.txt"),
        (["train", "empty.txt"], 3, "empty"),
        (["train", "one.txt"], 3, ""),
        (["train", "binary.txt"], 3, "byte"),
        (["train", "missing.yaml"], 2, "missing.yaml"),
        (["train", "twice.yaml"], 2, "stands twice"),
        (["train", "sea.txt", "--resmue"], 2, "did you mean --resume?"),
        (["generate", "runs/none", "--prompt", "x"], 2, "no run"),
        (["generate", "runs/sea", "--prompt", ""], 2, "prompt is empty"),
        (["generate", "runs/sea", "--prompt", "Ω"], 3, "Ω"),
        (["generate", "runs/sea", "--prompt", "She", "--temperature", "nan"], 2, "temperature"),
        (["generate", "runs/sea", "--prompt", "She", "--temperature", "-1"], 2, "temperature"),
        (["generate", "runs/sea", "--preset", "wild"], 2, "conservative"),
        (["generate", "runs/sea", "optim.lr=3"], 2, "training setting"),
        (["eval", "runs/sea", "--perplexity", "nowhere.txt"], 3, "nowhere.txt"),
    ],
)
def test_bad_input_gets_one_line_and_the_right_code(run, here, capsys, words, code, said):
    (here / "empty.txt").write_text("")
    (here / "one.txt").write_text("a")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (here / "twice.yaml").write_text("model: {n_layer: 1}\nmodel: {n_layer: 2}\n")
    assert called(*words) == code
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not out


def test_an_option_with_an_optional_value_does_not_swallow_the_next_option(
    run, here, capsys, monkeypatch, tmp_path
):
    """`--hellaswag --limit 5` once looked for a file called --limit; offline it cannot download."""

    def unreachable(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    assert called("eval", "runs/sea", "--hellaswag", "--limit", "5") == 6
    assert "no network here" in capsys.readouterr().err


def test_lengths_in_a_table_and_as_json(run, here, capsys):
    assert called("eval", "runs/sea", "--lengths", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    row = found["perplexity"]["as trained"]
    assert next(iter(row)) == "16"  # its context
    assert called("eval", "runs/sea", "--lengths") == 0
    first, header, plain, *_ = capsys.readouterr().out.splitlines()
    assert f"{found['tokens']:,} tokens" in first
    assert header.split() == list(row)
    assert plain.split() == ["as", "trained"] + [f"{value:.4g}" for value in row.values()]


def test_extremes_of_sampling_are_no_errors(run, here, capsys):
    words = ["generate", "runs/sea", "--prompt", "She", "--max-new-tokens", "5"]
    assert called(*words, "--temperature", "0") == 0
    greedy = capsys.readouterr().out
    for extreme in (["--temperature", "1e-9"], ["--top-k", "1"], ["--top-p", "0"]):
        assert called(*words, *extreme) == 0
        assert capsys.readouterr().out == greedy
    assert called(*words, "--top-k", "100000") == 0


def test_standard_input_is_a_text(folder):
    words = ["train", "-", *SMALL, "--out", "runs/piped", "--quiet"]
    done = octavo_in(folder, *words, input=TEXT)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_saves_exits_75_and_tells_how_to_go_on(folder):
    words = ["train", "sea.txt", *SMALL, "train.max_steps=100000", "log.every=1", "eval.every=0"]
    command = [sys.executable, "-m", "octavo", *words, "log.sample_every=0", "--out", "runs/cut"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = folder / "runs" / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and b'"train"' in metrics.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"octavo train runs/cut --resume" in err
    assert list((folder / "runs" / "cut" / "checkpoints").glob("step-*"))


def test_interactive_in_a_terminal_where_ctrl_c_stops_the_text_only(run, folder):
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "octavo", "generate", "runs/sea", "--interactive"]
    process = subprocess.Popen(
        [*words, "--max-new-tokens", "100000"], cwd=folder,
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)

    unread = bytearray()

    def read_until(wanted=b"", at_least=0):
        """Take what came up to ``wanted``; what came after it waits for the next call."""
        deadline = time.monotonic() + 60
        while wanted not in unread or len(unread) < at_least:
            assert time.monotonic() < deadline, unread
            if select.select([leader], [], [], 0.1)[0]:
                unread.extend(os.read(leader, 65536))
        del unread[: unread.index(wanted) + len(wanted)]

    read_until(b"> ")
    os.write(leader, b"She sells\n")
    read_until(at_least=100)  # the prompt's echo, and then it writes
    os.killpg(process.pid, signal.SIGINT)
    read_until(b"[stopped]")
    read_until(b"> ")
    os.write(leader, b"\x04")
    assert process.wait(timeout=30) == 0
    os.close(leader)


def test_a_pipe_that_closes_early_is_no_error(run, folder):
    command = (
        f'"{sys.executable}" -m octavo generate runs/sea --max-new-tokens 2000 --stream | head -c 5'
    )
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, check=True)
    assert (len(done.stdout), done.stderr) == (5, b"")


def test_wandb_flags_are_settings(here, capsys):
    words = ["train", "sea.txt", *SMALL, "--out", "runs/w", "--wandb_project", "p"]
    assert called(*words, "--wandb_run_name", "r", "log.every=x") == 2
    assert "log.every" in capsys.readouterr().err
