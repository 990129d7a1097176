package oci_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// web is the main thing: a container with an address, a way out and a published port, and a second one.
func web(r *rig) {
	r.run(container{name: "www", annotations: map[string]string{"network": "web", "publish": "8080:80, 9000:7/udp"}})
	r.run(container{name: "other", annotations: map[string]string{"network": "web"}})
	for _, host := range []string{"127.0.0.1", hostIP} {
		r.page(r.h.NS(), host+":8080", "hello from www")
	}
	r.page(r.h.Outside().NS(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.in("other", "peer "+r.addr("other"), "probe", "fetch", "http://"+r.addr("www")+"/")
	n, _ := r.endpoint("www")
	if len(n.Subnets) != 1 || n.Name != "web" || n.Mode != r.mode {
		r.Fatalf("network %+v", n)
	}
	r.in("www", "1 packets received", "ping", "-c", "1", "-W", "2", n.Subnets[0].Gateway)
	r.in("www", "1 packets received", "ping", "-c", "1", "-W", "2", r.addr("other"))
	r.in("www", "127.0.0.1/8", "ip", "addr", "show", "lo", "up")
	r.in("www", "peer "+hostIP+":", "probe", "fetch", "http://"+far+"/")
	r.in("www", "default via "+n.Subnets[0].Gateway+" dev eth0", "ip", "route")
	r.publishes("www", "8080->80/tcp", "9000->7/udp")

	r.end("www")
	r.noPage(r.h.NS(), "127.0.0.1:8080")
	r.in("other", "1 packets received", "ping", "-c", "1", "-W", "2", n.Subnets[0].Gateway)
}

// chosen are the settings that say what an interface is to be.
func chosen(r *rig) {
	r.run(container{name: "www", annotations: map[string]string{
		"network": "web", "subnet": "10.201.7.0/24, fd00:201::/64", "gateway": "10.201.7.254", "mtu": "1400",
		"ip": "10.201.7.9", "ip6": "fd00:201::9", "mac": "02:00:00:00:07:09", "interface": "net7", "publish": "80 8443:80",
	}})
	r.in("www", "10.201.7.9/24", "ip", "addr", "show", "net7")
	r.in("www", "fd00:201::9/64", "ip", "addr", "show", "net7")
	r.in("www", "02:00:00:00:07:09", "ip", "link", "show", "net7")
	r.in("www", "mtu 1400", "ip", "link", "show", "net7")
	r.in("www", "1 packets received", "ping", "-c", "1", "-W", "2", "10.201.7.254")
	r.page(r.h.Outside().NS(), "["+hostIP6+"]:8443", "hello from www")

	// Whoever comes later need not say again what network it is.
	r.run(container{name: "other", annotations: map[string]string{"network": "web", "default_route": "false"}})
	r.in("other", "mtu 1400", "ip", "link", "show", "eth0")
	if out, err := r.try("exec", "other", "ip", "route"); err != nil || strings.Contains(out, "default") {
		r.Errorf("routes without a default route: %q, %v", out, err)
	}
	r.run(container{name: "closed", annotations: map[string]string{"network": "inner", "internal": "true", "publish": "8081:80"}})
	if out, err := r.try("exec", "closed", "probe", "fetch", "http://"+far+"/"); err == nil {
		r.Errorf("an internal network has a way out: %q", out)
	}
	r.noPage(r.h.NS(), "127.0.0.1:8081")

	err := r.tryRun(container{name: "late", annotations: map[string]string{"network": "web", "mtu": "9000"}})
	if err == nil || !strings.Contains(err.Error(), "with other settings") {
		r.Errorf("another MTU for a network in use: %v", err)
	}
}

// names: containers find each other, and the world, by what the mounted resolv.conf leads to.
func names(r *rig) {
	r.run(container{name: "www", annotations: map[string]string{"network": "web", "alias": "pages,site"}})
	r.run(container{name: "other", annotations: map[string]string{"network": "web", "name": "client"}, hostname: "something"})
	for _, name := range []string{"www", "pages", "site"} {
		r.in("other", r.addr("www"), "probe", "resolve", name)
	}
	r.in("www", r.addr("other"), "probe", "resolve", "client")
	r.in("www", far, "probe", "resolve", engine.FarName)
	r.run(container{name: "third", annotations: map[string]string{"network": "web", "dns": engine.DNSAddr.String()}})
	r.in("third", "nameserver "+engine.DNSAddr.String(), "cat", "/etc/resolv.conf")
}

// resolvConf: the container finds a file of its own and the root directory, which others may have as well, is not written to.
func resolvConf(r *rig) {
	root := filepath.Join(r.h.Dir, "root2")
	if _, err := r.h.Run(r.Context(), "cp", "-a", r.h.Rootfs(), root); err != nil {
		r.Fatal(err)
	}
	defer os.RemoveAll(root)
	conf := filepath.Join(root, "etc/resolv.conf")
	secret := filepath.Join(r.h.Dir, "secret")
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			r.Fatal(err)
		}
	}
	write(secret, "keep")
	defer os.Remove(secret)
	link := func(target string) func() {
		return func() {
			if err := errors.Join(os.RemoveAll(conf), os.Symlink(target, conf)); err != nil {
				r.Fatal(err)
			}
		}
	}
	const ours = "nameserver "
	for _, tt := range []struct {
		name   string
		setUp  func()
		c      container
		within string // what the container's file says
		keeps  string // what the root's says after it; "" is not looked at
	}{
		{"a file", func() { write(conf, "old") }, container{}, ours, "old"},
		{"none", func() { os.Remove(conf) }, container{}, ours, ""},
		{"off", func() { os.Remove(conf); write(conf, "old") }, container{annotations: map[string]string{"resolv_conf": "off"}}, "old", "old"},
		{"the bundle mounts one", func() { write(conf, "old") }, container{mounts: []mount{{"/etc/resolv.conf", "none", secret, []string{"bind"}}}}, "keep", "old"},
		{"it does, and ours is wanted", func() { write(conf, "old") }, container{
			mounts:      []mount{{"/etc/resolv.conf", "none", secret, []string{"bind"}}},
			annotations: map[string]string{"resolv_conf": "on"},
		}, ours, "old"},
		{"a link out of the root", link("/../../../../../../.." + secret), container{}, ours, ""},
		{"a link to nowhere", link("../run/stub.conf"), container{}, ours, ""},
	} {
		r.Logf("%s", tt.name)
		tt.setUp()
		tt.c.name, tt.c.rootfs = "www", root
		if err := r.tryRun(tt.c); err != nil {
			r.Errorf("%s: %v", tt.name, err)
			continue
		}
		r.in("www", tt.within, "cat", "/etc/resolv.conf")
		if tt.within == ours {
			if _, err := r.try("exec", "www", "sh", "-c", "echo x >>/etc/resolv.conf"); err == nil {
				r.Errorf("%s: the container can write to the host's run directory", tt.name)
			}
		}
		r.end("www")
		if text, err := os.ReadFile(conf); tt.keeps != "" && (err != nil || string(text) != tt.keeps) {
			r.Errorf("%s: the root's file has %q, %v; want %q", tt.name, text, err, tt.keeps)
		}
		if text, err := os.ReadFile(secret); err != nil || string(text) != "keep" {
			r.Fatalf("%s: a file of the host has %q, %v", tt.name, text, err)
		}
	}
	// Where there is no /etc, nobody looks there.
	if err := os.RemoveAll(filepath.Join(root, "etc")); err != nil {
		r.Fatal(err)
	}
	r.run(container{name: "bare", rootfs: root})
	r.in("bare", "eth0", "ip", "link")
}

// shared: a container in another one's namespace has its interface, and publishes ports there as long as it is.
func shared(r *rig) {
	r.run(container{name: "pod", args: []string{"/bin/sleep", "1000"}, annotations: map[string]string{"network": "web", "publish": "8080:80"}})
	ns := fmt.Sprintf("/proc/%d/ns/net", r.pid("pod"))
	addr := r.addr("pod")
	r.run(container{name: "www", joins: ns, annotations: map[string]string{"network": "web", "publish": "8081:80"}})
	r.run(container{name: "quiet", joins: ns, args: []string{"/bin/sleep", "1000"}})
	r.in("www", addr, "ip", "addr")
	r.page(r.h.NS(), "127.0.0.1:8080", "hello from www")
	r.page(r.h.Outside().NS(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.publishes("pod", "8080->80/tcp", "8081->80/tcp")

	for _, tt := range []struct {
		annotations map[string]string
		want        string
	}{
		{map[string]string{"network": "other"}, "is on network web"},
		{map[string]string{"ip": "10.99.9.9"}, "it has [" + addr},
		{map[string]string{"mac": "02:00:00:00:00:aa"}, "it has 02:42"},
		{map[string]string{"alias": "more"}, "names belong to the container"},
		{map[string]string{"publish": "8080:80"}, "already allocated"},
	} {
		err := r.tryRun(container{name: "wrong", joins: ns, annotations: tt.annotations})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			r.Errorf("%v: %v, want %q", tt.annotations, err, tt.want)
		}
	}
	// The engine starts anew and calls the hooks again.
	if err := r.hook(r.state("www")); err != nil {
		r.Error(err)
	}
	r.end("www")
	r.publishes("pod", "8080->80/tcp")
	r.noPage(r.h.NS(), "127.0.0.1:8081")
	r.in("quiet", addr, "ip", "addr")

	// Of one that comes again, the ports do as well.
	r.run(container{name: "www", joins: ns, annotations: map[string]string{"publish": "8081:80"}})
	r.publishes("pod", "8080->80/tcp", "8081->80/tcp")
	r.end("pod") // whose the interface is
	r.noPage(r.h.NS(), "127.0.0.1:8081")
	if out, err := r.try("exec", "quiet", "ip", "addr"); err != nil || strings.Contains(out, "eth0") {
		r.Errorf("the interface outlives its container: %q, %v", out, err)
	}
}

// again: hooks are called again for containers that run, and nothing changes for these.
func again(r *rig) {
	r.run(container{name: "first", annotations: map[string]string{"network": "web"}})
	r.run(container{name: "www", annotations: map[string]string{"network": "web", "publish": "8080:80,9007:7"}, stages: []string{"prestart", "createRuntime", "poststop"}})
	r.end("first") // its address is lower, and free now
	r.page(r.h.NS(), "127.0.0.1:8080", "hello from www")
	before := r.snapshot()
	conn, err := engine.Dial(r.Context(), r.h.Outside().NS(), "tcp", hostIP+":9007")
	if err != nil {
		r.Fatal(err)
	}
	defer conn.Close()
	for i := range 3 {
		if err := r.hook(r.state("www")); err != nil {
			r.Error(err)
		}
		question, answer := fmt.Sprintf("question %d", i), make([]byte, len("question 0"))
		conn.SetDeadline(time.Now().Add(look.Patience))
		_, err := io.WriteString(conn, question)
		if err == nil {
			_, err = io.ReadFull(conn, answer)
		}
		if err != nil || string(answer) != question {
			r.Fatalf("a connection through calls of the hook: %q, %v", answer, err)
		}
	}
	if err := before.Same(r.snapshot()); err != nil {
		r.Error(err)
	}
}

// poststop: everything is released by the container's ID, whoever calls and however often.
func poststop(r *rig) {
	r.run(container{name: "www", annotations: map[string]string{"network": "web", "publish": "8080:80"}, stages: []string{"createRuntime"}})
	addr, state := r.addr("www"), r.state("www")
	bare := stopped(state)
	delete(bare, "annotations")
	for range 2 {
		if err := r.hook(bare); err != nil {
			r.Error(err)
		}
	}
	r.noPage(r.h.NS(), "127.0.0.1:8080")
	r.end("www")
	if err := r.hook(stopped(state)); err != nil {
		r.Errorf("the bundle's container is gone: %v", err)
	}
	// Without a hook for its end, the namespace takes the interface with it, and the port goes too.
	r.run(container{name: "www", annotations: map[string]string{"network": "web", "publish": "8080:80"}, stages: []string{"createRuntime"}})
	if got := r.addr("www"); got != addr {
		r.Errorf("address %s, want %s again", got, addr)
	}
	r.end("www")
	r.wait(5*time.Second, "the port to be released", func() error {
		if list := r.ps(); len(list) > 0 {
			return fmt.Errorf("there is %+v", list)
		}
		return nil
	})
}

// killed: the daemon dies between a container's beginning and its end.
func killed(r *rig) {
	r.run(container{name: "www", annotations: map[string]string{"network": "web", "publish": "8080:80"}})
	r.run(container{name: "other", annotations: map[string]string{"network": "web"}})
	addr := r.addr("www")
	if err := r.h.KillUsernet(); err != nil {
		r.Fatal(err)
	}
	r.in("other", "1 packets received", "ping", "-c", "1", "-W", "2", addr)
	if err := r.h.StartUsernet(r.Context()); err != nil {
		r.Fatal(err)
	}
	r.page(r.h.NS(), "127.0.0.1:8080", "hello from www")
	if err := r.hook(r.state("www")); err != nil {
		r.Error(err)
	}
	if got := r.addr("www"); got != addr {
		r.Errorf("address %s, want %s", got, addr)
	}
	if err := r.h.KillUsernet(); err != nil {
		r.Fatal(err)
	}
	if err := r.h.StartUsernet(r.Context()); err != nil {
		r.Fatal(err)
	}
	r.end("www", "other")
	r.noPage(r.h.NS(), "127.0.0.1:8080")
}

// several hooks, or one with other flags, give a container several networks.
func several(r *rig) {
	r.bundle(container{name: "www", annotations: map[string]string{"publish": "8080:80"}})
	// The second hook stands in the bundle beside the first.
	path := filepath.Join(r.dir("www"), "config.json")
	text, err := os.ReadFile(path)
	if err != nil {
		r.Fatal(err)
	}
	bin := r.usernetBin()
	second := fmt.Sprintf(`"createRuntime": [{"path": %q, "args": ["usernet", "oci-hook", "-network", "back", "-interface", "eth1"]}, {`, bin)
	both := strings.Replace(string(text), `"createRuntime": [
      {`, second, 1)
	if both == string(text) {
		r.Fatalf("no hook in %s", text)
	}
	if err := os.WriteFile(path, []byte(both), 0o644); err != nil {
		r.Fatal(err)
	}
	if err := r.start("www"); err != nil {
		r.Fatal(err)
	}
	r.in("www", "default via", "ip", "route", "show", "dev", "eth0")
	r.in("www", "default via", "ip", "route", "show", "dev", "eth1")
	r.page(r.h.Outside().NS(), hostIP+":8080", "hello from www")
	r.end("www")
	if list := r.ps(); len(list) > 1 { // networks go in their own time
		r.Errorf("after the container: %+v", list)
	}
}

// parallel: containers that come all at once, on a network that none has made yet.
func parallel(r *rig) {
	const count = 8
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		name := fmt.Sprintf("c%d", i)
		r.made = append(r.made, name)
		r.bundle(container{name: name, annotations: map[string]string{"network": fmt.Sprintf("net%d", i/4), "publish": fmt.Sprintf("%d:80", 8100+i)}})
		wg.Go(func() {
			rr := *r
			errs[i] = rr.start(name)
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			r.Errorf("container %d: %v", i, err)
			continue
		}
		r.page(r.h.NS(), fmt.Sprintf("127.0.0.1:%d", 8100+i), fmt.Sprintf("hello from c%d", i))
	}
	if list := r.ps(); len(list) != 2 {
		r.Errorf("%d networks, want 2", len(list))
	}
}
