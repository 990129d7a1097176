package control_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var ctx = context.Background()

const (
	networkID  = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	endpointID = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// serve runs a driver with one network and one joined endpoint behind a control socket.
func serve(t *testing.T) (*control.Client, http.Handler) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	d, err := driver.Open(driver.Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	n := usernet.Network{ID: networkID, Options: usernet.Options{Mode: usernet.Usermode, ICC: true},
		Subnets: []usernet.Subnet{{Prefix: netip.MustParsePrefix("10.200.1.0/24"), Gateway: netip.MustParseAddr("10.200.1.1")}}}
	if err := d.CreateNetwork(ctx, n); err != nil {
		t.Fatal(err)
	}
	ep := usernet.Endpoint{ID: endpointID, NetworkID: networkID, Addr4: netip.MustParsePrefix("10.200.1.2/24")}
	if _, err := d.CreateEndpoint(ctx, ep); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Join(ctx, networkID, endpointID, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.DeleteEndpoint(ctx, networkID, endpointID); err != nil {
			t.Error(err)
		}
		if err := d.DeleteNetwork(ctx, networkID); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h := control.Handler(d, nil, log)
	srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	srv.Start()
	t.Cleanup(srv.Close)
	return control.NewClient(path), h
}

func TestListAddAndRemovePorts(t *testing.T) {
	c, _ := serve(t)
	port := usernet.Port{Proto: usernet.TCP, HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}
	got, err := c.AddPorts(ctx, "bbbb", []usernet.Port{port})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].HostPort == 0 || got[0].HostIP != port.HostIP {
		t.Fatalf("got %v, want 127.0.0.1 with a port", got)
	}
	list, err := c.Networks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []control.Network{{
		ID: networkID, Mode: usernet.Usermode, Up: true, MTU: 1500, Traffic: &control.Traffic{}, Path: "netstack",
		Subnets: []control.Subnet{{Subnet: netip.MustParsePrefix("10.200.1.0/24"), Gateway: netip.MustParseAddr("10.200.1.1")}},
		Endpoints: []control.Endpoint{{
			ID: endpointID, IPv4: netip.MustParsePrefix("10.200.1.2/24"), MAC: list[0].Endpoints[0].MAC, Joined: true,
			Ports: []control.Port{{Proto: usernet.TCP, HostIP: port.HostIP, HostPort: got[0].HostPort, ContainerPort: 80}},
		}},
	}}
	if d := cmp.Diff(want, list, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Errorf("networks (-want +got):\n%s", d)
	}
	if err := c.RemovePorts(ctx, "10.200.1.2", got); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", netip.AddrPortFrom(got[0].HostIP, got[0].HostPort).String()); err == nil {
		conn.Close()
		t.Error("the removed port is still served")
	}
}

func TestErrorsAreSentences(t *testing.T) {
	c, _ := serve(t)
	port := usernet.Port{Proto: usernet.TCP, HostPort: 1234, ContainerPort: 80}
	for _, tt := range []struct {
		name string
		call func() error
		want string
	}{
		{"no such endpoint", func() error { _, err := c.AddPorts(ctx, "ffff", []usernet.Port{port}); return err }, `endpoint "ffff": not found`},
		{"empty endpoint", func() error { return c.RemovePorts(ctx, "10.9.9.9", []usernet.Port{port}) }, `endpoint "10.9.9.9": not found`},
		{"port not there", func() error { return c.RemovePorts(ctx, "bbbb", []usernet.Port{port}) }, "does not publish 1234:80/tcp"},
		{"protocol", func() error {
			_, err := c.AddPorts(ctx, "bbbb", []usernet.Port{{Proto: "icmp", ContainerPort: 1}})
			return err
		}, `protocol "icmp"`},
		{"network in use", func() error { return c.RemoveNetwork(ctx, "cccc") }, `network "cccc": not found`},
		{"nobody there", func() error { _, err := control.NewClient("/nowhere/s").Networks(ctx); return err }, "no usernet daemon answers at /nowhere/s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.call(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
}

func FuzzHandler(f *testing.F) {
	d, err := driver.Open(driver.Config{StateDir: f.TempDir(), RunDir: f.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { d.Close() })
	h := control.Handler(d, nil, slog.New(slog.DiscardHandler))
	f.Add("POST", "/v1/endpoints/x/ports", `{"ports":[{"proto":"tcp","host_port":1,"container_port":2}]}`)
	f.Add("DELETE", "/v1/endpoints/x/ports", `{"ports":[{"host_ip":"::"}]} {}`)
	f.Add("DELETE", "/v1/networks/%2e%2e", "")
	f.Add("GET", "/v1/networks", "null")
	f.Add("POST", "/v1/networks/prepare", `{"network":{"id":"a","subnets":[{"subnet":"10.0.0.0/8"}],"options":{"mtu":"1"}},"taken":["::/0"]}`)
	f.Add("POST", "/v1/endpoints", `{"network":{"id":"a"},"id":"b","interface":"eth0","addresses":["::"],"routes":[{}]}`)
	f.Add("DELETE", "/v1/networks/a/endpoints/b", "")
	f.Add("POST", "/v1/endpoints/x/ports", `{"ports":[{"host_port":-1}]}`)
	f.Fuzz(func(t *testing.T, method, path, body string) {
		req, err := http.NewRequest(method, "http://x", strings.NewReader(body))
		if err != nil {
			t.Skip()
		}
		req.URL.Path = path
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if w.Code == http.StatusNotFound || w.Code == http.StatusMethodNotAllowed || w.Code == http.StatusMovedPermanently {
			return
		}
		if text, _ := io.ReadAll(w.Body); !json.Valid(text) {
			t.Errorf("%s %s: %d with %q, which is no JSON", method, path, w.Code, text)
		}
	})
}
