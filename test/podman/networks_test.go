package podman_test

import (
	"strings"

	"github.com/usernet/usernet/test/engine"
)

// severalNetworks: a container on two networks, one of them connected and disconnected while it runs. What is published
// works through whichever it is on, and clients show as who they are.
func severalNetworks(r *rig) {
	r.network("left")
	r.network("right")
	r.run("www", "--network", "left", "-p", "8080:80", "-p", "5353:7/udp")
	r.run("cleft", "--network", "left")
	r.run("cright", "--network", "right")
	all := func(networks ...string) {
		r.Helper()
		for _, n := range networks {
			r.works("hello from www", "c"+n, "probe", "fetch", "http://"+r.addr("www", n).String()+"/")
		}
		r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
		r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
		r.page(r.host(), "127.0.0.1:8080", "hello from www")
		r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	}
	all("left")
	r.podman("network", "connect", "right", "www")
	all("left", "right")
	r.podman("network", "disconnect", "left", "www")
	all("right")
	if out, err := r.in("www", "ip", "rule"); err != nil || strings.Count(out, "from 10.") != 1 {
		r.Errorf("rules of the network that was left: %s, %v", out, err)
	}
	r.podman("network", "connect", "left", "www")
	all("left", "right")
	r.podman("restart", "-t", "0", "www")
	all("left", "right")
}

// mixed: a container on one of our networks and one of netavark's own.
func mixed(r *rig) {
	r.network("ours")
	r.podman("network", "create", "theirs")
	// A network of mode bridge has set the policy DROP, and netavark with nftables has no rule where that would see it.
	if _, err := r.e.Run(r.Context(), "iptables", "-P", "FORWARD", "ACCEPT"); err != nil {
		r.Fatal(err)
	}
	r.run("www", "--network", "ours", "--network", "theirs", "-p", hostIP+":8080:80")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
}

// pod: containers that share a namespace.
func pod(r *rig) {
	r.network("web")
	// Ports that no case before published by usernet itself: Podman 6 binds without SO_REUSEADDR, and connections in
	// TIME_WAIT are in its way.
	r.podman("pod", "create", "--name", "pod", "--infra-command", "/bin/sleep 9999", "--infra-image", engine.Image, "--network", "web", "-p", "8080:80", "-p", "8091:81")
	r.podman("run", "-d", "--pod", "pod", "--name", "one", engine.Image, "probe", "serve", "80")
	r.podman("run", "-d", "--pod", "pod", "--name", "two", engine.Image, "probe", "fetch", "http://127.0.0.1/")
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
	r.podman("pod", "stop", "-t", "0", "pod")
	r.noPage(r.outside(), hostIP+":8080")
	r.podman("pod", "start", "pod")
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
}

// reload: podman network reload is a teardown and a setup in the same namespace.
func reload(r *rig) {
	r.network("web", "--ipv6")
	r.run("www", "--network", "web", "-p", "8080:80", "-p", "5353:7/udp")
	r.run("other", "--network", "web")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	before, err := r.in("www", "ip", "addr", "show", "eth0")
	if err != nil {
		r.Fatal(err)
	}
	for range 2 {
		r.podman("network", "reload", "www")
		r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
		r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
		r.works("hello from www", "other", "probe", "fetch", "http://"+r.addr("www", "web").String()+"/")
		r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	}
	after, err := r.in("www", "ip", "addr", "show", "eth0")
	if got, want := addressLines(after), addressLines(before); err != nil || got != want {
		r.Errorf("addresses after the reload %q, %v; before %q", got, err, want)
	}
	r.podman("network", "reload", "--all")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
}

// addressLines are the MAC and the chosen IP addresses in what ip addr says.
func addressLines(text string) string {
	var keep []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 1 && (f[0] == "link/ether" || strings.HasPrefix(f[0], "inet")) && !strings.HasPrefix(f[1], "fe80") {
			keep = append(keep, f[1])
		}
	}
	return strings.Join(keep, " ")
}

// chosenAddresses: every address, name and route that a user can choose.
func chosenAddresses(r *rig) {
	r.network("web", "--subnet", "10.213.0.0/24", "--gateway", "10.213.0.254", "--ip-range", "10.213.0.4/30",
		"--subnet", "fd00:213::/64", "--gateway", "fd00:213::ffff", "--route", "10.99.0.0/24,10.213.0.9", "--route", "10.98.0.0/24,10.213.0.9,50")
	r.run("www", "--network", "web:ip=10.213.0.50,ip6=fd00:213::50,mac=02:00:00:00:be:ef,interface_name=lan7", "-p", "8080:80")
	r.run("client", "--network", "web")
	r.works("10.213.0.50/24", "www", "ip", "-4", "addr", "show", "lan7")
	r.works("fd00:213::50/64", "www", "ip", "-6", "addr", "show", "lan7")
	r.works("02:00:00:00:be:ef", "www", "ip", "link", "show", "lan7")
	r.works("via 10.213.0.254 dev lan7  metric 101", "www", "ip", "route", "show", "default")
	r.works("via fd00:213::ffff", "www", "ip", "-6", "route", "show", "default")
	r.works("10.99.0.0/24 via 10.213.0.9 dev lan7  metric 100", "www", "ip", "route")
	r.works("10.98.0.0/24 via 10.213.0.9 dev lan7  metric 50", "www", "ip", "route")
	r.works("hello from www", "client", "probe", "fetch", "http://10.213.0.50/")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.refused([]string{"10.213.0.50"}, "run", "-d", "--network", "web:ip=10.213.0.50", engine.Image)
	if r.mode.name != own.name {
		e := r.endpoint("www", "web")
		if e.IPv4.String() != "10.213.0.50/24" || e.IPv6.String() != "fd00:213::50/64" || e.MAC != "02:00:00:00:be:ef" {
			r.Errorf("usernet ps lists %+v", e)
		}
	}
	r.podman("rm", "-f", "-t", "0", "www")
	r.run("www", "--network", "web:ip=10.213.0.50")
}

// options: those of the network, by all their names.
func options(r *rig) {
	r.network("small", "-o", "mtu=1400")
	r.run("ca", "--network", "small")
	r.works("mtu 1400", "ca", "ip", "link", "show", "eth0")
	r.works("5000000 bytes came back", "ca", "probe", "bulk", far+":7", "5000000")
	r.network("large", "-o", "com.docker.network.driver.mtu=9000", "-o", "metric=7", "-o", "isolate=true")
	r.run("cb", "--network", "large")
	r.works("mtu 9000", "cb", "ip", "link", "show", "eth0")
	r.works("metric 7", "cb", "ip", "route", "show", "default")
	r.network("alone", "--label", "usernet.icc=false", "-o", "no_default_route=true")
	r.run("cc", "--network", "alone")
	r.run("cd", "--network", "alone")
	r.fails("cc", "probe", "fetch", "http://"+r.addr("cd", "alone").String()+"/")
	if out, err := r.in("cc", "ip", "route"); err != nil || strings.Contains(out, "default") {
		r.Errorf("routes: %q, %v", out, err)
	}
	r.network("plain", "--ipam-driver", "none")
	r.run("ce", "--network", "plain")
	r.works("peer "+hostIP+":", "ce", "probe", "fetch", "http://"+far+"/")
}

// badInput: what is wrong is told at once, in one sentence, and leaves nothing behind.
func badInput(r *rig) {
	create := func(want string, args ...string) {
		r.Helper()
		r.refused([]string{want}, append(append(append([]string{"network", "create"}, r.mode.args...), args...), "bad")...)
	}
	create(`option "mttu": unknown; did you mean mtu? known are bridge,`, "-o", "mttu=1400")
	create("option mtu=12", "-o", "mtu=12")
	create("option metric=high: want a number", "-o", "metric=high")
	create("isolate", "-o", "isolate=false")
	create(`usernet.mtu=1300`, "-o", "mtu=1400", "--label", "usernet.mtu=1300")
	create("interface name", "--interface-name", "br7")
	if r.mode.name == bridge.name {
		r.network("web", "--subnet", "10.213.0.0/24")
		create("10.213.0.0/24", "--subnet", "10.213.0.0/25")
		r.network("named", "-o", "bridge=br7")
	}
	r.network("small", "--subnet", "10.214.0.0/30")
	r.refused([]string{`option "colour"`}, "run", "-d", "--network", "small:colour=red", engine.Image)
	r.run("only", "--network", "small")
	r.refused([]string{"10.214.0"}, "run", "-d", "--network", "small", engine.Image) // Podman's own message
}
