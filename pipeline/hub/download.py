"""Fill the local cache on a login node, so that no job ever waits for the hub.

    python -m pipeline download RECIPE…            downloads the pinned model, tokenizer and data

Jobs run with HF_HUB_OFFLINE=1 (configs/clusters/). What a recipe needs and the cache lacks is told before anything
is queued: `not_downloaded`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.cluster import Cluster
from pipeline.config.recipe import Recipe
from pipeline.core.errors import LaunchError
from pipeline.tasks.task import task_of

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


@dataclass(frozen=True)
class Repository:
    """What a recipe needs of the hub."""

    name: str
    kind: str  # model or dataset
    revision: str | None


def repositories(recipe: Recipe) -> list[Repository]:
    """The recipe's model and data sets, as far as they are on the hub."""
    found = []
    if not recipe.model.random_init and not recipe.model.gguf and not Path(recipe.model.name).exists():
        found.append(Repository(recipe.model.name, "model", recipe.model.revision))
    task = task_of(recipe.task, recipe.seed)
    if task.source == "hub":
        found += [Repository(name, "dataset", revision) for name, revision in task.repositories().items()]
    return found


def download(recipes: Iterable[Recipe], cluster: Cluster) -> Iterator[str]:
    """Download what is not there yet, with a progress bar; a line for each repository."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    for name, needed in _needed(recipes).items():
        if not needed:
            yield f"{name}: nothing to download; its model and its rows are made here"
        for one in needed:
            try:
                folder = _snapshot(one, cluster, local=False)
            except RepositoryNotFoundError as error:
                raise LaunchError(
                    f"{one.kind} {one.name}: the hub does not know it, or it wants a login (hf auth login)"
                ) from error
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                why = str(error).strip().splitlines()[0]
                raise LaunchError(
                    f"{one.kind} {one.name}: cannot be downloaded ({why}); what has arrived stays, so the same command "
                    "resumes where it stopped"
                ) from error
            commit = Path(folder).name
            where = "model.revision" if one.kind == "model" else "task.revision"
            where += (
                f".{one.name}" if one.kind != "model" and sum(other.kind == one.kind for other in needed) > 1 else ""
            )
            pin = "" if one.revision else f"; pin it: {where}={commit}"
            yield f"{name}: {one.kind} {one.name} at {commit}, {_size(Path(folder)) / 1e9:.2f} GB in {folder}{pin}"


def not_downloaded(recipes: Iterable[Recipe], cluster: Cluster) -> list[str]:
    """What jobs on nodes without internet would look for in vain, as sentences."""
    if cluster.slurm.environment.get("HF_HUB_OFFLINE") in (None, "0", ""):
        return []
    return [
        f"{one.kind} {one.name} is not in the local cache ({why}), and the nodes have no internet: "
        f"run python -m pipeline download {name}"
        for name, needed in _needed(recipes).items()
        for one in needed
        if (why := _missing(one, cluster))
    ]


def _needed(recipes: Iterable[Recipe]) -> dict[str, list[Repository]]:
    return {recipe.name: repositories(recipe) for recipe in recipes}


def _missing(one: Repository, cluster: Cluster) -> str | None:
    """What the cache lacks of a repository, in the hub library's words; None where it is whole."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        _snapshot(one, cluster, local=True)
    except IncompleteSnapshotError as error:
        return re.sub(r"^.*?is incomplete: |\. Outgoing.*$", "", " ".join(str(error).split()))
    except LocalEntryNotFoundError:
        return f"no revision {one.revision}" if one.revision else "nothing of it"
    return None


def _snapshot(one: Repository, cluster: Cluster, *, local: bool) -> str:
    from huggingface_hub import snapshot_download

    wanted = MODEL_FILES if one.kind == "model" else None
    return str(
        snapshot_download(
            one.name,
            repo_type=one.kind,
            revision=one.revision,
            cache_dir=_cache(cluster),
            allow_patterns=wanted,
            local_files_only=local,
        )
    )


def _cache(cluster: Cluster) -> str | None:
    """Where the jobs look; None is the hub library's own place."""
    given = cluster.slurm.environment
    home = given.get("HF_HUB_CACHE") or (f"{given['HF_HOME']}/hub" if given.get("HF_HOME") else None)
    return os.path.expandvars(str(Path(home).expanduser())) if home else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
