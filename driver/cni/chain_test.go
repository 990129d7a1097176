package cni_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
)

// Behind other plugins of a chain the result grows.
func TestChain(t *testing.T) {
	b := newBench(t)
	b.in("ip", "link", "add", "dummy7", "type", "veth", "peer", "name", "dummy8")
	prev := fmt.Sprintf(`{"cniVersion": "1.1.0", "interfaces": [{"name": "dummy7", "sandbox": %q}], "ips": [{"interface": 0, "address": "10.9.0.1/24"}],
		"routes": [{"dst": "0.0.0.0/0", "gw": "10.213.0.1"}], "dns": {"domain": "theirs"}}`, b.ns)
	c := conf(`, "subnet": "10.213.0.0/24", "names": false`)
	out := b.works("ADD", withResult(c, prev))
	var r struct {
		Interfaces []struct{ Name string }
		IPs        []struct {
			Interface int
			Address   string
		}
		DNS struct{ Domain string }
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Interfaces) != 2 || r.Interfaces[1].Name != "eth0" || len(r.IPs) != 2 || r.IPs[1].Interface != 1 || r.IPs[1].Address != "10.213.0.2/24" || r.DNS.Domain != "theirs" {
		t.Errorf("result %s", out)
	}
	b.works("CHECK", withResult(c, out))
	b.works("DEL", withResult(c, out))
	for _, bad := range []string{`{"cniVersion": "1.1.0", "ips": [{"address": "here"}]}`, `{"cniVersion": "1.1.0", "interfaces": [null]}`, `"garbage"`} {
		b.refused(6, "prevResult", "ADD", withResult(c, bad))
	}
}

// Where a plugin before us has made the interface, what is left to us is to publish ports.
func TestForeign(t *testing.T) {
	b := newBench(t)
	out, err := exec.Command("ip", "link", "add", "theirs", "type", "veth", "peer", "name", "eth0", "netns", b.ns).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, args := range []string{"ip addr add 10.9.0.1/24 dev theirs", "ip link set theirs up"} {
		if out, err := exec.Command("sh", "-c", args).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	b.in("ip", "addr", "add", "10.9.0.2/24", "dev", "eth0")
	b.in("ip", "link", "set", "eth0", "up")
	serve(b)
	prev := fmt.Sprintf(`{"cniVersion": "1.1.0", "interfaces": [{"name": "theirs"}, {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": %q}],
		"ips": [{"interface": 1, "address": "10.9.0.2/24", "gateway": "10.9.0.1"}]}`, b.ns)
	plain := withResult(conf(""), prev)
	b.prints(prev, "ADD", plain)
	b.works("CHECK", plain)
	if list := b.d.Status(); len(list) > 0 {
		t.Errorf("networks %+v", list)
	}
	c := withRuntime(plain, `{"portMappings": [{"hostPort": 8080, "containerPort": 80}]}`)
	b.refused(102, "no network web", "CHECK", c)
	b.prints(prev, "ADD", c)
	b.works("CHECK", c)
	resp, err := http.Get("http://127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n := b.d.Status()[0]; n.Options.Mode != usernet.Foreign || len(n.Subnets) != 0 || n.Endpoints[0].MAC.String() != "02:00:00:00:00:02" {
		t.Errorf("network %+v", n)
	}
	b.works("DEL", c)
	b.works("DEL", c, socketEnv+"=/nowhere/s")
	if _, err := http.Get("http://127.0.0.1:8080"); err == nil {
		t.Error("the port is still published")
	}
	b.in("ip", "link", "show", "eth0")
	for _, key := range []string{`"mode": "bridge"`, `"mtu": 1400`, `"subnet": "10.213.0.0/24"`, `"ipam": {"type": "static"}`, `"ipMasq": true`, `"isDefaultGateway": true`} {
		b.refused(7, key[1:strings.Index(key, `":`)]+": eth0 was made by a plugin before usernet", "ADD", withResult(conf(", "+key), prev))
	}
	b.refused(7, "bandwidth: eth0 was made", "ADD", withRuntime(plain, `{"bandwidth": {"egressRate": 100000}}`))
	b.refused(7, "has no address", "ADD", withRuntime(withResult(conf(""), strings.Replace(prev, `"interface": 1`, `"interface": 0`, 1)), `{"portMappings": [{"hostPort": 1, "containerPort": 80}]}`))
}

// serve is a web server in the container, on port 80.
func serve(b *bench) {
	b.Helper()
	ns, err := netns.Open(b.ns)
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	var l net.Listener
	err = ns.Do(func() (err error) {
		l, err = net.Listen("tcp", ":80")
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	srv, done := &http.Server{Handler: http.NotFoundHandler()}, make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	b.Cleanup(func() { srv.Close(); <-done })
}
