package netavark_test

import (
	"bytes"
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
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/netavark"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv("NOTIFY_SOCKET"); addr != "" {
		os.Exit(pretendDaemon(addr))
	}
	os.Exit(nettest.Main(m))
}

// bench is a daemon behind a control socket, and a plugin that asks it.
type bench struct {
	*testing.T
	d      *driver.Driver
	plugin netavark.Plugin
}

func newBench(t *testing.T) *bench {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	d, err := driver.Open(driver.Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	unix, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	l := control.Listener(unix)
	srv := &http.Server{Handler: control.Handler(d, map[string]string{"mtu": "1400"}, log)}
	srv.ConnContext = l.(interface {
		ConnContext(context.Context, net.Conn) context.Context
	}).ConnContext
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		<-done
		for _, n := range d.Status() {
			for _, e := range n.Endpoints {
				if err := d.Detach(context.Background(), n.ID, e.ID, nil); err != nil {
					t.Error(err)
				}
			}
			if err := d.DeleteNetwork(context.Background(), n.ID); err != nil {
				t.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return &bench{t, d, netavark.Plugin{Version: "1.2.3", Daemon: control.Daemon{Socket: socket}}}
}

// run runs the plugin and returns its exit status and what it printed.
func (b *bench) run(stdin string, args ...string) (int, string) {
	b.Helper()
	var out bytes.Buffer
	p := b.plugin
	p.Stdin, p.Stdout = strings.NewReader(stdin), &out
	status := p.Run(b.Context(), args)
	return status, out.String()
}

// works runs the plugin, which must succeed and print the same JSON as want, or nothing.
func (b *bench) works(want, stdin string, args ...string) {
	b.Helper()
	status, out := b.run(stdin, args...)
	if status != 0 {
		b.Fatalf("%s: exit status %d: %s", args, status, out)
	}
	if d := cmp.Diff(value(b, want), value(b, out)); d != "" {
		b.Errorf("%s (-want +got):\n%s", args, d)
	}
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

// refused runs the plugin, which must fail as the interface wants it, with a message that has part in it.
func (b *bench) refused(part, stdin string, args ...string) {
	b.Helper()
	status, out := b.run(stdin, args...)
	b.isError(status, out, part)
}

func (b *bench) isError(status int, out, part string) {
	b.Helper()
	var answer map[string]string
	if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer) != 1 || status != 1 {
		b.Errorf("exit status %d, %q, %v; want 1 and an error alone", status, out, err)
		return
	}
	if msg := answer["error"]; !strings.Contains(msg, part) || strings.ContainsAny(msg, "\n") {
		b.Errorf("error %q, want %q in it", msg, part)
	}
}

// What Podman 5.8 writes down after create.
const network = `{
	"name": "web", "id": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "driver": "usernet",
	"created": "2026-11-21T07:08:11.759141836Z",
	"subnets": [{"subnet": "10.213.0.0/24", "gateway": "10.213.0.1"}, {"subnet": "fd00:213::/64", "gateway": "fd00:213::1"}],
	"routes": [{"destination": "10.99.0.0/24", "gateway": "10.213.0.9", "metric": 50}],
	"ipv6_enabled": true, "internal": false, "dns_enabled": true, "options": %s, "ipam_options": {"driver": "host-local"}
}`

// execOf is the input of setup and teardown.
func execOf(netOptions, ports, perNetwork string) string {
	return fmt.Sprintf(`{"container_id": "2db8b57420ec37be7c3f57c8554c233e", "container_name": "www", "port_mappings": %s, "network": `+network+`,
		"network_options": {"interface_name": "eth0", "aliases": ["2db8b57420ec"], %s}}`, ports, netOptions, perNetwork)
}

const addresses = `"static_ips": ["10.213.0.2", "fd00:213::2"]`

func TestSetupAndTeardown(t *testing.T) {
	b := newBench(t)
	ns := pinned(t)
	in := execOf(`{"mtu": "1300"}`, `[{"host_ip": "127.0.0.1", "host_port": 8080, "container_port": 80, "range": 2, "protocol": "tcp,udp"}]`,
		addresses+`, "static_mac": "02:00:00:00:be:ef"`)
	want := `{"interfaces": {"eth0": {"mac_address": "02:00:00:00:be:ef", "subnets": [
		{"ipnet": "10.213.0.2/24", "gateway": "10.213.0.1"}, {"ipnet": "fd00:213::2/64", "gateway": "fd00:213::1"}]}},
		"dns_server_ips": ["10.213.0.1", "fd00:213::1"], "dns_search_domains": ["dns.podman"]}`
	for range 2 { // a setup that is repeated is as good as one
		b.works(want, in, "setup", ns)
		n := b.d.Status()[0]
		if len(n.Endpoints) != 1 || len(n.Endpoints[0].Ports) != 4 || n.Name != "web" || n.Endpoints[0].Container.Name != "www" {
			t.Errorf("status %+v", n)
		}
		out, err := exec.Command("nsenter", "--net="+ns, "ip", "addr", "show", "eth0").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "10.213.0.2/24") || !strings.Contains(string(out), "mtu 1300") {
			t.Errorf("in the container: %s, %v", out, err)
		}
	}
	for range 2 {
		b.works("", in, "teardown", ns)
	}
	for _, n := range b.d.Status() {
		if len(n.Endpoints) > 0 {
			t.Errorf("after teardown: %+v", n)
		}
	}
	b.works(want, in, "setup", ns)
	b.works("", in, "teardown", ns+"-gone")
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

func TestCreate(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	b := newBench(t)
	const id = `"name": "web", "id": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "driver": "usernet", "created": "2026-11-21T07:08:11Z"`
	const flags = `"internal": false, "dns_enabled": true`
	b.works(`{`+id+`, `+flags+`, "ipv6_enabled": false, "subnets": [{"subnet": "10.87.0.0/24"}], "options": {"mtu": "1400"}}`,
		`{`+id+`, `+flags+`, "ipv6_enabled": false}`, "create")
	b.works(`{`+id+`, `+flags+`, "ipv6_enabled": true, "options": {"mode": "bridge", "mtu": "1300", "metric": "7"}, "labels": {"usernet.mode": "bridge"},
			"subnets": [{"subnet": "fd00:213::/64"}, {"subnet": "10.213.0.0/24", "gateway": "10.213.0.9", "lease_range": {"start_ip": "10.213.0.4", "end_ip": "10.213.0.7"}}]}`,
		`{`+id+`, `+flags+`, "ipv6_enabled": false, "options": {"com.docker.network.driver.mtu": "1300", "metric": "7"}, "labels": {"usernet.mode": "bridge"},
			"subnets": [{"subnet": "fd00:213::/64"}, {"subnet": "10.213.0.0/24", "gateway": "10.213.0.9", "lease_range": {"start_ip": "10.213.0.4", "end_ip": "10.213.0.7"}}]}`, "create")
	status, out := b.run(`{`+id+`, `+flags+`, "ipv6_enabled": true, "subnets": [{"subnet": "10.213.0.0/24"}]}`, "create")
	if status != 0 || !strings.Contains(out, `"subnet":"fd`) || strings.Count(out, `"subnet":`) != 2 {
		t.Errorf("exit status %d, %s; want an IPv6 subnet behind the other one", status, out)
	}
}

// What a container's option on a network publishes is ours to publish, whatever Podman does about its own ports.
func TestPublishOption(t *testing.T) {
	b := newBench(t)
	ns := pinned(t)
	const publish = addresses + `, "options": {"publish": "8081:80+127.0.0.1:5353:53/udp+9000-9001:9000-9001"}`
	const tcp = `[{"host_ip": "127.0.0.1", "host_port": 8080, "container_port": 80, "range": 1, "protocol": "tcp"}]`
	check := func(want ...string) {
		t.Helper()
		if status, out := b.run(execOf("{}", tcp, publish), "setup", ns); status != 0 {
			t.Fatalf("exit status %d: %s", status, out)
		}
		var got []string
		for _, p := range b.d.Status()[0].Endpoints[0].Ports {
			got = append(got, p.Port.String())
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("published ports (-want +got):\n%s", d)
		}
		b.works("", execOf("{}", tcp, publish), "teardown", ns)
	}
	ours := []string{"8081:80/tcp", "127.0.0.1:5353:53/udp", "9000:9000/tcp", "9001:9001/tcp"}
	check(append([]string{"127.0.0.1:8080:80/tcp"}, ours...)...)
	t.Setenv("_CONTAINERS_USERNS_CONFIGURED", "done") // rootless Podman serves its ports itself
	check(ours...)

	for value, want := range map[string]string{
		"":             `option publish: invalid port ""`,
		"80:80+":       `option publish: invalid port ""`,
		"80:80 81:81":  `option publish: invalid port "80:80 81:81"`,
		"80-90:80-81":  "11 ports of the host for 2",
		"8081:80/icmp": `protocol "icmp"`,
	} {
		b.refused(want, execOf("{}", "[]", addresses+`, "options": {"publish": "`+value+`"}`), "setup", ns)
	}
}

func TestErrors(t *testing.T) {
	b := newBench(t)
	ns := pinned(t)
	setup := func(part, in string) { t.Helper(); b.refused(part, in, "setup", ns) }
	const tcp = `{"host_ip": "", "host_port": 8080, "container_port": 80, "range": 1, "protocol": "tcp"}`
	setup("read standard input", "garbage")
	setup("read standard input", "")
	setup("read standard input", `{"container_id": 7}`)
	setup("container without an ID", `{}`)
	setup("10.9.9.9", execOf("{}", "[]", `"static_ips": ["10.9.9.9"]`))
	setup("the network's gateway", execOf("{}", "[]", `"static_ips": ["10.213.0.1"]`))
	setup(`option "mttu": unknown; did you mean mtu?`, execOf(`{"mttu": "1"}`, "[]", addresses))
	setup(`option "colour": the only one that a container has on a network is publish`, execOf("{}", "[]", addresses+`, "options": {"colour": "red"}`))
	setup("ports 65535-65536 to 80-81", execOf("{}", `[{"host_port": 65535, "container_port": 80, "range": 2, "protocol": "tcp"}]`, addresses))
	setup(`protocol "icmp"`, execOf("{}", strings.Replace("["+tcp+"]", `"tcp"`, `"icmp"`, 1), addresses))
	setup(`host address "here"`, execOf("{}", strings.Replace("["+tcp+"]", `""`, `"here"`, 1), addresses))
	setup(`MAC address "01:00:00:00:00:01"`, execOf("{}", "[]", addresses+`, "static_mac": "01:00:00:00:00:01"`))
	setup(`interface name "a/b"`, strings.Replace(execOf("{}", "[]", addresses), `"eth0"`, `"a/b"`, 1))
	setup("IPAM driver", strings.Replace(execOf("{}", "[]", addresses), "host-local", "dhcp", 1))
	b.refused("no such file or directory", execOf("{}", "[]", addresses), "setup", "/nowhere")
	b.refused("not one", execOf("{}", "[]", addresses), "setup", "/etc/passwd")
	b.refused("want create, setup NETNS", "", "setup")
	b.refused("want create, setup NETNS", "", "dance")
	b.refused("read standard input", "garbage", "teardown", ns)
	b.refused("read standard input", "garbage", "create")

	taken, err := net.Listen("tcp4", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	setup("8080/tcp: port is already allocated", execOf("{}", "["+tcp+"]", addresses))
	for _, n := range b.d.Status() {
		if len(n.Endpoints) > 0 {
			t.Errorf("what was refused is there: %+v", n)
		}
	}

	b.plugin.Daemon.Socket = "/nowhere/s"
	setup("start the usernet daemon", execOf("{}", "[]", addresses))
}

func TestInfo(t *testing.T) {
	b := newBench(t)
	b.works(`{"version": "1.2.3", "api_version": "1.0.0"}`, "", "info")
}

// FuzzPlugin: whatever comes, the answer is one that Podman can read.
func FuzzPlugin(f *testing.F) {
	f.Add(0, fmt.Sprintf(network, "{}"))
	f.Add(1, execOf(`{"mode": "bridge", "metric": "1"}`, `[{"host_port": 1, "container_port": 2, "range": 3, "protocol": "tcp,udp"}]`, addresses))
	f.Add(2, `{"network": {"subnets": [{"subnet": ""}, {"gateway": "::"}], "routes": [{}]}, "network_options": {"static_mac": "AAAA", "static_ips": [""]}}`)
	f.Add(1, `{"container_id": "x", "port_mappings": [{"range": 65535, "container_port": 1}]}`)
	f.Add(0, `{"created": 7}`)
	socket := filepath.Join(f.TempDir(), "nobody")
	f.Fuzz(func(t *testing.T, which int, stdin string) {
		args := [][]string{{"create"}, {"setup", "/proc/self/ns/net"}, {"teardown", "/proc/self/ns/net"}}[uint(which)%3]
		var out bytes.Buffer
		p := netavark.Plugin{Daemon: control.Daemon{Socket: socket}, Stdin: strings.NewReader(stdin), Stdout: &out}
		b := &bench{T: t}
		b.isError(p.Run(t.Context(), args), out.String(), "")
	})
}

// pretendDaemon listens and says that it is ready, as often as it is started, and ends with its parent's test.
func pretendDaemon(notify string) int {
	socket := os.Args[1]
	f, err := os.OpenFile(socket+".started", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 1
	}
	fmt.Fprintln(f, os.Getpid(), os.Args[1:])
	if len(os.Args) > 2 && os.Args[2] == "fail" {
		return 3
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return 1
	}
	c, err := net.Dial("unixgram", notify)
	if err != nil {
		return 1
	}
	fmt.Fprint(c, "READY=1")
	http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			fmt.Fprint(w, `{"id": "x"}`)
			return
		}
		fmt.Fprint(w, `{}`)
	}))
	return 0
}

// The daemon is started once, whoever else wants one at the same time.
func TestStart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "s")
	const runs = 8
	var out [runs]bytes.Buffer
	results := make(chan int)
	for i := range runs {
		p := netavark.Plugin{
			Daemon: control.Daemon{Socket: socket, Serve: []string{"/proc/self/exe", socket}},
			Stdin:  strings.NewReader(fmt.Sprintf(network, "{}")), Stdout: &out[i],
		}
		go func() { results <- p.Run(context.Background(), []string{"create"}) }()
	}
	for range runs {
		if status := <-results; status != 0 {
			t.Errorf("exit status %d", status)
		}
	}
	started, err := os.ReadFile(socket + ".started")
	if err != nil || strings.Count(string(started), "\n") != 1 {
		t.Errorf("started: %q, %v; want one daemon; %s", started, err, out[0].String())
	}
	for line := range strings.Lines(string(started)) {
		var pid int
		fmt.Sscan(line, &pid)
		if p, err := os.FindProcess(pid); err == nil {
			p.Kill()
		}
	}
}

func TestStartFails(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	var out bytes.Buffer
	p := netavark.Plugin{
		Daemon: control.Daemon{Socket: socket, Serve: []string{"/proc/self/exe", socket, "fail"}},
		Stdin:  strings.NewReader(fmt.Sprintf(network, "{}")), Stdout: &out,
	}
	(&bench{T: t}).isError(p.Run(t.Context(), []string{"create"}), out.String(), "exit status 3; "+filepath.Dir(socket)+"/usernet.log says why")
}
