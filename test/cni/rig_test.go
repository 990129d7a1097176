package cni_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

// Addresses as they stand in URLs.
var (
	hostIP = engine.HostAddr.Addr().String()
	router = engine.RouterAddr.Addr().String()
	far    = engine.FarAddr.String()
)

// patience is how long something may take that happens by itself.
const patience = 10 * time.Second

func now() float64 { return float64(time.Now().UnixMicro()) / 1e6 }

// rig is what a case has in hand: a host with runtimes, and ways to do something and fail when that does not work.
type rig struct {
	*testing.T
	e      *engine.CNI
	spaces []string
}

// space makes a network namespace that belongs to no runtime, and returns its path.
func (r *rig) space() string {
	r.Helper()
	name := fmt.Sprint("space", len(r.spaces))
	r.run("ip", "netns", "add", name)
	r.spaces = append(r.spaces, name)
	return "/run/netns/" + name
}

// dropSpace takes a namespace away with the processes in it.
func (r *rig) dropSpace(name string) {
	r.Helper()
	if _, err := r.e.Run(r.background(), "sh", "-c", "for p in $(ip netns pids "+name+"); do kill -9 $p; done; ip netns del "+name); err != nil {
		r.Errorf("clean up: %v", err)
	}
}

// serve starts the web server of the test image in a namespace.
func (r *rig) serve(space string) {
	r.Helper()
	r.run("sh", "-c", "ip netns exec "+base(space)+" "+r.e.Dir+"/bin/probe serve >/dev/null 2>&1 &")
}

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// run runs a command of the host.
func (r *rig) run(name string, args ...string) string {
	r.Helper()
	out, err := r.e.Run(r.Context(), name, args...)
	if err != nil {
		r.Fatal(err)
	}
	return out
}

// in runs a program of the test image in a namespace; it must succeed and print want.
func (r *rig) in(want, space string, args ...string) {
	r.Helper()
	out, err := r.e.Run(r.Context(), "ip", append([]string{"netns", "exec", base(space)}, args...)...)
	if err != nil || !strings.Contains(out, want) {
		r.Errorf("%s in %s: printed %q, %v; want %q", strings.Join(args, " "), space, out, err, want)
	}
}

func (r *rig) probe() string { return r.e.Dir + "/bin/probe" }

// write writes a network's list of plugins. containerd takes the first one by its name.
func (r *rig) write(c chain) {
	r.Helper()
	text := fmt.Sprintf(`{"cniVersion": %q, "name": %q, "plugins": [%s]}`, c.version(), c.name, strings.Join(c.plugins, ","))
	if err := r.e.Feed(r.Context(), text, "sh", "-c", "cat >"+engine.CNIConfig+"/10-"+c.name+".conflist"); err != nil {
		r.Fatal(err)
	}
}

// forget removes the networks that were written.
func (r *rig) forget() {
	r.Helper()
	if _, err := r.e.Run(r.background(), "sh", "-c", "rm -f "+engine.CNIConfig+"/10-*"); err != nil {
		r.Errorf("clean up: %v", err)
	}
}

// chain is a network's list of plugins, each as JSON.
type chain struct {
	name    string
	cni     string // the specification's version; "" is 1.0.0, the newest that Debian's plugins speak
	plugins []string
}

func (c chain) version() string {
	if c.cni == "" {
		return "1.0.0"
	}
	return c.cni
}

// usernetPlugin is usernet in a chain, with further keys.
func usernetPlugin(more string) string {
	return `{"type": "usernet", "capabilities": {"portMappings": true, "ips": true, "mac": true, "bandwidth": true, "aliases": true}` + more + `}`
}

// official is the chain that most hosts use.
func official(name string) chain {
	return chain{name: name, plugins: []string{
		`{"type": "bridge", "bridge": "cni9", "isGateway": true, "ipMasq": true, "ipam": {"type": "host-local", "subnet": "10.222.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}}`,
		`{"type": "portmap", "capabilities": {"portMappings": true}}`,
	}}
}

// call runs one plugin of a chain as a runtime does.
func (r *rig) call(c chain, i int, command, space string, port int, prev string) (string, error) {
	return r.callPlugin(c, i, "eth0", command, space, port, prev)
}

// callAs is call of the first plugin for another interface.
func (r *rig) callAs(c chain, ifName, command, space string, port int, prev string) (string, error) {
	return r.callPlugin(c, 0, ifName, command, space, port, prev)
}

func (r *rig) callPlugin(c chain, i int, ifName, command, space string, port int, prev string) (string, error) {
	var conf map[string]any
	if err := json.Unmarshal([]byte(c.plugins[i]), &conf); err != nil {
		r.Fatal(err)
	}
	conf["cniVersion"], conf["name"] = c.version(), c.name
	if capable, _ := conf["capabilities"].(map[string]any); port != 0 && capable["portMappings"] == true {
		conf["runtimeConfig"] = map[string]any{"portMappings": []map[string]any{{"hostPort": port, "containerPort": 80, "protocol": "tcp"}}}
	}
	if prev != "" {
		conf["prevResult"] = json.RawMessage(prev)
	}
	text, err := json.Marshal(conf)
	if err != nil {
		r.Fatal(err)
	}
	return r.e.Plugin(r.Context(), conf["type"].(string), string(text), "CNI_COMMAND="+command, "CNI_CONTAINERID="+base(space), "CNI_NETNS="+space, "CNI_IFNAME="+ifName)
}

func (r *rig) chainAdd(c chain, space string, port int) (result string) {
	for i := range c.plugins {
		out, err := r.call(c, i, "ADD", space, port, result)
		if err != nil {
			r.Errorf("%s: %v: %s", c.name, err, out)
		}
		result = out
	}
	return result
}

func (r *rig) chainDel(c chain, space string, port int, result string) {
	for i := len(c.plugins) - 1; i >= 0; i-- {
		if out, err := r.call(c, i, "DEL", space, port, result); err != nil {
			r.Errorf("%s: %v: %s", c.name, err, out)
		}
	}
}

// chainCheck has every plugin check, but Debian's portmap: it looks for IPv6 rules of containers that have no IPv6, behind the
// official bridge as well.
func (r *rig) chainCheck(c chain, space string, port int, result string) {
	r.Helper()
	for i, plugin := range c.plugins {
		if strings.Contains(plugin, `"portmap"`) {
			continue
		}
		if out, err := r.call(c, i, "CHECK", space, port, result); err != nil {
			r.Errorf("%s: %v: %s", c.name, err, out)
		}
	}
}

// look waits for a program in a container: it may take as long until it listens.
var look = engine.Look{Patience: 4 * time.Second, Attempt: 2 * time.Second}

// page fetches a page from a namespace; it must contain all of want.
func (r *rig) page(from *netns.NS, addr string, want ...string) {
	r.Helper()
	look.Page(r, from, addr, want...)
}

// noPage checks that nobody serves a page there.
func (r *rig) noPage(from *netns.NS, addr string) {
	r.Helper()
	look.NoPage(r, from, addr)
}

func (r *rig) host() *netns.NS    { return r.e.NS() }
func (r *rig) outside() *netns.NS { return r.e.Outside().NS() }

// wait asks until it is told that all is well; after the time it fails with the last error.
func (r *rig) wait(limit time.Duration, what string, check func() error) {
	r.Helper()
	engine.Wait(r, limit, what, check)
}

// snapshot is how the host looks.
func (r *rig) snapshot() engine.Snapshot { return r.e.Looks(r) }

// background is for what must be done after the test's own context ended.
func (r *rig) background() context.Context { return context.WithoutCancel(r.Context()) }
