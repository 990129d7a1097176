#!/bin/sh
# What make demo runs: usernet's main job. With Docker on the machine, on a private engine of that version; without, by commands on
# networks of their own. make demo ENGINE=docker installs Docker if it has to, ENGINE=none needs neither it nor root.
set -eu
cd "$(dirname "$0")/.."
engine=${ENGINE:-none}
if [ -z "${ENGINE:-}" ] && [ "$(id -u)" = 0 ] && [ -x /usr/sbin/dockerd ]; then engine=docker; fi
if [ "$engine" = docker ]; then test/setup.sh demo; fi
USERNET_BIN=$PWD/bin/usernet exec go run ./test/demo "$engine"
