#!/usr/bin/env bash
# Everything a change must pass: format, lint, tests. From a fresh clone: pip install -r requirements-dev.txt
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
python -m pytest "$@"
