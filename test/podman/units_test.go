package podman_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/usernet/usernet/test/engine"
)

// quadlet: the example units in dist/quadlet. There is no systemd here; what Podman's generator makes of them is run by
// hand.
func quadlet(r *rig) {
	dir := r.e.Path("/etc/containers/systemd")
	r.must(os.MkdirAll(dir, 0o755))
	defer os.RemoveAll(dir)
	for _, name := range []string{"web.network", "web.container"} {
		text, err := os.ReadFile(filepath.Join("../../dist/quadlet", name))
		r.must(err)
		text = []byte(strings.NewReplacer("nginx:stable", "localhost/"+engine.Image, "mode=usermode", "mode="+r.mode.name).Replace(string(text)))
		r.must(os.WriteFile(filepath.Join(dir, name), text, 0o644))
	}
	units, err := r.e.Run(r.Context(), "/usr/libexec/podman/quadlet", "-dryrun")
	r.must(err)
	starts := regexp.MustCompile(`(?m)^ExecStart=(.*)$`).FindAllStringSubmatch(units, -1)
	if len(starts) != 2 {
		r.Fatalf("%d commands in %s", len(starts), units)
	}
	// The network is asked for first; systemd would put in the name of the unit and have the rest done by the service.
	for _, want := range []string{"network create", " run "} {
		for _, start := range starts {
			if line := start[1]; strings.Contains(line, want) {
				line = strings.NewReplacer("%N", "web", "%t", "/run", "--sdnotify=conmon", "", "--cgroups=split", "", "--cidfile=/run/web.cid", "").Replace(line)
				_, err := r.e.Run(r.Context(), "sh", "-c", line)
				r.must(err)
			}
		}
	}
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
	r.page(r.outside(), "["+hostIP6+"]:8080", "hello from")
}

// latency compares how long netavark takes to set a container up and to tear it down with our driver and with its own: alone
// on its network, which then comes and goes with it, and beside another one. Podman does it under a lock of the host's.
func latency(r *rig) {
	r.network("ours", "--disable-dns", "--subnet", "10.213.0.0/24")
	r.podman("network", "create", "--disable-dns", "--subnet", "10.214.0.0/24", "theirs")
	out, err := r.e.Run(r.Context(), "bash", "-c", latencyScript, "bash", filepath.Join(r.e.Dir, "plugins"))
	r.must(err)
	took := map[string]int{}
	for line := range strings.Lines(out) {
		var name string
		var us int
		if _, err := fmt.Sscan(line, &name, &us); err != nil {
			r.Fatalf("%q: %v", out, err)
		}
		took[name] = us
	}
	for _, what := range []string{"alone-setup", "alone-teardown", "beside-setup", "beside-teardown"} {
		us, them := took["ours-"+what], took["theirs-"+what]
		if us == 0 || them == 0 {
			r.Fatalf("no figures in %q", out)
		}
		ratio := float64(us) / float64(them)
		r.Logf("%s: %.1f ms, netavark's bridge %.1f ms: %.2f", what, float64(us)/1000, float64(them)/1000, ratio)
		if ratio > 2 { // 1.3 is what we want; this is for busy machines
			r.Errorf("%s takes %.2f times as long as netavark's bridge", what, ratio)
		}
	}
}

// latencyScript prints the median of each measured command in microseconds.
const latencyScript = `
set -e
cd /tmp
mkdir -p /run/netns netavark
netavark=/usr/lib/podman/netavark
for ns in c1 c2; do touch /run/netns/$ns; unshare -n mount --bind /proc/self/ns/net /run/netns/$ns; done
trap 'umount /run/netns/c1 /run/netns/c2; rm -rf /run/netns/c1 /run/netns/c2 /tmp/netavark /tmp/*.json' EXIT
request() { # NETWORK CONTAINER ADDRESS PORT INTERFACE
	cat >$1.$2.json <<-JSON
	{"container_id": "$2$2", "container_name": "$2", "networks": {"$1": {"static_ips": ["$3"], "interface_name": "$5"}},
	"port_mappings": [{"host_ip": "", "container_port": 80, "host_port": $4, "range": 1, "protocol": "tcp"}],
	"network_info": {"$1": $(cat /etc/containers/networks/$1.json)}}
	JSON
}
run() { $netavark --config /tmp/netavark --plugin-directory "$1" --file $2.$3.json $4 /run/netns/$3 >/dev/null; }
timed() {
	local from=$EPOCHREALTIME
	run "$1" $2 c1 $4
	local to=$EPOCHREALTIME
	echo $2-$3-$4 $((${to/./} - ${from/./})) >>times.json
}
request ours c1 10.213.0.2 8080 eth0; request theirs c1 10.214.0.2 8080 eth0
request ours c2 10.213.0.3 8081 eth0; request theirs c2 10.214.0.3 8082 eth1
rounds=11
for when in alone beside; do
	if [ $when = beside ]; then run "$1" ours c2 setup; run "$1" theirs c2 setup; fi
	for i in $(seq $rounds); do
		for net in ours theirs; do timed "$1" $net $when setup; timed "$1" $net $when teardown; done
	done
done
run "$1" ours c2 teardown; run "$1" theirs c2 teardown
for name in $(cut -d ' ' -f 1 times.json | sort -u); do
	echo $name $(grep "^$name " times.json | cut -d ' ' -f 2 | sort -n | sed -n $((rounds / 2 + 1))p)
done
`
