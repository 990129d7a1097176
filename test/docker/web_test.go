package docker_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// background is for what must be done after the test's own context ended.
func (r *rig) background() context.Context { return context.WithoutCancel(r.Context()) }

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
	r.publishes("www", "web", "8080->80/tcp")
	r.publishes("other", "web")

	www := r.addr("www", "web").String()
	r.works("hello from www", "other", "probe", "fetch", "http://www/")
	r.works("peer "+r.addr("other", "web").String(), "other", "probe", "fetch", "http://"+www+"/")
	r.works("1 packets received", "other", "ping", "-c", "1", "-W", "2", www)
	r.works("knock", "other", "probe", "udp", www+":7", "knock")
	for _, from := range []string{"other", "www"} { // hairpin
		r.works("hello from www", from, "probe", "fetch", "http://"+hostIP+":8080/")
	}

	r.docker("restart", "-t", "0", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.docker("stop", "-t", "0", "www")
	r.noPage(r.host(), "127.0.0.1:8080")
	r.noPage(r.outside(), hostIP+":8080")
	r.docker("start", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www")
}

// egress: what containers reach, and as whom they appear there.
func egress(r *rig) {
	r.network("web")
	r.run("client", "--network", "web")
	r.works("peer "+hostIP+":", "client", "probe", "fetch", "http://"+far+"/")
	r.works("peer "+hostIP+":", "client", "probe", "fetch", "http://"+engine.FarName+"/")
	r.works("peer "+hostIP+":", "client", "probe", "udp", far+":7", "knock")
	r.works(strings.Repeat("x", 4000), "client", "probe", "udp", far+":7", strings.Repeat("x", 4000))
	r.works("1 packets received", "client", "ping", "-c", "1", "-W", "2", far)
	r.works(far, "client", "probe", "resolve", engine.FarName)
	r.works("20000000 bytes came back", "client", "probe", "bulk", far+":7", "20000000")
	r.fails("client", "probe", "resolve", "nobody.example.test")

	start := time.Now()
	r.fails("client", "probe", "fetch", "http://"+far+":81/")
	if took := time.Since(start); took > 4*time.Second {
		r.Errorf("a refused connection took %v: the refusal does not reach the container", took)
	}
}

// internal networks have no way out and none in, not even for a container that makes itself a default route.
func internal(r *rig) {
	r.network("web", "--internal", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("other", "--network", "web", "--cap-add", "NET_ADMIN")
	r.works("hello from www", "other", "probe", "fetch", "http://www/")
	for _, family := range []string{"-4", "-6"} {
		out, err := r.in("other", "ip", family, "route")
		if err != nil || !strings.Contains(out, "dev eth0") || strings.Contains(out, "default") {
			r.Errorf("ip %s route in an internal network: %q, %v", family, out, err)
		}
	}
	isolated := func(addrs ...string) {
		r.Helper()
		var tries sync.WaitGroup
		for _, addr := range addrs {
			tries.Go(func() {
				r.fails("other", "ping", "-c", "1", "-W", "1", strings.Trim(addr, "[]"))
				r.fails("other", "probe", "udp", addr+":7", "knock")
				r.fails("other", "probe", "fetch", "http://"+addr+"/")
			})
		}
		tries.Wait()
	}
	world, host := []string{far, "[" + far6 + "]"}, []string{hostIP, "[" + hostIP6 + "]"}
	isolated(append(world, host...)...)
	r.works("", "other", "ip", "route", "add", "default", "via", "10.213.0.1")
	r.works("", "other", "ip", "-6", "route", "add", "default", "via", "fd00:213::1")
	if r.mode.name == usermode.name {
		world = append(world, host...) // on a bridge the host is a neighbour of the containers, as with Docker's own driver
	}
	isolated(world...)
	r.noPage(r.host(), "127.0.0.1:8080")
	r.noPage(r.outside(), hostIP+":8080")
}

func ipv6(r *rig) {
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web", "--ip6", "fd00:213::80", "-p", "8080:80", "-p", "5353:7/udp", "-p", "[::1]:8081:80")
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
	r.works("peer "+hostIP+":", "other", "probe", "fetch", "http://"+far+"/")
	r.works("1 packets received", "other", "ping", "-6", "-c", "1", "-W", "2", far6)
	r.works(far6, "other", "probe", "resolve", engine.FarName)
	r.works("5000000 bytes came back", "other", "probe", "bulk", "["+far6+"]:7", "5000000")
}

// hostLoopback: a container reaches the host's services on its addresses at most, never those on the loopback.
func hostLoopback(r *rig) {
	var servers []net.Listener
	err := r.e.Do(func() error {
		for _, addr := range []string{"127.0.0.1:9901", "[::1]:9901", hostIP + ":9902"} {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return err
			}
			servers = append(servers, l)
		}
		return nil
	})
	if err != nil {
		r.Fatal(err)
	}
	var serving sync.WaitGroup
	defer serving.Wait()
	for _, l := range servers {
		defer l.Close()
		serving.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		})
	}
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("client", "--network", "web")
	r.works("", "client", "probe", "tcp", hostIP+":9902")
	for _, addr := range []string{"10.213.0.1", "[fd00:213::1]", hostIP, "[" + hostIP6 + "]", "169.254.169.254", "[fe80::1%eth0]"} {
		r.fails("client", "probe", "tcp", addr+":9901")
	}
}

// hostUntouched: a usermode network changes nothing on the host, and needs nothing there.
func hostUntouched(r *rig) {
	before := r.snapshot()
	if _, err := r.e.Run(r.Context(), "sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv6/conf/all/forwarding"); err != nil {
		r.Fatal(err)
	}
	defer func() {
		if _, err := r.e.Run(r.background(), "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"); err != nil {
			r.Error(err)
		}
	}()
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	if out, err := r.e.Run(r.Context(), "cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"); err != nil || out != "0\n0" {
		r.Errorf("forwarding is %q, %v, want it still off", out, err)
	}
	for line := range strings.Lines(before.Diff(r.snapshot())) {
		for _, section := range []string{"links", "routes", "iptables", "ip6tables", "nft"} {
			if strings.Contains(line[:min(len(line), 14)], " "+section+":") {
				r.Errorf("changed on the host: %s", line)
			}
		}
	}
}

// severalNetworks connects and disconnects a running container.
func severalNetworks(r *rig) {
	r.network("a")
	r.network("b")
	r.run("www", "--network", "a", "-p", "8080:80")
	r.run("ca", "--network", "a")
	r.run("cb", "--network", "b")
	r.fails("cb", "probe", "resolve", "www")
	r.docker("network", "connect", "--alias", "page", "b", "www")
	r.works("hello from www", "ca", "probe", "fetch", "http://www/")
	r.works("hello from www", "cb", "probe", "fetch", "http://page/")
	r.works("hello from cb", "www", "probe", "fetch", "http://cb/")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.page(r.host(), "127.0.0.1:8080", "hello from www")

	r.docker("network", "disconnect", "a", "www") // the one that has its default route and its ports
	r.fails("ca", "probe", "resolve", "www")
	r.works("hello from www", "cb", "probe", "fetch", "http://www/")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.page(r.outside(), hostIP+":8080", "hello from www")

	r.docker("network", "connect", "a", "www")
	r.works("hello from www", "ca", "probe", "fetch", "http://www/")
	r.docker("stop", "-t", "0", "www")
	r.docker("start", "www")
	r.works("hello from www", "ca", "probe", "fetch", "http://www/")
	r.works("hello from www", "cb", "probe", "fetch", "http://www/")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.refused([]string{"active endpoints"}, "network", "rm", "a")
}

// isolation: networks of either kind do not see each other, nor Docker's own.
func isolation(r *rig) {
	r.network("a")
	r.network("b")
	modes := []mode{bridge, usermode, own}
	for i, m := range modes {
		args := append([]string{"network", "create"}, m.args...)
		r.docker(append(args, fmt.Sprint("x", i))...)
		r.run(fmt.Sprint("cx", i), "--network", fmt.Sprint("x", i))
	}
	r.run("ca", "--network", "a")
	r.run("cb", "--network", "b")
	var tries sync.WaitGroup
	reach := func(from, to, network string) {
		r.Helper()
		addr := r.addr(to, network).String()
		tries.Go(func() {
			r.fails(from, "probe", "fetch", "http://"+addr+"/")
			r.fails(from, "ping", "-c", "1", "-W", "1", addr)
		})
	}
	reach("ca", "cb", "b")
	for i := range modes {
		reach("ca", fmt.Sprint("cx", i), fmt.Sprint("x", i))
		reach(fmt.Sprint("cx", i), "ca", "a")
	}
	tries.Wait()
	// And from the outside, a router that knows the way does not get in either.
	to := r.addr("ca", "a").String()
	if _, err := r.e.RunOutside(r.Context(), "ip", "route", "add", to, "via", hostIP); err != nil {
		r.Fatal(err)
	}
	r.noPage(r.outside(), to+":80")
	if _, err := r.e.RunOutside(r.Context(), "ip", "route", "del", to); err != nil {
		r.Fatal(err)
	}
}
