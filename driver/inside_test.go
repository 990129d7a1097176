package driver

import (
	"testing"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/nettest"
)

// Which endpoints are in a namespace is asked of the kernel: two networks may use the same addresses, and a container can change
// what it likes about its interface.
func TestStatusIn(t *testing.T) {
	b := newBench(t)
	first, second := netOf(usernet.Usermode, 1), netOf(usernet.Usermode, 1)
	second.ID = id('d')
	bridged := netOf(usernet.Bridge, 2)
	one := b.attachment(first, "one", 2)
	two := b.attachment(second, "two", 2)
	three := b.attachment(bridged, "three", 3)
	three.Netns, three.Endpoint.IfName = one.Netns, "eth1"
	for _, a := range []Attachment{one, two, three} {
		b.attach(a)
	}
	b.restart()
	for _, tt := range []struct {
		in   Attachment
		want map[string]string // network to endpoint
	}{
		{one, map[string]string{first.ID: one.Endpoint.ID, bridged.ID: three.Endpoint.ID}},
		{two, map[string]string{second.ID: two.Endpoint.ID}},
		{Attachment{Netns: nettest.NewNS(t)}, nil},
	} {
		list, err := b.StatusIn(ctx, tt.in.Netns)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) != len(tt.want) {
			t.Errorf("%s: %d networks, want %d", tt.in.Container.Name, len(list), len(tt.want))
		}
		for _, n := range list {
			if len(n.Endpoints) != 1 || n.Endpoints[0].ID != tt.want[n.ID] {
				t.Errorf("%s: network %.12s has %+v, want %.12s", tt.in.Container.Name, n.ID, n.Endpoints, tt.want[n.ID])
			}
		}
	}
	for _, a := range []Attachment{one, two, three} {
		b.detach(a)
	}
	if list, err := b.StatusIn(ctx, one.Netns); err != nil || len(list) > 0 {
		t.Errorf("after all were detached: %v, %v", list, err)
	}
	b.gone()
}
