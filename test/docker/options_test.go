package docker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/test/engine"
)

// chosenAddresses: every address that a user can choose.
func chosenAddresses(r *rig) {
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--gateway", "10.213.0.254", "--ip-range", "10.213.0.4/30",
		"--aux-address", "printer=10.213.0.5", "--subnet", "fd00:213::/64", "--gateway", "fd00:213::ffff")
	r.run("www", "--network", "web", "--ip", "10.213.0.50", "--ip6", "fd00:213::50", "--mac-address", "02:00:00:00:be:ef", "-p", "8080:80")
	r.run("client", "--network", "web")
	r.run("second", "--network", "web")
	r.works("10.213.0.50/24", "www", "ip", "-4", "addr", "show", "eth0")
	r.works("fd00:213::50/64", "www", "ip", "-6", "addr", "show", "eth0")
	r.works("02:00:00:00:be:ef", "www", "ip", "link", "show", "eth0")
	r.works("via 10.213.0.254", "www", "ip", "route", "show", "default")
	r.works("via fd00:213::ffff", "www", "ip", "-6", "route", "show", "default")
	r.works("hello from www", "client", "probe", "fetch", "http://10.213.0.50/")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.works("1 packets received", "www", "ping", "-c", "1", "-W", "2", "10.213.0.254")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	for _, name := range []string{"client", "second"} {
		if a := r.addr(name, "web").String(); a == "10.213.0.5" || a == "10.213.0.254" {
			r.Errorf("%s was given %s", name, a)
		}
	}
	if r.mode.name != own.name {
		e := r.endpoint("www", "web")
		if got := fmt.Sprintf("%v %v %v", e.IPv4, e.IPv6, e.MAC); got != "10.213.0.50/24 fd00:213::50/64 02:00:00:00:be:ef" {
			r.Errorf("usernet ps lists %s", got)
		}
	}
	r.docker("rm", "-f", "www")
	r.run("www", "--network", "web", "--ip", "10.213.0.50")
}

// nullIPAM: where Docker brings no addresses, usernet does.
func nullIPAM(r *rig) {
	if r.mode.name == own.name {
		return
	}
	r.network("web", "--ipam-driver", "null", "-o", "subnet=10.213.0.0/24", "-o", "gateway=10.213.0.1")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("client", "--network", "web")
	www := r.endpoint("www", "web").IPv4
	if !strings.HasPrefix(www.String(), "10.213.0.") {
		r.Fatalf("www has address %s", www)
	}
	r.works(www.String(), "www", "ip", "-4", "addr", "show", "eth0")
	r.works("hello from www", "client", "probe", "fetch", "http://"+www.Addr().String()+"/")
	r.works("peer "+hostIP+":", "client", "probe", "fetch", "http://"+far+"/")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.docker("restart", "-t", "0", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www")
}

func mtu(r *rig) {
	r.network("a", "-o", "com.docker.network.driver.mtu=1400")
	r.run("ca", "--network", "a")
	r.run("cb", "--network", "a")
	r.works("mtu 1400", "ca", "ip", "link", "show", "eth0")
	r.works("1 packets received", "ca", "ping", "-c", "1", "-W", "2", "-s", "4000", r.addr("cb", "a").String())
	r.works("5000000 bytes came back", "ca", "probe", "bulk", far+":7", "5000000")
	r.works(strings.Repeat("x", 4000), "ca", "probe", "udp", far+":7", strings.Repeat("x", 4000))
	if r.mode.name == own.name {
		return
	}
	r.network("b", "-o", "mtu=9000")
	r.run("cc", "--network", "b")
	r.works("mtu 9000", "cc", "ip", "link", "show", "eth0")
	r.works("5000000 bytes came back", "cc", "probe", "bulk", far+":7", "5000000")
}

// icc=false keeps the containers of a network apart, and nothing else.
func icc(r *rig) {
	r.network("web", "-o", "com.docker.network.bridge.enable_icc=false")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("client", "--network", "web")
	www := r.addr("www", "web").String()
	r.fails("client", "probe", "fetch", "http://"+www+"/")
	r.fails("client", "ping", "-c", "1", "-W", "1", www)
	r.works("peer "+hostIP+":", "client", "probe", "fetch", "http://"+far+"/")
	r.works("1 packets received", "client", "ping", "-c", "1", "-W", "2", far)
	r.page(r.outside(), hostIP+":8080", "hello from www")
}

// namesAndBinding: the options for an interface's name and for the host address of ports that give none.
func namesAndBinding(r *rig) {
	r.network("web", "-o", "com.docker.network.container_iface_prefix=lan", "-o", "com.docker.network.bridge.host_binding_ipv4=127.0.0.1")
	r.run("www", "--network", "web", "-p", "8080:80", "-p", hostIP2+":8081:80")
	r.works("lan0", "www", "ip", "link", "show", "lan0")
	r.page(r.host(), "127.0.0.1:8080", "hello from www")
	r.noPage(r.outside(), hostIP+":8080")
	r.page(r.outside(), hostIP2+":8081", "hello from www")
}

// masquerade=false sends containers' own addresses out; the outside has no way back to them until it is given one.
func masquerade(r *rig) {
	r.network("web", "--subnet", "10.213.0.0/24", "-o", "com.docker.network.bridge.enable_ip_masquerade=false")
	r.run("client", "--network", "web", "--ip", "10.213.0.9")
	r.fails("client", "probe", "fetch", "http://"+far+"/")
	if _, err := r.e.RunOutside(r.Context(), "ip", "route", "add", "10.213.0.0/24", "via", hostIP); err != nil {
		r.Fatal(err)
	}
	defer r.e.RunOutside(r.background(), "ip", "route", "del", "10.213.0.0/24")
	r.works("peer 10.213.0.9:", "client", "probe", "fetch", "http://"+far+"/")
}

// adoptedBridge: a bridge that was there before is used, and stays when the network goes.
func adoptedBridge(r *rig) {
	onHost := func(args ...string) {
		r.Helper()
		if _, err := r.e.Run(r.Context(), "ip", args...); err != nil {
			r.Fatal(err)
		}
	}
	onHost("link", "add", "lan0", "type", "bridge")
	defer r.e.Run(r.background(), "ip", "link", "del", "lan0")
	onHost("addr", "add", "10.213.0.1/24", "dev", "lan0")
	onHost("link", "set", "lan0", "up")
	r.network("web", "--subnet", "10.213.0.0/24", "-o", "com.docker.network.bridge.name=lan0")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router)
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.refused([]string{"lan0", "in use"}, "network", "create", "-d", r.mode.args[1], "-o", "mode=bridge", "-o", "bridge=lan0", "other")
	r.docker("rm", "-f", "www")
	r.docker("network", "rm", "web")
	out, err := r.e.Run(r.Context(), "ip", "addr", "show", "lan0")
	if err != nil || !strings.Contains(out, "10.213.0.1/24") || !strings.Contains(out, "UP") {
		r.Errorf("the adopted bridge is gone or changed: %v\n%s", err, out)
	}
}

// flushedFirewall: rules that somebody flushed come back on SIGHUP.
func flushedFirewall(r *rig) {
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web", "-p", "8080:80")
	saved := map[string]string{}
	for _, tool := range []string{"iptables", "ip6tables"} {
		text, err := r.e.Run(r.Context(), tool+"-save")
		if err != nil {
			r.Fatal(err)
		}
		saved[tool] = text
	}
	defer func() { // Docker's own rules do not come back by themselves
		for tool, text := range saved {
			if err := r.e.Feed(r.background(), text, tool+"-restore"); err != nil {
				r.Error(err)
			}
		}
	}()
	flush := func() {
		r.Helper()
		for tool := range saved {
			for _, table := range []string{"filter", "nat", "mangle", "raw"} {
				for _, what := range []string{"-F", "-X"} {
					if _, err := r.e.Run(r.Context(), tool, "-t", table, what); err != nil {
						r.Fatal(err)
					}
				}
			}
		}
	}
	getsOut := func() bool {
		_, err := r.e.Docker(r.Context(), "exec", "-e", "PROBE_PATIENCE=1s", "www", "probe", "fetch", "http://"+far+"/")
		return err == nil
	}
	flush()
	if getsOut() { // usernet's own look at the rules, every 30 s, may have come in between; not twice
		if flush(); getsOut() {
			r.Error("the flush did nothing: the container still gets out")
		}
	}
	if err := r.e.SignalUsernet(hangup); err != nil {
		r.Fatal(err)
	}
	r.wait(5*time.Second, "the rules to come back", func() error {
		_, err := r.in("www", "probe", "fetch", "http://"+far+"/")
		return err
	})
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.works("peer ["+hostIP6+"]:", "www", "probe", "fetch", "http://["+far6+"]/")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router)
	r.page(r.outside(), "["+hostIP6+"]:8080", "hello from www", "peer ["+router6)
}

// badInput is refused with a message that helps, and changes nothing.
func badInput(r *rig) {
	if r.mode.name == own.name {
		return
	}
	create := append([]string{"network", "create"}, r.mode.args...)
	for _, bad := range []struct {
		args  []string
		parts []string
	}{
		{[]string{"-o", "colour=red"}, append([]string{"colour"}, config.Names()...)},
		{[]string{"-o", "usernet.colour=red"}, []string{"colour"}},
		{[]string{"-o", "mtu=12"}, []string{"mtu", "12"}},
		{[]string{"-o", "mtu=70000"}, []string{"mtu", "70000"}},
		{[]string{"-o", "mtu=soft"}, []string{"mtu", "soft"}},
		{[]string{"-o", "icc=perhaps"}, []string{"icc", "perhaps"}},
		{[]string{"--ipam-driver", "null", "-o", "subnet=10.213.0.5/24"}, []string{"10.213.0.0/24"}},
		{[]string{"--subnet", "10.213.0.0/32"}, []string{"10.213.0.0/32"}},
	} {
		r.refused(bad.parts, append(append(create, bad.args...), "web")...)
	}
	r.refused([]string{"mode", "usermode", "bridge"}, "network", "create", "-d", "usernet", "-o", "mode=magic", "web")
	if out := r.docker("network", "ls", "-q", "-f", "type=custom"); out != "" {
		r.Errorf("networks are left: %s", out)
	}
	if list := r.ps(); len(list) != 0 {
		r.Errorf("usernet knows networks: %v", list)
	}
	if r.mode.name == bridge.name {
		r.network("a", "--ipam-driver", "null", "-o", "subnet=10.213.0.0/24")
		r.refused([]string{"10.213.0.128/25", "overlaps"}, append(create, "--ipam-driver", "null", "-o", "subnet=10.213.0.128/25", "b")...)
		r.refused([]string{"eth0"}, append(create, "-o", "bridge=eth0", "b")...)
		r.refused([]string{"name"}, append(create, "-o", "bridge=this/is/no/name", "b")...)
	} else {
		r.refused([]string{"masquerade", "mode=bridge"}, append(create, "-o", "masquerade=false", "b")...)
	}
	// A subnet that is used up.
	r.network("small", "--subnet", "10.214.0.0/30")
	r.run("one", "--network", "small")
	r.refused(nil, "run", "-d", "--name", "two", "--network", "small", engine.Image)
	r.refused(nil, "run", "-d", "--name", "three", "--network", "small", "--ip", "10.214.0.1", engine.Image)
}

// hostileCalls come straight to the plugin's socket. The daemon answers and lives, and Docker's networks work on.
func hostileCalls(r *rig) {
	if r.mode.name == own.name {
		return
	}
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80")
	id := r.docker("network", "inspect", "-f", "{{.Id}}", "web")
	deep := strings.Repeat(`{"a":`, 100_000)
	for _, call := range []struct{ method, body string }{
		{"NetworkDriver.CreateNetwork", ""},
		{"NetworkDriver.CreateNetwork", "null"},
		{"NetworkDriver.CreateNetwork", "{}"},
		{"NetworkDriver.CreateNetwork", "[1,2"},
		{"NetworkDriver.CreateNetwork", deep},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"` + strings.Repeat("x", 64<<20) + `"}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"../../etc","IPv4Data":[{"Pool":"10.9.0.0/24","Gateway":"10.9.0.1/24"}]}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"abc","IPv4Data":[{"Pool":"10.9.0.0/240","Gateway":"x"}]}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"abc","Options":{"com.docker.network.generic":{"mode":7}}}`},
		{"NetworkDriver.CreateEndpoint", ""},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"` + id + `","EndpointID":"../../../x","Interface":{"Address":"10.9.0.2/24"}}`},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"` + id + `","EndpointID":"e","Interface":{"MacAddress":"ff:ff:ff:ff:ff:ff"}}`},
		{"NetworkDriver.Join", `{"NetworkID":"` + id + `","EndpointID":"nobody","SandboxKey":"/etc/passwd"}`},
		{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"` + id + `","EndpointID":"nobody"}`},
		{"NetworkDriver.NoSuchMethod", "{}"},
		{"../../v1/networks", "{}"},
	} {
		if err := r.call(call.method, call.body); !errors.Is(err, errRefused) {
			r.Errorf("%s %.60s: %v, want a refusal", call.method, call.body, err)
		}
	}
	if !r.e.UsernetRunning() {
		r.Fatal("usernet died")
	}
	r.page(r.outside(), hostIP+":8080", "hello from www")
	if n := len(r.ps()); n != 1 {
		r.Errorf("usernet has %d networks, want 1", n)
	}
}

// errRefused says that the plugin understood that it was asked for something and said no.
var errRefused = errors.New("refused")

// call makes one call on the plugin's socket.
func (r *rig) call(method, body string) error {
	tr := &http.Transport{DialContext: r.e.DialUnix(engine.PluginSocket), DisableKeepAlives: true, ResponseHeaderTimeout: 20 * time.Second}
	req, err := http.NewRequestWithContext(r.Context(), http.MethodPost, "http://plugin/"+method, strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := tr.RoundTrip(req)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("%w: a body that is too long is not read to its end", errRefused)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	var said struct{ Err string }
	if resp.StatusCode >= 300 || json.Unmarshal(answer, &said) == nil && said.Err != "" {
		return fmt.Errorf("%w: %s: %s", errRefused, resp.Status, answer)
	}
	return nil
}
