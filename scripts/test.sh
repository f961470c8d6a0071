#!/usr/bin/env bash
# Set up .venv, then run the tests that are not marked slow. Arguments pass through to pytest, except:
#   --with-torch   also install the extra `torch`, so that the tests that need it run
#   --with-pod     also install the extra `pod`, libtpu, so that a program is compiled for a TPU slice
#   --with-app     also install the extra `app`, Gradio, so that the web page is opened in Chromium, if there is one
#   --slow         run those marked slow instead: whole commands and jobs, killed and continued; `.ci/run` runs both
# PYTHON and SFD_VENV choose another Python and another environment, see setup.sh.
# Two processes share the test files in their order; the longest, the demo's, is among the first.
# SFD_TEST_PROCESSES=0 runs them in one process, for a debugger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=(dev)
marked="not slow"
arguments=()
for argument in "$@"; do
    case $argument in
        --with-torch) extras+=(torch) ;;
        --with-pod) extras+=(pod) ;;
        --with-app) extras+=(app) ;;
        --slow) marked=slow ;;
        *) arguments+=("$argument") ;;
    esac
done
bash scripts/setup.sh "${extras[@]}"
exec "${SFD_VENV:-.venv}/bin/python" -m pytest -q --durations=25 -m "$marked" \
    -n "${SFD_TEST_PROCESSES:-2}" --dist=loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
