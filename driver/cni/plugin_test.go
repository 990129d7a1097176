package cni_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/cni"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// socketEnv tells a call of the plugin where its daemon is.
const socketEnv = "CNI_TEST_SOCKET"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "pretend-ipam" {
		os.Exit(pretendIPAM())
	}
	os.Exit(nettest.Main(m))
}

// bench is a daemon behind a control socket, and a container.
type bench struct {
	*testing.T
	d      *driver.Driver
	socket string
	path   string // where IPAM plugins are
	ns     string // the container's network namespace
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{T: t, socket: filepath.Join(t.TempDir(), "s"), path: t.TempDir(), ns: pinned(t)}
	log := slog.New(slog.DiscardHandler)
	var err error
	if b.d, err = driver.Open(driver.Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Log: log}); err != nil {
		t.Fatal(err)
	}
	unix, err := net.Listen("unix", b.socket)
	if err != nil {
		t.Fatal(err)
	}
	l := control.Listener(unix)
	srv := &http.Server{Handler: control.Handler(b.d, map[string]string{"mtu": "1400"}, log)}
	srv.ConnContext = l.(interface {
		ConnContext(context.Context, net.Conn) context.Context
	}).ConnContext
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		<-done
		for _, n := range b.d.Status() {
			for _, e := range n.Endpoints {
				if err := b.d.Detach(context.Background(), n.ID, e.ID, nil); err != nil {
					t.Error(err)
				}
			}
			if err := b.d.DeleteNetwork(context.Background(), n.ID); err != nil {
				t.Error(err)
			}
		}
		if err := b.d.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// pinned is the path of a new namespace.
func pinned(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	ns, err := netns.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	t.Cleanup(func() { netns.Remove(path) })
	return path
}

// call runs the plugin, in this process, with a configuration and variables over the usual ones. It returns what it printed, and
// the error that it told of.
func (b *bench) call(command, conf string, env ...string) (string, *failure) {
	b.Helper()
	usual := []string{socketEnv + "=" + b.socket, "CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_NETNS=" + b.ns, "CNI_IFNAME=eth0",
		"CNI_PATH=" + b.path, "CNI_ARGS=", "PRETEND_ADD=", "PRETEND_DEL=", "PRETEND_CHECK=", "PRETEND_STATUS="}
	for _, v := range append(usual, env...) {
		name, value, _ := strings.Cut(v, "=")
		os.Setenv(name, value)
	}
	stdin, stdout := os.Stdin, os.Stdout
	defer func() { os.Stdin, os.Stdout = stdin, stdout }()
	os.Stdin, os.Stdout = b.file(conf), b.file("")
	p := cni.Plugin{Daemon: control.Daemon{Socket: os.Getenv(socketEnv)}}
	status := p.Run(context.Background())
	out, err := os.ReadFile(os.Stdout.Name())
	if err != nil {
		b.Fatal(err)
	}
	if status == 0 {
		return string(out), nil
	}
	var f failure
	if err := json.Unmarshal(out, &f); err != nil || f.CNIVersion == "" || f.Msg == "" || status != 1 {
		b.Errorf("%s: status %d and %q; want an error of the specification alone", command, status, out)
	}
	return "", &f
}

// file is a file with text in it.
func (b *bench) file(text string) *os.File {
	b.Helper()
	f, err := os.CreateTemp(b.TempDir(), "")
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err == nil {
		_, err = f.Seek(0, 0)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return f
}

// failure is an error as the specification has it.
type failure struct {
	CNIVersion string
	Code       uint
	Msg        string
	Details    string
}

// works runs the plugin, which must succeed.
func (b *bench) works(command, conf string, env ...string) string {
	b.Helper()
	out, f := b.call(command, conf, env...)
	if f != nil {
		b.Fatalf("%s: %+v", command, *f)
	}
	return out
}

// prints runs the plugin, which must print the same JSON as want.
func (b *bench) prints(want, command, conf string, env ...string) string {
	b.Helper()
	out := b.works(command, conf, env...)
	if d := cmp.Diff(value(b, want), value(b, out)); d != "" {
		b.Errorf("%s (-want +got):\n%s", command, d)
	}
	return out
}

func value(t testing.TB, text string) (v any) {
	t.Helper()
	if text == "" {
		return nil
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}

// refused runs the plugin, which must fail with a code and a message that has part in it.
func (b *bench) refused(code uint, part, command, conf string, env ...string) {
	b.Helper()
	out, f := b.call(command, conf, env...)
	switch {
	case f == nil:
		b.Errorf("%s: worked: %s", command, out)
	case f.Code != code || !strings.Contains(f.Msg+f.Details, part) || strings.Contains(f.Msg, "\n"):
		b.Errorf("%s: %+v, want code %d and %q", command, *f, code, part)
	}
}

// endpoints are those of all networks.
func (b *bench) endpoints() (list []driver.EndpointStatus) {
	for _, n := range b.d.Status() {
		list = append(list, n.Endpoints...)
	}
	return list
}

// in runs a command in the container.
func (b *bench) in(args ...string) string {
	b.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + b.ns}, args...)...).CombinedOutput()
	if err != nil {
		b.Errorf("%s: %v: %s", args, err, out)
	}
	return string(out)
}

// conf is a configuration with further keys; they begin with a comma.
func conf(more string) string {
	return `{"cniVersion": "1.1.0", "name": "web", "type": "usernet"` + more + `}`
}

// withResult puts a result in a configuration as prevResult.
func withResult(conf, result string) string {
	return strings.TrimSuffix(conf, "}") + `, "prevResult": ` + result + `}`
}

// withRuntime puts what a runtime gives into a configuration.
func withRuntime(conf, runtime string) string {
	return strings.TrimSuffix(conf, "}") + `, "runtimeConfig": ` + runtime + `}`
}

func (b *bench) contains(text string, parts ...string) {
	b.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			b.Errorf("%q is missing in %s", p, text)
		}
	}
}

const dual = `, "subnets": [{"subnet": "10.213.0.0/24"}, {"subnet": "fd00:213::/64", "gateway": "fd00:213::9"}]`

func TestAddAndDelete(t *testing.T) {
	b := newBench(t)
	c := withRuntime(conf(dual+`, "mtu": 1300, "args": {"cni": {"ips": ["10.213.0.7"], "mac": "02:00:00:00:00:07"}}, "dns": {"nameservers": ["192.0.2.53"]}`),
		`{"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}, {"hostPort": 0, "containerPort": 81},
			{"hostPort": 53, "containerPort": 53, "protocol": "UDP"}], "ips": ["10.213.0.5/24", "fd00:213::5"], "mac": "02:00:00:00:be:ef"}`)
	result := b.prints(fmt.Sprintf(`{"cniVersion": "1.1.0",
		"interfaces": [{"name": "eth0", "mac": "02:00:00:00:be:ef", "mtu": 1300, "sandbox": %q}],
		"ips": [{"interface": 0, "address": "10.213.0.5/24", "gateway": "10.213.0.1"}, {"interface": 0, "address": "fd00:213::5/64", "gateway": "fd00:213::9"}],
		"routes": [{"dst": "0.0.0.0/0", "gw": "10.213.0.1"}, {"dst": "::/0", "gw": "fd00:213::9"}],
		"dns": {"nameservers": ["192.0.2.53"]}}`, b.ns), "ADD", c)
	b.contains(b.in("ip", "addr", "show", "eth0"), "10.213.0.5/24", "fd00:213::5/64", "mtu 1300")
	e := b.endpoints()[0]
	if len(e.Ports) != 2 || e.Container.ID != "c1" || e.IfName != "eth0" {
		t.Errorf("endpoint %+v", e)
	}
	b.works("CHECK", withResult(c, result))
	b.refused(101, "has an interface eth0 already", "ADD", c)
	for range 2 {
		b.prints("", "DEL", withResult(c, result))
	}
	b.works("DEL", c, "CNI_NETNS=")
	b.works("DEL", c, "CNI_NETNS=/nowhere/ns")
	b.works("DEL", conf(`, "mode": "nonsense", "mtu": -1, "colour": "red"`))
	if list := b.endpoints(); len(list) > 0 {
		t.Errorf("after DEL: %+v", list)
	}
	if out, err := exec.Command("nsenter", "--net="+b.ns, "ip", "link", "show", "eth0").CombinedOutput(); err == nil {
		t.Errorf("after DEL: %s", out)
	}
}

// Every version gets the result in its own form.
func TestVersions(t *testing.T) {
	b := newBench(t)
	for _, v := range cni.Versions {
		c := strings.Replace(conf(`, "subnet": "10.213.0.0/24"`), "1.1.0", v, 1)
		out := b.works("ADD", c)
		b.contains(strings.Join(strings.Fields(out), " "), `"cniVersion": "`+v+`"`, `"address": "10.213.0.2/24"`)
		if old := strings.HasPrefix(v, "0."); old != strings.Contains(out, `"version": "4"`) {
			t.Errorf("%s: %s", v, out)
		}
		if v != "0.3.1" {
			b.works("CHECK", withResult(c, out))
		}
		b.works("DEL", withResult(c, out))
	}
	b.refused(1, "config version does not allow CHECK", "CHECK", strings.Replace(conf(""), "1.1.0", "0.3.1", 1))
	b.refused(1, "config version does not allow GC", "GC", strings.Replace(conf(""), "1.1.0", "1.0.0", 1))
	b.refused(1, "config version does not allow STATUS", "STATUS", strings.Replace(conf(""), "1.1.0", "1.0.0", 1))
	b.refused(1, "1.1.0", "ADD", strings.Replace(conf(""), "1.1.0", "9.0.0", 1))
	b.refused(1, "0.3.1", "ADD", `{"name": "web", "type": "usernet"}`)
	b.prints(`{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}`, "VERSION", "")
}

func TestBridge(t *testing.T) {
	b := newBench(t)
	c := conf(`, "mode": "bridge", "bridge": "cni7", "subnet": "10.213.0.0/24", "isGateway": true, "hairpinMode": true, "ipMasq": false, "isDefaultGateway": false`)
	out := b.works("ADD", c)
	var r struct {
		Interfaces []struct{ Name, Sandbox string }
		IPs        []struct{ Interface int }
		Routes     []any
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Interfaces) != 3 || r.Interfaces[0].Name != "cni7" || r.Interfaces[2].Name != "eth0" || r.Interfaces[2].Sandbox != b.ns ||
		len(r.IPs) != 1 || r.IPs[0].Interface != 2 || len(r.Routes) != 0 {
		t.Errorf("result %s", out)
	}
	port, err := exec.Command("ip", "-o", "link", "show", r.Interfaces[1].Name).CombinedOutput()
	if err != nil {
		t.Error(err)
	}
	b.contains(string(port), "master cni7", "mtu 1400") // the MTU is the daemon's default
	b.works("CHECK", withResult(c, out))
	if got := b.in("ip", "route"); strings.Contains(got, "default") {
		t.Errorf("routes %s", got)
	}
	if n := b.d.Status()[0]; n.Options.Masquerade {
		t.Errorf("network %+v", n)
	}
	b.works("DEL", withResult(c, out))
}

// Several networks give a container several interfaces, and the first one its default route. They may publish the same port.
func TestSeveralInterfaces(t *testing.T) {
	b := newBench(t)
	ports := `{"portMappings": [{"hostPort": 8080, "containerPort": 80}]}`
	c0 := withRuntime(conf(`, "subnet": "10.213.0.0/24"`), ports)
	c1 := strings.Replace(withRuntime(conf(`, "subnet": "10.213.1.0/24"`), ports), "web", "data", 1)
	b.works("ADD", c0)
	r1 := b.works("ADD", c1, "CNI_IFNAME=net1")
	r2 := b.works("ADD", c0, "CNI_IFNAME=net2")
	b.contains(b.in("ip", "route"), "default via 10.213.0.1 dev eth0", "default via 10.213.1.1 dev net1")
	b.contains(b.in("ip", "addr"), "10.213.0.2/24", "10.213.1.2/24", "10.213.0.3/24")
	b.contains(b.in("ip", "route", "get", "192.0.2.1"), "dev eth0")
	b.works("DEL", c0)
	b.works("DEL", withResult(c1, r1), "CNI_IFNAME=net1")
	b.works("DEL", withResult(c0, r2), "CNI_IFNAME=net2")
}

// A network is known by its name. Its settings cannot change while containers are on it.
func TestSameName(t *testing.T) {
	b := newBench(t)
	c := conf(`, "subnet": "10.213.0.0/24"`)
	b.works("ADD", c)
	b.refused(101, "with other settings, and containers are on it", "ADD", conf(`, "subnet": "10.214.0.0/24"`), "CNI_CONTAINERID=c2", "CNI_NETNS="+pinned(t))
	b.refused(101, "with other settings, and containers are on it", "ADD", conf(`, "subnet": "10.213.0.0/24", "mtu": 1350`), "CNI_CONTAINERID=c2", "CNI_NETNS="+pinned(t))
	b.works("DEL", c)
	b.contains(b.works("ADD", conf(`, "subnet": "10.214.0.0/24"`)), "10.214.0.2/24")
	b.works("DEL", c)
}

func TestNames(t *testing.T) {
	b := newBench(t)
	c := withRuntime(conf(`, "subnet": "10.213.0.0/24", "dns": {"domain": "example.test", "search": ["lab"]}`), `{"aliases": {"web": ["www"], "other": ["no"]}, "dns": {"searches": ["corp"], "options": ["ndots:5"]}}`)
	out := b.works("ADD", c, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=nginx;K8S_POD_NAMESPACE=prod;K8S_POD_INFRA_CONTAINER_ID=c1;COLOUR=red")
	var r struct{ DNS json.RawMessage }
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	want := `{"nameservers": ["10.213.0.1"], "domain": "example.test", "search": ["corp", "example.test"], "options": ["ndots:5"]}`
	if d := cmp.Diff(value(t, want), value(t, string(r.DNS))); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if got := b.endpoints()[0].Container; got.Name != "nginx" || strings.Join(got.Aliases, " ") != "www nginx.prod" {
		t.Errorf("container %+v", got)
	}
	b.works("DEL", c)
	out = b.works("ADD", withRuntime(conf(`, "names": false`), `{"aliases": ["www"]}`))
	if strings.Contains(out, "nameservers") {
		t.Errorf("result %s", out)
	}
	b.works("DEL", c)
}

func TestArguments(t *testing.T) {
	b := newBench(t)
	c := conf(`, "subnet": "10.213.0.0/24"`)
	out := b.works("ADD", c, "CNI_ARGS=IP=10.213.0.77;MAC=02:00:00:00:00:77")
	b.contains(out, "10.213.0.77/24", "02:00:00:00:00:77")
	b.works("DEL", c)
	out = b.works("ADD", withRuntime(c, `{"ipRanges": [[{"subnet": "10.215.0.0/24", "rangeStart": "10.215.0.50", "rangeEnd": "10.215.0.60", "gateway": "10.215.0.254"}]]}`))
	b.contains(out, "10.215.0.50/24", "10.215.0.254")
	b.works("DEL", c)
	b.refused(4, "CNI_ARGS", "ADD", c, "CNI_ARGS=COLOUR=red")
	b.refused(4, "CNI_ARGS", "ADD", c, "CNI_ARGS=garbage")
	b.refused(7, `address "here"`, "ADD", c, "CNI_ARGS=IP=here")
	b.refused(7, "10.9.9.9 is in none", "ADD", c, "CNI_ARGS=IP=10.9.9.9")
	b.refused(7, "the network's gateway", "ADD", c, "CNI_ARGS=IP=10.213.0.1")
	b.refused(7, `MAC address "x"`, "ADD", c, "CNI_ARGS=MAC=x")
}

func TestBandwidth(t *testing.T) {
	b := newBench(t)
	c := withRuntime(conf(`, "mode": "bridge", "bridge": "cni7", "subnet": "10.213.0.0/24"`), `{"bandwidth": {"ingressRate": 8000000, "ingressBurst": 800000, "egressRate": 4000000}}`)
	b.works("ADD", c)
	out, err := exec.Command("tc", "qdisc", "show").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	b.contains(string(out), "tbf", "rate 8Mbit", "rate 4Mbit", "ingress")
	b.works("DEL", c)
	b.refused(7, "a burst of 5 bits without a rate", "ADD", withRuntime(conf(""), `{"bandwidth": {"egressBurst": 5}}`))
	b.refused(7, "want at least 8000", "ADD", withRuntime(conf(""), `{"bandwidth": {"egressRate": 5}}`))
}
