package oci_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// dropIn: under the name netns the program does what genuinetools/netns does.
func dropIn(r *rig) {
	netns := filepath.Join(r.h.Dir, "bin/netns")
	if err := os.Symlink("usernet", netns); err != nil {
		r.Fatal(err)
	}
	defer os.Remove(netns)
	tool := func(args ...string) string {
		r.Helper()
		out, err := r.h.Run(r.Context(), netns, args...)
		if err != nil {
			r.Error(err)
		}
		return out
	}
	// A prestart hook and nothing else is how it was used.
	hook := container{hook: []string{netns}, stages: []string{"prestart"}, annotations: map[string]string{"mode": "usermode", "nonsense": "x"}}
	named := func(name string) container { c := hook; c.name = name; return c }
	r.run(named("one"))
	r.run(named("two"))
	ip := func(name string) string {
		text, err := os.ReadFile(filepath.Join(r.dir(name), ".ip"))
		if err != nil {
			r.Error(err)
		}
		return string(text)
	}
	if ip("one") != "172.19.0.2" || ip("two") != "172.19.0.3" {
		r.Errorf("addresses %q and %q, want 172.19.0.2 and 172.19.0.3", ip("one"), ip("two"))
	}
	r.in("one", "172.19.0.2/16", "ip", "addr", "show", "eth0")
	r.in("one", "default via 172.19.0.1 dev eth0", "ip", "route")
	r.in("one", "127.0.0.1/8", "ip", "addr", "show", "lo", "up")
	r.in("one", "peer 172.19.0.2:", "probe", "fetch", "http://172.19.0.3/")
	r.in("one", "peer "+hostIP+":", "probe", "fetch", "http://"+far+"/")
	if out, err := r.h.Run(r.Context(), "ip", "addr", "show", "netns0"); err != nil || !strings.Contains(out, "172.19.0.1/16") {
		r.Errorf("netns0: %s, %v", out, err)
	}

	lines := strings.Split(tool("ls"), "\n")
	if got := strings.Join(strings.Fields(lines[0]), " "); got != "IP LOCAL VETH PID STATUS NS FD" {
		r.Errorf("columns %q", got)
	}
	if len(lines) != 3 {
		r.Fatalf("netns ls: %q", lines)
	}
	for i, name := range []string{"one", "two"} {
		f := strings.Fields(lines[i+1])
		if len(f) != 5 || f[0] != ip(name) || f[2] != fmt.Sprint(r.pid(name)) || f[3] != "running" {
			r.Errorf("netns ls: %q, want %s %d running", lines[i+1], ip(name), r.pid(name))
			continue
		}
		if _, err := r.h.Run(r.Context(), "ip", "link", "show", f[1]); err != nil {
			r.Errorf("local veth: %v", err)
		}
	}
	if _, err := r.h.Run(r.Context(), netns, "rm"); err == nil || !strings.Contains(err.Error(), "active endpoints") {
		r.Errorf("rm while containers run: %v", err)
	}

	// Addresses come back without a hook for the end.
	r.end("one")
	r.wait(5*time.Second, "the address to be free", func() error {
		if out := tool("ls"); strings.Contains(out, "172.19.0.2") {
			return fmt.Errorf("netns ls: %s", out)
		}
		return nil
	})
	three := named("three")
	three.hook, three.stages = []string{netns, "--ipfile", "address", "--iface", "net0"}, []string{"prestart", "poststop"}
	r.run(three)
	file := filepath.Join(r.dir("three"), "address")
	if text, err := os.ReadFile(file); err != nil || string(text) != "172.19.0.2" {
		r.Errorf("address of the third: %q, %v", text, err)
	}
	r.in("three", "172.19.0.2/16", "ip", "addr", "show", "net0")
	r.end("three")
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		r.Errorf("%s is left: %v", file, err)
	}
	static := named("static")
	static.hook = []string{netns, "--static-ip", "172.19.3.4"}
	r.run(static)
	if ip("static") != "172.19.3.4" {
		r.Errorf("static address %q", ip("static"))
	}
	r.end("two", "static")

	// A bridge that was made for it stays, with its own address and MTU.
	r.wait(5*time.Second, "the bridge to go", func() error {
		if _, err := r.h.Run(r.Context(), "ip", "link", "show", "netns0"); err == nil {
			return fmt.Errorf("netns0 is there")
		}
		return nil
	})
	if out := tool("create", "--mtu", "1300", "--ip", "172.29.0.1/24"); !strings.Contains(out, "created bridge") {
		r.Errorf("create: %q", out)
	}
	tool("create")
	r.run(named("four"))
	if ip("four") != "172.29.0.2" {
		r.Errorf("address on the bridge that was there: %q", ip("four"))
	}
	r.in("four", "mtu 1300", "ip", "link", "show", "eth0")
	r.end("four")
	r.wait(5*time.Second, "the container to go", func() error {
		if lines := strings.Split(tool("ls"), "\n"); len(lines) > 1 {
			return fmt.Errorf("netns ls: %q", lines)
		}
		return nil
	})
	if out, err := r.h.Run(r.Context(), "ip", "addr", "show", "netns0"); err != nil || !strings.Contains(out, "172.29.0.1/24") {
		r.Errorf("the bridge after its last container: %q, %v", out, err)
	}
	if out := tool("rm"); !strings.Contains(out, "deleted bridge: netns0") {
		r.Errorf("rm: %q", out)
	}
	for _, tt := range []struct{ args, want string }{
		{"rm", "Link not found"},
		{"create --bridge=", "name cannot be empty"},
		{"create --ip=", "ip address cannot be empty"},
		{"create --ip 172.19.0.1", "want one such as"},
		{"create --bridge lo", "not a bridge"},
		{"dance", "there is no command"},
		{"--colour", "flag provided but not defined"},
	} {
		if out, err := r.h.Run(r.Context(), netns, strings.Fields(tt.args)...); err == nil || !strings.Contains(err.Error(), tt.want) {
			r.Errorf("netns %s: %q, %v; want %q", tt.args, out, err, tt.want)
		}
	}
	if out := tool("version"); !strings.HasPrefix(out, "netns of usernet") {
		r.Errorf("version: %q", out)
	}
}
