"""A short selection of scripts/soak on the real Slurm: one GRPO step that is hit again and again."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import NANO, only, run_cli
from slurm_lab import Lab, copy_steps
from soak import Record, disturb, result
from soak_faults import FAULTS, INPUTS, Trial

SETTINGS = [*NANO, "grpo.max_steps=100", "cluster.save_steps=3", "cluster.hang_timeout=8"]  # longer than both faults
CHOSEN = [  # those that Slurm or the launcher answers without the user
    "rank 1 out of host memory",
    "preempted by CANCEL, 20 s of grace",
]


@pytest.fixture
def trial(lab: Lab, nano: Path, tmp_path: Path) -> Iterator[Trial]:
    runs = tmp_path / "runs"
    copy_steps(nano, runs, *INPUTS["grpo"])
    trial = Trial(runs, "grpo", lab, random.Random(1), SETTINGS)
    yield trial
    trial.end()
    subprocess.run(["scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE", "GraceTime=20"], check=True)


def test_a_run_that_is_hit_again_and_again_has_the_undisturbed_result(trial: Trial, nano: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    copy_steps(nano, undisturbed, *INPUTS["grpo"])
    done = run_cli("run", "tiny", *SETTINGS, "--stages", "grpo", "--runs", str(undisturbed))
    assert done.returncode == 0, done.stderr
    records: list[Record] = []
    disturb(trial, [FAULTS[name] for name in CHOSEN], records.append)
    assert [record.fault for record in records] == CHOSEN  # each came before the end
    assert sum(record.lost for record in records) == 0
    assert sum(record.typed for record in records) == 0  # nobody had to do anything
    assert max(record.redone for record in records) <= 3  # save_steps
    assert result(trial.folder, "grpo") == result(only(undisturbed, "tiny/grpo-*"), "grpo")
