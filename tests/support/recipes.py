"""The recipes and clusters of configs/, typed, with overrides; a problem in them fails the test."""

from __future__ import annotations

from pipeline.config.cluster import Cluster, read_cluster
from pipeline.config.recipe import Recipe, read


def recipe_of(name: str, *words: str) -> Recipe:
    recipe, problems = read(name, words)
    assert recipe is not None, problems
    return recipe


def cluster_of(name: str, *words: str) -> Cluster:
    cluster, problems = read_cluster(name, words)
    assert cluster is not None, problems
    return cluster
