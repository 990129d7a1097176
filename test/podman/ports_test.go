package podman_test

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/usernet/usernet/test/engine"
)

func ports(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "8081:80", "-p", "8082:80/tcp", "-p", "127.0.0.1:8083:80", "-p", "[::1]:8084:80",
		"-p", "9000-9002:9000-9002", "-p", "5353:9000/udp", "-p", "8081:9001/udp", "-p", "127.0.0.1:5354:9000/udp",
		"-p", hostIP+":8090:80", engine.Image, "probe", "serve", "80", "9000", "9001", "9002")
	r.run("two", "--network", "web", "-p", hostIP2+":8090:80", "-p", hostIP+":8083:80", "-p", hostIP+":5354:7/udp", "-p", "8100:80")

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
	everywhere := []string{"0.0.0.0 8100->80/tcp", ":: 8100->80/tcp"}
	if r.e.Kind.Name == "podman61" {
		everywhere = []string{"8100->80/tcp"} // it holds the port with one socket for both families
	}
	r.publishes("two", "web", append(everywhere, hostIP2+" 8090->80/tcp", hostIP+" 8083->80/tcp", hostIP+" 5354->7/udp")...)
	if got := r.podman("port", "two", "80/tcp"); !strings.Contains(got, hostIP2+":8090") {
		r.Errorf("podman port: %s", got)
	}

	// The sockets that serve what Podman holds are for redirected clients only.
	for addr := range r.privatePorts() {
		r.noPage(r.host(), "127.0.0.1:"+addr)
		r.noPage(r.outside(), hostIP+":"+addr)
	}
}

// privatePorts are the TCP ports of our own that clients are redirected to.
func (r *rig) privatePorts() map[string]bool {
	if r.mode.name == own.name {
		return nil
	}
	text, err := r.e.Run(r.Context(), "nft", "list", "set", "inet", "usernet-ports", "private")
	if err != nil {
		r.Fatal(err)
	}
	found := map[string]bool{}
	for _, element := range strings.Split(text, ",") {
		if _, port, ok := strings.Cut(strings.TrimSpace(strings.Trim(element, " {}\n\t")), "tcp . "); ok {
			found[strings.Fields(port)[0]] = true
		}
	}
	if len(found) == 0 {
		r.Errorf("no private ports in %s", text)
	}
	return found
}

// unreserved: Podman may be told not to hold ports; then usernet does. They are ports of no other case: what usernet served
// rests in TIME_WAIT, which Podman 6 does not bind beside (it asks for no SO_REUSEADDR).
func unreserved(r *rig) {
	conf := r.e.Path("/etc/containers/containers.conf")
	text, err := os.ReadFile(conf)
	if err != nil {
		r.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte(strings.Replace(string(text), "[engine]", "[engine]\nenable_port_reservation = false", 1)), 0o644); err != nil {
		r.Fatal(err)
	}
	defer os.WriteFile(conf, text, 0o644)
	r.network("web")
	r.run("www", "--network", "web", "-p", "8070:80", "-p", "5353:7/udp")
	r.page(r.outside(), hostIP+":8070", "hello from www", "peer "+router+":")
	r.page(r.host(), "[::1]:8070", "hello from www")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.publishes("www", "web", "8070->80/tcp", "5353->7/udp")
	r.refused([]string{"8070/tcp: port is already allocated by endpoint"}, "run", "-d", "--network", "web", "-p", "8070:80", engine.Image)
	strange := r.listen("tcp", ":8071")
	defer strange.Close()
	r.refused([]string{"8071/tcp: port is already allocated"}, "run", "-d", "--network", "web", "-p", "8071:80", engine.Image)
}

// manyPorts: a range of 5 000 ports.
func manyPorts(r *rig) {
	r.network("web")
	r.run("idle", "--network", "web")
	began := time.Now()
	r.run("www", "--network", "web", "-p", "20000-24999:20000-24999/udp", engine.Image, "probe", "serve", "20000", "24999")
	r.Logf("podman run with 5000 ports took %v", time.Since(began).Round(time.Millisecond))
	r.udp(r.outside(), hostIP+":20000", "peer "+router+":")
	r.udp(r.outside(), hostIP+":24999", "peer "+router+":")
	r.udp(r.outside(), "["+hostIP6+"]:24999", "peer ")
}

// bindingOption: the option for the host address of ports that give none.
func bindingOption(r *rig) {
	r.network("web", "-o", "host_binding=127.0.0.1")
	r.run("www", "--network", "web", "-p", "8080:80", "-p", hostIP2+":8081:80")
	r.page(r.host(), "127.0.0.1:8080", "hello from www")
	r.noPage(r.outside(), hostIP+":8080")
	r.page(r.outside(), hostIP2+":8081", "hello from www")
}

// flushed: somebody flushes the firewall; usernet notices, at the latest when it is told to look.
func flushed(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80", "-p", "5353:7/udp")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	if _, err := r.e.Run(r.Context(), "nft", "delete", "table", "inet", "usernet-ports"); err != nil {
		r.Fatal(err)
	}
	if err := r.e.SignalUsernet(hangup); err != nil {
		r.Fatal(err)
	}
	r.page(r.host(), "127.0.0.1:8080", "hello from www")
	r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
}

func box(i int) string { return fmt.Sprintf("box%03d", i) }

// publishOption: ports that Podman does not know of.
func publishOption(r *rig) {
	if r.mode.name == own.name {
		return
	}
	r.network("web")
	r.run("www", "--network", "web:publish=8081:80+5353:7/udp+127.0.0.1:8082:80", "-p", "8080:80")
	for _, port := range []string{"8080", "8081"} {
		r.page(r.outside(), hostIP+":"+port, "hello from www", "peer "+router+":")
		r.page(r.host(), "127.0.0.1:"+port, "hello from www")
	}
	r.page(r.host(), "127.0.0.1:8082", "hello from www")
	r.noPage(r.outside(), hostIP+":8082")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.refused([]string{"bind 0.0.0.0:8081/tcp: port is already allocated by endpoint"}, "run", "-d", "--network", "web:publish=8081:80", engine.Image)
	r.podman("restart", "-t", "0", "www")
	r.page(r.outside(), hostIP+":8081", "hello from www", "peer "+router+":")
	r.podman("stop", "-t", "0", "www")
	r.noPage(r.outside(), hostIP+":8081")
}
