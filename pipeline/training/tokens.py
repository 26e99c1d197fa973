"""Make the tokens of a split's rows once; later processes, attempts and steps map them into memory.

    rows = encode_split(tokenizer, data.folder, "sft")      a Dataset of input_ids and labels, in the order of the split

Rank 0 writes the file, on all cores, and the other ranks wait. It is in the folder of the preprocess step, so every
step that trains on these rows finds it. Its name is a hash of all that decides the tokens (the split's file, the
tokenizer, the code) and a hash of its own content, so nothing is read that is out of date or damaged. Without the file,
or where it cannot be written, the rows are encoded anew.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.core import heartbeat
from pipeline.core.files import appears
from pipeline.core.hashing import file_sha256
from pipeline.models import loading
from pipeline.models.loading import encode_rows, prompt_ids
from pipeline.training import distributed
from pipeline.workflow.artifact import TOKENS, split_file

ROWS_AT_ONCE = 1000  # that are encoded before they are written
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
CODE = (encode_rows, prompt_ids, loading._stop)  # what decides the tokens beside the tokenizer
HASH_LENGTH = 16  # hexadecimal characters in the name of a file


def encode_split(tokenizer: PreTrainedTokenizerBase, data: Path, split: str) -> Dataset:
    """Return `encode_rows` of every row of a split of the preprocess step in `data`. Every rank must call it."""
    path = distributed.from_rank_0(lambda: keep_tokens(tokenizer, data, split))
    if path is None:
        return Dataset(pa.Table.from_batches(_encode(tokenizer, split_file(data, split)), SCHEMA))
    appears(Path(path))
    with pa.memory_map(path) as file:
        return Dataset(pa.ipc.open_file(file).read_all())


def row_lengths(rows: Dataset) -> list[int]:
    """Return the number of tokens of each row."""
    found: list[int] = pc.list_value_length(rows.data["input_ids"]).to_pylist()
    return found


def masked_lengths(rows: Dataset) -> list[int]:
    """Return the number of tokens without a loss of each row, which are those of its prompt."""
    labels = rows.data["labels"].combine_chunks()
    before = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() == -100)])
    found: list[int] = np.diff(before[labels.offsets.to_numpy() - labels.offsets[0].as_py()]).tolist()
    return found


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[int]:
    """Return the number of tokens of each conversation with its generation prompt. Every rank must call it."""

    def count() -> list[int]:
        with all_cores():
            return [len(ids) for ids in prompt_ids(tokenizer, list(prompts))]

    return distributed.from_rank_0(count)


def keep_tokens(tokenizer: PreTrainedTokenizerBase, data: Path, split: str) -> str | None:
    """Return the path of the file of a split's tokens, written if need be by this process; None where it cannot be."""
    folder, name = data / TOKENS, f"{split}-{_key(tokenizer, split_file(data, split))}"
    for path in folder.glob(f"{name}-*.arrow"):
        if path.stem == f"{name}-{_digest(path)}":
            return str(path)
        with contextlib.suppress(OSError):
            path.unlink()
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in _encode(tokenizer, split_file(data, split)):
                writer.write_batch(batch)
        path = folder / f"{name}-{_digest(temporary)}.arrow"
        temporary.replace(path)
    except OSError as error:
        print(f"note: the tokens of {split} are not kept for the next start: {error}", flush=True)
        return None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return str(path)


def _encode(tokenizer: PreTrainedTokenizerBase, rows: Path) -> Iterator[pa.RecordBatch]:
    table = pq.read_table(rows, columns=["prompt", "completion"])
    with all_cores():
        for start in range(0, table.num_rows, ROWS_AT_ONCE):
            some = table.slice(start, ROWS_AT_ONCE).to_pydict()
            heartbeat.beat(long=True)
            yield pa.RecordBatch.from_pylist(encode_rows(tokenizer, some["prompt"], some["completion"]), SCHEMA)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let tokenizers use every core that this process may use; otherwise its launcher leaves each process one."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"  # a process that is forked later must not use threads


def _key(tokenizer: PreTrainedTokenizerBase, rows: Path) -> str:
    """Return a hash of all that decides a split's tokens.

    The first row's text is a part of it, because a template may write today's date.
    """
    first = next(pq.ParquetFile(rows).iter_batches(1, columns=["prompt", "completion"])).to_pylist()
    texts = [
        file_sha256(rows),
        *(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in first),
        *(inspect.getsource(function) for function in CODE),
        *(version(package) for package in ("transformers", "tokenizers")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        texts += [file_sha256(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return sha256("\n".join(map(str, texts)).encode()).hexdigest()[:HASH_LENGTH]


def _digest(path: Path) -> str:
    return file_sha256(path)[:HASH_LENGTH]
