package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
)

// The parts of usernet ps --json that tests look at, written down here again: scripts of users rely on them.
type (
	PSNetwork struct {
		ID        string
		Name      string
		Mode      string
		Up        bool
		MTU       int
		Subnets   []struct{ Subnet, Gateway string }
		Endpoints []PSEndpoint
	}
	PSEndpoint struct {
		ID          string
		Container   string
		ContainerID string `json:"container_id"`
		IPv4, IPv6  netip.Prefix
		MAC         string
		Ports       []PSPort
	}
	PSPort struct {
		Proto         string
		HostIP        netip.Addr `json:"host_ip"`
		HostPort      uint16     `json:"host_port"`
		ContainerPort uint16     `json:"container_port"`
		Error         string
	}
)

// PS is what usernet ps --json says, with args. It may be asked when the test has ended.
func (h *Host) PS(t testing.TB, args ...string) (list []PSNetwork) {
	t.Helper()
	text, err := h.Usernet(context.WithoutCancel(t.Context()), append([]string{"ps", "--json"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatalf("usernet ps --json: %v: %s", err, text)
	}
	return list
}

// Publishes checks that these are the published ports of a container and no others, in the form HOST->CONTAINER/PROTO.
func (e PSEndpoint) Publishes(t testing.TB, container string, want ...string) {
	t.Helper()
	got := map[string]int{}
	for _, p := range e.Ports {
		s := fmt.Sprintf("%d->%d/%s", p.HostPort, p.ContainerPort, p.Proto)
		if p.HostIP.IsValid() {
			s = p.HostIP.String() + " " + s
		}
		if p.Error != "" {
			s += " " + p.Error
		}
		got[s]++
	}
	wanted := map[string]int{}
	for _, w := range want {
		wanted[w]++
	}
	if fmt.Sprint(got) != fmt.Sprint(wanted) {
		t.Errorf("usernet ps: %s publishes %v, want %v", container, got, wanted)
	}
}
