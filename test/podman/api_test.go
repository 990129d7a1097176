package podman_test

import (
	"fmt"
	"strings"

	"github.com/usernet/usernet/test/engine"
)

const composeFile = `
services:
  www:
    image: localhost/` + engine.Image + `
    ports: ["8080:80"]
    networks:
      front: {aliases: [page]}
      back: {}
  client:
    image: localhost/` + engine.Image + `
    networks: [back]
networks:
  front:
    driver: usernet
    labels: {%s}
    driver_opts: {com.docker.network.driver.mtu: "1400"}
  back:
    driver: usernet
    labels: {%s}
    internal: true
`

// api: the docker command and docker compose against Podman's Docker-compatible API, where options get lost and labels
// do not.
func api(r *rig) {
	stop, err := r.e.ServeAPI(r.Context())
	r.must(err)
	defer func() { r.must(stop()) }()
	docker := func(args ...string) string {
		r.Helper()
		out, err := r.e.Docker(r.Context(), args...)
		r.must(err)
		return out
	}
	docker("network", "create", "-d", "usernet", "--label", "usernet.mode="+r.mode.name, "--label", "usernet.mtu=1300", "web")
	docker("run", "-d", "--name", "www", "--network", "web", "-p", "8080:80", "localhost/"+engine.Image)
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
	r.works("mtu 1300", "www", "ip", "link", "show", "eth0")
	if ps := r.ps(); len(ps) != 1 || ps[0].Mode != r.mode.name {
		r.Errorf("usernet ps: %+v, want one network of mode %s", ps, r.mode.name)
	}
	docker("rm", "-f", "www")
	docker("network", "rm", "web")

	label := `usernet.mode: "` + r.mode.name + `"`
	file := fmt.Sprintf(composeFile, label, label)
	_, err = r.e.Compose(r.Context(), file, "up", "-d")
	r.must(err)
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
	client := strings.Fields(r.podman("ps", "--format", "{{.Names}}", "--filter", "label=com.docker.compose.service=client"))
	if len(client) != 1 {
		r.Fatalf("containers of service client: %v", client)
	}
	r.fails(client[0], "probe", "fetch", "http://"+far+"/")
	_, err = r.e.Compose(r.Context(), file, "down", "-t", "0")
	r.must(err)
}
