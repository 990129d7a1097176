package docker_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
)

const hangup = syscall.SIGHUP

// soon is how fast things must work again after a restart: within a second, and another one for a busy machine.
const soon = 2 * time.Second

// must fails the test on an error of something that has to work.
func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// usernetKilled: usernet dies in the middle of traffic. Containers on the network go on talking to each other; a new
// usernet brings back the rest.
func usernetKilled(r *rig) {
	r.network("web", "--ipv6", "--subnet", "10.213.0.0/24", "--subnet", "fd00:213::/64")
	r.network("inner", "--internal")
	r.run("www", "--network", "web", "-p", "8080:80", "-p", "5353:7/udp", "-p", "80")
	r.run("busy", "--network", "web", engine.Image, "probe", "hold", far+":7")
	r.run("peer", "--network", "inner")
	r.works("1 packets received", "www", "ping", "-c", "1", "-W", "2", far) // usernet opens its socket for pings with the first
	before := r.snapshot()
	r.wait(5*time.Second, "traffic", func() error { return contains(r.docker("logs", "busy"), "connected") })

	killed := time.Now()
	r.must(r.e.KillUsernet())
	r.works("hello from www", "busy", "probe", "fetch", "http://www/")
	r.must(r.e.StartUsernet(r.Context()))
	restarted := time.Now()
	r.wait(soon, "the published port", func() error { return r.fetch(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":") })
	r.Logf("the published port works %v after the restart", time.Since(restarted).Round(time.Millisecond))
	r.wait(soon, "the way out", func() error { return r.survived(r.docker("logs", "busy"), killed) })
	r.works("peer "+hostIP+":", "busy", "probe", "fetch", "http://"+far+"/")
	r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
	r.works("peer "+hostIP+":", "www", "probe", "udp", far+":7", "knock")
	r.works("peer ["+hostIP6+"]:", "www", "probe", "fetch", "http://["+far6+"]/")
	r.works("hello from www", "busy", "probe", "fetch", "http://www/")
	r.works("1 packets received", "busy", "ping", "-c", "1", "-W", "2", far)
	r.wait(5*time.Second, "the host to look as before the kill", func() error { return before.Same(r.snapshot()) })

	r.docker("restart", "-t", "0", "www") // the new usernet can end what the old one began
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.must(r.e.StopUsernet()) // and an orderly stop is no worse
	r.must(r.e.StartUsernet(r.Context()))
	r.wait(soon, "the published port", func() error { return r.fetch(r.outside(), hostIP+":8080", "hello from www") })
}

func contains(text, want string) error {
	if !strings.Contains(text, want) {
		return fmt.Errorf("%q is not in %q", want, text)
	}
	return nil
}

// survived reads the log of probe hold after usernet was killed. The kernel carries what leaves a bridge network: it was
// never lost. What leaves a usermode network must have connected again.
func (r *rig) survived(log string, killed time.Time) error {
	if r.mode.name == bridge.name {
		if strings.Contains(log, "lost") {
			return errors.New(log)
		}
		return nil
	}
	lines := strings.Split(strings.TrimSpace(log), "\n")
	stamp, event, _ := strings.Cut(lines[len(lines)-1], " ")
	at, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil {
		return err
	}
	if event != "connected" || at.Before(killed) {
		return fmt.Errorf("last line is %q, usernet was killed at %v", lines[len(lines)-1], killed)
	}
	return nil
}

// usernetKilledAnytime kills usernet at many moments of a container's and a network's life. Whatever was half made or
// half removed, a new usernet and the ordinary commands leave nothing.
func usernetKilledAnytime(r *rig) {
	before := r.snapshot()
	for i := range 8 {
		delay := time.Duration(i) * 40 * time.Millisecond
		r.network("web")
		var wg sync.WaitGroup
		wg.Go(func() {
			r.e.Docker(r.Context(), "run", "-d", "--name", "client", "--network", "web", "-p", "8080:80", engine.Image)
			if i%2 == 1 {
				r.e.Docker(r.Context(), "rm", "-f", "client")
			}
			r.e.Docker(r.Context(), append(append([]string{"network", "create"}, r.mode.args...), "other")...)
		})
		time.Sleep(delay) // the moment to strike is what varies
		r.must(r.e.KillUsernet())
		r.must(r.e.StartUsernet(r.Context()))
		wg.Wait()
		r.e.Docker(r.Context(), "rm", "-f", "client")
		r.e.Docker(r.Context(), "network", "rm", "other")
		r.run("after", "--network", "web", "-p", "8080:80")
		r.page(r.outside(), hostIP+":8080", "hello from after")
		r.docker("rm", "-f", "after")
		r.docker("network", "rm", "web")
	}
	r.wait(5*time.Second, "nothing to be left", func() error { return before.Same(r.snapshot()) })
}

// usernetAbsent: containers go while usernet is not there to hear of it, and Docker tells nobody afterwards.
func usernetAbsent(r *rig) {
	var tries sync.WaitGroup
	for i, m := range both {
		r.docker(append(append([]string{"network", "create"}, m.args...), "net-"+m.name)...)
		r.run("goes-"+m.name, "--network", "net-"+m.name, "-p", fmt.Sprintf("808%d:80", i))
		r.run("stays-"+m.name, "--network", "net-"+m.name, "-p", fmt.Sprintf("909%d:80", i))
	}
	r.must(r.e.KillUsernet())
	for _, m := range both { // Docker tries each of its calls for some 15 s
		tries.Go(func() {
			if _, err := r.e.Docker(r.Context(), "rm", "-f", "goes-"+m.name); err != nil {
				r.Error(err)
			}
		})
	}
	tries.Wait()
	r.must(r.e.StartUsernet(r.Context()))
	r.wait(soon, "usernet to forget the containers", func() error {
		for _, n := range r.ps() {
			if len(n.Endpoints) != 1 {
				return fmt.Errorf("endpoints: %v", n.Endpoints)
			}
		}
		return nil
	})
	for i, m := range both {
		port := fmt.Sprintf("808%d", i)
		r.noPage(r.outside(), hostIP+":"+port)
		r.page(r.outside(), fmt.Sprintf("%s:909%d", hostIP, i), "hello from stays-"+m.name)
		r.run("new-"+m.name, "--network", "net-"+m.name, "-p", port+":80")
		r.page(r.outside(), hostIP+":"+port, "hello from new-"+m.name)
	}
}

// engineRestarted: Docker stops its containers, and starts those that ask for it.
func engineRestarted(r *rig) {
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80", "--restart", "always")
	r.run("once", "--network", "web", "-p", "8081:80")
	r.must(r.e.StopDaemon())
	r.noPage(r.outside(), hostIP+":8080")
	r.noPage(r.outside(), hostIP+":8081")
	r.must(r.e.StartDaemon(r.Context()))
	r.wait(10*time.Second, "the container that always restarts", func() error {
		return r.fetch(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
	})
	r.publishes("www", "web", "8080->80/tcp")
	r.docker("start", "once")
	r.page(r.outside(), hostIP+":8081", "hello from once")
	r.works("hello from www", "once", "probe", "fetch", "http://www/")
}

// engineKilled: Docker dies without a word, its containers live on until the next Docker ends them, and it never tells
// usernet of that.
func engineKilled(r *rig) {
	r.network("web")
	r.network("away")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("gone", "--network", "away", "-p", "8081:80")
	www := r.addr("www", "web")
	r.must(r.e.KillDaemon())
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.must(r.e.StartDaemon(r.Context()))
	r.wait(10*time.Second, "Docker to notice that the container is dead", func() error {
		if s := r.inspect("www", ".State.Status"); s != "exited" {
			return errors.New(s)
		}
		return nil
	})
	r.run("new", "--network", "web", "-p", "8082:80") // may be given the address of the dead
	r.docker("start", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.page(r.outside(), hostIP+":8082", "hello from new")
	r.works("hello from new", "www", "probe", "fetch", "http://new/")
	r.Logf("www had %v, has %v", www, r.addr("www", "web"))
	r.wait(5*time.Second, "the port of the dead to be free", func() error { return r.free("8081") })
	r.wait(5*time.Second, "usernet ps to list the living", func() error {
		n := 0
		for _, network := range r.ps() {
			n += len(network.Endpoints)
		}
		if n != 2 {
			return fmt.Errorf("%d endpoints: %v", n, r.ps())
		}
		return nil
	})
	r.docker("rm", "-f", "gone", "www", "new")
	r.docker("network", "rm", "away", "web")
}

// liveRestore: containers and their ports outlive a restart of Docker, orderly or not, and end properly after it.
func liveRestore(r *rig) {
	r.must(r.e.RestartDaemon(r.Context(), "--live-restore"))
	defer func() { r.must(r.e.RestartDaemon(r.background())) }()
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.run("two", "--network", "web", "-p", "8081:80")
	before := r.snapshot()
	for _, stop := range []func() error{r.e.StopDaemon, r.e.KillDaemon} {
		r.must(stop())
		r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
		r.must(r.e.StartDaemon(r.Context(), "--live-restore"))
		r.page(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":")
		r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
		r.works("hello from two", "www", "probe", "fetch", "http://two/")
		r.wait(5*time.Second, "the host to look as before", func() error { return before.Same(r.snapshot()) })
	}
	r.docker("stop", "-t", "0", "www")
	r.wait(soon, "the port to be free", func() error { return r.free("8080") })
	r.docker("start", "www")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	r.network("late")
	r.docker("network", "connect", "late", "two")
	r.docker("network", "disconnect", "web", "two")
	r.works("peer "+hostIP+":", "two", "probe", "fetch", "http://"+far+"/")
	r.docker("rm", "-f", "www", "two")
	r.docker("network", "rm", "web", "late")
}
