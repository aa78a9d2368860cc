#!/usr/bin/env bash
# Run all checks that a change must pass: format, lint, tests. Needs: pip install -r requirements-dev.txt
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
python -m pytest "$@"
