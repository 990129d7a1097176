package podman_test

import (
	"fmt"
	"os"
	"strings"

	"github.com/usernet/usernet/test/engine"
)

// names: containers find each other, and the world, by name; those on another network do not find them.
func names(r *rig) {
	r.network("web", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.network("other")
	r.run("db", "--network", "web:alias=store")
	r.run("client", "--network", "web")
	r.run("stranger", "--network", "other")
	if out, err := r.in("client", "cat", "/etc/resolv.conf"); err != nil || !strings.Contains(out, "search dns.podman") || !strings.Contains(out, "nameserver 10.213.0.1\n") {
		r.Errorf("resolv.conf: %q, %v", out, err)
	}
	addrs := func() string {
		r.Helper()
		return r.podman("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}\n{{.GlobalIPv6Address}}{{end}}", "db")
	}
	works := func() {
		r.Helper()
		db := addrs()
		v4, v6, _ := strings.Cut(db, "\n")
		for _, name := range []string{"db", "store", "db.dns.podman", "store.dns.podman", r.inspect("db", ".Id")[:12]} {
			r.works(db, "client", "probe", "resolve", name)
		}
		r.works(db, "client", "probe", "resolve", "db", "tcp")
		r.works("db", "client", "probe", "resolve", v4)
		r.works("db", "client", "probe", "resolve", v6)
		r.works("hello from db", "client", "probe", "fetch", "http://db/")
		r.works("hello from db", "client", "wget", "-q", "-O", "-", "http://store/")
		r.works("1 packets received", "client", "ping", "-c", "1", "-W", "2", "db")
		r.works(far+"\n"+far6, "client", "probe", "resolve", engine.FarName)
		r.works(far+"\n"+far6, "client", "probe", "resolve", engine.FarName, "tcp")
		for _, name := range []string{"nobody", "nobody.dns.podman", "nobody.example.test", "10.213.0.200"} {
			r.fails("client", "probe", "resolve", name)
		}
		for _, name := range []string{"db", "store", "db.dns.podman", v4} {
			r.fails("stranger", "probe", "resolve", name)
		}
	}
	follows := func() {
		r.Helper()
		r.works(addrs(), "client", "probe", "resolve", "db")
		r.works("hello from db", "client", "wget", "-q", "-O", "-", "http://store/")
	}
	works()
	if r.mode.name == own.name {
		return
	}
	r.works("10.213.0.1", "client", "nslookup", "gateway.containers.internal", "10.213.0.1")
	inHosts, err := r.in("client", "probe", "resolve", "host.containers.internal") // Podman's /etc/hosts
	if err != nil {
		r.Error(err)
	}
	if r.mode.name == rootless.name { // there it has an alias
		inHosts = hostIP
	}
	r.works(inHosts, "client", "nslookup", "host.containers.internal", "10.213.0.1")
	if r.mode.name == bridge.name { // where the gateway's address is one of the host's
		r.fails("stranger", "nslookup", "db", "10.213.0.1")
	}

	r.podman("restart", "-t", "0", "db")
	follows()
	r.must(r.e.KillUsernet())
	r.must(r.e.StartUsernet(r.Context()))
	works()
	r.podman("network", "reload", "db")
	follows()
	r.podman("stop", "-t", "0", "db")
	r.fails("client", "probe", "resolve", "db")
	r.podman("start", "db")
	follows()
	// The same name on another network is another container's.
	r.podman("rm", "-f", "-t", "0", "stranger")
	r.run("stranger", "--network", "other:alias=db")
	r.works(r.addr("stranger", "other").String(), "stranger", "probe", "resolve", "db")
	follows()
}

// namesAcrossNetworks: a container on two networks knows the names on both, whichever server its C library asks, and reaches
// other names if one of them has a way out.
func namesAcrossNetworks(r *rig) {
	r.network("inner", "--internal")
	r.network("outer")
	r.run("both", "--network", "inner", "--network", "outer")
	r.run("near", "--network", "inner")
	r.run("faraway", "--network", "outer")
	all := func() {
		r.Helper()
		near, faraway := r.addr("near", "inner").String(), r.addr("faraway", "outer").String()
		for name, want := range map[string]string{"near": near, "faraway.dns.podman": faraway, near: "near", engine.FarName: far} {
			r.works(want, "both", "probe", "resolve", name)
		}
		r.works(r.addr("both", "inner").String(), "near", "probe", "resolve", "both")
		r.works(r.addr("both", "outer").String(), "faraway", "probe", "resolve", "both")
		for _, name := range []string{"faraway", "faraway.dns.podman", engine.FarName, "host.containers.example"} {
			r.fails("near", "probe", "resolve", name)
		}
		r.fails("faraway", "probe", "resolve", "near")
	}
	all()
	r.podman("network", "disconnect", "outer", "both")
	r.works(r.addr("near", "inner").String(), "both", "probe", "resolve", "near")
	r.fails("both", "probe", "resolve", "faraway")
	r.fails("both", "probe", "resolve", engine.FarName)
	r.fails("faraway", "probe", "resolve", "both")
	r.podman("network", "connect", "--alias", "again", "outer", "both")
	all()
	r.works(r.addr("both", "outer").String(), "faraway", "probe", "resolve", "again")
	if r.mode.name == own.name {
		return
	}
	r.must(r.e.KillUsernet())
	r.must(r.e.StartUsernet(r.Context()))
	all()
}

// nameServers: who is asked for other names.
func nameServers(r *rig) {
	r.network("web")
	r.run("client", "--network", "web")
	file := r.e.Path("/etc/resolv.conf")
	servers := func(addr string) { r.must(os.WriteFile(file, []byte("nameserver "+addr+"\n"), 0o644)) }
	defer servers(engine.DNSAddr.String())
	servers(hostIP) // nobody listens
	if r.mode.name != own.name {
		r.wait(soon, "the host's new resolver to be asked", func() error {
			if out, err := r.in("client", "probe", "resolve", engine.FarName); err == nil {
				return fmt.Errorf("resolved %s", out)
			}
			return nil
		})
		servers(far)
		r.wait(soon, "the host's next resolver to be asked", func() error {
			_, err := r.in("client", "probe", "resolve", engine.FarName)
			return err
		})
		servers(hostIP)
	}

	r.network("chosen", "--dns", far)
	r.run("chooser", "--network", "chosen")
	r.works(far, "chooser", "probe", "resolve", engine.FarName)
	r.works("chooser", "chooser", "probe", "resolve", r.addr("chooser", "chosen").String())
	r.network("changed", "--dns", hostIP)
	r.run("changer", "--network", "changed")
	r.fails("changer", "probe", "resolve", engine.FarName)
	r.podman("network", "update", "changed", "--dns-drop", hostIP, "--dns-add", far)
	r.podman("restart", "-t", "0", "changer")
	r.works(far, "changer", "probe", "resolve", engine.FarName)

	// Where the network has no names, Podman writes down what the user or the host says.
	r.network("plain", "--disable-dns")
	r.run("one", "--network", "plain", "--dns", far)
	r.run("two", "--network", "plain")
	r.works(far, "one", "probe", "resolve", engine.FarName)
	r.fails("one", "probe", "resolve", "two")
	r.works("nameserver "+hostIP, "two", "cat", "/etc/resolv.conf")

	// Where it has, Podman does not tell a plugin of --dns; the network's resolver stays the one that is asked.
	if r.mode.name != own.name {
		r.run("deaf", "--network", "chosen", "--dns", hostIP)
		r.works(r.addr("chooser", "chosen").String(), "deaf", "probe", "resolve", "chooser")
		r.works(far, "deaf", "probe", "resolve", engine.FarName)
	}
}
