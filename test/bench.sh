#!/bin/sh
# What make bench runs: usernet's networks beside Docker's own, in one run. Flags: go run ./test/bench -h.
set -eu
cd "$(dirname "$0")/.."
test/setup.sh
USERNET_BIN=$PWD/bin/usernet exec go run ./test/bench "$@"
