#!/bin/sh
# Installs what the tests and the demo need on a Debian machine, and makes the root that the newer Docker runs in.
# Quick when all is there. It never starts a service: the tests run engines of their own, in their own namespaces.
#
#   test/setup.sh          everything
#   test/setup.sh demo     only what make demo needs
#   test/setup.sh bench    only what make bench needs
set -eu

cache=${USERNET_TEST_CACHE:-/var/cache/usernet-test}
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 LC_ALL=C.UTF-8

say() { echo "setup: $*" >&2; }

# guarded DIR COMMAND... runs COMMAND while DIR/usr/sbin/policy-rc.d forbids packages to start services.
guarded() (
	policy=$1/usr/sbin/policy-rc.d
	shift
	if [ -e "$policy" ] && [ ! -e "$policy.usernet" ]; then mv "$policy" "$policy.usernet"; fi
	restore() {
		rm -f "$policy"
		if [ -e "$policy.usernet" ]; then mv "$policy.usernet" "$policy"; fi
	}
	trap restore EXIT
	trap 'exit 1' INT TERM
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	"$@"
)

# logged COMMAND... keeps what a command prints in $cache/setup.log, and shows the end of it when the command fails.
logged() {
	if "$@" >"$cache/setup.log" 2>&1; then return; fi
	tail -n 20 "$cache/setup.log" >&2
	say "$* failed"
	exit 1
}

# packages NAME... installs those that are missing.
packages() {
	missing=
	for p in "$@"; do
		case $(dpkg-query -W -f '${Status}' "$p" 2>/dev/null) in
		*' installed') ;;
		*) missing="$missing $p" ;;
		esac
	done
	if [ -z "$missing" ]; then return; fi
	say "installing$missing"
	mkdir -p "$cache"
	logged apt-get update -q
	# shellcheck disable=SC2086
	logged guarded / apt-get install -qy --no-install-recommends $missing
}

# mirror prints the address that apt fetches Debian's main archive from.
mirror() {
	apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Component: main' 'Origin: Debian' 'Label: Debian' |
		sort -u | head -n 1
}

# debian NAME SUITE PROGRAM PACKAGE... makes $cache/NAME: a Debian of that suite with the packages in it, PROGRAM being a
# file of theirs. It appears whole or not at all. The packages in $experimental are then taken from there, if they are there.
debian() (
	name=$1 suite=$2 program=$3
	shift 3
	root=$cache/$name
	if [ -e "$root/$program" ]; then return; fi
	say "making $root"
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock 9
	if [ -e "$root/$program" ]; then return; fi
	new=$(mktemp -d "$cache/$name.XXXXXX")
	trap 'rm -rf --one-file-system "$new"' EXIT
	trap 'exit 1' INT TERM
	url=$(mirror)
	if [ -z "$url" ]; then
		say "apt knows no Debian mirror"
		exit 1
	fi
	logged debootstrap --variant=minbase "$suite" "$new" "$url"
	for f in $(ls /etc/apt/apt.conf.d/*proxy* 2>/dev/null); do cp "$f" "$new/etc/apt/apt.conf.d/"; done
	logged guarded "$new" chroot "$new" apt-get install -qy --no-install-recommends "$@"
	if [ -n "${experimental:-}" ]; then
		echo "deb $url experimental main" >"$new/etc/apt/sources.list.d/experimental.list"
		logged chroot "$new" apt-get update -q -o Acquire::Check-Valid-Until=false
		# shellcheck disable=SC2086
		logged guarded "$new" chroot "$new" apt-get install -qy --no-install-recommends -t experimental $experimental
	fi
	logged chroot "$new" apt-get clean
	chmod 755 "$new"
	mv -T "$new" "$root"
	trap - EXIT INT TERM
)

# sid makes $cache/sid: Debian unstable with its Docker in it.
sid() {
	debian sid sid usr/sbin/dockerd docker.io docker-cli docker-compose iptables nftables iproute2 conntrack ca-certificates
}

# podman makes $cache/podman54, podman58 and podman61: Debian trixie, unstable and experimental with their Podman in them, and
# the docker command for Podman's Docker-compatible API.
podman() {
	set -- podman netavark aardvark-dns crun conmon passt uidmap docker-cli docker-compose \
		iptables nftables iproute2 conntrack ca-certificates
	debian podman54 trixie usr/bin/podman "$@"
	debian podman58 sid usr/bin/podman "$@"
	experimental='podman netavark' debian podman61 sid usr/bin/podman "$@"
}

# cni makes $cache/cni: Debian bookworm with what calls CNI plugins, containerd and the last Podman that does, and the
# official plugins; and it builds cnitool, which Debian does not have.
cni() {
	debian cni bookworm usr/bin/podman podman conmon crun runc containerd containernetworking-plugins \
		iptables nftables iproute2 conntrack ca-certificates
	if [ -e "$cache/cnitool" ]; then return; fi
	say "building cnitool"
	logged env CGO_ENABLED=0 GOBIN="$cache" go install -trimpath github.com/containernetworking/cni/cnitool@v1.3.1
}

# peers adds to $cache/sid and $cache/peers whom make bench compares usernet with. Who cannot be had is left out: the
# benchmark names those. (test/gvproxy, which compares answers with gvproxy's, does not do without.) What is built is newer than Debian's packages of it.
peers() (
	exec 9>"$cache/lock"
	flock 9
	for p in passt slirp4netns uidmap procps; do
		case $(dpkg-query --admindir="$cache/sid/var/lib/dpkg" -W -f '${Status}' "$p" 2>/dev/null) in
		*' installed') continue ;;
		esac
		say "adding $p to $cache/sid"
		if [ -z "${updated:-}" ]; then (logged chroot "$cache/sid" apt-get update -q -o Acquire::Check-Valid-Until=false) || true; fi
		updated=yes
		(logged guarded "$cache/sid" chroot "$cache/sid" apt-get install -qy --no-install-recommends "$p") || say "going on without $p"
	done
	built=$cache/peers
	for module in github.com/containers/gvisor-tap-vsock@v0.8.9 github.com/rootless-containers/rootlesskit/v3@v3.1.0; do
		if [ -e "$built/$(basename "$module")" ]; then continue; fi
		say "building $module"
		mkdir -p "$built/new"
		case $module in
		*gvisor-tap-vsock*) programs='gvproxy vm' ;;
		*) programs=rootlesskit ;;
		esac
		for p in $programs; do
			(logged env CGO_ENABLED=0 GOBIN="$built/new" go install -trimpath "${module%@*}/cmd/$p@${module#*@}") || continue 2
		done
		if [ -e "$built/new/vm" ]; then mv "$built/new/vm" "$built/new/gvforwarder"; fi
		mv "$built"/new/* "$built"
		rmdir "$built/new"
		touch "$built/$(basename "$module")"
	done
)

if [ "$(id -u)" != 0 ]; then
	say "run me as root"
	exit 1
fi
packages docker.io iptables nftables busybox-static conntrack iproute2 iputils-ping ca-certificates
if [ "${1:-}" = demo ]; then exit; fi
packages debootstrap docker-compose runc crun gcc libc6-dev git make
sid
peers
if [ "${1:-}" = bench ]; then exit; fi
podman
cni
