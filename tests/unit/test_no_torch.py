"""The tests of this folder load no torch: they are the ones that scripts/test --fast runs."""

from __future__ import annotations

import subprocess
import sys

from running import ROOT

CODE = """
import sys, pytest
assert pytest.main(["tests/unit", "--collect-only", "-q", "--no-header", "-p", "no:cacheprovider"]) == 0
print(sorted({"torch", "transformers", "trl", "peft", "deepspeed"} & set(sys.modules)))
"""


def test_no_test_of_this_folder_loads_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
