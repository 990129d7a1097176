package podman_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// soon is how fast things must work again after a restart: within a second, and more for a busy machine.
const soon = 5 * time.Second

// must fails the test on an error of something that has to work.
func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// usernetKilled: the daemon dies in the middle of a container's life. A new one brings everything back, and ends what the
// old one began.
func usernetKilled(r *rig) {
	before := r.snapshot()
	r.network("web", "--ipv6")
	r.run("www", "--network", "web", "-p", "8080:80", "-p", "5353:7/udp")
	r.run("other", "--network", "web")
	works := func() {
		r.Helper()
		r.wait(soon, "the published port", func() error { return r.fetch(r.outside(), hostIP+":8080", "hello from www", "peer "+router+":") })
		r.udp(r.outside(), hostIP+":5353", "peer "+router+":")
		r.page(r.host(), "[::1]:8080", "hello from www")
		r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
		// Podman gives a container that is restarted another address.
		r.works("hello from www", "other", "probe", "fetch", "http://"+r.addr("www", "web").String()+"/")
	}
	works()
	r.must(r.e.KillUsernet())
	r.works("hello from www", "other", "probe", "fetch", "http://"+r.addr("www", "web").String()+"/")
	r.must(r.e.StartUsernet(r.Context()))
	works()
	r.podman("restart", "-t", "0", "www")
	works()
	r.must(r.e.KillUsernet())
	r.podman("rm", "-f", "-t", "0", "www", "other") // the plugin starts a daemon for that
	r.wait(10*time.Second, "nothing to be left but the daemon", func() error {
		return sameBut(before, r.snapshot(), "processes: usernet", "sockets:", "usernet:", "descriptors:", "namespaces: file")
	})
	r.stopStarted()
}

// sameBut compares two snapshots but for what begins with one of except.
func sameBut(before, after engine.Snapshot, except ...string) error {
	var left []string
line:
	for line := range strings.Lines(before.Diff(after)) {
		for _, e := range except {
			if strings.HasPrefix(line[2:], e) {
				continue line
			}
		}
		left = append(left, line)
	}
	if left != nil {
		return errors.New(strings.Join(left, ""))
	}
	return nil
}

// started are the daemons that run and that the test has not started itself, by their IDs in the pretend host.
func (r *rig) started() []int {
	r.Helper()
	files, err := filepath.Glob(r.e.Path("/proc") + "/[0-9]*/cmdline")
	r.must(err)
	var pids []int
	for _, file := range files {
		args, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(args), "usernet\x00serve\x00") || strings.Contains(string(args), "--log-level") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		r.must(err)
		pids = append(pids, pid)
	}
	return pids
}

// stopStarted ends the daemon that a plugin started; there must be just one.
func (r *rig) stopStarted() {
	r.Helper()
	pids := r.started()
	if len(pids) != 1 {
		r.Errorf("%d daemons run, want 1", len(pids))
	}
	for _, pid := range pids {
		_, err := r.e.Run(r.Context(), "sh", "-c", fmt.Sprint("kill ", pid))
		r.must(err)
	}
	r.wait(10*time.Second, "the daemon to end", func() error {
		if n := len(r.started()); n != 0 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	r.forgetStart()
}

// forgetStart removes what the start of a daemon leaves for the next one, and for people.
func (r *rig) forgetStart() {
	for _, file := range []string{"start.lock", "usernet.log"} {
		r.must(os.Remove(r.e.Path(filepath.Join(r.e.UsernetDir(), file))))
	}
}

// selfStart: nobody runs a daemon. The first of many containers at the same time starts one, and it does not go with them.
func selfStart(r *rig) {
	r.must(r.e.StopUsernet())
	r.network("web")
	if n := len(r.started()); n != 1 {
		r.Errorf("%d daemons after the first command, want 1", n)
	}
	r.stopStarted()
	var all sync.WaitGroup
	for i := range 5 {
		all.Go(func() {
			_, err := r.e.Podman(r.Context(), "run", "-d", "--name", box(i), "--network", "web", "-p", fmt.Sprintf("%d:80", 8080+i), engine.Image)
			if err != nil {
				r.Error(err)
			}
		})
	}
	all.Wait()
	for i := range 5 {
		r.page(r.outside(), fmt.Sprintf("%s:%d", hostIP, 8080+i), "hello from", "peer "+router+":")
	}
	pids := r.started()
	if len(pids) != 1 {
		r.Fatalf("%d daemons run, want 1", len(pids))
	}
	// It is the child of nobody, in a session and a control group of its own.
	stat, err := r.e.Run(r.Context(), "cut", "-d", " ", "-f", "4,6", fmt.Sprintf("/proc/%d/stat", pids[0]))
	if want := fmt.Sprintf("1 %d", pids[0]); err != nil || stat != want {
		r.Errorf("parent and session are %q, %v, want %q", stat, err, want)
	}
	group, err := r.e.Run(r.Context(), "cat", fmt.Sprintf("/proc/%d/cgroup", pids[0]))
	if err != nil || !strings.Contains(group, "0::/\n") && !strings.HasSuffix(group, "0::/") {
		r.Errorf("control groups are %q, %v", group, err)
	}
	r.podman("rm", "-f", "-t", "0", "-a")
	r.stopStarted()
	r.must(r.e.StartUsernet(r.Context()))
}

// daemonRefuses: there is no daemon and none can be started.
func daemonRefuses(r *rig) {
	r.must(r.e.StopUsernet())
	defer func() { r.must(r.e.StartUsernet(r.background())) }()
	dir := r.e.Path("/etc/usernet")
	r.must(os.MkdirAll(dir, 0o755))
	defer os.RemoveAll(dir)
	r.must(os.WriteFile(filepath.Join(dir, "usernet.conf"), []byte("mood = 1\n"), 0o600))
	r.refused([]string{"start the usernet daemon", "usernet.log says why"}, append(append([]string{"network", "create"}, r.mode.args...), "web")...)
	r.forgetStart()
}

// vanished: Podman and the container are killed, and nobody cleans up after them.
func vanished(r *rig) {
	before := r.snapshot()
	r.network("web")
	r.run("www", "--network", "web", "-p", "8080:80")
	r.page(r.outside(), hostIP+":8080", "hello from www")
	_, err := r.e.Run(r.Context(), "sh", "-c", `
		for c in /proc/[0-9]*; do [ "$(cat $c/comm)" = conmon ] && kill -9 ${c#/proc/}; done
		kill -9 $(podman inspect -f '{{.State.Pid}}' www)
		umount /run/netns/netns-* && rm -f /run/netns/netns-*`)
	r.must(err)
	r.wait(10*time.Second, "the endpoint and its network to go", func() error {
		return sameBut(before, r.snapshot(), "processes: podman")
	})
	// Podman 5.4 has to be told twice.
	r.wait(5*time.Second, "Podman to forget the container", func() error {
		_, err := r.e.Podman(r.Context(), "rm", "-f", "-t", "0", "www")
		return err
	})
	r.run("www", "--network", "web", "-p", "8080:80")
	r.page(r.outside(), hostIP+":8080", "hello from www")
}

// killedAnytime kills the daemon at many moments of a container's life. Whatever was half made or half removed, a new one
// and the ordinary commands leave nothing.
func killedAnytime(r *rig) {
	before := r.snapshot()
	r.network("web")
	for i := range 6 {
		var wg sync.WaitGroup
		wg.Go(func() {
			r.e.Podman(r.Context(), "run", "-d", "--name", "client", "--network", "web", "-p", "8080:80", engine.Image)
			if i%2 == 1 {
				r.e.Podman(r.Context(), "rm", "-f", "-t", "0", "client")
			}
		})
		time.Sleep(time.Duration(i) * 60 * time.Millisecond) // the moment to strike is what varies
		r.must(r.e.KillUsernet())
		wg.Wait()
		r.stopAnyStarted()
		r.must(r.e.StartUsernet(r.Context()))
		r.e.Podman(r.Context(), "rm", "-f", "-t", "0", "client")
		r.run("after", "--network", "web", "-p", "8080:80")
		r.page(r.outside(), hostIP+":8080", "hello from after")
		r.podman("rm", "-f", "-t", "0", "after")
	}
	r.wait(5*time.Second, "nothing to be left", func() error { return before.Same(r.snapshot()) })
}

func (r *rig) stopAnyStarted() {
	if len(r.started()) > 0 {
		r.stopStarted()
	}
}

// many: fifty containers at once, each with a published port.
func many(r *rig) {
	const count = 50
	r.network("web", "--subnet", "10.213.0.0/24")
	began := time.Now()
	var all sync.WaitGroup
	for i := range count {
		all.Go(func() {
			_, err := r.e.Podman(r.Context(), "run", "-d", "--name", box(i), "--network", "web", "-p", fmt.Sprintf("%d:80", 20000+i), engine.Image)
			if err != nil {
				r.Error(err)
			}
		})
	}
	all.Wait()
	if r.Failed() {
		return
	}
	r.Logf("%d containers started in %v", count, time.Since(began).Round(time.Millisecond))
	seen := map[string]bool{}
	ps := r.ps()
	for _, e := range ps[0].Endpoints {
		seen[e.IPv4.String()] = true
	}
	if len(ps) != 1 || len(ps[0].Endpoints) != count || len(seen) != count {
		r.Errorf("usernet ps lists %d networks, %d endpoints with %d addresses", len(ps), len(ps[0].Endpoints), len(seen))
	}
	for i := 0; i < count; i += 10 {
		r.page(r.outside(), fmt.Sprintf("%s:%d", hostIP, 20000+i), "hello from ", "peer "+router+":")
	}
	r.podman("rm", "-f", "-t", "0", "-a")
}

const hangup = syscall.SIGHUP
