package podman_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// rootless is the mode of an ordinary user's networks.
var rootless = mode{"rootless", []string{"--driver", "usernet"}}

var rootlessCases = []testCase{
	{name: "web", run: rootlessWeb},
	{name: "egress", run: egress},
	{name: "internal", run: internal},
	{name: "ipv6", run: rootlessIPv6},
	{name: "names", run: names},
	{name: "namesAcrossNetworks", run: namesAcrossNetworks},
	{name: "severalNetworks", run: rootlessNetworks},
	{name: "mixed", run: rootlessMixed},
	{name: "pod", run: rootlessPod},
	{name: "chosenAddresses", run: chosenAddresses},
	{name: "refusals", run: rootlessRefusals},
	{name: "usernetKilled", run: rootlessKilled},
	{name: "start", run: rootlessStart},
	{name: "activation", run: rootlessActivation},
	{name: "migrate", run: rootlessMigrate},
	{name: "twoUsers", run: twoUsers},
	{name: "many", run: rootlessMany},
}

func TestRootless(t *testing.T) {
	engine.EachRootless(t, func(t *testing.T, e *engine.Podman) {
		for i := range rootlessCases {
			rootlessCases[i].modes = []mode{rootless}
		}
		suite(t, e, rootlessCases)
	})
}

// rootlessWeb: what Podman publishes itself with a forwarder of its own, and what it lets us publish. There the container
// sees its clients.
func rootlessWeb(r *rig) {
	r.network("web")
	r.run("www", "--network", "web:publish=8081:80+5353:7/udp+127.0.0.1:8082:80", "-p", "8080:80", "-p", "5354:7/udp")
	r.run("other", "--network", "web")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	for _, host := range localAll {
		r.page(r.host(), host+":8081", "hello from www")
	}
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.udp(r.outside(), hostIP+":5354", "peer ")
	r.page(r.host(), "127.0.0.1:8082", "hello from www")
	r.noPage(r.outside(), hostIP+":8082")
	r.publishes("www", "web", "8081->80/tcp", "5353->7/udp", "127.0.0.1 8082->80/tcp")

	www := r.addr("www", "web").String()
	r.works("peer "+r.addr("other", "web").String(), "other", "probe", "fetch", "http://"+www+"/")
	r.works("knock", "other", "probe", "udp", www+":7", "knock")
	for _, port := range []string{"8080", "8081"} {
		r.works("hello from www", "other", "probe", "fetch", "http://"+hostIP+":"+port+"/")
		r.works("hello from www", "other", "probe", "fetch", "http://host.containers.internal:"+port+"/")
	}
	out, err := r.e.Usernet(r.Context(), "port", "add", www, "9090:80")
	if err != nil || !strings.Contains(out, "9090") {
		r.Errorf("usernet port add: %q, %v", out, err)
	}
	r.page(r.outside(), hostIP+":9090", "hello from www", "peer "+router+":")

	r.podman("restart", "-t", "0", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.podman("stop", "-t", "0", "www")
	r.noPage(r.outside(), hostIP+":8080")
	r.noPage(r.outside(), hostIP+":8081")
	r.podman("start", "www")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
}

func rootlessIPv6(r *rig) {
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.run("www", "--network", "web:ip6=fd00:213::80,publish=8081:80+5353:7/udp+[::1]:8082:80")
	r.run("other", "--network", "web")
	r.works("hello from www", "other", "probe", "fetch", "http://[fd00:213::80]/")
	r.page(r.outside(), "["+hostIP6+"]:8081", "hello from www", "peer ["+router6+"]:")
	r.udp(r.outside(), "["+hostIP6+"]:5353", "peer ["+router6+"]:")
	r.page(r.host(), "[::1]:8082", "hello from www")
	r.noPage(r.outside(), "["+hostIP6+"]:8082")
	r.works("peer ["+hostIP6+"]:", "other", "probe", "fetch", "http://["+far6+"]/")
	r.works("peer ["+hostIP6+"]:", "other", "probe", "udp", "["+far6+"]:7", "knock")
	r.works("1 packets received", "other", "ping", "-6", "-c", "1", "-W", "2", far6)
}

// rootlessNetworks: a container gets on a network while it runs, and off another one.
func rootlessNetworks(r *rig) {
	r.network("left")
	r.network("right")
	r.run("www", "--network", "left:publish=8081:80", "-p", "8080:80")
	r.run("cright", "--network", "right")
	r.fails("cright", "probe", "fetch", "http://"+r.addr("www", "left").String()+"/")
	r.podman("network", "connect", "right", "www")
	r.works("hello from www", "cright", "probe", "fetch", "http://"+r.addr("www", "right").String()+"/")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.podman("network", "disconnect", "left", "www")
	r.works("hello from www", "cright", "probe", "fetch", "http://"+r.addr("www", "right").String()+"/")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.noPage(r.outside(), hostIP+":8081")
	r.podman("network", "reload", "www")
	r.works("hello from www", "cright", "probe", "fetch", "http://"+r.addr("www", "right").String()+"/")
	r.podman("rm", "-f", "-t", "0", "-a")
	r.podman("network", "rm", "left", "right")
	r.wait(5*time.Second, "the networks to go", func() error {
		if ps := r.ps(); len(ps) != 0 {
			return fmt.Errorf("usernet ps lists %d", len(ps))
		}
		return nil
	})
}

// rootlessMixed: a container on one of our networks and one of netavark's, whose way out is pasta.
func rootlessMixed(r *rig) {
	r.network("ours")
	r.podman("network", "create", "theirs")
	r.run("www", "--network", "ours:publish=8081:80", "--network", "theirs")
	r.run("cours", "--network", "ours")
	r.run("ctheirs", "--network", "theirs")
	for _, n := range []string{"ours", "theirs"} {
		r.works("hello from www", "c"+n, "probe", "fetch", "http://"+r.addr("www", n).String()+"/")
	}
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.fails("cours", "probe", "fetch", "http://"+r.addr("ctheirs", "theirs").String()+"/")
}

func rootlessPod(r *rig) {
	r.network("web")
	r.podman("pod", "create", "--name", "pair", "--infra-command", "/bin/sleep 9999", "--infra-image", engine.Image, "--network", "web:publish=8081:80", "-p", "8080:80")
	r.podman("run", "-d", "--pod", "pair", "--name", "www", engine.Image)
	r.podman("run", "-d", "--pod", "pair", "--name", "peer", engine.Image, "sleep", "9999")
	r.page(r.outside(), hostIP+":8080", "hello from pair")
	r.page(r.outside(), hostIP+":8081", "hello from pair", "peer "+router+":")
	r.works("hello from pair", "peer", "probe", "fetch", "http://127.0.0.1/")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
}

func rootlessRefusals(r *rig) {
	before := r.snapshot()
	r.refused([]string{"mode=bridge", "which takes root"}, "network", "create", "--driver", "usernet", "-o", "mode=bridge", "bad")
	r.network("web")
	l := r.listen("tcp", hostIP+":8088")
	defer l.Close()
	for publish, want := range map[string]string{
		"80:80":            "sysctl net.ipv4.ip_unprivileged_port_start=80",
		"8088:80":          "bind 0.0.0.0:8088/tcp: port is already allocated by a process of another user",
		"x":                `option publish: invalid port "x"`,
		"8080:80+":         `option publish: invalid port ""`,
		"8080:80/sctp":     "SCTP is published on networks of mode bridge only",
		"8080:80+8080:81":  "bind 0.0.0.0:8080/tcp",
		"192.0.2.1:8080:1": "not an address of this host",
	} {
		r.refused([]string{want}, "run", "-d", "--network", "web:publish="+publish, engine.Image)
	}
	r.refused([]string{`option "colour"`}, "run", "-d", "--network", "web:colour=red", engine.Image)
	r.podman("rm", "-f", "-t", "0", "-a")
	r.wait(10*time.Second, "nothing to be left of it", func() error {
		return sameBut(before, r.snapshot(), "sockets: tcp "+hostIP+":8088")
	})
}

// rootlessKilled: the containers notice the death of the daemon by what they cannot reach, and only until there is another.
func rootlessKilled(r *rig) {
	r.network("web")
	r.run("www", "--network", "web:publish=8081:80+5353:7/udp", "-p", "8080:80")
	r.run("other", "--network", "web")
	works := func() {
		r.Helper()
		r.wait(soon, "the published port", func() error { return r.fetch(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":") })
		r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
		r.page(r.outside(), hostIP+":8080", "hello from www")
		r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
		r.works("hello from www", "other", "probe", "fetch", "http://"+r.addr("www", "web").String()+"/")
	}
	works()
	r.must(r.e.KillUsernet())
	r.works("hello from www", "other", "probe", "fetch", "http://"+r.addr("www", "web").String()+"/")
	r.page(r.outside(), hostIP+":8080", "hello from www") // Podman's forwarder is not ours
	// Inside of Podman's network namespace none can be started, and the message says what to do.
	r.refused([]string{"usernet serve", "systemctl --user enable --now usernet.socket"}, "run", "--rm", "--network", "web", engine.Image, "true")
	r.must(r.e.StartUsernet(r.Context()))
	works()
	r.podman("restart", "-t", "0", "www")
	works()
}

// rootlessStart: where nobody runs a daemon, the first network starts one, on the host's network.
func rootlessStart(r *rig) {
	r.must(r.e.StopUsernet())
	r.network("web")
	if n := len(r.started()); n != 1 {
		r.Fatalf("%d daemons after the first command, want 1", n)
	}
	r.run("www", "--network", "web:publish=8081:80")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.podman("rm", "-f", "-t", "0", "-a")
	r.stopStarted()
	out, err := r.e.Podman(r.Context(), "unshare", "--rootless-netns", r.e.Dir+"/bin/usernet", "serve")
	if err == nil || !strings.Contains(err.Error(), "this is Podman's network namespace") {
		r.Errorf("usernet serve in Podman's network namespace: %s, %v", out, err)
	}
	r.must(r.e.StartUsernet(r.Context()))
}

// rootlessActivation: the first container after a start of the machine starts the daemon, by the socket of dist/user/usernet.socket.
func rootlessActivation(r *rig) {
	r.network("web")
	r.must(r.e.StopUsernet())
	called, err := r.e.ActivateUsernet(r.Context())
	r.must(err)
	r.run("www", "--network", "web:publish=8081:80")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.must(<-called)
	r.podman("rm", "-f", "-t", "0", "-a")
	r.must(r.e.StopUsernet())
	r.must(r.e.StartUsernet(r.Context()))
}

// rootlessMigrate: Podman leaves its user namespace for another one, and the daemon of the old one makes room.
func rootlessMigrate(r *rig) {
	r.network("web")
	r.run("www", "--network", "web:publish=8081:80")
	r.podman("system", "migrate")
	if r.e.UsernetRunning() {
		// One that lives in the old namespace goes with the first who asks from the new one.
		r.network("other")
	}
	r.wait(10*time.Second, "the daemon of the old user namespace to end", func() error {
		if r.e.UsernetRunning() {
			return errors.New("it runs")
		}
		return nil
	})
	r.podman("start", "www")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.podman("rm", "-f", "-t", "0", "-a")
	r.stopStarted()
	r.must(r.e.StartUsernet(r.Context()))
}

// twoUsers: each has networks, containers and a daemon, of which the other one knows nothing.
func twoUsers(r *rig) {
	bob, err := r.e.AddUser(r.Context(), "bob", 1001)
	r.must(err)
	other := &rig{T: r.T, e: bob, mode: r.mode}
	r.must(bob.StartUsernet(r.Context()))
	defer func() {
		other.clean()
		r.must(bob.StopUsernet())
		_, err := bob.Podman(r.background(), "system", "migrate") // ends the process that keeps the namespaces
		r.must(err)
	}()
	for i, u := range []*rig{r, other} {
		u.network("web", "--subnet", "10.213.0.0/24")
		u.run("www", "--network", fmt.Sprintf("web:ip=10.213.0.7,publish=%d:80", 8081+i), "--hostname", "www")
	}
	for i, u := range []*rig{r, other} {
		u.page(u.outside(), fmt.Sprintf("%s:%d", hostIP, 8081+i), "hello from www", "peer "+router+":")
		u.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
		if ps := u.ps(); len(ps) != 1 || len(ps[0].Endpoints) != 1 || ps[0].Endpoints[0].Ports[0].HostPort != uint16(8081+i) {
			u.Errorf("usernet ps: %+v", ps)
		}
	}
	other.refused([]string{"port is already allocated by a process of another user"}, "run", "-d", "--network", "web:publish=8081:80", engine.Image)
}

// rootlessMany: ten containers at once.
func rootlessMany(r *rig) {
	r.network("web", "--subnet", "10.213.0.0/24")
	began := time.Now()
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			_, err := r.e.Podman(r.Context(), "run", "-d", "--name", box(i), "--network", fmt.Sprintf("web:publish=%d:80", 20000+i), engine.Image)
			if err != nil {
				r.Error(err)
			}
		})
	}
	all.Wait()
	if r.Failed() {
		return
	}
	r.Logf("10 containers started in %v", time.Since(began).Round(time.Millisecond))
	for i := range 10 {
		r.page(r.outside(), fmt.Sprintf("%s:%d", hostIP, 20000+i), "hello from ", "peer "+router+":")
	}
	r.podman("rm", "-f", "-t", "0", "-a")
}
