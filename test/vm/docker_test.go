package vm_test

import (
	"errors"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
	"github.com/usernet/usernet/test/vm/console"
)

// docker: what docker run -p opens in the machine is open on the host.
func docker(r *rig) {
	r.modules("vmw_vsock_virtio_transport", "tun")
	g := r.gateway("-listen", r.hybrid())
	r.starts("agent", "usernet", "agent")
	driver := r.driver()
	r.engine()
	r.in("docker", "import", "--change", `CMD ["/bin/probe","serve"]`, "/payload/image.tar", engine.Image)
	r.in("docker", "network", "create", "-d", "usernet", "--ipv6", "--subnet", "10.201.0.0/24", "--subnet", "fd00:201::/64", "web")

	start := time.Now()
	r.in("docker", "run", "-d", "--name", "www", "--network", "web", "-p", "8080:80", "-p", "8007:7", "-p", "5353:7/udp", engine.Image)
	r.Logf("docker run took %v", time.Since(start).Round(time.Second))
	r.published()
	r.bulk(hostIP+":8007", 8<<20, true)
	r.works(want("peer "+hostIP+":"), "docker", "exec", "www", "probe", "fetch", "http://"+far+"/")
	if err := contains(r.ports(), ":8080", ":8007", ":5353", "published by"); err != nil {
		r.Errorf("usernet gateway ports: %v", err)
	}
	r.conflict()

	r.must(g.Stop(syscall.SIGKILL))
	r.gateway("-listen", r.hybrid())
	r.published()
	r.kill(driver)
	r.wait("the host to close what the driver had published", func() error { return errors.Join(r.free(8080), r.free(5353)) })
	r.driver()
	r.published()

	r.in("docker", "rm", "-f", "www")
	r.check(errors.Join(r.free(8080), r.free(8007), r.free(5353)))
	if ports := r.ports(); strings.Contains(ports, "published by") {
		r.Errorf("usernet gateway ports, without a container: %s", ports)
	}
}

// engine starts Docker in the machine and waits for it.
func (r *rig) engine() {
	r.Helper()
	start := time.Now()
	// Not for Kubernetes, which takes long to start. dockerd gives a containerd of its own 15 s, which may be too little here.
	r.in("sh", "-c", `ln -s /run /var/run && mkdir /run/containerd && printf 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n' >/run/containerd/config.toml`)
	containerd := r.starts("containerd", "containerd", "--config", "/run/containerd/config.toml")
	r.socket(containerd, "/run/containerd/containerd.sock")
	dockerd := r.starts("dockerd", "dockerd", "--containerd", "/run/containerd/containerd.sock", "--exec-opt", "native.cgroupdriver=cgroupfs")
	r.socket(dockerd, "/run/docker.sock")
	r.in("docker", "version") // waits for the answer
	r.Logf("Docker is there after %v", time.Since(start).Round(time.Second))
}

// socket waits for a daemon's socket in the machine.
func (r *rig) socket(p *console.Process, path string) {
	r.Helper()
	r.wait(path, func() error {
		select {
		case <-p.Ended():
			r.Fatalf("what makes %s has ended", path) // its log is shown
		default:
		}
		_, err := r.try("test", "-S", path)
		return err
	})
}

// driver starts usernet in the machine and waits until Docker could reach it.
func (r *rig) driver() *console.Process {
	r.Helper()
	p := r.starts("usernet", "usernet", "serve", "--host-gateway", "vsock://2:1024", "--log-level", "debug")
	r.socket(p, engine.PluginSocket)
	return p
}

// published checks what the container has published, from the outside: it sees the client that the host sees.
func (r *rig) published() {
	r.Helper()
	r.page(r.outside(), hostIP+":8080", "hello from", "peer "+router+":")
	r.page(r.outside(), "["+hostIP6+"]:8080", "hello from", "peer ["+router6+"]:")
	r.page(r.host(), "127.0.0.1:8080", "hello from")
	r.udp(hostIP+":5353", "knock", "peer "+router+":")
	r.udp("["+hostIP6+"]:5353", strings.Repeat("knock", 1000), "peer ["+router6+"]:")
}

// conflict: a port that somebody on the host has is an error of docker run, and leaves nothing.
func (r *rig) conflict() {
	r.Helper()
	var taken net.Listener
	r.must(r.m.Do(func() (err error) {
		taken, err = net.Listen("tcp", ":8090")
		return err
	}))
	defer taken.Close()
	out, err := r.try("docker", "run", "-d", "--name", "second", "--network", "web", "-p", "8089:80", "-p", "8090:80", engine.Image)
	if !errors.Is(err, console.ErrCommand) || !strings.Contains(err.Error(), "8090") || !strings.Contains(err.Error(), "address already in use") {
		r.Errorf("docker run of a port that is taken on the host: %q, %v", out, err)
	}
	r.check(r.free(8089))
	r.must(taken.Close())
	r.in("docker", "start", "second")
	r.page(r.outside(), hostIP+":8090", "hello from")
	r.in("docker", "rm", "-f", "second")
	r.check(errors.Join(r.free(8089), r.free(8090)))
}
