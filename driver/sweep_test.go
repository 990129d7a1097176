package driver

import (
	"testing"
	"time"

	"github.com/usernet/usernet/endpoint"
)

func TestStale(t *testing.T) {
	const here, nowhere = "/proc/self/ns/net", "/nowhere/sandbox"
	long := -2 * waitsFor
	for _, tt := range []struct {
		name  string
		c     container
		ago   time.Duration
		state endpoint.State
		want  bool
	}{
		{"running", container{joined: true, moved: true, sandboxKey: here}, long, endpoint.Moved, false},
		{"running, its sandbox out of our sight", container{joined: true, moved: true, sandboxKey: nowhere}, long, endpoint.Moved, false},
		{"its namespace went", container{joined: true, moved: true, sandboxKey: here}, 0, endpoint.Gone, true},
		{"just created", container{}, 0, endpoint.Home, false},
		{"created and forgotten", container{}, long, endpoint.Home, true},
		{"just joined, the sandbox is to come", container{joined: true, sandboxKey: nowhere}, 0, endpoint.Home, false},
		{"joined, and the sandbox never came", container{joined: true, sandboxKey: nowhere}, long, endpoint.Home, true},
		{"joined, about to move", container{joined: true, sandboxKey: here}, long, endpoint.Home, false},
		{"handed back", container{joined: true, moved: true, sandboxKey: nowhere}, 0, endpoint.Home, true},
		{"handed back, and a file is left of the sandbox", container{joined: true, moved: true, sandboxKey: "/etc/passwd"}, 0, endpoint.Home, true},
		{"being handed back", container{joined: true, moved: true, sandboxKey: here}, 0, endpoint.Home, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.c.since = time.Now().Add(tt.ago)
			if got := tt.c.stale(tt.state); got != "" != tt.want {
				t.Errorf("stale: %q, want %t", got, tt.want)
			}
		})
	}
}
