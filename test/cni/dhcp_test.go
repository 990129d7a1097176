package cni_test

import (
	"fmt"
	"strings"

	"github.com/usernet/usernet/test/engine"
)

// dhcp: a container on a LAN, by a bridge of the host, with a DHCP server there and the official plugin that asks it.
func dhcp(r *rig) {
	r.run("sh", "-c", "ip link add lan0 type bridge && ip addr add 10.217.0.1/24 dev lan0 && ip link set lan0 up")
	defer r.e.Run(r.background(), "ip", "link", "del", "lan0")
	conf := r.e.Dir + "/udhcpd.conf"
	text := "start 10.217.0.20\nend 10.217.0.40\ninterface lan0\nlease_file " + r.e.Dir + "/leases\npidfile " + r.e.Dir + "/udhcpd.pid\n" +
		"option subnet 255.255.255.0\noption router 10.217.0.1\noption lease 600\n"
	if err := r.e.Feed(r.Context(), text, "sh", "-c", "cat >"+conf+" && touch "+r.e.Dir+"/leases"); err != nil {
		r.Fatal(err)
	}
	defer r.start(r.e.Dir+"/rootfs/bin/busybox", "udhcpd", "-f", conf)()
	r.run("rm", "-f", "/run/cni/dhcp.sock")
	defer r.start(engine.CNIPlugins+"/dhcp", "daemon")()
	r.wait(patience, "the DHCP client", func() error { _, err := r.e.Run(r.Context(), "test", "-S", "/run/cni/dhcp.sock"); return err })

	c := chain{name: "lan", plugins: []string{`{"type": "usernet", "mode": "bridge", "bridge": "lan0", "ipam": {"type": "dhcp"}}`}}
	for range 2 {
		space := r.space()
		result := r.chainAdd(c, space, 0)
		if !strings.Contains(result, `"address": "10.217.0.`) || !strings.Contains(result, `"gw": "10.217.0.1"`) {
			r.Errorf("result %s", result)
		}
		r.in("10.217.0.", space, "ip", "addr", "show", "eth0")
		r.in("default via 10.217.0.1 dev eth0", space, "ip", "route")
		r.serve(space)
		r.page(r.host(), address(result)+":80", "hello from", "peer 10.217.0.1")
		r.restart(func() {})
		r.page(r.host(), address(result)+":80", "hello from")
		r.chainCheck(c, space, 0, result)
		r.chainDel(c, space, 0, result)
		if out, err := r.e.Run(r.Context(), "ip", "netns", "exec", base(space), "ip", "link", "show", "eth0"); err == nil {
			r.Errorf("after DEL: %s", out)
		}
	}
	// Nobody has an address to give.
	c = chain{name: "nowhere", plugins: []string{`{"type": "usernet", "mode": "bridge", "bridge": "lan0", "ipam": {"type": "dhcp", "daemonSocketPath": "/run/cni/nobody.sock"}}`}}
	space := r.space()
	if out, err := r.call(c, 0, "ADD", space, 0, ""); err == nil || !strings.Contains(out, "ipam dhcp") {
		r.Errorf("ADD without a DHCP client: %s, %v", out, err)
	}
	r.wait(patience, "nothing to be left", r.nobody)
}

// address is the first address in a result.
func address(result string) string {
	_, after, _ := strings.Cut(result, `"address": "`)
	a, _, _ := strings.Cut(after, "/")
	return a
}

// start starts a program of the host, and returns how to end it.
func (r *rig) start(name string, args ...string) (stop func()) {
	r.Helper()
	pid := r.run("sh", "-c", name+" "+strings.Join(args, " ")+" >"+r.e.Dir+"/"+base(name)+".log 2>&1 & echo $!")
	return func() {
		if _, err := r.e.Run(r.background(), "sh", "-c", fmt.Sprint("kill ", pid)); err != nil {
			r.Errorf("clean up: %v", err)
		}
	}
}
