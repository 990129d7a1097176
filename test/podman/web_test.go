package podman_test

import (
	"net"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// web is the main thing: a page from a container, fetched from everywhere.
func web(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("other", "--network", "web")
	for _, host := range localAll {
		r.page(r.host(), host+":8080", "hello from www")
	}
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.page(r.outside(), "["+hostIP6+"]:8080", "hello from www")

	www := r.addr("www", "web").String()
	r.works("peer "+r.addr("other", "web").String(), "other", "probe", "fetch", "http://"+www+"/")
	r.works("1 packets received", "other", "ping", "-c", "1", "-W", "2", www)
	r.works("knock", "other", "probe", "udp", www+":7", "knock")
	for _, from := range []string{"other", "www"} { // hairpin
		r.works("hello from www", from, "probe", "fetch", "http://"+hostIP+":8080/")
	}

	r.podman("restart", "-t", "0", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.podman("stop", "-t", "0", "www")
	r.noPage(r.host(), "127.0.0.1:8080")
	r.noPage(r.outside(), hostIP+":8080")
	r.podman("start", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www")
}

// egress: what containers reach, and as whom they appear there.
func egress(r *rig) {
	r.network("web")
	r.run("client", "--network", "web")
	r.works("peer "+hostIP+":", "client", "probe", "fetch", "http://"+far+"/")
	r.works("peer "+hostIP+":", "client", "probe", "fetch", "http://"+engine.FarName+"/")
	r.works("peer "+hostIP+":", "client", "probe", "udp", far+":7", "knock")
	r.works("1 packets received", "client", "ping", "-c", "1", "-W", "2", far)
	r.works(far, "client", "probe", "resolve", engine.FarName)
	r.works("20000000 bytes came back", "client", "probe", "bulk", far+":7", "20000000")
	r.fails("client", "probe", "fetch", "http://"+far+":81/")
	for _, addr := range []string{"169.254.169.254", "127.0.0.1", hostIP} {
		r.fails("client", "probe", "tcp", addr+":9901")
	}
}

// internal networks have no way out and none in.
func internal(r *rig) {
	r.network("web", "--internal", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("other", "--network", "web", "--cap-add", "NET_ADMIN")
	r.works("hello from www", "other", "probe", "fetch", "http://"+r.addr("www", "web").String()+"/")
	for _, family := range []string{"-4", "-6"} {
		out, err := r.in("other", "ip", family, "route")
		if err != nil || !strings.Contains(out, "dev eth0") || strings.Contains(out, "default") {
			r.Errorf("ip %s route in an internal network: %q, %v", family, out, err)
		}
	}
	r.works("", "other", "ip", "route", "add", "default", "via", "10.213.0.1")
	var tries sync.WaitGroup
	for _, addr := range []string{far, "[" + far6 + "]"} {
		tries.Go(func() {
			r.fails("other", "probe", "udp", addr+":7", "knock")
			r.fails("other", "probe", "fetch", "http://"+addr+"/")
		})
	}
	tries.Wait()
	if r.mode.name != rootless.name { // rootless Podman has a forwarder inside of the container
		r.noPage(r.outside(), hostIP+":8080")
	}
}

func ipv6(r *rig) {
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	started := time.Now()
	r.run("www", "--network", "web:ip6=fd00:213::80", "-p", "8080:80", "-p", "5353:7/udp", "-p", "[::1]:8081:80")
	r.Logf("started in %v", time.Since(started).Round(time.Millisecond))
	// No address waits for the detection of duplicates.
	if out, err := r.in("www", "ip", "-6", "addr", "show", "eth0"); err != nil || !strings.Contains(out, "fd00:213::80/64") || strings.Contains(out, "fd00:213::80/64 scope global tentative") {
		r.Errorf("addresses: %q, %v", out, err)
	}
	r.run("other", "--network", "web")
	r.works("hello from www", "other", "probe", "fetch", "http://[fd00:213::80]/")
	r.works("1 packets received", "other", "ping", "-6", "-c", "1", "-W", "2", "fd00:213::80")
	for _, host := range localAll {
		r.page(r.host(), host+":8080", "hello from www")
	}
	r.page(r.outside(), "["+hostIP6+"]:8080", "hello from www", "peer ["+router6+"]:")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.udp(r.outside(), "["+hostIP6+"]:5353", "peer ["+router6+"]:")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.page(r.host(), "[::1]:8081", "hello from www")
	r.noPage(r.host(), "127.0.0.1:8081")
	r.noPage(r.outside(), "["+hostIP6+"]:8081")
	r.works("peer ["+hostIP6+"]:", "other", "probe", "fetch", "http://["+far6+"]/")
	r.works("peer ["+hostIP6+"]:", "other", "probe", "udp", "["+far6+"]:7", "knock")
	r.works("1 packets received", "other", "ping", "-6", "-c", "1", "-W", "2", far6)

	// Podman asks the driver for an IPv6 subnet when it is given none.
	r.network("chosen", "--ipv6")
	r.run("six", "--network", "chosen")
	r.works("peer ["+hostIP6+"]:", "six", "probe", "fetch", "http://["+far6+"]/")
}

// hostUntouched: a usermode network without published ports changes nothing on the host, and needs nothing there.
func hostUntouched(r *rig) {
	before := r.snapshot()
	if _, err := r.e.Run(r.Context(), "sh", "-c", "cat /proc/sys/net/ipv4/ip_forward >/tmp/forward; echo 0 >/proc/sys/net/ipv4/ip_forward"); err != nil {
		r.Fatal(err)
	}
	defer r.e.Run(r.background(), "sh", "-c", "cat /tmp/forward >/proc/sys/net/ipv4/ip_forward")
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	if out, err := r.e.Run(r.Context(), "cat", "/proc/sys/net/ipv4/ip_forward"); err != nil || out != "0" {
		r.Errorf("forwarding is %q, %v, want it still off", out, err)
	}
	for line := range strings.Lines(before.Diff(r.snapshot())) {
		for _, section := range []string{"links", "routes", "iptables", "ip6tables", "nft", "sockets"} {
			if strings.Contains(line[:min(len(line), 14)], " "+section+":") {
				r.Errorf("changed on the host: %s", line)
			}
		}
	}
}

// isolation: networks of either kind do not see each other, nor Podman's own.
func isolation(r *rig) {
	modes := []mode{bridge, usermode, own}
	r.network("home")
	r.run("ca", "--network", "home")
	for _, m := range modes {
		name := "x" + m.name
		r.podman(append(append([]string{"network", "create"}, m.args...), name)...)
		r.run("c"+name, "--network", name)
	}
	var tries sync.WaitGroup
	reach := func(from, to, network string) {
		r.Helper()
		addr := r.addr(to, network).String()
		tries.Go(func() { r.fails(from, "probe", "fetch", "http://"+addr+"/") })
	}
	for _, m := range modes {
		name := "x" + m.name
		reach("ca", "c"+name, name)
		if m.name != own.name || r.mode.name != bridge.name {
			reach("c"+name, "ca", "home")
		}
	}
	tries.Wait()
}

// listen takes a port of the host, as a stranger to Podman and usernet would.
func (r *rig) listen(network, addr string) net.Listener {
	r.Helper()
	var l net.Listener
	err := r.e.Do(func() (err error) {
		l, err = net.Listen(network, addr)
		return err
	})
	if err != nil {
		r.Fatal(err)
	}
	return l
}
