"""Write whole sets of rows as files:   python -m pipeline generate corr2cause --n 2-6 --out DIR

A set has every claim about every class (N = 2…6; sampled classes for N ≥ 7), each row with its own variable names. The
files `train.parquet`, `validation.parquet` and `test.parquet` are split by canonical class. `splits.json` lists the
classes of each, and `README.md` is a data card. Rows are written as they are made, so a set need not fit in memory.
`--copies K` makes each claim under K renamings. The same seed gives the same bytes with any number of processes: a
group of rows depends only on the seed and its classes, and groups are written in order.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.recipe import TaskChoice
from pipeline.core.errors import DataError
from pipeline.core.hashing import file_sha256
from pipeline.tasks.corr2cause import Class, ClassClaim, Corr2Cause, Corr2CauseParams, split_classes
from pipeline.tasks.corr2cause.graphs import EquivalenceClass
from pipeline.tasks.corr2cause.proof_writer import Form
from pipeline.tasks.task import task_of

MOST_ROWS = 1_000_000_000  # of a set: about a day on a large machine
CLASSES = {2: 2, 3: 5, 4: 20, 5: 142, 6: 2201}  # on N unlabelled nodes; for larger N the number of sampled classes
GROUP = 32  # classes in a group of rows
SPLITS = {"train": ("sft", "both", "grpo"), "validation": ("validation",), "test": ("test",)}
STATUS = {"Yes": "entailed", "No": "contradicted", "Unknown": "undetermined"}


def most_rows(params: Corr2CauseParams, copies: int) -> int:
    """Return an upper bound of the number of rows, before anything is generated."""
    classes = {n: CLASSES.get(n, params.sampled_classes) for n in set(params.n)}
    return copies * sum(count * 3 * n * (n - 1) for n, count in classes.items())


@dataclass(frozen=True)
class GenerationSpec:
    """The specification of a set: everything its bytes depend on."""

    params: str  # the task's params as canonical JSON, which is sent to the processes
    seed: int
    copies: int
    proof: Form | Literal["none"]

    @property
    def task(self) -> Corr2Cause:
        choice = TaskChoice("corr2cause", "generated", None, None, "error", json.loads(self.params))
        task = task_of(choice, self.seed)
        assert isinstance(task, Corr2Cause)
        return task


@cache
def _parts(spec: GenerationSpec) -> dict[str, list[list[Class]]]:
    """Return the groups of classes of each split, by N."""
    task = spec.task
    found = split_classes(task.params, spec.seed)
    parts = {}
    for split, names in SPLITS.items():
        groups = []
        for n in sorted(set(task.params.n)):
            same_n = sorted((mec for name in names for mec in found[name] if mec.n == n), key=lambda mec: mec.id)
            groups += [same_n[k : k + GROUP] for k in range(0, len(same_n), GROUP)]
        parts[split] = groups
    return parts


Job = tuple[GenerationSpec, str, int, int]  # specification, split, group, copy


def _group(job: Job) -> list[dict[str, Any]]:
    """Return the rows of one group of classes under one renaming; they depend on the job alone."""
    spec, split, number, copy = job
    task, rows = spec.task, []
    for mec in _parts(spec)[split][number]:
        rng = random.Random(f"{spec.seed}/rows/{copy}/{mec.id}")
        chosen = enumerate(_chosen(task, rng, mec))
        rows += [_row(task, rng, claim, f"{split}/{copy}/{mec.id}/{k}", spec) for k, claim in chosen]
    return rows


def _chosen(task: Corr2Cause, rng: random.Random, mec: Class) -> list[ClassClaim]:
    """Return all claims about a class; for balanced sets, equally many with each answer within each type."""
    claims = list(task.claims(mec))
    if task.params.balance == "natural":
        return claims
    kept = []
    for relation in dict.fromkeys(claim.relation for claim in claims):
        by_gold: dict[str, list[ClassClaim]] = {gold: [] for gold in task.golds}
        for claim in claims:
            if claim.relation == relation:
                by_gold[claim.gold].append(claim)
        fewest = min(len(same) for same in by_gold.values())
        kept += [claim for same in by_gold.values() for claim in rng.sample(same, fewest)]
    return kept


def _row(task: Corr2Cause, rng: random.Random, claim: ClassClaim, id: str, spec: GenerationSpec) -> dict[str, Any]:
    """Return one row as a record of the parquet schema."""
    drawn = task.rename(rng, claim, with_proof=spec.proof != "none", shuffle=False)
    example = task.example(drawn if spec.proof == "none" else replace(drawn, proof=spec.proof), id)
    tags, mec = example.tags, drawn.mec
    exact = isinstance(mec, EquivalenceClass)
    arrows = sorted(mec.pattern.arrows) if exact else []  # type: ignore[attr-defined]
    names = tags["names"].split(" ") if drawn.who else list(tags["names"])
    row = {
        "id": id,
        "input": example.question,
        "label": int(example.gold == "Yes"),
        "status": STATUS[example.gold] if exact and (len(task.golds) == 3 or example.gold == "Yes") else None,
        "num_variables": tags["n"],
        "relation_type": tags["relation"],
        "class": example.group,
        "class_size": tags["members"],
        "premise_tokens": tags["premise_tokens"],
        "names": names,
        "mode": tags["mode"],
        "style": tags["style"],
        "seed": spec.seed,
        "forced_edges": [[names[a], names[b]] for a, b in arrows] if exact else None,
        "num_edges": len(arrows) if exact else None,
        "completion": example.target,
    }
    if tags["style"] == "plusplus":
        premise, hypothesis = example.question.removeprefix("Premise: ").split("\nHypothesis: ")
        row["query"] = f"Premise:\n{premise}\n\nHypothesis: {hypothesis}"
    return row


def _schema(style: str) -> pa.Schema:
    text, number = pa.string(), pa.int32()
    fields = {
        "id": text,
        "input": text,
        "label": number,
        "status": text,
        "num_variables": number,
        "relation_type": text,
        "class": text,
        "class_size": number,
        "premise_tokens": number,
        "names": pa.list_(text),
        "mode": text,
        "style": text,
        "seed": pa.int64(),
        "forced_edges": pa.list_(pa.list_(text)),
        "num_edges": number,
        "completion": text,
    }
    return pa.schema(list((fields | ({"query": text} if style == "plusplus" else {})).items()))


def generate(
    out: Path,
    params: Mapping[str, Any],
    *,
    seed: int = 0,
    copies: int = 1,
    proof: Form | Literal["none"] = "none",
    processes: int = 1,
) -> dict[str, Any]:
    """Write the set to the empty or new folder `out`. Returns the counts of the data card.

    Raises RecipeError for invalid params, DataError if the folder is not empty.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: {out} is a file; give a new folder")
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):  # a killed run leaves hidden ones
        raise DataError(f"--out: {out} is not empty; give a new folder")
    settled = {"instruction": "", **params}
    if settled.get("mode") == "paper":
        settled.setdefault("phases", [{"n": list(settled.get("n", (3, 4, 5))), "rows": 1, "proof_fraction": 0.0}])
    spec = GenerationSpec(json.dumps(settled, sort_keys=True), seed, copies, proof)
    task = spec.task  # raises errors about the params before anything is written
    if (most := most_rows(task.params, copies)) > MOST_ROWS:
        fits = max(1, copies * MOST_ROWS // most)
        problem = f"--copies: got {copies}, which is up to {most:,} rows; expected at most {MOST_ROWS:,} rows"
        raise DataError(f"{problem}. Fix: --copies {fits}")
    out.mkdir(parents=True, exist_ok=True)
    parts = _parts(spec)
    ids = {split: sorted({mec.id for group in groups for mec in group}) for split, groups in parts.items()}
    overlap = sum(len(set(ids[a]) & set(ids[b])) for a in ids for b in ids if a < b)
    counts: dict[str, Counter[tuple[int, str]]] = {split: Counter() for split in parts}
    hashes = {}
    context = get_context("spawn")
    with context.Pool(processes) if processes > 1 else _SerialPool() as pool:
        for split, groups in parts.items():
            if not groups:
                continue
            partial, path = out / f".{split}.parquet", out / f"{split}.parquet"
            schema = _schema(task.params.style)
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                jobs = ((spec, split, k, copy) for copy in range(copies) for k in range(len(groups)))
                windows = _windows(jobs, 4 * processes)
                for rows in (rows for window in windows for rows in pool.imap(_group, window)):
                    if rows:  # a window of a few groups at a time bounds the memory
                        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                        label = "status" if len(task.golds) == 3 else "label"
                        counts[split].update((row["num_variables"], str(row[label])) for row in rows)
            partial.replace(path)
            hashes[path.name] = file_sha256(path)
    listed = {split: [[n, gold, rows] for (n, gold), rows in sorted(count.items())] for split, count in counts.items()}
    record = {"overlap": overlap, "classes": {split: len(classes) for split, classes in ids.items()}, "rows": listed}
    (out / "splits.json").write_text(json.dumps({"overlap": overlap, "classes": ids}) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_card(spec, record, hashes), encoding="utf-8")
    return record


def _windows(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Yield the jobs in lists of `size`."""
    while window := list(islice(jobs, size)):
        yield window


class _SerialPool:
    """The interface of a process pool, in this process."""

    def __enter__(self) -> _SerialPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap(self, function: Any, jobs: Sequence[Any]) -> Iterator[Any]:
        return map(function, jobs)


def _card(spec: GenerationSpec, record: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """Return the data card: description, settings, counts, fields, hashes, and the overlap of the splits."""
    task = spec.task
    p = task.params
    sizes = ", ".join(map(str, sorted(set(p.n))))
    lines = [
        "---",
        "task_categories: [text-classification]",
        "language: [en]",
        "tags: [causal-reasoning, corr2cause]",
        "configs:",
        "- config_name: default",
        "  data_files:",
        *(f"  - {{split: {Path(name).stem}, path: {name}}}" for name in hashes),
        "---",
        "",
        f"# Corr2Cause, {p.mode}, style {p.style}, N = {sizes}",
        "",
        "Does a causal claim about two of N variables hold in every causal graph that has exactly the independences of",
        "the premise? Generated by Therefore (`python -m pipeline generate corr2cause`), after Jin et al. 2024.",
        "",
        (
            "The published rows with the wrong labels of their program, for comparison with published figures."
            if p.mode == "paper"
            else "Labels are exact; variables are renamed at random in every row."
        ),
        "",
        f"- Semantics: {json.dumps(asdict(task.semantics))}",
        f"- Answers: {', '.join(task.golds)}; share: {p.balance}; premises: {p.premise}; proofs: {spec.proof}",
        f"- Seed {spec.seed}, {spec.copies} renaming(s) per claim",
        f"- No class of isomorphic graphs is in two splits: overlap {record['overlap']} (`splits.json` lists them)",
        "",
        "| split | N | answer | rows |",
        "|---|---|---|---|",
        *(f"| {split} | {n} | {gold} | {rows} |" for split, part in record["rows"].items() for n, gold, rows in part),
        "",
        f"Classes: {', '.join(f'{split} {count}' for split, count in record['classes'].items())}.",
        "",
        "Fields: `input`, `label` (1: entailed), `status` (of three answers), `num_variables`, `relation_type`,",
        "`class` (canonical), `class_size` (members), `premise_tokens` (words and marks), `names` in the premise's",
        "order, `mode`, `style`, `seed`, `forced_edges` (compelled, tail and head), `completion` (with the proof,",
        "if set).",
        "",
        "| file | sha256 |",
        "|---|---|",
        *(f"| {name} | {digest} |" for name, digest in hashes.items()),
        "",
        f"Params: `{spec.params}`",
    ]
    return "\n".join(lines) + "\n"
