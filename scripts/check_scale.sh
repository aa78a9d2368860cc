#!/usr/bin/env bash
# Checks that scripts/check.sh leaves out, since they need much to be installed:
#   spark   the tests of --engine=spark, and the same arrays from two worker processes as from pandas. Needs:
#           pip install -r requirements-dev.txt -r requirements-prepare.txt; Java 17
#   pairs   each layout and engine resumes the checkpoint of each other one, on two processes
#   megatron  a block that is split by --parallel=tp, and one made of the layers of megatron-core. Needs:
#           pip install megatron-core==0.16.1
#   hosts   workers and hosts that are killed and come back (scripts/check_hosts.py). Needs root
# Arguments are the names of the checks [all].
set -euo pipefail
cd "$(dirname "$0")/.."

spark() {
    python -m pytest tests/test_prepare_engines.py -k spark -rs
    local work
    work=$(mktemp -d)
    python - "$work" <<'END'
import sys
sys.path[:0] = [".", "tests"]
from pathlib import Path
from test_prepare_engines import made_up, write
write(made_up(0, rows=20_000), Path(sys.argv[1]) / "logs", 4)
END
    for engine in pandas spark; do
        PYSPARK_SUBMIT_ARGS="--master local-cluster[2,1,1024] pyspark-shell" \
            python scripts/prepare.py --engine=$engine --input="$work/logs" --out="$work/$engine"
    done
    for file in "$work"/pandas/*.npy; do
        cmp "$file" "$work/spark/$(basename "$file")"
    done
    rm -r "$work"
    echo "spark: the arrays of two workers are those of pandas"
}

pairs() {
    CHECK_ALL_PAIRS=1 python -m pytest tests/test_engines.py -k goes_on_from_another
}

megatron() {
    python -m pytest tests/test_megatron.py -rs
}

hosts() {
    python scripts/check_hosts.py
}

[ $# -gt 0 ] || set -- spark pairs megatron hosts
for check in "$@"; do
    "$check"
done
