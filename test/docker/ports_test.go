package docker_test

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// ports is the matrix of what -p can say.
func ports(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "8081:80", "-p", "8082:80/tcp", "-p", "127.0.0.1:8083:80", "-p", "[::1]:8084:80",
		"-p", "9000-9002:9000-9002", "-p", "5353:9000/udp", "-p", "8081:9001/udp", "-p", "127.0.0.1:5354:9000/udp",
		"-p", hostIP+":8090:80", engine.Image, "probe", "serve", "80", "9000", "9001", "9002")
	r.run("two", "--network", "web", "-p", hostIP2+":8090:80", "-p", hostIP+":8083:80", "-p", hostIP+":5354:7/udp")

	for _, p := range []string{"8081", "8082", "9000", "9001", "9002"} {
		for _, host := range localAll {
			r.page(r.host(), host+":"+p, "hello from www")
		}
		r.page(r.outside(), hostIP+":"+p, "hello from www", "peer "+router+":")
	}
	r.page(r.outside(), hostIP2+":9001", "hello from www", "local "+r.addr("www", "web").String()+":9001")
	r.page(r.host(), "127.0.0.1:8083", "hello from www")
	r.page(r.outside(), hostIP+":8083", "hello from two")
	r.page(r.host(), "[::1]:8084", "hello from www")
	for _, addr := range []string{hostIP2 + ":8083", "[" + hostIP6 + "]:8084", "[" + hostIP6 + "]:8083"} {
		r.noPage(r.outside(), addr)
	}
	r.page(r.outside(), hostIP+":8090", "hello from www")
	r.page(r.outside(), hostIP2+":8090", "hello from two")

	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.udp(r.outside(), hostIP2+":5353", "peer "+router+":")
	r.udp(r.outside(), hostIP+":8081", "peer "+router+":")
	for _, host := range localAll {
		r.udp(r.host(), host+":5353", "peer ")
	}
	r.udp(r.host(), "127.0.0.1:5354", "peer ")
	r.udp(r.outside(), hostIP+":5354", "peer "+router+":")
	r.publishes("www", "web", "8081->80/tcp", "8082->80/tcp", "127.0.0.1 8083->80/tcp", "::1 8084->80/tcp",
		"9000->9000/tcp", "9001->9001/tcp", "9002->9002/tcp", "5353->9000/udp", "8081->9001/udp",
		"127.0.0.1 5354->9000/udp", hostIP+" 8090->80/tcp")
}

// portRange: of a range of the host for one port of the container, the first free one is taken.
func portRange(r *rig) {
	taken := r.listen("tcp", ":8100")
	defer taken.Close()
	r.network("web")
	r.run("one", "--network", "web", "-p", "8100-8103:80")
	r.run("two", "--network", "web", "-p", "8100-8103:80")
	r.page(r.outside(), hostIP+":8101", "hello from one")
	r.page(r.outside(), hostIP+":8102", "hello from two")
	r.publishes("one", "web", "8101->80/tcp")
	r.publishes("two", "web", "8102->80/tcp")
	r.run("three", "--network", "web", "-p", "8100-8103:80")
	r.refused([]string{"810"}, "run", "-d", "--name", "four", "--network", "web", "-p", "8100-8103:80", engine.Image)
	r.refused([]string{"range"}, "run", "-d", "--name", "five", "--network", "web", "-p", "8200-8201:80-82", engine.Image)
}

// listen takes a port of the host, as a stranger to Docker and usernet would.
func (r *rig) listen(network, addr string) net.Listener {
	r.Helper()
	var l net.Listener
	err := r.e.Do(func() (err error) {
		l, err = net.Listen(network, addr)
		return err
	})
	if err != nil {
		r.Fatal(err)
	}
	return l
}

// free tells whether anybody could have a port of the host now, for TCP and UDP.
func (r *rig) free(port string) error {
	return r.e.Do(func() error {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		c, err := net.ListenPacket("udp", ":"+port)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		return errors.Join(l.Close(), c.Close())
	})
}

// ephemeral: -p 80 and -P let usernet choose. Docker cannot show what it chose, usernet ps can.
func ephemeral(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "80", "-p", "127.0.0.1::80", "-p", "7/udp")
	r.run("all", "--network", "web", "--expose", "80", "-P")
	if r.mode.name == own.name {
		return
	}
	ports := append(r.endpoint("www", "web").Ports, r.endpoint("all", "web").Ports...)
	if len(ports) != 4 {
		r.Fatalf("usernet ps lists %d ports, want 4: %v", len(ports), ports)
	}
	seen := map[string]bool{}
	for _, p := range ports {
		key := fmt.Sprint(p.Proto, p.HostPort)
		if p.HostPort < 1024 || seen[key] {
			r.Errorf("port %d/%s is privileged or given twice", p.HostPort, p.Proto)
		}
		seen[key] = true
		addr := fmt.Sprintf("%s:%d", hostIP, p.HostPort)
		switch {
		case p.Proto == "udp":
			r.udp(r.outside(), addr, "peer "+router)
		case p.HostIP.IsValid():
			r.page(r.host(), fmt.Sprintf("127.0.0.1:%d", p.HostPort), "hello from www")
			r.noPage(r.outside(), addr)
		default:
			r.page(r.outside(), addr, "hello from")
		}
	}
	text, err := r.e.Usernet(r.Context(), "ps", "--control-socket", engine.ControlSocket)
	if want := fmt.Sprintf("%d->80/tcp", ports[0].HostPort); err != nil || ports[0].Proto == "tcp" && !strings.Contains(text, want) {
		r.Errorf("usernet ps: %v\n%s\nwant %q in it", err, text, want)
	}
}

// conflict: a port that somebody has is refused by name, and the container that wanted it leaves no trace.
func conflict(r *rig) {
	r.network("a")
	r.network("b")
	r.run("www", "--network", "a", "-p", "8080:80", "-p", "5353:7/udp")
	holder := "endpoint"
	if r.mode.name != own.name {
		holder += " " + r.endpoint("www", "a").ID[:12]
	}
	for _, network := range []string{"a", "b"} {
		for _, ports := range []string{"8080:80", "127.0.0.1:8080:80", "[::1]:8080:80", hostIP + ":8080:80"} {
			r.refused([]string{"8080", "port is already allocated", holder},
				"run", "-d", "--name", "two", "--network", network, "-p", "8077:80", "-p", ports, engine.Image)
			r.docker("rm", "-f", "two")
		}
	}
	r.refused([]string{"5353", "port is already allocated", holder},
		"run", "-d", "--name", "two", "--network", "a", "-p", "5353:7/udp", engine.Image)
	r.docker("rm", "-f", "two")
	stranger := r.listen("tcp", "127.0.0.1:8099")
	r.refused([]string{"8099"}, "run", "-d", "--name", "two", "--network", "a", "-p", "8099:80", engine.Image)
	stranger.Close()
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.docker("start", "two") // what was in the way has gone
	r.page(r.outside(), hostIP+":8099", "hello from")
	r.run("three", "--network", "a", "-p", "8077:80", "-p", "8080:7/udp") // nothing of the failed tries is held
	r.udp(r.outside(), hostIP+":8080", "peer ")
}

// release: every way to end a container's use of a port makes it free at once.
func release(r *rig) {
	r.network("web")
	free := func(how string) {
		r.Helper()
		r.wait(2*time.Second, "8080 to be free after "+how, func() error { return r.free("8080") })
	}
	run := func() {
		r.Helper()
		r.run("www", "--network", "web", "-p", "8080:80", "-p", "8080:7/udp")
		r.page(r.outside(), hostIP+":8080", "hello from www")
	}
	for _, how := range [][]string{
		{"stop", "-t", "5", "www"}, {"kill", "www"}, {"network", "disconnect", "web", "www"}, {"rm", "-f", "www"},
		{"network", "disconnect", "-f", "web", "www"}, {"exec", "www", "kill", "1"},
	} {
		run()
		if _, err := r.e.Docker(r.Context(), how...); err != nil && how[0] != "exec" { // which dies with the container
			r.Fatal(err)
		}
		free(strings.Join(how, " "))
		r.e.Docker(r.Context(), "rm", "-f", "www") // it has gone already after rm
	}
	r.refused([]string{"nonsense"}, "run", "--name", "www", "--network", "web", "-p", "8080:80", engine.Image, "/bin/nonsense")
	free("a failed start")
	r.docker("rm", "www")
	run()
}

// portCommand: usernet port changes the ports of a running container.
func portCommand(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80")
	if r.mode.name == own.name {
		return
	}
	id := r.endpoint("www", "web").ID
	command := func(args ...string) (string, error) {
		return r.e.Usernet(r.Context(), append([]string{"port", args[0], "--control-socket", engine.ControlSocket}, args[1:]...)...)
	}
	must := func(args ...string) string {
		r.Helper()
		out, err := command(args...)
		if err != nil {
			r.Fatal(err)
		}
		return out
	}
	must("add", id[:12], "8088:80/tcp", "5353:7/udp")
	r.page(r.outside(), hostIP+":8088", "hello from www", "peer "+router+":")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.publishes("www", "web", "8080->80/tcp", "8088->80/tcp", "5353->7/udp")
	if _, err := command("add", id[:12], "8088:7"); err == nil || !strings.Contains(err.Error(), "already allocated") {
		r.Errorf("port add of a taken port: %v", err)
	}
	if _, err := command("add", "no-such-endpoint", "8089:7"); err == nil || !strings.Contains(err.Error(), "not found") {
		r.Errorf("port add to nobody: %v", err)
	}
	must("rm", id[:12], "8088:80/tcp")
	r.noPage(r.outside(), hostIP+":8088")
	must("rm", id[:12], "8080:80/tcp")
	r.noPage(r.outside(), hostIP+":8080")
	r.publishes("www", "web", "5353->7/udp")
	if out := must("add", id[:12], "80"); !strings.Contains(out, ":80/tcp") {
		r.Errorf("port add of any host port printed %q", out)
	}
	r.docker("stop", "-t", "0", "www")
	r.docker("start", "www")
	r.publishes("www", "web", "8080->80/tcp")
}
