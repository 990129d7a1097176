#!/bin/sh
# What make bench runs: usernet's networks beside Docker's own, in one run. Flags: go run ./test/bench -h.
set -eu
cd "$(dirname "$0")/.."
test/setup.sh
# It also runs in containers, which have no C library.
USERNET_BIN=$PWD/bin/usernet CGO_ENABLED=0 exec go run ./test/bench "$@"
