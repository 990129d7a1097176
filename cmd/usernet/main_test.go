//go:build linux

package main

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		asMain()
		return
	}
	os.Exit(nettest.Main(m))
}

func runProgram(t *testing.T, ctx context.Context, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = (&program{stdout: &out, stderr: &errs}).main(ctx, args)
	return code, out.String(), errs.String()
}

func TestWrongCommandLines(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.conf")
	if err := os.WriteFile(bad, []byte("mood = \"good\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		code int
		want string // in standard error
	}{
		{"", 2, "usage: usernet COMMAND"},
		{"dance", 2, `no command "dance"`},
		{"ps --colour", 2, "flag provided but not defined: -colour"},
		{"ps web", 2, `unexpected argument "web"`},
		{"ps --control-socket /nowhere/s", 1, "no usernet daemon answers at /nowhere/s"},
		{"port", 2, "want add or rm"},
		{"port add x", 2, "want an endpoint and at least one port"},
		{"port add --control-socket /nowhere/s x 80:http", 1, `"80:http"`},
		{"port add x 8000-8001:80-82", 1, "8000-8001"},
		{"port rm --control-socket /nowhere/s x 8080:80", 1, "no usernet daemon answers at /nowhere/s"},
		{"network", 2, "want rm"},
		{"network rm", 2, "want at least one network"},
		{"serve now", 2, `unexpected argument "now"`},
		{"serve --config /nowhere/c", 1, "/nowhere/c"},
		{"serve --config " + bad, 1, "unknown setting mood"},
		{"serve --host-gateway carrier:pigeon", 1, `host gateway: address "carrier:pigeon": `},
		{"serve --log-level loud", 1, "want debug, info, warn or error"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			code, stdout, stderr := runProgram(t, t.Context(), strings.Fields(tt.args)...)
			if code != tt.code || !strings.Contains(stderr, tt.want) || stdout != "" {
				t.Errorf("exit status %d, stdout %q, stderr %q; want %d and %q", code, stdout, stderr, tt.code, tt.want)
			}
		})
	}
}

func TestServeUntilCancelled(t *testing.T) {
	nettest.NoLeaks(t)
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	args := []string{"serve", "--plugin-socket", filepath.Join(dir, "plugin.sock"), "--control-socket", filepath.Join(dir, "ctl.sock"),
		"--state-dir", filepath.Join(dir, "state"), "--run-dir", filepath.Join(dir, "run")}
	type result struct {
		code   int
		stderr string
	}
	ended := make(chan result)
	go func() {
		code, _, stderr := runProgram(t, ctx, args...)
		ended <- result{code, stderr}
	}()
	// The sockets are there before the daemon answers; a client waits for it.
	for {
		if _, err := os.Stat(filepath.Join(dir, "ctl.sock")); err == nil {
			break
		}
		select {
		case r := <-ended:
			t.Fatalf("ended early: %+v", r)
		default:
		}
	}
	code, stdout, stderr := runProgram(t, t.Context(), "ps", "--json", "--control-socket", filepath.Join(dir, "ctl.sock"))
	if code != 0 || strings.TrimSpace(stdout) != "[]" {
		t.Errorf("ps: exit status %d, %q, %q", code, stdout, stderr)
	}
	if code, _, stderr := runProgram(t, t.Context(), args...); code != 1 || !strings.Contains(stderr, "another process listens on it") {
		t.Errorf("a second daemon: exit status %d, %q", code, stderr)
	}
	cancel()
	if r := <-ended; r.code != 0 {
		t.Errorf("exit status %d: %s", r.code, r.stderr)
	}
	for _, s := range []string{"plugin.sock", "ctl.sock"} {
		if _, err := os.Stat(filepath.Join(dir, s)); !os.IsNotExist(err) {
			t.Errorf("%s is left", s)
		}
	}
}

func TestTable(t *testing.T) {
	list := []control.Network{
		{
			ID: "0123456789abcdef", Mode: usernet.Usermode, Up: true, Path: "netstack", PathError: "no TPROXY",
			Subnets: []control.Subnet{
				{Subnet: netip.MustParsePrefix("172.18.0.0/16"), Gateway: netip.MustParseAddr("172.18.0.1")},
				{Subnet: netip.MustParsePrefix("fd00::/64"), Gateway: netip.MustParseAddr("fd00::1")},
			},
			Endpoints: []control.Endpoint{{
				ID: "fedcba9876543210", IPv4: netip.MustParsePrefix("172.18.0.2/16"), IPv6: netip.MustParsePrefix("fd00::2/64"),
				MAC: "02:00:00:00:00:01",
				Ports: []control.Port{
					{Proto: usernet.TCP, HostPort: 8080, ContainerPort: 80},
					{Proto: usernet.UDP, HostIP: netip.MustParseAddr("::1"), HostPort: 53, ContainerPort: 53, Error: "taken"},
					{Proto: usernet.TCP, HostPort: 81, ContainerPort: 80, Gateway: control.GatewayUp},
					{Proto: usernet.TCP, HostPort: 82, ContainerPort: 80, Gateway: control.GatewayLost, GatewayError: "gone"},
				},
			}},
		},
		{ID: "aaaa", Mode: usernet.Bridge},
	}
	var out strings.Builder
	if err := table(&out, list); err != nil {
		t.Fatal(err)
	}
	want := `NETWORK        MODE       SUBNET                     GATEWAY               ENDPOINTS   STATE
0123456789ab   usermode   172.18.0.0/16, fd00::/64   172.18.0.1, fd00::1   1           up, TCP by netstack (no TPROXY)
aaaa           bridge     -                          -                     0           down

ENDPOINT       NETWORK        ADDRESS               MAC                 PORTS
fedcba987654   0123456789ab   172.18.0.2, fd00::2   02:00:00:00:00:01   *:8080->80/tcp, [::1]:53->53/udp (taken), *:81->80/tcp and on the VM's host, *:82->80/tcp (lost on the VM's host: gone)
`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Errorf("table (-want +got):\n%s", d)
	}
}
