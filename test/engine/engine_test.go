package engine_test

import (
	"os"
	"strings"
	"testing"

	"github.com/usernet/usernet/test/engine"
)

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

// TestDockersOwnBridge shows that the pretend host works: what the tests of usernet rely on holds with the driver that
// Docker brings.
func TestDockersOwnBridge(t *testing.T) { engine.Each(t, testBridge) }

func testBridge(t *testing.T, e *engine.Engine) {
	ctx := t.Context()
	docker := func(args ...string) string {
		t.Helper()
		out, err := e.Docker(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Log(docker("version", "--format", "{{.Server.Version}}"))
	snap := func() engine.Snapshot {
		s, err := e.Snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := snap()
	docker("network", "create", "web")
	docker("run", "-d", "--name", "www", "--network", "web", "-p", "8080:80", "-p", "5353:5353/udp", engine.Image, "probe", "serve", "80", "5353")
	if d := before.Diff(snap()); !strings.Contains(d, "+ sockets: tcp 0.0.0.0:8080") || !strings.Contains(d, "+ namespaces: pin") {
		t.Errorf("the snapshot misses the container:\n%s", d)
	}
	for _, addr := range []string{"127.0.0.1:8080", engine.HostAddr.Addr().String() + ":8080"} {
		if page, err := engine.Get(ctx, e.NS(), addr); err != nil || !strings.HasPrefix(page, "hello from") {
			t.Errorf("%s: %q, %v", addr, page, err)
		}
	}
	page, err := engine.Get(ctx, e.Outside().NS(), engine.HostAddr.Addr().String()+":8080")
	if want := "peer " + engine.RouterAddr.Addr().String(); err != nil || !strings.Contains(page, want) {
		t.Errorf("from outside: %q, %v, want %q", page, err, want)
	}
	if text, err := engine.AskUDP(ctx, e.Outside().NS(), engine.HostAddr.Addr().String()+":5353", "knock"); err != nil || !strings.HasSuffix(text, " knock") {
		t.Errorf("udp from outside: %q, %v", text, err)
	}
	inside := func(want string, args ...string) {
		t.Helper()
		out, err := e.Docker(ctx, append([]string{"exec", "www", "probe"}, args...)...)
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("probe %s: %q, %v, want %q", args, out, err, want)
		}
	}
	self := "peer " + engine.HostAddr.Addr().String()
	inside("hello from", "fetch", "http://www/")
	inside(self, "fetch", "http://"+engine.FarAddr.String()+"/")
	inside(self, "fetch", "http://"+engine.FarName+"/")
	inside(self, "udp", engine.FarAddr.String()+":7", "knock")
	inside(engine.FarAddr.String(), "resolve", engine.FarName)
	inside("1000000 bytes", "bulk", engine.FarAddr.String()+":7", "1000000")
	docker("exec", "www", "ping", "-c", "1", "-W", "2", engine.FarAddr.String())
	docker("rm", "-f", "www")
	docker("network", "rm", "web")
	if d := before.Diff(snap()); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

// TestPodmansOwnBridge is the same for Podman.
func TestPodmansOwnBridge(t *testing.T) { engine.EachPodman(t, testPodman) }

func testPodman(t *testing.T, p *engine.Podman) {
	ctx := t.Context()
	podman := func(args ...string) string {
		t.Helper()
		out, err := p.Podman(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Log(podman("version", "--format", "{{.Client.Version}}"))
	snap := func() engine.Snapshot {
		s, err := p.Snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	podman("network", "create", "web")
	podman("run", "--rm", "--network", "web", "-p", "8080:80", engine.Image, "true") // netavark leaves chains behind
	podman("network", "rm", "web")
	before := snap()
	podman("network", "create", "web")
	podman("run", "-d", "--name", "www", "--network", "web", "-p", "8080:80", "-p", "5353:5353/udp", engine.Image, "probe", "serve", "80", "5353")
	// The port shows as a listening socket or, where Podman binds without listening (6), in netavark's rules.
	if d := before.Diff(snap()); !strings.Contains(d, "8080") || !strings.Contains(d, "+ namespaces: pin") {
		t.Errorf("the snapshot misses the container:\n%s", d)
	}
	for _, addr := range []string{"127.0.0.1:8080", engine.HostAddr.Addr().String() + ":8080"} {
		if page, err := engine.Get(ctx, p.NS(), addr); err != nil || !strings.HasPrefix(page, "hello from") {
			t.Errorf("%s: %q, %v", addr, page, err)
		}
	}
	page, err := engine.Get(ctx, p.Outside().NS(), engine.HostAddr.Addr().String()+":8080")
	if want := "peer " + engine.RouterAddr.Addr().String(); err != nil || !strings.Contains(page, want) {
		t.Errorf("from outside: %q, %v, want %q", page, err, want)
	}
	if out, err := p.Podman(ctx, "exec", "www", "probe", "fetch", "http://www/"); err != nil || !strings.Contains(out, "hello from") {
		t.Errorf("by name: %q, %v", out, err)
	}
	podman("rm", "-f", "-t", "0", "www")
	podman("network", "rm", "web")
	if d := before.Diff(snap()); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}
