package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/driver/gateway"
	"github.com/usernet/usernet/driver/gvproxy/cli"
	"github.com/usernet/usernet/usermode/l2"
)

func TestParsePublish(t *testing.T) {
	guest := netip.MustParseAddr("192.168.127.2")
	for _, tt := range []struct{ text, proto, local, remote string }{
		{"8080:80", "tcp", ":8080", "192.168.127.2:80"},
		{"8080:80/tcp", "tcp", ":8080", "192.168.127.2:80"},
		{"127.0.0.1:5353:53/udp", "udp", "127.0.0.1:5353", "192.168.127.2:53"},
		{"[::1]:8080:80", "tcp", "[::1]:8080", "192.168.127.2:80"},
		{"localhost:8080:80", "tcp", "localhost:8080", "192.168.127.2:80"},
		{"80", "", "", ""},
		{":80", "", "", ""},
		{"8080:", "", "", ""},
		{"8080:x", "", "", ""},
		{"8080:70000", "", "", ""},
		{"::1:8080:80", "", "", ""},
		{"8080:80/sctp", "", "", ""},
		{"a/b:8080:80", "", "", ""},
		{"", "", "", ""},
	} {
		f, err := parsePublish(tt.text, guest)
		if tt.proto == "" {
			if err == nil {
				t.Errorf("-p %s is taken: %+v", tt.text, f)
			}
			continue
		}
		if err != nil || string(f.Proto) != tt.proto || f.Local != tt.local || f.Remote != tt.remote {
			t.Errorf("-p %s: %s %s to %s, %v", tt.text, f.Proto, f.Local, f.Remote, err)
		}
	}
}

func gatewayConfig(t *testing.T, args string) (gateway.Config, error) {
	t.Helper()
	fs := flag.NewFlagSet("usernet gateway", flag.ContinueOnError)
	more := newGatewayFlags(fs)
	g, err := cli.ParseFlags(fs, strings.Fields(args), os.ReadFile)
	if err != nil {
		return gateway.Config{}, err
	}
	return more.config(g)
}

func TestGatewayFlags(t *testing.T) {
	c, err := gatewayConfig(t, "-subnet6 none -isolated -linger 10s -p 8080:80 -lease 02:00:00:00:00:09=192.168.127.9"+
		" -listen-vm hybrid:///run/vm:1024 -listen-dgram unixgram:///a -listen-dgram unixgram:///b -mtu 4000")
	if err != nil {
		t.Fatal(err)
	}
	n, h := c.Network, c.Hypervisors
	if n.Subnet6.IsValid() || len(n.NAT) != 1 || !n.Isolated || n.MTU != 4000 || n.Leases[netip.MustParseAddr("192.168.127.9")] != (l2.MAC{2, 0, 0, 0, 0, 9}) {
		t.Errorf("network %+v", n)
	}
	if h.Linger != 10*time.Second || len(c.Machines) != 1 || !slices.Equal(h.Datagrams, []string{"/a", "/b"}) {
		t.Errorf("machines %v, %+v", c.Machines, h)
	}
	if last := c.Forwards[len(c.Forwards)-1]; last.Local != ":8080" {
		t.Errorf("forwards %+v", c.Forwards)
	}
	if c, err = gatewayConfig(t, ""); err != nil || c.Hypervisors.Linger != 0 || c.Network.Subnet6 != gateway.Subnet6 {
		t.Errorf("without flags: %+v, %v", c, err)
	}
	for _, args := range []string{
		"-subnet6 x", "-p 80", "-lease x", "-lease 02:00:00:00:00:09", "-listen-vm x", "-listen-dgram /a", "-listen-dgram unixgram://a",
		"-linger 0s", "-linger x", "-nope", "-ssh-port 1",
	} {
		if _, err := gatewayConfig(t, args); err == nil {
			t.Errorf("%s is taken", args)
		}
	}
}

// Every flag of the gateway is in its manual.
func TestGatewayManual(t *testing.T) {
	text, err := os.ReadFile("../../doc/man/usernet-gateway.1")
	if err != nil {
		t.Fatal(err)
	}
	fs := flag.NewFlagSet("usernet gateway", flag.ContinueOnError)
	newGatewayFlags(fs)
	if _, err := cli.ParseFlags(fs, nil, os.ReadFile); err != nil {
		t.Fatal(err)
	}
	fs.VisitAll(func(f *flag.Flag) {
		if !strings.Contains(string(text), ".It Fl "+f.Name) && !strings.Contains(string(text), ", Fl "+f.Name+" ") {
			t.Errorf("-%s is not in the manual", f.Name)
		}
	})
}

func TestGatewayPorts(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/services/forwarder/all", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `[{"local":":6443","remote":"192.168.127.2:6443","protocol":"tcp"}]`)
	})
	mux.HandleFunc(gateway.PortsPath, func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode([]gateway.Published{{Proto: "tcp", Port: 8080, Guest: "vm(3)", Accepted: 7, Active: 2}})
	})
	srv := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	defer func() {
		srv.Close()
		<-done
	}()
	ports := func(args ...string) (int, string) {
		var out bytes.Buffer
		p := &program{stdout: &out, stderr: &out}
		status := p.main(context.Background(), append([]string{"gateway", "ports", "-services", "unix://" + socket}, args...))
		return status, out.String()
	}
	want := "PROTOCOL  HOST   LEADS TO            CONNECTIONS\n" +
		"tcp       :6443  192.168.127.2:6443  \n" +
		"tcp       :8080  published by vm(3)  2 of 7\n"
	if status, got := ports(); status != 0 || got != want {
		t.Errorf("status %d\n%s\nwant\n%s", status, got, want)
	}
	var all struct {
		Forwards  []gatewayForward
		Published []gateway.Published
	}
	status, got := ports("-json")
	if err := json.Unmarshal([]byte(got), &all); err != nil || status != 0 || len(all.Forwards) != 1 || len(all.Published) != 1 || all.Published[0].Guest != "vm(3)" {
		t.Errorf("status %d, %v: %s", status, err, got)
	}
	if status, got := ports("-services", "unix:///nonexistent/api"); status != 1 || !strings.Contains(got, "no such file") {
		t.Errorf("status %d: %s", status, got)
	}
}

func TestGatewayRegister(t *testing.T) {
	var out bytes.Buffer
	p := &program{stdout: &out, stderr: &out}
	if status := p.main(context.Background(), []string{"gateway", "register", "-name", "vms"}); status != 0 {
		t.Errorf("status %d", status)
	}
	if text := out.String(); !strings.Contains(text, "00000400-FACB-11E6-BD58-64006A7986D3") || !strings.Contains(text, `"vms"`) {
		t.Errorf("entry %s", text)
	}
	if status := p.main(context.Background(), []string{"gateway", "register", "unix:///x"}); status != 1 {
		t.Errorf("of a unix socket: status %d", status)
	}
	if status := p.main(context.Background(), []string{"gateway", "register", "-install", "-remove"}); status != 2 {
		t.Errorf("install and remove: status %d", status)
	}
}
