"""The order and the labels of SFT rows."""

from __future__ import annotations

import pyarrow as pa
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sft import order_rows, unmask_prompts, validation_metrics
from pipeline.training.tokens import SCHEMA


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=120), st.integers(1, 5))
@settings(max_examples=200)
def test_rows_come_by_phase_each_once_and_batches_are_of_like_length(rows: list[tuple[int, int]], batch: int) -> None:
    phases, lengths = [phase for phase, _ in rows], [length for _, length in rows]
    found = order_rows(list(range(len(rows))), phases, lengths, batch, seed=0)
    assert sorted(found) == list(range(len(rows)))
    assert [phases[k] for k in found] == sorted(phases)
    assert found == order_rows(list(range(len(rows))), phases, lengths, batch, seed=0)


def test_batches_are_of_like_length_in_a_random_order() -> None:
    lengths = [1 + (7 * k) % 64 for k in range(64)]
    found = order_rows(list(range(64)), [0] * 64, lengths, 4, seed=0)
    batches = [[lengths[k] for k in found[start : start + 4]] for start in range(0, 64, 4)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)
    assert batches != sorted(batches)
    assert found != order_rows(list(range(64)), [0] * 64, lengths, 4, seed=1)


def test_the_loss_of_the_weights_that_are_kept_is_told_with_its_distance_from_training() -> None:
    losses = [(2.0, 1.9), (1.0, 1.5), (0.5, 1.7)]  # of training, of validation after it
    history: list[dict[str, float]] = []
    for step, (train, validation) in enumerate(losses, 1):
        history += [{"loss": train, "step": step}, {"eval_loss": validation, "step": step}]
    best, last = validation_metrics(history, best=True), validation_metrics(history, best=False)
    assert best == {"validation_loss": 1.5, "validation_loss_gap": 0.5, "validation_step": 2, "validations": 3}
    assert (last["validation_step"], last["validation_loss_gap"]) == (3, 1.7 - 0.5)
    assert validation_metrics([{"loss": 1.0, "step": 1}], best=True) == {}


def test_the_first_rows_learn_their_prompts_too() -> None:
    made = [{"input_ids": [k, 2, 3], "labels": [-100, -100, 3]} for k in range(5)]
    rows = Dataset(pa.Table.from_pylist(made, SCHEMA))
    found = unmask_prompts(rows, [4, 0, 2, 1], 0.5)
    assert [row[0] for row in found["input_ids"]] == [4, 0, 2, 1]
    assert list(found["labels"]) == [[4, 2, 3], [0, 2, 3], [-100, -100, 3], [-100, -100, 3]]
    assert list(unmask_prompts(rows, [1], 0.0)) == [rows[1]]
