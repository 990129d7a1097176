package cni_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// networks are one of each mode, with the addresses chosen by usernet.
func networks(version string) []chain {
	return []chain{
		{name: "user", cni: version, plugins: []string{usernetPlugin(`, "subnet": "10.213.0.0/24"`)}},
		{name: "bridged", cni: version, plugins: []string{usernetPlugin(`, "mode": "bridge", "subnet": "10.214.0.0/24"`)}},
	}
}

// reaches checks that a container has a way out and that its port 80 is served at a port of the host.
func (r *rig) reaches(space string, port int) {
	r.Helper()
	r.serve(space)
	r.in("peer "+hostIP, space, r.probe(), "fetch", "http://"+far+"/")
	r.page(r.outside(), fmt.Sprint(hostIP, ":", port), "peer "+router)
	for _, a := range []string{"127.0.0.1", "[::1]", hostIP} {
		r.page(r.host(), fmt.Sprint(a, ":", port), "hello from")
	}
}

// tool: every command that cnitool has, in every version.
func tool(r *rig) {
	for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, c := range networks(v) {
			r.write(c)
			space := r.space()
			env := []string{`CAP_ARGS={"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}], "mac": "02:00:00:00:be:ef"}`, "CNI_ARGS=IgnoreUnknown=1;COLOUR=red"}
			out := r.tool(env, "add", c.name, space)
			if !strings.Contains(out, "02:00:00:00:be:ef") {
				r.Errorf("result %s", out)
			}
			r.reaches(space, 8080)
			if v != "0.3.1" {
				r.tool(env, "check", c.name, space)
			}
			if v == "1.1.0" {
				r.tool(env, "status", c.name, space)
				r.tool(env, "gc", c.name, space) // cnitool tells of no attachment, so that of this one goes
				r.noPage(r.host(), "127.0.0.1:8080")
			}
			r.tool(env, "del", c.name, space)
			r.tool(env, "del", c.name, space)
		}
	}
}

func (r *rig) tool(env []string, args ...string) string {
	r.Helper()
	out, err := r.e.Tool(r.Context(), env, args...)
	if err != nil {
		r.Errorf("%v: %s", err, out)
	}
	return out
}

// examples: the networks of dist, and that the node reaches the pods, as Kubernetes' probes do.
func examples(r *rig) {
	text, err := os.ReadFile("../../dist/cni/10-usernet.conflist")
	if err != nil {
		r.Fatal(err)
	}
	manifest, err := os.ReadFile("../../dist/cni/kubernetes.yaml")
	if err != nil {
		r.Fatal(err)
	}
	_, pods, _ := strings.Cut(string(manifest), "10-usernet.conflist: |\n")
	pods, _, _ = strings.Cut(pods, "\n---\n")
	for name, list := range map[string]string{"usernet": string(text), "pods": pods} {
		if err := r.e.Feed(r.Context(), list, "sh", "-c", "cat >"+engine.CNIConfig+"/10-"+name+".conflist"); err != nil {
			r.Fatal(err)
		}
		space := r.space()
		env := []string{`CAP_ARGS={"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}`}
		result := r.tool(env, "add", name, space)
		r.reaches(space, 8080)
		if name == "pods" {
			r.page(r.host(), address(result)+":80", "hello from")
		}
		r.tool(env, "check", name, space)
		r.tool(env, "del", name, space)
	}
}

// addresses: the official plugins for addresses.
func addresses(r *rig) {
	for i, ipam := range []string{
		`{"type": "host-local", "ranges": [[{"subnet": "10.215.0.0/24", "rangeStart": "10.215.0.50"}], [{"subnet": "fd00:215::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]}`,
		`{"type": "static", "addresses": [{"address": "10.215.0.50/24", "gateway": "10.215.0.1"}], "dns": {"nameservers": ["192.0.2.53"]}}`,
	} {
		c := chain{name: fmt.Sprint("leased", i), plugins: []string{usernetPlugin(`, "ipam": ` + ipam)}}
		a, b := r.space(), r.space()
		result := r.chainAdd(c, a, 8080)
		r.in("10.215.0.50/24", a, "ip", "addr")
		r.reaches(a, 8080)
		if i == 0 {
			other := r.chainAdd(c, b, 0)
			r.in("10.215.0.51/24", b, "ip", "addr")
			r.in("hello from", b, r.probe(), "fetch", "http://10.215.0.50/")
			r.in("fd00:215::", b, "ip", "addr")
			r.chainDel(c, b, 0, other)
		}
		r.chainDel(c, a, 8080, result)
		if left := r.run("sh", "-c", "ls /var/lib/cni/networks/"+c.name+" 2>/dev/null | grep ^10 || true"); left != "" {
			r.Errorf("leases are left: %s", left)
		}
	}
}

// several: one container on two networks, and its port on both.
func several(r *rig) {
	space := r.space()
	nets := networks("")
	var results []string
	for i, c := range nets {
		out, err := r.callAs(c, fmt.Sprint("eth", i), "ADD", space, 8080, "")
		if err != nil {
			r.Errorf("%v: %s", err, out)
		}
		results = append(results, out)
	}
	r.in("10.213.0.2/24", space, "ip", "addr", "show", "eth0")
	r.in("10.214.0.2/24", space, "ip", "addr", "show", "eth1")
	r.in("dev eth0", space, "ip", "route", "get", far)
	r.reaches(space, 8080)
	// The port goes on by the network that is left.
	if out, err := r.callAs(nets[0], "eth0", "DEL", space, 8080, results[0]); err != nil {
		r.Errorf("%v: %s", err, out)
	}
	r.page(r.outside(), hostIP+":8080", "hello from")
	if out, err := r.callAs(nets[1], "eth1", "DEL", space, 8080, results[1]); err != nil {
		r.Errorf("%v: %s", err, out)
	}
	r.noPage(r.host(), "127.0.0.1:8080")
}

// many: fifty containers at once, twice.
func many(r *rig) {
	const count = 50
	var spaces []string
	for range count {
		spaces = append(spaces, r.space())
	}
	for _, c := range networks("") {
		results := make([]string, count)
		each(count, func(i int) { results[i] = r.chainAdd(c, spaces[i], 20000+i) })
		seen := map[string]bool{}
		for _, text := range results {
			var result struct{ IPs []struct{ Address string } }
			if err := json.Unmarshal([]byte(text), &result); err != nil || len(result.IPs) != 1 || seen[result.IPs[0].Address] {
				r.Fatalf("result %s, %v; want one address that nobody else has", text, err)
			}
			seen[result.IPs[0].Address] = true
		}
		r.serve(spaces[count-1])
		r.page(r.outside(), fmt.Sprint(hostIP, ":", 20000+count-1), "hello from")
		each(count, func(i int) { r.chainDel(c, spaces[i], 20000+i, results[i]) })
	}
}

func each(n int, do func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { do(i) })
	}
	wg.Wait()
}

// rounds: nothing is left of a thousand containers, or of as many as there is time for.
func rounds(r *rig) {
	spaces := []string{r.space(), r.space(), r.space(), r.space()}
	nets := networks("")
	one := func(i, n int) {
		c := nets[n%len(nets)]
		port := 20000 + i
		r.chainDel(c, spaces[i], port, r.chainAdd(c, spaces[i], port))
	}
	each(len(spaces), func(i int) { one(i, 0); one(i, 1) }) // what is made once
	r.wait(patience, "the networks to go", r.nobody)
	before := r.snapshot()
	end := time.Now().Add(40 * time.Second)
	done := make([]int, len(spaces))
	each(len(spaces), func(i int) {
		for ; done[i] < 250 && time.Now().Before(end) && !r.Failed(); done[i]++ {
			one(i, done[i])
		}
	})
	r.Logf("%d rounds", done[0]+done[1]+done[2]+done[3])
	r.wait(patience, "nothing to be left", func() error { return before.Same(r.snapshot()) })
}

// crash: the daemon is killed between ADD and DEL. Another one comes before DEL, or only after it.
func crash(r *rig) {
	for _, c := range networks("1.1.0") {
		space := r.space()
		result := r.chainAdd(c, space, 8080)
		r.serve(space)
		r.page(r.outside(), hostIP+":8080", "hello from")
		r.restart(func() {})
		r.page(r.outside(), hostIP+":8080", "hello from")
		if out, err := r.call(c, 0, "CHECK", space, 8080, result); err != nil {
			r.Errorf("%v: %s", err, out)
		}
		r.chainDel(c, space, 8080, result)
		r.noPage(r.host(), "127.0.0.1:8080")

		again := r.chainAdd(c, space, 8080)
		r.restart(func() {
			r.chainDel(c, space, 8080, again)
			if out, err := r.e.Run(r.Context(), "ip", "netns", "exec", base(space), "ip", "link", "show", "eth0"); err == nil {
				r.Errorf("after DEL: %s", out)
			}
			if started := r.started(); len(started) > 0 {
				r.Errorf("DEL has started %d", started)
			}
		})
		// The same container again, and this time it goes with the daemon away.
		lost := r.space()
		r.chainAdd(c, lost, 8081)
		r.restart(func() {
			r.dropSpace(base(lost))
			r.spaces = slices.DeleteFunc(r.spaces, func(s string) bool { return s == base(lost) })
		})
		r.wait(patience, "the lost container to be forgotten", func() error { return r.nobody() })
	}
}

// restart kills the daemon, and starts another one when meanwhile has been done.
func (r *rig) restart(meanwhile func()) {
	r.Helper()
	if err := r.e.KillUsernet(); err != nil {
		r.Error(err)
	}
	meanwhile()
	if err := r.e.StartUsernet(r.Context()); err != nil {
		r.Fatal(err)
	}
}

// nobody tells that the daemon has endpoints.
func (r *rig) nobody() error {
	out, err := r.e.Usernet(r.Context(), "ps", "--json", "--control-socket", engine.ControlSocket)
	if err == nil && strings.TrimSpace(out) != "[]" {
		err = fmt.Errorf("usernet ps: %s", out)
	}
	return err
}

// started are the daemons that the plugin has started, by their IDs in the pretend host.
func (r *rig) started() (pids []int) {
	r.Helper()
	files, err := filepath.Glob(r.e.Path("/proc") + "/[0-9]*/cmdline")
	if err != nil {
		r.Fatal(err)
	}
	for _, file := range files {
		args, err := os.ReadFile(file)
		if err != nil || !strings.HasSuffix(string(args), "usernet\x00serve\x00") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// stopStarted ends them.
func (r *rig) stopStarted() {
	r.Helper()
	for _, pid := range r.started() {
		r.run("sh", "-c", fmt.Sprint("kill ", pid))
	}
	r.wait(patience, "the daemon to end", func() error {
		if pids := r.started(); len(pids) > 0 {
			return fmt.Errorf("it runs still: %d", pids)
		}
		return nil
	})
}

// selfStart: without a daemon, ADD starts one, and many at once start one.
func selfStart(r *rig) {
	if err := r.e.StopUsernet(); err != nil {
		r.Fatal(err)
	}
	c := networks("1.1.0")[0]
	var spaces []string
	for range 5 {
		spaces = append(spaces, r.space())
	}
	results := make([]string, len(spaces))
	each(len(spaces), func(i int) { results[i] = r.chainAdd(c, spaces[i], 20000+i) })
	if pids := r.started(); len(pids) != 1 {
		r.Errorf("started: %d, want one", pids)
	}
	r.reaches(spaces[0], 20000)
	if out, err := r.call(c, 0, "STATUS", spaces[0], 0, ""); err != nil {
		r.Errorf("%v: %s", err, out)
	}
	each(len(spaces), func(i int) { r.chainDel(c, spaces[i], 20000+i, results[i]) })
	r.stopStarted()
	r.run("rm", "-rf", "/var/lib/usernet", engine.RunDir)
	if err := r.e.StartUsernet(r.Context()); err != nil {
		r.Fatal(err)
	}
}
