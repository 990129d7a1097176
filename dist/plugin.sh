#!/bin/sh
# plugin.sh [DIRECTORY]: make the directory of the managed Docker plugin (default: plugin), as docker plugin create wants
# it: config.json and rootfs/. It needs Go, and neither a registry nor a running engine.
#
#	dist/plugin.sh && docker plugin create usernet plugin && docker plugin enable usernet
#
# Bridge networks need iptables in the plugin; it is copied from this machine with the libraries it uses. It has to be
# of the kind that the machines use on which the plugin will run: IPTABLES=iptables-legacy or iptables-nft chooses
# another than this machine's default. Where there is none, the plugin has usermode networks only.
#
# VERSION is what usernet version prints; the default is git's name for the source.
set -eu
umask 022
cd "$(dirname "$0")/.."
out=${1:-plugin}
root=$out/rootfs

if [ -e "$out" ] && [ ! -e "$out/config.json" ]; then
	echo "plugin.sh: $out is there and is not a plugin's directory" >&2
	exit 1
fi
tables=$(command -v "${IPTABLES:-iptables}" || true)
if [ -z "$tables" ] && [ -n "${IPTABLES:-}" ]; then
	echo "plugin.sh: there is no $IPTABLES on this machine" >&2
	exit 1
fi
rm -rf "$out"
mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/run/docker/plugins" "$root/var/lib/usernet" "$root/etc"
# The sandboxes of containers are below /var/run/docker, as Docker writes it.
ln -s ../run "$root/var/run"

version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo unknown)}
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$version" -o "$root/usr/bin/usernet" ./cmd/usernet
cp plugin.json "$out/config.json"

# copy takes files as they are named into the root, with the libraries that they load.
copy() {
	{
		printf '%s\n' "$@"
		for f in "$@"; do
			ldd "$f" | sed -n 's|^.*=> \(/[^ ]*\) .*$|\1|p; s|^[[:space:]]*\(/[^ ]*\) .*$|\1|p'
		done
	} | sort -u | while read -r f; do
		cp -L --parents "$f" "$root"
	done
}

if [ -n "$tables" ]; then
	multi=$(readlink -f "$tables")
	copy "$multi"
	for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
		ln -s "$multi" "$root/usr/sbin/$name"
	done
	for dir in "${XTABLES_LIBDIR:-}" /usr/lib/*/xtables /usr/lib64/xtables /usr/lib/xtables; do
		if [ -d "$dir" ]; then
			copy "$dir"/*.so
		fi
	done
	echo "plugin.sh: $out is made, with $("$tables" --version)"
else
	echo "plugin.sh: $out is made, without iptables: networks of mode bridge will not work"
fi
