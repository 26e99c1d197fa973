"""Draw prompts less often whose last group of completions had no spread: the order of GRPO's prompts, epoch by epoch.

    redraw = Redraw(ids, probability=0.25, seed=0, record=out / DRAWS)
    redraw.observe(["row-7", …], [[0.2, 0.2, …], …])        the rewards of each prompt's group
    order = redraw.order(epoch, shuffled, wanted)           the prompts of an epoch, as numbers

In the first epoch every prompt comes once. Then the prompts are gone through in random order, again and again, until as
many are drawn as an epoch has; each time, one whose last group had no spread is left out with probability
1 − `probability`. So an epoch keeps its number of steps, and prompts with spread take the places of the others.

An epoch's order follows from the seed and from what was known when it began, which checkpoints keep: a run that resumes
draws the same. Every process observes the groups of all processes, so all draw alike. `record` is a line for each
prompt and epoch: how often it was drawn, how often left out, and how its last group was.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import read_lines

LAST = {"-": "none yet", "s": "spread", "r": "all right", "w": "all wrong", "u": "no reward"}  # groups, by their letter
WITHOUT_SPREAD = "rwu"
TOLERANCE = 1e-6  # between the rewards of a group


class Redraw:
    """The prompts by their ids, how the last group of each was, and how it was when the epoch began."""

    def __init__(
        self, ids: Sequence[str], probability: float, seed: int, highest: float = 1.0, record: Path | None = None
    ) -> None:
        """`highest`: the reward of the best completion; a group without spread is right above half of it."""
        self.ids = list(ids)
        self.places = {name: k for k, name in enumerate(ids)}
        self.probability, self.seed, self.highest, self.record = probability, seed, highest, record
        self.epoch = 0
        self.last = ["-"] * len(ids)
        self.before = list(self.last)  # when the epoch began

    def observe(self, ids: Sequence[str], groups: Sequence[Sequence[float]]) -> None:
        """Take note of the rewards of each prompt's group; NaN is a completion without a reward."""
        for name, rewards in zip(ids, groups, strict=True):
            self.last[self.places[name]] = self._letter([one for one in rewards if not math.isnan(one)])

    def _letter(self, rewards: Sequence[float]) -> str:
        if not rewards:
            return "u"
        if max(rewards) - min(rewards) > TOLERANCE:
            return "s"
        return "r" if 2 * rewards[0] > self.highest else "w"

    def order(self, epoch: int, shuffled: Sequence[int], wanted: int) -> list[int]:
        """Return `wanted` prompts of an epoch, which begins now or is resumed; `shuffled` is its order without redraws.

        The record has this epoch's lines at its end afterwards, instead of those of an attempt that got further.
        """
        if epoch != self.epoch:
            self.epoch, self.before = epoch, list(self.last)
        lots = random.Random(f"{self.seed}/redraw/{epoch}")
        drawn: list[int] = []
        left_out: Counter[int] = Counter()
        order = list(shuffled)
        while len(drawn) < wanted:
            for place in order:
                if self.before[place] in WITHOUT_SPREAD and lots.random() >= self.probability:
                    left_out[place] += 1
                    continue
                drawn.append(place)
                if len(drawn) == wanted:
                    break
            lots.shuffle(order)
        if self.record:
            self._write(self.record, Counter(drawn), left_out)
        return drawn

    def _write(self, record: Path, drawn: Counter[int], left_out: Counter[int]) -> None:
        lines = [line for line in read_lines(record) if line["epoch"] < self.epoch] if record.is_file() else []
        for place, name in enumerate(self.ids):
            counts = {"drawn": drawn[place], "left_out": left_out[place]}
            lines.append({"epoch": self.epoch, "id": name, **counts, "last": LAST[self.before[place]]})
        temporary = record.with_name(f".{record.name}")
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(record)

    def metrics(self) -> dict[str, int]:
        """Return how many draws were made and left out in all epochs, and how the prompts' last groups were."""
        lines = read_lines(self.record) if self.record and self.record.is_file() else []
        counts = {f"prompts_{name}": sum(line[name] for line in lines) for name in ("drawn", "left_out")}
        last = {name: sum(one == letter for one in self.last) for letter, name in LAST.items()}
        return counts | {f"last_group_{name.replace(' ', '_')}": count for name, count in last.items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"epoch": self.epoch, "before": "".join(self.before), "last": "".join(self.last)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint has kept; one of other prompts, or of before the setting, has nothing."""
        if len(state.get("last", "")) == len(state.get("before", "")) == len(self.ids):
            self.epoch, self.before, self.last = state["epoch"], list(state["before"]), list(state["last"])
