"""The law by which GRPO draws prompts without spread less often: shares, determinism, resume, and the record."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.recipe import read
from pipeline.core.files import read_lines
from pipeline.core.hashing import plain
from pipeline.training.redraw import Redraw

IDS = [f"row-{k}" for k in range(40)]
SPREAD, RIGHT, WRONG = [0.0, 1.0, 1.0, 0.0], [1.2, 1.2, 1.2, 1.2], [0.2, 0.2, 0.2, 0.2]


def observed(probability: float = 0.25, record: Path | None = None, seed: int = 0) -> Redraw:
    """The first ten prompts are all right, the next ten all wrong, the others have spread."""
    redraw = Redraw(IDS, probability, seed, 1.2, record)
    redraw.order(0, range(40), 40)
    redraw.observe(IDS, [RIGHT] * 10 + [WRONG] * 10 + [SPREAD] * 20)
    return redraw


def test_the_first_epoch_is_that_of_every_other_run() -> None:
    shuffled = random.Random(1).sample(range(40), 40)
    assert Redraw(IDS, 0.25, 0).order(0, shuffled, 36) == shuffled[:36]


def test_prompts_without_spread_come_with_the_probability_of_the_setting() -> None:
    counts: Counter[int] = Counter()
    for seed in range(400):
        counts.update(observed(seed=seed).order(1, range(40), 40))
    often = sum(counts[k] for k in range(20, 40)) / 20
    right, wrong = sum(counts[k] for k in range(10)) / 10, sum(counts[k] for k in range(10, 20)) / 10
    assert sum(counts.values()) == 400 * 40  # an epoch keeps its steps
    assert often > 1.5 * 400  # the others take their places
    assert right / often == pytest.approx(0.25, rel=0.1)
    assert wrong / often == pytest.approx(0.25, rel=0.1)


def test_a_prompt_without_spread_does_not_come_twice_before_the_others_have_come_again() -> None:
    drawn = observed(0.01).order(1, range(40), 40)
    assert sorted(Counter(k for k in drawn if k >= 20).values())[0] >= 1
    assert len([k for k in drawn if k < 20]) <= 4


def test_prompts_that_are_all_without_spread_are_drawn_all_the_same() -> None:
    redraw = Redraw(IDS, 0.01, 0)
    redraw.observe(IDS, [WRONG] * 40)
    assert len(redraw.order(1, range(40), 40)) == 40
    assert redraw.order(1, range(40), 0) == []  # fewer prompts than a batch has


def test_what_is_drawn_follows_from_seed_epoch_and_history() -> None:
    assert observed().order(1, range(40), 40) == observed().order(1, range(40), 40)
    assert observed().order(1, range(40), 40) != observed(seed=1).order(1, range(40), 40)
    assert observed().order(1, range(40), 40) != observed().order(2, range(40), 40)
    other = observed()
    other.observe(IDS[20:], [RIGHT] * 20)
    assert observed().order(1, range(40), 40) != other.order(1, range(40), 40)


def test_a_resume_inside_an_epoch_draws_what_that_epoch_has_begun_with() -> None:
    straight = observed()
    order = straight.order(1, range(40), 40)
    straight.observe(IDS[:20], [SPREAD] * 20)  # learned in the first half of the epoch
    resumed = Redraw(IDS, 0.25, 0, 1.2)
    resumed.restore(json.loads(json.dumps(straight.state())))
    assert resumed.order(1, range(40), 40) == order
    assert resumed.order(2, range(40), 40) == straight.order(2, range(40), 40)
    assert straight.last == resumed.last
    assert sorted(straight.order(3, range(40), 40)) == list(range(40))  # every prompt has spread now


def test_a_checkpoint_of_other_prompts_or_of_before_the_setting_has_nothing_to_restore() -> None:
    redraw = observed()
    before = redraw.state()
    redraw.restore({})
    redraw.restore(Redraw(IDS[:7], 0.25, 0).state())
    assert redraw.state() == before


@pytest.mark.parametrize(
    ("rewards", "last"),
    [
        (SPREAD, "s"),
        (RIGHT, "r"),
        ([1.0, 1.0], "r"),  # correct, in a form that earns nothing
        (WRONG, "w"),
        ([0.0, 0.0], "w"),
        ([0.2, 0.2 + 1e-8], "w"),  # sums in another order
        ([math.nan, math.nan], "u"),
        ([math.nan, 0.2], "w"),
    ],
)
def test_how_a_group_was(rewards: list[float], last: str) -> None:
    redraw = Redraw(["a", "b"], 0.5, 0, 1.2)
    redraw.observe(["b"], [rewards])
    assert redraw.last == ["-", last]


def test_each_prompt_of_each_epoch_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "draws.jsonl"
    redraw = observed(record=record)
    drawn = Counter(redraw.order(1, range(40), 40))
    lines = read_lines(record)
    assert [(line["epoch"], line["id"]) for line in lines] == [(epoch, name) for epoch in (0, 1) for name in IDS]
    assert all((line["drawn"], line["left_out"], line["last"]) == (1, 0, "none yet") for line in lines[:40])
    assert [line["drawn"] for line in lines[40:]] == [drawn[k] for k in range(40)]
    assert {line["last"] for line in lines[40:50]} == {"all right"}
    assert {line["last"] for line in lines[50:60]} == {"all wrong"}
    assert all(line["left_out"] > 0 for line in lines[40:60] if not line["drawn"])
    assert not any(line["left_out"] for line in lines[60:])
    metrics = redraw.metrics()
    assert metrics["prompts_drawn"] == 80
    assert metrics["prompts_left_out"] == sum(line["left_out"] for line in lines) > 0
    assert (metrics["last_group_all_right"], metrics["last_group_all_wrong"], metrics["last_group_spread"]) == (
        10,
        10,
        20,
    )
    observed(record=record)  # an attempt that begins again at the first epoch
    assert {line["epoch"] for line in read_lines(record)} == {0}


def test_the_setting_is_neutral_where_it_is_not_set() -> None:
    tiny, _ = read("tiny", [])
    assert tiny is not None
    assert tiny.grpo.redraw_without_spread == 1.0
    assert "redraw_without_spread" not in plain(tiny.grpo)  # so fingerprints are what they were
    changed, _ = read("tiny", ["grpo.redraw_without_spread=0.5"])
    assert changed is not None
    assert plain(changed.grpo)["redraw_without_spread"] == 0.5
    _, problems = read("tiny", ["grpo.redraw_without_spread=0"])
    assert problems == ["grpo.redraw_without_spread: got 0; expected a number from 0.01 to 1"]
