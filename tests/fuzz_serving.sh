#!/usr/bin/env bash
# By hand: schemathesis against the server's own OpenAPI page; no answer may be a 5xx. fuzz_serving.sh [EXAMPLES a route]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
log=$(mktemp)
.venv/bin/python -m stretto serve zoo:tiny --port 8765 --max-choices 2 --timeout 20 --max-model-len 128 >"$log" 2>&1 &
server=$!
trap 'kill $server' EXIT
until grep -q "API:" "$log"; do sleep 0.2; done
"${SCHEMATHESIS:-st}" run http://127.0.0.1:8765/openapi.json --checks not_a_server_error --max-examples "${1:-1000}" \
    --phases "${PHASES:-examples,coverage,fuzzing}" --generation-deterministic --request-timeout 60 --continue-on-failure
curl -sf http://127.0.0.1:8765/health
