#!/usr/bin/env bash
# By hand: schemathesis against the server's own OpenAPI page; no answer may be a 5xx. fuzz_serving.sh [EXAMPLES a route]
# 520 a route are about 10,000 cases: 9 minutes on two cores. CHECKS: more of schemathesis' checks.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
log=$(mktemp)
.venv/bin/python -m stretto serve zoo:tiny --port 8765 --max-choices 2 --timeout 20 --max-model-len 128 >"$log" 2>&1 &
server=$!
trap 'kill $server' EXIT
until grep -q "API:" "$log"; do sleep 0.2; done
checks=not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance
failed=0
"${SCHEMATHESIS:-st}" run http://127.0.0.1:8765/openapi.json --checks "${CHECKS:-$checks}" --max-examples "${1:-520}" \
    --phases "${PHASES:-examples,coverage,fuzzing}" --generation-deterministic --request-timeout 60 --continue-on-failure || failed=$?
curl -sf http://127.0.0.1:8765/health
curl -sf http://127.0.0.1:8765/metrics | grep -E "^(stretto:requests_refused_total|vllm:request_success_total)"
exit $failed
