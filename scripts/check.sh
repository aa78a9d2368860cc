#!/usr/bin/env bash
# Run all checks that a change must pass: format, lint, tests. Needs: pip install -r requirements-dev.txt
# Arguments go to pytest. FUZZ=60 scripts/check.sh looks for faults for 60 seconds as well.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
python -m pytest -n auto --dist=loadfile "$@"
if [ -n "${FUZZ:-}" ]; then
    python scripts/fuzz.py --seconds="$FUZZ"
fi
