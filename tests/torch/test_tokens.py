"""tokens: the rows are encoded once, and a file that is missing, damaged or of other rows changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.config.recipe import Model, RandomInit
from pipeline.models.loading import encode_rows, load_tokenizer, make_random_model, read_template
from pipeline.training import tokens
from pipeline.training.tokens import encode_split, masked_lengths, row_lengths
from pipeline.workflow.weights import find_checkpoint

SCRATCH = RandomInit("qwen2", 400, 16, 1, 2, 2, 32, 128, 10000.0, 0.02)
MODEL = Model("m", None, SCRATCH, None, None, "none", "auto", "float32")
ROWS: list[dict[str, Any]] = [
    {
        "id": str(k),
        "prompt": [{"role": "user", "content": f"A correlates with {k}."}],
        "completion": [{"role": "assistant", "content": f"<think>\n{'A B linked. ' * k}\n</think>\nTherefore: No"}],
    }
    for k in range(5)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    out = tmp_path_factory.mktemp("scratch")
    make_random_model(SCRATCH, ["A correlates with B.", "<think>\nA B linked.\n</think>"] * 50, "think", out, 0)
    return load_tokenizer(find_checkpoint(str(out)), MODEL)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "sft.parquet")
    return tmp_path


def expected(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]] = ROWS) -> list[dict[str, list[int]]]:
    return encode_rows(tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows])


def files(data: Path) -> list[Path]:
    return sorted((data / "tokens").iterdir())


def test_rows_are_encoded_once(tokenizer: PreTrainedTokenizerBase, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 2)
    rows = encode_split(tokenizer, data, "sft")
    assert list(rows) == expected(tokenizer)
    assert row_lengths(rows) == [len(row["input_ids"]) for row in expected(tokenizer)]
    assert masked_lengths(rows) == [row["labels"].count(-100) for row in expected(tokenizer)]
    monkeypatch.setattr(tokens, "_encode", lambda *_: pytest.fail("encoded again"))
    assert list(encode_split(tokenizer, data, "sft")) == expected(tokenizer)
    assert len(files(data)) == 1


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "gone"])
def test_a_file_that_is_damaged_or_gone_is_made_anew(
    tokenizer: PreTrainedTokenizerBase, data: Path, damage: str
) -> None:
    encode_split(tokenizer, data, "sft")
    (path,) = files(data)
    whole = path.read_bytes()
    half = len(whole) // 2
    changed = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    path.unlink() if damage == "gone" else path.write_bytes(
        {"changed": changed, "cut": whole[:half], "empty": b""}[damage]
    )
    assert list(encode_split(tokenizer, data, "sft")) == expected(tokenizer)
    assert [path.read_bytes() for path in files(data)] == [whole]


def test_other_rows_or_another_template_are_other_tokens(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    encode_split(tokenizer, data, "sft")
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), data / "data" / "sft.parquet")
    assert list(encode_split(tokenizer, data, "sft")) == expected(tokenizer, ROWS[:3])
    before, tokenizer.chat_template = tokenizer.chat_template, read_template("chatml")
    try:
        other = expected(tokenizer, ROWS[:3])
        assert list(encode_split(tokenizer, data, "sft")) == other
    finally:
        tokenizer.chat_template = before
    assert other != expected(tokenizer, ROWS[:3])
    assert len(files(data)) == 3


def test_a_template_that_writes_the_date_is_read_again_on_another_day(
    tokenizer: PreTrainedTokenizerBase, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tokenizer.apply_chat_template
    for day in ("Monday", "Tuesday"):
        monkeypatch.setattr(
            tokenizer,
            "apply_chat_template",
            lambda some, day=day, **words: (
                [f"{day} {text}" for text in found] if isinstance(found := plain(some, **words), list) else day + found
            ),
        )
        assert list(encode_split(tokenizer, data, "sft")) == expected(tokenizer)
    assert len(files(data)) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(
    tokenizer: PreTrainedTokenizerBase, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "tokens").write_text("a file where the folder would be")
    assert list(encode_split(tokenizer, data, "sft")) == expected(tokenizer)
    assert "note: the tokens of sft are not kept" in capsys.readouterr().out
