"""The command line as people type it: sorted words, help that answers, errors of one line."""

import os
import signal
import subprocess
import sys

import pytest
from command_kit import SEA, SMALL, Terminal, figures, printed, python, wait_until
from command_kit import octavo as called
from test_config import S2
from training_kit import events

import octavo
from octavo.cli import COMMANDS, SPINS, spin_briefly


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "sea.txt").write_text(SEA, encoding="utf-8")
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


def test_help_is_instant_and_imports_nothing_heavy(folder):
    script = "import sys; from octavo.cli import main\ntry: main([])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    done = python(script)
    assert done.stdout.startswith("octavo: a small")
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_page_without_torch(command, capsys):
    before = "torch" in sys.modules
    page = printed(capsys, command, "--help")
    assert page.startswith(f"usage: octavo {command} ")
    assert f"\n  octavo {command} " in page
    assert ("torch" in sys.modules) == before
    if command == "train":
        assert "optim.lr=0.001" in page
        assert "Peak learning rate." in page


def test_train_then_generate_then_eval(run, here, capsys):
    assert (run / "report.html").exists()
    words = ["generate", "runs/sea", "--prompt", "She", "--max-new-tokens", "8"]
    first = printed(capsys, *words)
    assert printed(capsys, "generate", "--prompt", "She", "--max_tokens", "8", "runs/sea") == first
    assert len(first) == 9
    assert figures(capsys, *words)["texts"] == [first[:-1]]
    judged = figures(capsys, "eval", "runs/sea")
    last = events(run, "eval")[-1]
    assert judged["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert figures(capsys, "eval", "runs/sea", "--perplexity", "sea.txt")["tokens"] == len(SEA) - 1


def test_standard_input_is_a_text(folder):
    words = ["train", "-", *SMALL, "--out", "runs/piped", "--quiet"]
    assert octavo_in(folder, *words, input=SEA).returncode == 0
    assert (folder / "runs" / "piped" / "input.txt").read_text(encoding="utf-8") == SEA


def test_the_seed_projects_flags_are_understood(run, here, capsys):
    words = ["--max_tokens", "20", "--temperature=0.9", "--top_k=50", "--top_p=0.95", "--stream"]
    streamed = printed(capsys, "generate", "runs/sea", "--prompt", "She", *words)
    assert printed(capsys, "generate", "runs/sea", "--prompt", "She", *words[:-1]) == streamed


def test_plan_counts_what_the_model_has(here, capsys):
    plan = figures(capsys, "plan", "sea.txt", *SMALL, "--no-probe")
    config = octavo.ModelConfig(
        vocab_size=len(set(SEA)), block_size=16, n_layer=1, n_head=2, d_model=16
    )
    assert plan["parameters_total"] == sum(p.numel() for p in octavo.GPT(config).parameters())
    assert plan["tokens_a_step"] == 4 * 16
    assert plan["tokens_in_all"] == 6 * 4 * 16


def test_the_mini_transformers_yaml_runs_as_it_stands(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(SEA * 12, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(S2, encoding="utf-8")
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
    found = figures(capsys, "eval", "runs/sea", "--lengths")
    row = found["perplexity"]["as trained"]
    assert next(iter(row)) == "16"  # its context
    first, header, plain, *_ = printed(capsys, "eval", "runs/sea", "--lengths").splitlines()
    assert f"{found['tokens']:,} tokens" in first
    assert header.split() == list(row)
    assert plain.split() == ["as", "trained"] + [f"{value:.4g}" for value in row.values()]


def test_extremes_of_sampling_are_no_errors(run, here, capsys):
    words = ["generate", "runs/sea", "--prompt", "She", "--max-new-tokens", "5"]
    greedy = printed(capsys, *words, "--temperature", "0")
    for extreme in (["--temperature", "1e-9"], ["--top-k", "1"], ["--top-p", "0"]):
        assert printed(capsys, *words, *extreme) == greedy
    assert called(*words, "--top-k", "100000") == 0


def test_ctrl_c_saves_exits_75_and_tells_how_to_go_on(folder):
    words = ["train", "sea.txt", *SMALL, "train.max_steps=100000", "log.every=1", "eval.every=0"]
    command = [sys.executable, "-m", "octavo", *words, "log.sample_every=0", "--out", "runs/cut"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = folder / "runs" / "cut" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and b'"train"' in metrics.read_bytes(), 60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"octavo train runs/cut --resume" in err
    assert list((folder / "runs" / "cut" / "checkpoints").glob("step-*"))


def test_interactive_in_a_terminal_where_ctrl_c_stops_the_text_only(run, folder):
    words = ["generate", "runs/sea", "--interactive", "--max-new-tokens", "100000"]
    terminal = Terminal(folder, *words)
    terminal.read_until(b"> ")
    terminal.type(b"She sells\n")
    terminal.read_until(at_least=100)  # the prompt's echo, and then it writes
    terminal.send(signal.SIGINT)
    terminal.read_until(b"[stopped]")
    terminal.read_until(b"> ")
    terminal.type(b"\x04")
    assert terminal.ended() == 0


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


def test_threads_spin_briefly_unless_the_user_has_said_how(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
