package main

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/usernet/usernet/test/bench/load"
	"github.com/usernet/usernet/test/engine"
)

// subject is one kind of network under measurement.
type subject struct {
	name      string
	mtu       int
	own       bool // its failure is one of the run
	mandatory bool // measured whatever is chosen
	ports     bool // only its published ports are its own work
	same      bool // its ports have the same number inside
	create    []string
	start     func(*rig, *subject) error

	index   int
	site    *site // nil while it does not run
	missing error // why it does not
}

// String is the name in the tables.
func (s *subject) String() string { return fmt.Sprintf("%s, MTU %d", s.name, s.mtu) }

// controlName is the name of its agent's socket.
func (s *subject) controlName() string { return fmt.Sprintf("agent%d", s.index) }

// publicPort is the port of the pretend host that leads to its agent.
func (s *subject) publicPort() uint16 { return uint16(7000 + s.index) }

// innerPort is what its agent listens at.
func (s *subject) innerPort() uint16 {
	if s.same {
		return s.publicPort()
	}
	return agentPort
}

// site is a subject that runs.
type site struct {
	inside    *load.Remote
	gateway   netip.Addr
	published netip.AddrPort // as seen from outside; the zero value: it publishes nothing
	local     netip.AddrPort // the same as seen from the pretend host
	daemons   []*daemon
	forwarder func() []process // what carries the load; nil: the kernel alone
	restart   func() error     // a fresh forwarder; nil: there is none
}

func (t *site) stop() {
	for _, d := range t.daemons {
		d.stop()
	}
}

// publishes says that the public port leads inside, from outside and on the loopback.
func (t *site) publishes(port uint16) {
	t.published = netip.AddrPortFrom(engine.HostAddr.Addr(), port)
	t.local = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
}

// allSubjects lists everybody. The first is what the others are compared with.
func allSubjects() []*subject {
	var all []*subject
	add := func(s subject) { all = append(all, &s) }
	add(subject{name: "kernel veth", mtu: 1500, own: true, mandatory: true, start: (*rig).startVeth})
	docker := func(name string, mtu int, create ...string) {
		create = append(create, "-o", fmt.Sprintf("com.docker.network.driver.mtu=%d", mtu))
		add(subject{name: name, mtu: mtu, own: true, create: create, start: (*rig).startContainers})
	}
	docker("Docker bridge", 1500, "-d", "bridge")
	docker("usernet bridge", 1500, "-d", "usernet", "-o", "mode=bridge")
	for _, mtu := range []int{1500, 65520} {
		docker("usernet usermode", mtu, "-d", "usernet")
		docker("usernet netstack", mtu, "-d", "usernet", "-o", "fastpath=off")
	}
	for _, mtu := range []int{1500, 65520} {
		add(subject{name: "pasta", mtu: mtu, start: (*rig).startPasta})
		add(subject{name: "slirp4netns", mtu: mtu, start: (*rig).startSlirp})
		add(subject{name: "usernet gateway + agent", mtu: mtu, own: true, start: (*rig).startUsernet})
		add(subject{name: "usernet gateway + gvforwarder", mtu: mtu, start: gvproxy((*rig).dropIn, (*rig).installed)})
		add(subject{name: "gvproxy", mtu: mtu, start: gvproxy((*rig).installed, (*rig).installed)})
		add(subject{name: "rootlesskit gvisor-tap-vsock", mtu: mtu, start: rootlesskit("gvisor-tap-vsock", "gvisor-tap-vsock")})
	}
	add(subject{name: "rootlesskit builtin", mtu: 65520, ports: true, start: rootlesskit("slirp4netns", "builtin")})
	add(subject{name: "rootlesskit slirp4netns", mtu: 65520, ports: true, start: rootlesskit("slirp4netns", "slirp4netns")})
	add(subject{name: "rootlesskit implicit (pasta)", mtu: 65520, ports: true, same: true, start: rootlesskit("pasta", "implicit")})
	return all
}

// isDocker tells whether the subject is a network of the Docker engine.
func (s *subject) isDocker() bool { return s.create != nil }

// isUsernet tells whether usernet's daemon carries the load.
func (s *subject) isUsernet() bool { return strings.HasPrefix(s.name, "usernet") }
