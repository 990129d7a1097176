package gateway

import (
	"net/netip"
	"testing"

	"github.com/usernet/usernet/driver/gvproxy"
)

// What is added is answered and shown, and shown as it was given.
func TestNames(t *testing.T) {
	a, b := netip.MustParseAddr("10.200.0.1"), netip.MustParseAddr("10.200.0.2")
	n := newNames([]gvproxy.Zone{{Name: "containers.internal.", Records: []gvproxy.Record{{Name: "gateway", Addr: a}}}})
	lookup := func(name string) (addrs []netip.Addr) {
		answer, _ := n.answered.Lookup(name)
		return answer.Addrs
	}
	if got := lookup("gateway.containers.internal."); len(got) != 1 || got[0] != a {
		t.Errorf("the gateway is %v", got)
	}
	before := n.all()
	n.add(gvproxy.Zone{Name: "containers.internal.", Records: []gvproxy.Record{{Name: "gateway", Addr: b}}})
	n.add(gvproxy.Zone{Name: "Other.", Default: b})
	if got := lookup("gateway.containers.internal."); len(got) != 1 || got[0] != b {
		t.Errorf("the gateway is %v, want what was added later", got)
	}
	if got := lookup("anything.other."); len(got) != 1 || got[0] != b {
		t.Errorf("a name of the new zone is %v", got)
	}
	if all := n.all(); len(all) != 2 || len(all[0].Records) != 2 || all[1].Name != "Other." || len(before) != 1 || len(before[0].Records) != 1 {
		t.Errorf("zones %+v, before %+v", all, before)
	}
	if newNames(nil).all() != nil || newNames([]gvproxy.Zone{}).all() == nil {
		t.Error("no zones and an empty list are shown alike")
	}
}
