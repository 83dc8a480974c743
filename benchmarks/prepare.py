"""Megabytes a second of preparation: octavo beside tiktoken alone and nanoGPT's way, GPT-2's BPE.

The texts are cut into documents of some 5,000 characters and repeated, each time a little
different, up to --megabytes, as one .jsonl. From that file, in as many processes as --threads says:

octavo           `octavo data prepare`: shards, hashes, duplicates, 13-grams of validation
tiktoken alone   processes that read the file and call encode_ordinary_batch; nothing is kept
nanoGPT's way    its data/openwebtext/prepare.py: datasets.map, then one np.memmap for each part;
                 the file is a dataset of that library's already when the clock starts

All start their processes in every round. Before anything is timed all must have made the same
tokens of each document.

    python benchmarks/prepare.py --vocabulary DIR --megabytes 200 --text FILES
"""

import functools
import hashlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import Work, measure, options
from record import versions

DOCUMENT, BATCH, EOT = 5000, 128, 50256
VAL = 0.0005  # nanoGPT's share of documents for validation


def write_texts(files: list[Path], megabytes: float, folder: Path) -> int:
    """Write texts.jsonl; returns the bytes of text in it."""
    documents = [document for file in files for document in cut(file.read_text(encoding="utf-8"))]
    size = number = 0
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            text = documents[number % len(documents)]
            if number >= len(documents):  # told apart, and cut at another place
                text = f"{number} {text[number * 37 % 200 :]}"
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            number += 1
    return size


def cut(text: str) -> Iterator[str]:
    """Documents of about one length, cut at line ends."""
    document = ""
    for line in text.splitlines(keepends=True):
        document += line
        if len(document) >= DOCUMENT:
            yield document
            document = ""
    if document.strip():
        yield document


def encoding(vocabulary: Path) -> Any:
    """GPT-2's encoding as tiktoken.get_encoding("gpt2") gives it, without a network."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    files = [str(vocabulary / name) for name in ("vocab.bpe", "encoder.json")]
    return tiktoken.Encoding(
        "gpt2-from-files",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*files),
        special_tokens={"<|endoftext|>": EOT},
    )


def octavo_round(folder: Path, vocabulary: Path, processes: int) -> Callable[[], Any]:
    """The command's own function, into a new directory."""
    from octavo.text.prepare_request import Request
    from octavo.text.preparing import prepare

    source = [str(folder / "texts.jsonl")]
    asked = {"tokenizer": str(vocabulary), "processes": processes, "val_fraction": VAL}
    dataset = prepare(Request(source, folder / "octavo", **asked))
    return lambda: [np.asarray(dataset.tokens(split)) for split in ("train", "val")]


def tiktoken_round(folder: Path, vocabulary: Path, processes: int) -> Callable[[], Any]:
    """Processes that have nothing to do with each other."""
    context = multiprocessing.get_context("spawn")
    share = [(folder, vocabulary, number, processes) for number in range(processes)]
    workers = [context.Process(target=tiktoken_share, args=arguments) for arguments in share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            sys.exit("error: a process of tiktoken's failed")
    return lambda: tiktoken_tokens(folder, vocabulary)


def tiktoken_share(folder: Path, vocabulary: Path, number: int, processes: int) -> None:
    """Every so many-th batch of documents."""
    encode = encoding(vocabulary).encode_ordinary_batch
    for at, documents in enumerate(batches(folder)):
        if at % processes == number:
            encode(documents, num_threads=1)


def tiktoken_tokens(folder: Path, vocabulary: Path) -> Iterator[np.ndarray]:
    """What the processes made, made once more."""
    encode = encoding(vocabulary).encode_ordinary_batch
    for documents in batches(folder):
        yield from (np.array([*ids, EOT]) for ids in encode(documents, num_threads=1))


def batches(folder: Path) -> Iterator[list[str]]:
    """The documents, some at a time."""
    documents: list[str] = []
    with (folder / "texts.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            documents.append(json.loads(line)["text"])
            if len(documents) == BATCH:
                yield documents
                documents = []
    yield documents


def nanogpt_round(folder: Path, vocabulary: Path, processes: int) -> Callable[[], Any]:
    """The steps of nanoGPT's script, with its numbers; only the number of processes is ours."""
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(str(folder / "arrow"))
    split = dataset.train_test_split(test_size=VAL, seed=2357, shuffle=True)
    process = functools.partial(nanogpt_document, encoding(vocabulary))
    tokenized = split.map(
        process, remove_columns=["text"], num_proc=processes, load_from_cache_file=False
    )
    made = []
    for name, part in tokenized.items():
        length = int(np.sum(part["len"], dtype=np.uint64))
        path = folder / f"nanogpt-{name}.bin"
        row = np.memmap(path, dtype=np.uint16, mode="w+", shape=(length,))
        at, shards = 0, min(1024, len(part))
        for number in range(shards):
            shard = part.shard(num_shards=shards, index=number, contiguous=True)
            ids = np.concatenate(shard.with_format("numpy")["ids"])
            row[at : at + len(ids)] = ids
            at += len(ids)
        row.flush()
        made.append(path)
    return lambda: [np.memmap(path, dtype=np.uint16, mode="r") for path in made]


def nanogpt_document(encoder: Any, example: dict[str, str]) -> dict[str, Any]:
    """A document's tokens and its end."""
    ids = encoder.encode_ordinary(example["text"])
    ids.append(EOT)
    return {"ids": ids, "len": len(ids)}


ROUNDS = {
    "octavo": octavo_round,
    "tiktoken alone": tiktoken_round,
    "nanoGPT's way": nanogpt_round,
}


def fingerprint(rows: Iterable[np.ndarray]) -> list[Any]:
    """Documents, tokens, and a hash of the documents' tokens in whatever order they lie."""
    documents = tokens = mixed = 0
    for row in rows:
        for ids in np.split(row, np.flatnonzero(row == EOT) + 1)[:-1]:
            data = hashlib.blake2b(ids.astype("<u2").tobytes(), digest_size=16).digest()
            mixed = (mixed + int.from_bytes(data, "little")) % 2**128
            documents, tokens = documents + 1, tokens + len(ids)
    return [documents, tokens, mixed]


def one_round(what: str, folder: Path, vocabulary: Path, processes: int, check: bool) -> None:
    """In a process of its own: prints the seconds, and with ``check`` what was made."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        for name in ("texts.jsonl", "arrow"):
            (Path(fresh) / name).symlink_to(folder / name)
        started = time.perf_counter()
        tokens = ROUNDS[what](Path(fresh), vocabulary, processes)
        seconds = time.perf_counter() - started
        print(json.dumps([seconds, fingerprint(tokens()) if check else None]))


def work(what: str, folder: Path, vocabulary: Path, processes: int, megabytes: float) -> Work:
    """What was made as the answer; a round is one more process that prepares."""
    common = [sys.executable, __file__, "--round", what, "--folder", str(folder)]
    common += ["--vocabulary", str(vocabulary), "--threads", str(processes)]

    def ask(*more: str) -> list[Any]:
        done = subprocess.run([*common, *more], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return Work(ask("--check")[1], lambda: megabytes / ask()[0])


def equal_tokens(answers: dict[str, list[Any]]) -> None:
    """Raise unless all made the same tokens of the same documents."""
    documents, tokens, _ = answers["octavo"]
    for what, answer in answers.items():
        if answer != answers["octavo"]:
            raise SystemExit(f"error: {what} made {answer}, octavo {answers['octavo']}")
    print(f"the tokens of {documents} documents agree, {tokens} with their ends")


if __name__ == "__main__":
    parser = options("megabytes of text a second, prepared for training")
    parser.add_argument("--vocabulary", type=Path, required=True, help="encoder.json, vocab.bpe")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="texts to repeat")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--round", choices=ROUNDS, help="used by the script itself")
    parser.add_argument("--folder", type=Path, help="as above")
    parser.add_argument("--check", action="store_true", help="as above")
    asked = parser.parse_args()
    if asked.round:
        one_round(asked.round, asked.folder, asked.vocabulary, asked.threads, asked.check)
        sys.exit()
    asked.versions = versions("octavo", "tiktoken", "datasets", "numpy")
    with tempfile.TemporaryDirectory() as place:
        size = write_texts(asked.text, asked.megabytes, Path(place)) / 1e6
        import datasets

        datasets.disable_progress_bars()
        texts = str(Path(place) / "texts.jsonl")
        loaded = datasets.load_dataset("json", data_files=texts, cache_dir=place, split="train")
        loaded.save_to_disk(str(Path(place) / "arrow"))
        common = (Path(place), asked.vocabulary.absolute(), asked.threads, size)
        peers = {what: functools.partial(work, what, *common) for what in ROUNDS}
        measure("prepare", peers, equal_tokens, "MB/s", asked)
