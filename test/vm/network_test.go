package vm_test

import (
	"fmt"
	"strings"
	"syscall"

	"github.com/usernet/usernet/test/engine"
)

// agent: the machine has its network over its vsock, by usernet at both ends.
func agent(r *rig) {
	r.modules("vmw_vsock_virtio_transport", "tun")
	g := r.gateway("-listen", r.hybrid())
	a := r.starts("agent", "usernet", "agent", "-debug")
	r.wholeNetwork("tap0")

	r.must(g.Stop(syscall.SIGKILL))
	g = r.gateway("-listen", r.hybrid())
	r.backAgain("the gateway was killed")
	r.kill(a)
	r.starts("agent", "usernet", "agent", "-debug")
	r.backAgain("the agent was killed")
	r.must(g.Stop(syscall.SIGTERM))
	if g.Status() != 0 {
		r.Errorf("the gateway ended with status %d", g.Status())
	}
}

// stream: the machine has its network by its network card.
func stream(r *rig) {
	g := r.gateway("-listen-qemu", "unix://"+r.frames())
	r.lease("eth0")
	r.wholeNetwork("eth0")

	r.must(g.Stop(syscall.SIGKILL))
	r.gateway("-listen-qemu", "unix://"+r.frames())
	r.backAgain("the gateway was killed")
}

// modules loads kernel modules in the machine.
func (r *rig) modules(names ...string) {
	r.Helper()
	r.in(append([]string{"modprobe", "-a"}, names...)...)
}

// lease gives the machine's network card an address by DHCP; the kernel does the rest by router advertisements.
func (r *rig) lease(card string) {
	r.Helper()
	r.modules("virtio_net")
	r.in("ip", "link", "set", card, "up")
	r.in("udhcpc", "-i", card, "-n", "-q", "-t", "20", "-s", "/payload/lease.sh")
}

// address waits for addresses of a card of the machine that begin like these.
func (r *rig) address(card string, want ...string) {
	r.Helper()
	r.wait("addresses", func() error {
		out, err := r.try("ip", "addr", "show", card)
		if err == nil {
			err = contains(out, want...)
		}
		if err == nil && strings.Contains(out, "tentative") {
			err = fmt.Errorf("not yet for use: %s", out)
		}
		return err
	})
}

// wholeNetwork checks what a machine gets of its gateway: addresses, names, the way out, and the way in.
func (r *rig) wholeNetwork(card string) {
	r.Helper()
	r.address(card, "inet "+first+"/24", "inet6 "+first6+"/64")
	r.works(want("default via "+gateway), "ip", "route")
	r.works(want("default via fe80::"), "ip", "-6", "route")
	r.names()
	r.wayOut()
	r.wayIn()
}

func (r *rig) names() {
	r.Helper()
	r.works(want("nameserver "+gateway), "cat", "/etc/resolv.conf")
	r.works(want(gateway), "probe", "resolve", "gateway.containers.internal")
	r.works(want(hostAlias), "probe", "resolve", "host.docker.internal")
	r.works(want(far, far6), "probe", "resolve", engine.FarName)
	r.works(want(far, far6), "probe", "resolve", engine.FarName, "tcp")
	r.call("/services/dns/add", `{"Name":"vm.test.","Records":[{"Name":"www","IP":"192.168.127.77"}]}`)
	r.works(want("192.168.127.77"), "probe", "resolve", "www.vm.test")
	if out, err := r.try("probe", "resolve", "nobody.vm.test"); err == nil {
		r.Errorf("nobody.vm.test is %s", out)
	}
}

func (r *rig) wayOut() {
	r.Helper()
	for _, addr := range []string{gateway, gateway6, hostIP, hostIP6, far, far6} {
		r.works(want("1 packets received"), "ping", "-c", "1", "-W", "10", addr)
	}
	r.works(want("peer "), "probe", "fetch", "http://"+engine.FarName+"/")
	r.works(want("peer "+hostIP+":"), "probe", "fetch", "http://"+far+"/")
	r.works(want("peer ["+hostIP6+"]:"), "probe", "fetch", "http://["+far6+"]/")
	r.works(want("peer "+hostIP+":", "knock"), "probe", "udp", far+":7", "knock")
	r.works(want("peer ["+hostIP6+"]:", "knock"), "probe", "udp", "["+far6+"]:7", "knock")
	r.works(want("500000 bytes came back"), "probe", "bulk", far+":7", "500000")
	if out, err := r.try("probe", "fetch", "http://"+far+":81/"); err == nil || !strings.Contains(err.Error(), "refused") {
		r.Errorf("a port that nobody listens on: %q, %v", out, err)
	}
	r.serves("127.0.0.1:8099")
	r.works(want("host sees 127.0.0.1:"), "probe", "fetch", "http://"+hostAlias+":8099/")
}

func (r *rig) wayIn() {
	r.Helper()
	r.starts("serve", "probe", "serve")
	expose, unexpose := "/services/forwarder/expose", "/services/forwarder/unexpose"
	r.call(expose, `{"local":":8080","remote":"`+first+`:80"}`)
	r.call(expose, `{"local":":5353","remote":"`+first+`:7","protocol":"udp"}`)
	r.page(r.outside(), hostIP+":8080", "hello from", "local "+first+":80")
	r.page(r.outside(), "["+hostIP6+"]:8080", "hello from")
	r.page(r.host(), "127.0.0.1:8080", "hello from")
	r.udp(hostIP+":5353", "knock")
	r.call(expose, `{"local":":8086","remote":"[`+first6+`]:80"}`)
	r.page(r.outside(), hostIP+":8086", "hello from", "local ["+first6+"]:80")
	r.page(r.outside(), "["+hostIP6+"]:8086", "hello from", "peer ["+router6+"]:")
	r.call(expose, `{"local":":8007","remote":"`+first+`:7"}`)
	r.bulk(hostIP+":8007", 4<<20, true)
	if err := contains(r.ports(), ":8080", ":5353"); err != nil {
		r.Errorf("usernet gateway ports: %v", err)
	}
	r.call(unexpose, `{"local":":8080"}`)
	r.call(unexpose, `{"local":":5353","protocol":"udp"}`)
	r.check(r.free(8080))
	r.check(r.free(5353))
	// A machine opens ports of the host by itself at the gateway's port 80; wget has no other way to tell of success than its status.
	r.works(nil, "wget", "-q", "-O", "-", "--post-data", `{"local":":8081","remote":"`+first+`:80"}`, "http://"+gateway+expose)
	r.page(r.outside(), hostIP+":8081", "hello from")
}

// backAgain waits for the machine to reach the outside, and checks that it is reached. Forwards end with the gateway.
func (r *rig) backAgain(after string) {
	r.Helper()
	for _, way := range []struct{ want, args []string }{
		{want("peer " + hostIP + ":"), []string{"fetch", "http://" + far + "/"}},
		{want("peer ["+hostIP6+"]:", "knock"), []string{"udp", "[" + far6 + "]:7", "knock"}}, // an address of IPv6 takes a second
	} {
		r.wait("the way out after "+after, func() error {
			out, err := r.try(append([]string{"probe"}, way.args...)...)
			if err != nil {
				return err
			}
			return contains(out, way.want...)
		})
	}
	r.works(want("peer "), "probe", "fetch", "http://"+engine.FarName+"/")
	r.call("/services/forwarder/expose", `{"local":":8088","remote":"`+first+`:80"}`)
	r.page(r.outside(), hostIP+":8088", "hello from", "local "+first+":80")
	r.call("/services/forwarder/unexpose", `{"local":":8088"}`)
}
