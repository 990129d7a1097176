package vm_test

import (
	"fmt"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
	"github.com/usernet/usernet/test/vm/console"
)

// guest is one of two machines on one gateway.
type guest struct {
	*rig
	card, addr, addr6 string
	web, knock, echo  string // where the host leads to its ports 80, 7 by UDP and 7
	join              func() // starts its network
}

// guests: two machines on one gateway, one by its vsock, the other by its network card. They reach each other; one goes and comes back, or
// hangs, and the other does not notice.
func guests(r *rig) {
	one := &guest{rig: r.beside("one"), card: "tap0", addr: first, addr6: first6}
	two := &guest{rig: r.beside("two"), card: "eth0", addr: second, addr6: second6}
	one.web, one.knock, one.echo = hostIP+":8081", hostIP+":5301", hostIP+":8071"
	two.web, two.knock, two.echo = hostIP+":8082", hostIP+":5302", hostIP+":8072"
	var agent *console.Process
	one.join = func() {
		one.modules("vmw_vsock_virtio_transport", "tun")
		agent = one.starts("agent", "usernet", "agent", "-debug")
	}
	two.join = func() { two.lease(two.card) }
	hardware := machine{memory: 512, nic: true, mac: secondMAC}

	wait := one.power(machine{memory: 512, vsock: true})
	two.boot(hardware)
	wait()
	r.gateway("-listen", r.hybrid(), "-listen-qemu", "unix://"+r.frames())
	r.serves("127.0.0.1:8099")
	r.call("/services/dns/add", fmt.Sprintf(`{"Name":"vm.test.","Records":[{"Name":"one","IP":%q},{"Name":"two","IP":%q}]}`, first, second))
	for _, g := range []*guest{one, two} {
		g.comes()
		g.forward(g.web, 80, "tcp")
		g.forward(g.knock, 7, "udp")
		g.forward(g.echo, 7, "tcp")
	}
	r.check(contains(r.call("/leases", ""), fmt.Sprintf("%q:%q", first, firstMAC), fmt.Sprintf("%q:%q", second, secondMAC)))
	one.reaches(two)
	two.reaches(one)

	undisturbed(two, "the agent of one is killed", func() {
		one.kill(agent)
		one.join()
		one.reaches(two)
	})
	undisturbed(one, "two is switched off and on", func() {
		two.must(two.qemu.Stop(syscall.SIGKILL))
		two.boot(hardware)
		two.comes()
		two.reaches(one)
	})
	hangs(two, one)
	hangs(one, two)
}

// beside is the rig of one machine of several.
func (r *rig) beside(name string) *rig {
	sub := *r
	sub.name = name
	return &sub
}

// comes is what a machine does that has just been started.
func (g *guest) comes() {
	g.Helper()
	g.in("hostname", g.name)
	g.join()
	g.starts("serve", "probe", "serve")
}

// forward leads an address of the host to a port of the machine.
func (g *guest) forward(from string, to int, proto string) {
	g.Helper()
	g.call("/services/forwarder/expose", fmt.Sprintf(`{"local":%q,"remote":"%s:%d","protocol":%q}`, from, g.addr, to, proto))
}

// reaches checks that a machine that has come, perhaps again, reaches another one, and the outside, and the outside the machine.
func (g *guest) reaches(o *guest) {
	g.Helper()
	g.address(g.card, "inet "+g.addr+"/24", "inet6 "+g.addr6+"/64")
	g.works(want("peer "+hostIP+":"), "probe", "fetch", "http://"+far+"/")
	g.works(want("peer ["+hostIP6+"]:"), "probe", "fetch", "http://["+far6+"]/")
	g.works(want("peer "+hostIP+":", "knock"), "probe", "udp", far+":7", "knock")
	g.works(want(far, far6), "probe", "resolve", engine.FarName)
	g.works(want("host sees 127.0.0.1:"), "probe", "fetch", "http://"+hostAlias+":8099/")

	for _, addr := range []string{o.addr, o.addr6} {
		g.works(want("1 packets received"), "ping", "-c", "1", "-W", "10", addr)
	}
	g.works(want("hello from "+o.name, "peer ["+g.addr6+"]:"), "probe", "fetch", "http://["+o.addr6+"]/")
	g.works(want("peer "+g.addr+":", "knock"), "probe", "udp", o.addr+":7", "knock")
	g.works(want("500000 bytes came back"), "probe", "bulk", o.addr+":7", "500000")

	g.udp(g.knock, "knock", "peer ")
	g.reached(o)
}

// reached checks that a machine is reached from another one and from the outside.
func (g *guest) reached(o *guest) {
	g.Helper()
	o.works(want("hello from "+g.name, "peer "+o.addr+":", "local "+g.addr+":80"), "probe", "fetch", "http://"+g.name+".vm.test/")
	g.page(g.outside(), g.web, "hello from "+g.name, "local "+g.addr+":80")
}

// longPause is what nothing takes that does not wait for another machine, however busy this one is.
const longPause = 20 * time.Second

// undisturbed has a long transfer go on with a machine while something is done to the other one.
func undisturbed(g *guest, what string, do func()) {
	g.Helper()
	f := g.flow(g.echo)
	g.passes(f, 1<<20)
	before, start := f.got.Load(), time.Now()
	do()
	n, took := f.got.Load()-before, time.Since(start)
	g.passes(f, 1<<20)
	pause := time.Duration(f.pause.Load())
	g.Logf("%s: in %v, %d MiB came back from %s, with pauses of up to %v", what, took.Round(time.Millisecond), n>>20, g.name,
		pause.Round(time.Millisecond))
	if n == 0 || pause > longPause {
		g.Errorf("%s: %s stood still for %v", what, g.name, pause)
	}
	g.completes(f)
}
