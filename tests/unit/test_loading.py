"""Loading: templates and data, bounds on what a file may contain, and names that stay in their folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from bounded import ends
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load
from pipeline.config.cluster import Batches, batches, generation_sizes, read_cluster
from pipeline.config.load import read_typed
from pipeline.config.recipe import CONFIGS, Goal, Recipe, Report, divisors, read
from pipeline.core.errors import ArtifactError, PipelineError, RecipeError
from pipeline.core.hashing import file_identity, plain
from pipeline.core.schema import Name, is_free_mapping, parse
from pipeline.workflow.artifact import STEP, open_artifact
from pipeline.workflow.plan import make_plan
from pipeline.workflow.single_step import checkpoint_identity, recipe_of


def text_of(name: str = "tiny") -> str:
    return Path(f"configs/{name}.yaml").read_text(encoding="utf-8")


def problems_of(name: str, *overrides: str) -> str:
    """Everything that planning this recipe reports."""
    with ends(), pytest.raises(PipelineError) as caught:  # what these tests are about took minutes, or never ended
        make_plan([name], overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---------------------------------------------------------------- templates and data


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "before ${oc.env:HOME,none} after",
        "${ oc.env : HOME }",
        "${oc.decode:${oc.env:HOME}}",
        "${oc.${seed}:HOME}",
        "${oc.select:seed}",
        "${oc.dict.values:sft}",
    ],
)
def test_a_resolver_is_refused_in_a_recipe_an_override_and_a_cluster(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text_of().replace('instruction: ""', f"instruction: {json.dumps(text)}"), encoding="utf-8")
    for found in (problems_of(str(file)), problems_of("tiny", f"task.params.instruction={json.dumps(text)}")):
        assert "expected a value, or a reference to a setting such as ${sft.max_length}. Fix: " in found
        assert os.environ["HOME"] not in found
    where = tmp_path / "site.yaml"
    where.write_text(f"slurm: {{environment: {{TOKEN: {json.dumps(text)}}}}}", encoding="utf-8")
    assert "expected a value, or a reference" in "\n".join(read_cluster(str(where))[1])


def test_a_reference_is_resolved_and_an_escaped_one_is_text() -> None:
    recipe, problems = read("tiny", ["sft.max_length=${grpo.max_prompt_length}", r"evaluate.prompts=['\${seed}']"])
    assert problems == []
    assert recipe is not None
    assert recipe.sft.max_length == recipe.grpo.max_prompt_length
    assert recipe.evaluate.prompts == ("${seed}",)
    _, problems = read("tiny", ["evaluate.prompts=['costs ${price}']"])
    assert any("price" in text and r"write \${…} where these characters are meant" in text for text in problems)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.text(st.sampled_from(list("$\\{}[]: ?seed.oc'\"x\0")), max_size=30), max_size=50))
def test_data_is_never_read_as_a_template(prompts: list[str]) -> None:
    """What a record holds comes back as it stands: references, escapes, `???` and broken ones."""
    recipe, _ = read("tiny")
    assert recipe is not None
    record = plain(recipe)
    record["evaluate"]["prompts"] = [*prompts, "???", "${oc.env:HOME}", "\\${x}", "\0000\0"]
    again, problems = read_typed(Recipe, [record], ["seed=3"], {"name": "tiny"})
    assert problems == []
    assert again is not None
    assert list(again.evaluate.prompts) == record["evaluate"]["prompts"]
    assert again.seed == 3


def test_an_older_step_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    folder = step_folder(tmp_path, lambda record: record["evaluate"].update(prompts=["${oc.env:HF_TOKEN} and ${x}"]))
    recipe, _, _ = recipe_of(str(folder))
    assert recipe.evaluate.prompts == ("${oc.env:HF_TOKEN} and ${x}",)


def step_folder(tmp_path: Path, change: Any) -> Path:
    """A folder with weights, and a step.json whose recipe was changed."""
    recipe, _ = read("tiny")
    assert recipe is not None
    record = plain(recipe)
    change(record)
    folder = tmp_path / "runs" / "tiny" / "sft-0123456789" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder.parent / STEP).write_text(json.dumps({"recipe": record, "inputs": {}}))
    return folder


# ---------------------------------------------------------------- empty mappings, what is missing


def test_an_empty_mapping_replaces_the_defaults(tmp_path: Path) -> None:
    assert "grpo.rewards: got none; expected at least one" in problems_of("tiny", "grpo.rewards={}")
    file = tmp_path / "mine.yaml"
    text = re.sub(r"  rewards:\n(    .*\n)+", "  rewards: {}\n", text_of())
    file.write_text(text, encoding="utf-8")
    assert "grpo.rewards: got none; expected at least one" in problems_of(str(file))
    recipe, problems = read("tiny", ["grpo.rewards={}", "grpo.rewards.correctness={weight: 1.0, params: {}}"])
    assert problems == []
    assert recipe is not None
    assert list(recipe.grpo.rewards) == ["correctness"]
    cluster, _ = read_cluster("local", ["slurm.environment={}"])
    assert cluster is not None
    assert cluster.slurm.environment == {}
    recipe, _ = read("math_science", ["report.success_criteria={}"])
    assert recipe is not None
    assert recipe.report.success_criteria == {}


def test_an_empty_section_is_no_reason_to_forget_its_defaults() -> None:
    recipe, problems = read("tiny", ["sft={}", "lora={}"])
    assert problems == []
    assert recipe == read("tiny")[0]
    assert [is_free_mapping(Recipe, path) for path in ("grpo.rewards", "task.params", "task.revision")] == [True] * 3
    assert is_free_mapping(Recipe, "task.params.phases.x")
    assert not any(is_free_mapping(Recipe, path) for path in ("sft", "sft.epochs", "nothing.here", "model.random_init"))


def test_an_empty_recipe_has_no_model(tmp_path: Path) -> None:
    for content in ("", "# nothing\n", "{}", "seed: 3\n"):
        file = tmp_path / "empty.yaml"
        file.write_text(content)
        assert "model.name: not set. Fix: give model.name a value" in problems_of(str(file))
    assert "evaluate.prompts[0]: not set" in problems_of("tiny", "evaluate.prompts=['???']")


# ---------------------------------------------------------------- files

FILES: list[tuple[str, bytes, str]] = [
    ("UTF-16", text_of().encode("utf-16"), "got UTF-16; expected UTF-8. Fix: iconv -f UTF-16 -t UTF-8"),
    ("UTF-16 without its mark", text_of().encode("utf-16-le"), "got zero bytes, as in UTF-16"),
    ("UTF-32", text_of().encode("utf-32"), "got UTF-32; expected UTF-8"),
    ("Latin-1", ("# größer\n" + text_of()).encode("latin-1"), "got bytes that are not UTF-8 (the first at 4)"),
    ("a null key", b"model: {name: x}\nnull: 3\n", "Fix: give every setting a name"),
    ("a list", b"- 1\n- 2\n", "got a list; expected settings"),
    ("a key twice", b"seed: 1\nseed: 2\n", "duplicate key"),
    ("a tag", b"seed: !!python/object:os.system x\n", "could not determine a constructor"),
    ("too large", b"#" * 300_000, "expected at most 262144"),
    ("too deep", b"seed: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    (
        "aliases",
        b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)),
        "expand",
    ),
    (
        "references",
        b"".join(b"a%d: '${a%d}${a%d}'\n" % (n, n - 1, n - 1) for n in range(1, 40)),
        "more than 32 references",
    ),
    ("an alias of itself", b"a: &a [*a]\n", "recursive aliases"),
    ("a number of 5000 digits", b"seed: " + b"1" * 5000, "cannot be read"),
]


@pytest.mark.parametrize(("content", "told"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_file_that_cannot_be_a_recipe_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    found = problems_of(str(file))
    assert told in found
    assert str(file) in found


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + text_of().encode())
    assert read(str(file))[1] == []


def test_a_device_or_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "kernel.yaml").symlink_to("/proc/kmsg")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "kernel", "zero"):
        problems_of(str(tmp_path / f"{name}.yaml"))
    assert file_identity(Path("/proc/kmsg")) == file_identity(Path("/proc/version"))  # nothing, of either


@pytest.mark.parametrize("folder", ["/proc", "/", "/sys", "/dev", "/usr/lib"])
def test_a_folder_that_is_no_model_is_named_and_not_read(folder: str) -> None:
    words = ["model.random_init=null", f"model.name={folder}", "sft.optimizer.name=adamw_torch"]
    assert f"model.name: got {folder}, a folder without config.json" in problems_of("tiny", *words)


def test_other_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "task.path: got" in problems_of("gsm8k", "task.source=path", f"task.path={tmp_path}/rows.jsonl")
    assert "device or pipe" in problems_of("gsm8k", "model.chat_template=/dev/zero")
    assert "model.chat_template: got /proc/kmsg, an empty file" in problems_of(
        "gsm8k", "model.chat_template=/proc/kmsg"
    )
    for key in ("model.name", "task.path", "model.chat_template", "model.gguf"):
        assert f"{key}: got 'xxx" in problems_of("gsm8k", f"{key}={'x' * 5000}")


# ---------------------------------------------------------------- numbers

HUGE = [
    "grpo.global_batch_size=1000000000000",
    "sft.global_batch_size=1000000000000",
    "grpo.num_generations=1000000000000",
    "sft.epochs=1e300",
    "sft.epochs=.inf",
    "sft.epochs=.nan",
    "sft.optimizer.learning_rate=1e999",
    "sft.optimizer.learning_rate=-.inf",
    f"sft.optimizer.learning_rate={'9' * 400}",
    "report.bootstrap_samples=1000000000000",
    "evaluate.max_new_tokens=1000000000000000000000",
    "seed=4294967296",
    f"seed={'9' * 4000}",
    f"seed={'9' * 5000}",
    "lora.r=99999999999",
    "sft.optimizer.lr_scheduler_kwargs={num_decay_steps: 1000000000000}",
    "sft.optimizer.lr_scheduler_kwargs={num_decay_steps: .inf}",
    "sft.optimizer.lr_scheduler_kwargs={num_decay_steps: {1: 2}}",
    "task.params.phases=[{n: [3], rows: 1000000000000}]",
    "grpo.rewards.format.params={x: .nan}",
    "cluster.nodes=1000000000000",
    "cluster.generation_batch_size=1000000000000",
    "cluster.sft.per_device_batch_size=1000000000000",
    "cluster.gpu_memory=.inf",
    "cluster.processes=99999999999",
    "cluster.save_steps=1000000000000",
]


@pytest.mark.parametrize("override", HUGE, ids=lambda text: text[:60])
def test_a_number_beyond_all_bounds_is_named_at_once(override: str) -> None:
    found = problems_of("tiny", override)
    key = override.partition("=")[0]
    assert key in found
    assert len(found) < 2000


@pytest.mark.parametrize("size", [2**32 - 1, 2**32 - 5, 2**31, 4_294_705_156])
def test_the_largest_batches_are_divided(size: int) -> None:
    with ends():
        assert divisors(size)[-1] == size
        recipe, _ = read("deepseek7b", [f"sft.global_batch_size={size}", f"grpo.global_batch_size={size}"])
        cluster, _ = read_cluster("h100", ["gpus=1"])
        assert cluster is not None
        if recipe is not None:
            for stage in ("sft", "grpo"):
                assert batches(cluster, recipe, "sft" if stage == "sft" else "grpo")[0] is not None
            assert generation_sizes(recipe, Batches(1, 1, size))


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_numbers_that_can_be_right_are(tmp_path: Path) -> None:
    recipe, problems = read("tiny", ["seed=4294967295", "sft.epochs=1000", "report.bootstrap_samples=1000000"])
    assert problems == []
    assert recipe is not None


def test_bytes_that_are_no_text_are_named() -> None:
    assert "evaluate.prompts=['\\udce4']\": the value cannot be read" in problems_of(
        "tiny", "evaluate.prompts=['\udce4']"
    )
    _, problems = parse(dict[str, str], {"x": "\udce4"}, "prompts")
    assert problems == ["prompts.x: got '\\udce4'; expected a text in UTF-8, but it contains bytes that are not"]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["..", "../../x", "a/b", "/tmp/x", ".hidden", "-x", "", "a\nb", "a\0b", "x" * 200, "exports", "evaluations"]
)
def test_a_name_that_leaves_its_folder_is_refused_wherever_a_recipe_is_read(tmp_path: Path, name: str) -> None:
    assert parse(dict[str, Name], {"x": name})[1]
    folder = step_folder(tmp_path, lambda record: record.update(name=name))
    with pytest.raises(RecipeError, match=r"name: got .*; expected a name: letters, digits"):
        recipe_of(str(folder))


def test_a_step_without_a_name_or_recipe_is_named(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, lambda record: record.pop("name"))
    with pytest.raises(RecipeError, match="name: got null; expected a name"):
        recipe_of(str(folder))
    cases: list[dict[str, Any]] = [{"inputs": {}}, {"recipe": "tiny"}, {"recipe": ["x"]}]
    for record in cases:
        (folder.parent / STEP).write_text(json.dumps(record))
        with pytest.raises(PipelineError, match="got no recipe; expected a step's record"):
            recipe_of(str(folder))


@pytest.mark.parametrize("stem", ["..", ".x", "-x", "exports", "a;b", "$(x)", "x" * 120])
def test_a_file_whose_name_is_no_name_is_refused(tmp_path: Path, stem: str) -> None:
    file = tmp_path / f"{stem}.yaml"
    file.write_text(text_of())
    assert "expected a name: letters, digits" in problems_of(str(file))
    file.write_text("launcher: local\n")
    assert "cluster.name: " in "\n".join(read_cluster(str(file))[1])


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tiny.yaml").write_text(text_of())
    with pytest.raises(RecipeError, match="both called 'tiny'"):
        make_plan(["tiny", f"{tmp_path}/a/tiny.yaml"])
    with pytest.raises(RecipeError, match="both called 'tiny'"):
        make_plan([f"{tmp_path}/a/tiny.yaml", f"{tmp_path}/b/tiny.yaml"])
    smoke_tested = tmp_path / "a" / "tiny-smoke-test.yaml"
    smoke_tested.write_text(text_of())
    assert make_plan(["tiny", str(smoke_tested)]).steps


def test_the_report_of_many_recipes_has_a_folder_that_can_be_made(tmp_path: Path) -> None:
    names = []
    for number in range(12):
        file = tmp_path / f"{number}-{'long' * 12}.yaml"
        file.write_text(text_of())
        names.append(str(file))
    report = make_plan(names, runs=tmp_path / "runs").steps[-1]
    report.folder.mkdir(parents=True)
    assert report.folder.parent.parent == tmp_path / "runs"


# ---------------------------------------------------------------- what a checkpoint is


def test_a_checkpoint_below_a_folder_called_global_step_keeps_its_identity(tmp_path: Path) -> None:
    """Only DeepSpeed's own states, in folders of that name inside the checkpoint, are no part of it."""
    folder = tmp_path / "global_step_runs" / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    (folder / "global_step2" / "zero.bin").write_text("states")
    before = checkpoint_identity(str(folder))
    assert list(before) == ["model.safetensors"]
    (folder / "model.safetensors").write_text("others")
    assert checkpoint_identity(str(folder)) != before


def test_every_recipe_file_is_still_what_its_yaml_says() -> None:
    """The bounded loader and PyYAML read the same values."""
    for file in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("clusters/*.yaml")]:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


# ---------------------------------------------------------------- names that settings had before


def test_a_setting_under_its_former_name_is_read_and_the_new_name_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_noticed", set())
    file = tmp_path / "mine.yaml"
    file.write_text("model: {name: m}\nevaluate: {goals: {thoughts: {above: 0.9}}, confidence: 0.9}\n")
    recipe, problems = read(str(file), ["evaluate.draws=123", "evaluate.draws=124"])
    assert recipe is not None, problems
    assert recipe.report == Report(124, 0.9, {"thoughts": Goal(above=0.9)})
    told = capsys.readouterr().err
    assert told.count("note: evaluate.draws is now report.bootstrap_samples") == 1
    assert "note: evaluate.goals is now report.success_criteria" in told
    _, problems = read(str(file), ["evaluate.draws=0"])
    assert any(text.startswith("report.bootstrap_samples: got 0; expected") for text in problems)
    both, _ = read(str(file), ["evaluate.draws=5", "report.bootstrap_samples=6"])
    assert both is not None
    assert both.report.bootstrap_samples == 6


def test_what_only_the_report_reads_asks_no_model_again() -> None:
    words = ["report.confidence=0.9", "evaluate.goals={f1: {above: 0.5}}"]
    before, after = make_plan(["tiny"]), make_plan(["tiny"], words)
    pairs = zip(before.steps, after.steps, strict=True)
    assert [new.name for old, new in pairs if old.fingerprint != new.fingerprint] == ["report"]


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    record: dict[str, Any] = {name: {} for name in ("payload", "inputs", "files", "metrics", "provenance")}
    record |= {"stage": "sft", "recipe": "x", "fingerprint": "x", "schema": 99}
    (tmp_path / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"schema: got 99; expected at most \d+\. Fix: "):
        open_artifact(tmp_path)


def test_a_setting_that_is_gone_is_left_out_and_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_noticed", set())
    recipe, problems = read("tiny", ["model.backend=unsloth"])
    assert (recipe, problems) == (read("tiny")[0], [])
    assert "note: model.backend is gone" in capsys.readouterr().err
