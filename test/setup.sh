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

# add_to_sid PACKAGE... adds to $cache/sid those that it lacks. The caller has the lock.
add_to_sid() {
	missing=
	for p in "$@"; do
		case $(dpkg-query --admindir="$cache/sid/var/lib/dpkg" -W -f '${Status}' "$p" 2>/dev/null) in
		*' installed') ;;
		*) missing="$missing $p" ;;
		esac
	done
	if [ -z "$missing" ]; then return; fi
	say "adding to $cache/sid:$missing"
	(logged chroot "$cache/sid" apt-get update -q -o Acquire::Check-Valid-Until=false) || true
	# shellcheck disable=SC2086
	logged guarded "$cache/sid" chroot "$cache/sid" apt-get install -qy --no-install-recommends $missing
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
	set -- passt slirp4netns uidmap procps
	(add_to_sid "$@") || for p in "$@"; do (add_to_sid "$p") || say "going on without $p"; done
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

# vm adds to $cache/sid what virtual machines run on, and makes $cache/vm1: the machine's own Debian kernel for clouds, the
# modules that it needs to find its disk, in the order of the file list, and the disk. Who changes what is on it, counts it up.
vm() (
	exec 9>"$cache/lock"
	flock 9
	add_to_sid qemu-system-x86 seabios vhost-device-vsock
	if [ -e "$cache/vm1" ]; then return; fi
	say "making $cache/vm1"
	new=$(mktemp -d "$cache/vm1.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	trap 'exit 1' INT TERM
	logged apt-get update -q
	kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
	cd "$new"
	logged apt-get download -q "$kernel"
	dpkg-deb -x linux-image-*.deb deb
	find deb -name '*.ko.xz' -exec unxz {} +
	disk
	mkdir modules
	for m in virtio_pci virtio_blk virtio_console ext4 overlay; do # one that is not there is in the kernel
		sed -n "s,^\\([^:]*/$m.ko\\):,\\1,p" disk/usr/lib/modules/*/modules.dep | tr ' ' '\n' | tac
	done | awk '!seen[$0]++' >needed
	while read -r m; do
		cp disk/usr/lib/modules/*/"$m" modules/
		basename "$m" >>modules/list
	done <needed
	mv deb/boot/vmlinuz-* vmlinuz
	logged mke2fs -q -t ext4 -O '^has_journal' -m 0 -d disk disk.ext4 "$(($(du -sm disk | cut -f 1) * 9 / 8 + 32))M"
	rm -rf disk deb needed ./*.deb
	chmod -R a+rX .
	mv -T "$new" "$cache/vm1"
	trap - EXIT INT TERM
)

# disk makes the directory disk, the root of a virtual machine: Docker and what it needs from $cache/sid, busybox, and the kernel
# modules from the directory deb.
disk() {
	mkdir -p disk/usr/bin disk/usr/lib disk/usr/lib64 disk/var/lib/docker
	for d in dev etc memory payload proc root run sys tmp; do mkdir "disk/$d"; done
	for l in usr/bin usr/lib usr/lib64; do ln -s "$l" "disk/${l#usr/}"; done
	ln -s usr/bin disk/sbin
	ln -s bin disk/usr/sbin
	set -- dockerd containerd containerd-shim-runc-v2 runc docker docker-init docker-proxy xtables-nft-multi nft ip conntrack
	for p in "$@"; do cp -L "$cache/sid$(chroot "$cache/sid" sh -c "command -v $p")" disk/usr/bin/; done
	for f in $(chroot "$cache/sid" sh -c 'for p; do ldd "$(command -v "$p")"; done; ls /usr/lib/*/xtables/*.so' sh "$@" 2>/dev/null |
		grep -o '/[^ ]*' | grep -v ':$' | sort -u); do
		mkdir -p "disk${f%/*}"
		cp -L "$cache/sid$f" "disk$f"
	done
	for p in iptables ip6tables; do
		for l in "$p" "$p-save" "$p-restore"; do ln -s xtables-nft-multi "disk/usr/bin/$l"; done
	done
	cp /bin/busybox disk/usr/bin/
	for a in $(/bin/busybox --list); do ln -s busybox "disk/usr/bin/$a" 2>/dev/null || true; done
	cp -a deb/lib/modules disk/usr/lib/
	/bin/busybox depmod -b disk/usr "$(ls deb/lib/modules)"
}

if [ "$(id -u)" != 0 ]; then
	say "run me as root"
	exit 1
fi
packages docker.io iptables nftables busybox-static conntrack iproute2 iputils-ping ca-certificates
if [ "${1:-}" = demo ]; then exit; fi
packages debootstrap e2fsprogs xz-utils docker-compose runc crun gcc libc6-dev git make
sid
peers
if [ "${1:-}" = bench ]; then exit; fi
podman
cni
vm
