#!/usr/bin/env bash
# bash run_pipeline.sh RECIPE… [key=value …]   the whole pipeline; --help for the options
# Sets .venv up if it is missing. To use your own environment: THEREFORE_VENV=DIR, or --no-setup with it active.
set -euo pipefail
export THEREFORE_TYPED_IN=$PWD   # what relative paths among the words are relative to
cd "$(dirname "$0")"
python=${THEREFORE_VENV:-.venv}/bin/python args=()
for arg in "$@"; do if [ "$arg" = --no-setup ]; then python=python3; else args+=("$arg"); fi; done
[ "$python" = python3 ] || scripts/setup
exec "$python" -m pipeline run "${args[@]:---help}"
