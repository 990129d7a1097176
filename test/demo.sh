#!/bin/sh
# What make demo runs: usernet's main job, on a private Docker engine that goes afterwards.
set -eu
cd "$(dirname "$0")/.."
test/setup.sh demo
USERNET_BIN=$PWD/bin/usernet exec go run ./test/demo
