package docker_test

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// many: two hundred containers on one network, all of them with a published port, come and go without a trace. (What
// is left is looked at after every case.)
func many(r *rig) {
	const count, atOnce = 200, 8
	r.network("web", "--subnet", "10.213.0.0/24")
	start := time.Now()
	next := make(chan int)
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for i := range next {
				_, err := r.e.Docker(r.Context(), "run", "-d", "--name", box(i), "--network", "web",
					"-p", fmt.Sprintf("%d:80", 20000+i), engine.Image)
				if err != nil {
					r.Error(err)
				}
			}
		})
	}
	for i := range count {
		next <- i
	}
	close(next)
	wg.Wait()
	if r.Failed() {
		return
	}
	r.Logf("%d containers started in %v", count, time.Since(start).Round(time.Second))
	for i := 0; i < count; i += 20 {
		r.page(r.outside(), fmt.Sprintf("%s:%d", hostIP, 20000+i), "hello from ", "peer "+router+":")
		r.works("hello from ", box(i), "probe", "fetch", "http://"+box(count-1-i)+"/")
	}
	r.works("peer "+hostIP+":", box(0), "probe", "fetch", "http://"+far+"/")
	if r.mode.name != own.name {
		if ps := r.ps(); len(ps) != 1 || len(ps[0].Endpoints) != count {
			r.Errorf("usernet ps lists %d networks", len(ps))
		}
	}
	start = time.Now()
	r.docker(append([]string{"rm", "-f"}, strings.Fields(r.docker("ps", "-aq"))...)...)
	r.Logf("and removed in %v", time.Since(start).Round(time.Second))
}

func box(i int) string { return fmt.Sprintf("box%03d", i) }

const composeFile = `
version: "3.5"
services:
  www:
    image: ` + engine.Image + `
    ports: ["8080:80"]
    networks:
      front: {aliases: [page]}
      back: {}
  client:
    image: ` + engine.Image + `
    networks: [back]
networks:
  front:
    driver: %s
    driver_opts: {%s}
  back:
    driver: %s
    driver_opts: {%s}
    internal: true
`

// compose: the networks of a compose file, with options.
func compose(r *rig) {
	opts := `usernet.mode: "` + r.mode.name + `", com.docker.network.driver.mtu: "1400"`
	if r.mode.name == own.name {
		opts = `com.docker.network.driver.mtu: "1400"`
	}
	driver := r.mode.args[1]
	file := fmt.Sprintf(composeFile, driver, opts, driver, opts)
	if _, err := r.e.Compose(r.Context(), file, "up", "-d"); err != nil {
		r.Fatal(err)
	}
	names := strings.Fields(r.docker("ps", "--format", "{{.Names}}", "--filter", "label=com.docker.compose.service=client"))
	if len(names) != 1 {
		r.Fatalf("containers of service client: %v", names)
	}
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
	r.works("hello from", names[0], "probe", "fetch", "http://www/")
	r.works("mtu 1400", names[0], "ip", "link", "show", "eth0")
	r.fails(names[0], "probe", "fetch", "http://"+far+"/")
	if _, err := r.e.Compose(r.Context(), file, "down", "-t", "0"); err != nil {
		r.Fatal(err)
	}
	if out := r.docker("network", "ls", "-q", "-f", "type=custom"); out != "" {
		r.Errorf("networks are left: %s", out)
	}
}
