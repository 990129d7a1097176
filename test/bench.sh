#!/bin/sh
# What make bench runs: usernet's networks beside Docker's own and the other user-mode networks, in one run. For
# its flags: make bench ARGS=-h.
set -eu
cd "$(dirname "$0")/.."
test/setup.sh bench
# It also runs in containers, which have no C library.
USERNET_BIN=$PWD/bin/usernet CGO_ENABLED=0 exec go run ./test/bench "$@"
