package cni_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// pretendIPAM notes the command and prints what the test wants it to print: an IPAM plugin that is told its result. It fails with what it
// prints if that has a code in it.
func pretendIPAM() int {
	dir := os.Getenv("CNI_PATH")
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 2
	}
	f, err := os.OpenFile(filepath.Join(dir, "called"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return 2
	}
	defer f.Close()
	command := os.Getenv("CNI_COMMAND")
	fmt.Fprintf(f, "%s %s %t\n", command, os.Getenv("CNI_IFNAME"), bytes.Contains(text, []byte(`"pretend-ipam"`)))
	out := os.Getenv("PRETEND_" + command)
	fmt.Print(out)
	if strings.Contains(out, `"code"`) {
		return 1
	}
	return 0
}

// withIPAM puts the pretended plugin in the path, and returns how it was called since the last time.
func (b *bench) withIPAM() (called func() string) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(b.path, "pretend-ipam")); err != nil {
		b.Fatal(err)
	}
	return func() string {
		name := filepath.Join(b.path, "called")
		text, _ := os.ReadFile(name)
		os.Remove(name)
		return string(text)
	}
}

const ipamConf = `, "ipam": {"type": "pretend-ipam", "subnet": "10.220.0.0/24", "addresses": [{"address": "fd00:220::/64"}]}`

func TestIPAM(t *testing.T) {
	b := newBench(t)
	called := b.withIPAM()
	expect := func(want string) {
		t.Helper()
		if got := called(); got != want {
			t.Errorf("the plugin was called %q, want %q", got, want)
		}
	}
	c := conf(ipamConf)
	lease := `PRETEND_ADD={"cniVersion": "1.0.0", "ips": [{"address": "10.220.0.20/24", "gateway": "10.220.0.1"}, {"address": "fd00:220::20/64"}],
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.99.0.0/16", "gw": "10.220.0.9", "priority": 7}], "dns": {"nameservers": ["192.0.2.9"]}}`
	out := b.prints(fmt.Sprintf(`{"cniVersion": "1.1.0",
		"interfaces": [{"name": "eth0", "mac": "02:42:0a:dc:00:14", "mtu": 1400, "sandbox": %q}],
		"ips": [{"interface": 0, "address": "10.220.0.20/24", "gateway": "10.220.0.1"}, {"interface": 0, "address": "fd00:220::20/64", "gateway": "fd00:220::1"}],
		"routes": [{"dst": "0.0.0.0/0", "gw": "10.220.0.1"}, {"dst": "::/0", "gw": "fd00:220::1"}, {"dst": "10.99.0.0/16", "gw": "10.220.0.9", "priority": 7}],
		"dns": {"nameservers": ["192.0.2.9"]}}`, b.ns), "ADD", c, lease)
	expect("ADD eth0 true\n")
	b.contains(b.in("ip", "route"), "10.99.0.0/16 via 10.220.0.9 dev eth0 metric 7")
	b.works("CHECK", withResult(c, out))
	expect("CHECK eth0 true\n")

	// Another container has fewer addresses, and is on the same network.
	other := []string{"CNI_CONTAINERID=c2", "CNI_NETNS=" + pinned(t), `PRETEND_ADD={"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.21/24"}]}`}
	b.works("ADD", c, other...)
	b.works("DEL", c, other...)
	expect("ADD eth0 true\nDEL eth0 true\n")

	b.works("GC", strings.TrimSuffix(c, "}")+`, "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}`)
	b.works("STATUS", c)
	expect("GC eth0 true\nSTATUS eth0 true\n")
	if len(b.endpoints()) != 1 {
		t.Errorf("endpoints %+v", b.endpoints())
	}
	b.refused(50, "ipam pretend-ipam: dry", "STATUS", c, `PRETEND_STATUS={"code": 50, "msg": "dry"}`)
	b.refused(42, "ipam pretend-ipam: lost", "CHECK", withResult(c, out), `PRETEND_CHECK={"code": 42, "msg": "lost"}`)
	b.refused(42, "ipam pretend-ipam: busy", "DEL", c, `PRETEND_DEL={"code": 42, "msg": "busy"}`)
	called()
	b.works("DEL", c) // it was taken off the network already; the address is to be given back all the same
	expect("DEL eth0 true\n")
}

// What an ADD got from the plugin that fails afterwards is given back.
func TestIPAMFailures(t *testing.T) {
	b := newBench(t)
	called := b.withIPAM()
	c := conf(ipamConf)
	for _, tt := range []struct {
		code            uint
		part, conf, add string
	}{
		{11, "ipam pretend-ipam: full", c, `{"code": 11, "msg": "full"}`},
		{999, "ipam pretend-ipam: read its result", c, ``},
		{999, "ipam pretend-ipam: read its result", c, `garbage`},
		{7, "it gave no address", c, `{"cniVersion": "1.1.0"}`},
		{7, "10.220.0.1 is the network's gateway", c, `{"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.1/24"}]}`},
		{7, "has room for the gateway alone", c, `{"cniVersion": "1.1.0", "ips": [{"address": "10.9.0.1/32"}]}`},
		{7, "mtu, advmss, table and scope", c, `{"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.5/24"}], "routes": [{"dst": "10.0.0.0/8", "mtu": 1}]}`},
		{7, "no gateway of that family", c, `{"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.5/24"}], "routes": [{"dst": "fd01::/64"}]}`},
		{7, "subnets are given", conf(ipamConf + dual), `{"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.5/24"}]}`},
	} {
		b.refused(tt.code, tt.part, "ADD", tt.conf, "PRETEND_ADD="+tt.add)
		if got := called(); got != "ADD eth0 true\nDEL eth0 true\n" {
			t.Errorf("%s: the plugin was called %q", tt.part, got)
		}
	}
	b.refused(7, "there is no such plugin", "ADD", conf(`, "ipam": {"type": "nobody"}`))
	b.refused(7, "want the name of a plugin", "ADD", conf(`, "ipam": {"type": "../../bin/sh"}`))
	if list := b.endpoints(); len(list) > 0 {
		t.Errorf("endpoints %+v", list)
	}
}

// A default route by another gateway than the network's, or where the configuration wants none, is the only one of its family.
func TestIPAMDefaultRoutes(t *testing.T) {
	b := newBench(t)
	b.withIPAM()
	c := conf(ipamConf)
	add := `PRETEND_ADD={"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.20/24"}, {"address": "fd00:220::20/64"}], "routes": [{"dst": "0.0.0.0/0", "gw": "10.220.0.254"}]}`
	out := b.works("ADD", c, add)
	if got := b.in("ip", "route", "show", "default"); strings.TrimSpace(got) != "default via 10.220.0.254 dev eth0" {
		t.Errorf("routes %s", got)
	}
	b.contains(b.in("ip", "-6", "route", "show", "default"), "fd00:220::1")
	b.works("CHECK", withResult(c, out))
	b.works("DEL", c)
	c = conf(ipamConf + `, "isDefaultGateway": false`)
	b.works("ADD", c, `PRETEND_ADD={"cniVersion": "1.1.0", "ips": [{"address": "10.220.0.20/24"}], "routes": [{"dst": "0.0.0.0/0"}]}`)
	if got := b.in("ip", "route", "show", "default"); strings.TrimSpace(got) != "default via 10.220.0.1 dev eth0" {
		t.Errorf("routes %s", got)
	}
	b.works("DEL", c)
}

// The container's interface and no daemon: DEL takes the link out of the container, and the daemon that comes later forgets
// the endpoint.
func TestDeleteWithoutDaemon(t *testing.T) {
	b := newBench(t)
	c := conf(`, "subnet": "10.213.0.0/24"`)
	out := b.works("ADD", c)
	b.in("ip", "link", "set", "eth0", "alias", "theirs")
	b.prints("", "DEL", withResult(c, out), socketEnv+"=/nowhere/s")
	b.in("ip", "link", "set", "eth0", "alias", "usernet") // fails if it is gone
	b.prints("", "DEL", withResult(c, out), socketEnv+"=/nowhere/s")
	if out, err := exec.Command("nsenter", "--net="+b.ns, "ip", "link", "show", "eth0").CombinedOutput(); err == nil {
		t.Errorf("after DEL: %s", out)
	}
}
