package cni_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/internal/netns"
)

func TestErrors(t *testing.T) {
	b := newBench(t)
	add := func(code uint, part, c string, env ...string) { t.Helper(); b.refused(code, part, "ADD", c, env...) }
	add(6, "unmarshall", "garbage")
	add(6, "unexpected end", "")
	add(6, "more than", strings.Repeat(" ", 16<<20)+conf(""))
	add(6, "mtu", conf(`, "mtu": "big"`))
	add(7, "it needs mode bridge", conf(`, "ipam": {"type": "dhcp"}`))
	add(7, "no ports are published", withRuntime(conf(`, "mode": "bridge", "bridge": "cni7", "ipam": {"type": "dhcp"}`), `{"portMappings": [{"hostPort": 80, "containerPort": 80}]}`))
	add(7, "the subnets are the server's business", conf(`, "mode": "bridge", "bridge": "cni7", "subnet": "10.1.0.0/24", "ipam": {"type": "dhcp"}`))
	add(6, "ipam", conf(`, "ipam": "host-local"`))
	add(6, "aliases", withRuntime(conf(""), `{"aliases": "www"}`))
	add(7, "missing network name", `{"cniVersion": "1.1.0", "type": "usernet"}`)
	add(2, `colour: "red" is not supported; known are`, conf(`, "colour": "red"`))
	add(2, `vlan: 7 is not supported, only 0`, conf(`, "vlan": 7`))
	add(7, "want usermode or bridge", conf(`, "mode": "router"`))
	add(7, "mtu=7", conf(`, "mtu": 7`))
	add(7, "it needs mode=bridge", conf(`, "bridge": "cni0"`))
	add(7, "it needs mode=bridge", conf(`, "ipMasq": false`))
	add(7, `option "colour": unknown`, conf(`, "options": {"colour": "red"}`))
	add(7, "mode is given twice", conf(`, "mode": "bridge", "options": {"mode": "usermode"}`))
	add(7, `subnet "here"`, conf(`, "subnet": "here"`))
	add(7, "it needs a subnet", conf(`, "gateway": "10.0.0.1"`))
	add(7, `"there" is no address`, conf(`, "subnet": "10.213.0.0/24", "gateway": "there"`))
	add(7, "overlaps", conf(`, "subnet": "10.213.0.0/24", "subnets": [{"subnet": "10.213.0.0/16"}]`))
	add(7, "is outside", conf(`, "subnets": [{"subnet": "10.213.0.0/24", "rangeStart": "10.9.0.1"}]`))
	add(7, "want numbers from 1 to 65535", withRuntime(conf(""), `{"portMappings": [{"hostPort": 80, "containerPort": 0}]}`))
	add(7, "want numbers from 1 to 65535", withRuntime(conf(""), `{"portMappings": [{"hostPort": 70000, "containerPort": 1}]}`))
	add(7, `protocol "icmp"`, withRuntime(conf(""), `{"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}]}`))
	add(7, `host address "here"`, withRuntime(conf(""), `{"portMappings": [{"hostPort": 80, "containerPort": 80, "hostIP": "here"}]}`))
	add(3, "no such file", conf(""), "CNI_NETNS=/nowhere/ns")
	add(4, "no network namespace", conf(""), "CNI_NETNS=/etc/passwd")
	add(4, "CNI_IFNAME", conf(""), "CNI_IFNAME=")
	add(8, "own network namespace", conf(""), fmt.Sprintf("CNI_NETNS=/proc/%d/ns/net", os.Getpid()))
	b.refused(4, "CNI_COMMAND", "DANCE", conf(""))
	b.refused(7, "prevResult is missing", "CHECK", conf(""))
	b.refused(6, "unmarshall", "DEL", "garbage")

	taken, err := net.Listen("tcp4", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	add(100, "port is already allocated", withRuntime(conf(""), `{"portMappings": [{"hostPort": 8080, "containerPort": 80}]}`))
	small := conf(`, "subnet": "10.213.0.0/30"`)
	b.works("ADD", small)
	add(11, "exhausted", small, "CNI_CONTAINERID=c2", "CNI_NETNS="+pinned(t))
	b.works("DEL", small)
	if list := b.endpoints(); len(list) > 0 {
		t.Errorf("what was refused is there: %+v", list)
	}
	add(11, "start the usernet daemon", conf(""), socketEnv+"=/nowhere/s")
}

// CHECK finds whatever differs from the result.
func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name, part string
		spoil      func(b *bench)
	}{
		{"no interface", "no interface eth0", func(b *bench) { b.in("ip", "link", "del", "eth0") }},
		{"other interface", "usernet has not made the interface eth0", func(b *bench) {
			b.in("ip", "link", "set", "eth0", "down")
			b.in("ip", "link", "set", "eth0", "name", "eth9")
			b.in("ip", "link", "add", "eth0", "type", "bridge")
		}},
		{"MAC address", "eth0 has the MAC address 02:00:00:00:00:01", func(b *bench) { b.in("ip", "link", "set", "eth0", "address", "02:00:00:00:00:01") }},
		{"MTU", "eth0 has an MTU of 1280", func(b *bench) { b.in("ip", "link", "set", "eth0", "mtu", "1280") }},
		{"down", "eth0 is down", func(b *bench) { b.in("ip", "link", "set", "eth0", "down") }},
		{"address", "eth0 does not have the address 10.213.0.2/24", func(b *bench) { b.in("ip", "addr", "del", "10.213.0.2/24", "dev", "eth0") }},
		{"IPv6 address", "eth0 does not have the address fd00:213::1/64", func(b *bench) { b.in("ip", "addr", "del", "fd00:213::1/64", "dev", "eth0") }},
		{"route", "no route to 0.0.0.0/0 by 10.213.0.1", func(b *bench) { b.in("ip", "route", "del", "default") }},
		{"IPv6 route", "no route to ::/0 by fd00:213::9", func(b *bench) { b.in("ip", "-6", "route", "del", "default") }},
		{"port", "port 8081 of the host is not published", func(b *bench) {
			e := b.endpoints()[0]
			if err := b.d.RemovePorts(b.Context(), e.NetworkID, e.ID, []usernet.Port{e.Ports[1].Port}); err != nil {
				b.Fatal(err)
			}
		}},
		{"endpoint", "the daemon has no network web", func(b *bench) {
			// The daemon has forgotten it, and the interface is still there.
			e := b.endpoints()[0]
			if err := b.d.Detach(b.Context(), e.NetworkID, e.ID, nil); err != nil {
				b.Fatal(err)
			}
			if err := b.d.DeleteNetwork(b.Context(), e.NetworkID); err != nil {
				b.Fatal(err)
			}
			imitate(b)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			c := withRuntime(conf(dual+`, "names": false`), `{"portMappings": [{"hostPort": 8080, "containerPort": 80}, {"hostPort": 8081, "containerPort": 81}]}`)
			c = withResult(c, b.works("ADD", c))
			b.works("CHECK", c)
			tt.spoil(b)
			b.refused(102, tt.part, "CHECK", c)
			b.works("DEL", c)
		})
	}
}

// imitate makes the interface that CHECK expects of a container in TestCheck.
func imitate(b *bench) {
	b.Helper()
	ns, err := netns.Open(b.ns)
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name, la.MTU, la.HardwareAddr, la.Alias = "eth0", 1400, []byte{2, 0x42, 10, 213, 0, 2}, driver.LinkAlias
		veth := &netlink.Veth{LinkAttrs: la, PeerName: "other"}
		return errors.Join(netlink.LinkAdd(veth), netlink.LinkSetAlias(veth, la.Alias))
	})
	if err != nil {
		b.Fatal(err)
	}
	for _, args := range []string{"link set eth0 up", "link set other up", "addr add 10.213.0.2/24 dev eth0", "addr add fd00:213::1/64 dev eth0 nodad",
		"route add default via 10.213.0.1", "-6 route add default via fd00:213::9"} {
		b.in(append([]string{"ip"}, strings.Fields(args)...)...)
	}
}

func TestCollect(t *testing.T) {
	b := newBench(t)
	c := conf(`, "subnet": "10.213.0.0/24"`)
	other := strings.Replace(c, "web", "data", 1)
	for i := range 3 {
		b.works("ADD", c, fmt.Sprint("CNI_CONTAINERID=c", i), "CNI_NETNS="+pinned(t))
	}
	b.works("ADD", other)
	b.works("GC", strings.TrimSuffix(c, "}")+`, "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "net7"}]}`)
	var left []string
	for _, n := range b.d.Status() {
		for _, e := range n.Endpoints {
			left = append(left, n.Name+" "+e.Container.ID)
		}
	}
	if len(left) != 2 || !strings.Contains(strings.Join(left, ","), "web c1") || !strings.Contains(strings.Join(left, ","), "data c1") {
		t.Errorf("left are %q", left)
	}
	b.works("GC", strings.TrimSuffix(c, "}")+`, "cni.dev/valid-attachments": []}`)
	b.works("GC", strings.Replace(c, "web", "nobody", 1))
	b.works("DEL", other)
}

func TestStatus(t *testing.T) {
	b := newBench(t)
	b.works("STATUS", conf(""))
	b.works("STATUS", conf(`, "subnet": "10.213.0.0/24"`))
	b.refused(7, "mtu=7", "STATUS", conf(`, "mtu": 7`))
	b.refused(50, "start the usernet daemon", "STATUS", conf(""), socketEnv+"=/nowhere/s")
	// A daemon was here.
	dead := t.TempDir() + "/s"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	b.refused(51, "start the usernet daemon", "STATUS", conf(""), socketEnv+"="+dead)
	bridge := conf(`, "mode": "bridge", "subnet": "10.213.0.0/24"`)
	b.works("ADD", bridge)
	b.works("STATUS", bridge)
	b.refused(50, "overlaps", "STATUS", strings.Replace(bridge, "web", "data", 1))
	b.works("DEL", bridge)
}
