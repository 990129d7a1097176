//go:build linux

package dns

import (
	"net/netip"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestZones(t *testing.T) {
	ip := netip.MustParseAddr
	var z Zones
	z.Add(Zone{Name: "Containers.internal.", Records: []ZoneRecord{{Name: "gateway", IP: ip("10.200.1.1")}, {Name: "Host", IP: ip("10.200.1.254")}}})
	z.Add(Zone{Name: "crc.testing", DefaultIP: ip("10.200.1.2"), Records: []ZoneRecord{
		{Name: "api", IP: ip("10.200.1.3")},
		{Name: "api", IP: ip("fd00::3")},
		{Name: "api", IP: ip("10.200.1.9")},
		{Regexp: regexp.MustCompile(`^crc-(.*?)-master-0$`), IP: ip("10.200.1.4")},
	}})
	z.Add(Zone{Name: "testing", Records: []ZoneRecord{{Name: "a.b", IP: ip("fd00::5")}}})
	for name, want := range map[string]*Answer{
		"gateway.containers.internal.":   {Addrs: addrs("10.200.1.1"), Zone: "containers.internal."},
		"host.containers.internal.":      {Addrs: addrs("10.200.1.254"), Zone: "containers.internal."},
		"other.containers.internal.":     {Missing: true, Zone: "containers.internal."},
		"containers.internal.":           nil,
		"xcontainers.internal.":          nil,
		"api.crc.testing.":               {Addrs: addrs("10.200.1.3", "fd00::3"), Zone: "crc.testing."},
		"crc-a1b2-master-0.crc.testing.": {Addrs: addrs("10.200.1.4"), Zone: "crc.testing."},
		"x.y.crc.testing.":               {Addrs: addrs("10.200.1.2"), Zone: "crc.testing."},
		"crc.testing.":                   {Missing: true, Zone: "testing."},
		"a.b.testing.":                   {Addrs: addrs("fd00::5"), Zone: "testing."},
		"b.testing.":                     {Zone: "testing."},
		"c.testing.":                     {Missing: true, Zone: "testing."},
		"example.com.":                   nil,
		".":                              nil,
	} {
		got, ok := z.Lookup(name)
		if want == nil {
			if ok {
				t.Errorf("%s: answered with %+v, want it left to others", name, got)
			}
			continue
		}
		if diff := cmp.Diff(*want, got, compare); !ok || diff != "" {
			t.Errorf("%s: %v, -want +got\n%s", name, ok, diff)
		}
	}
}

func TestZonesAddToOne(t *testing.T) {
	ip := netip.MustParseAddr
	var z Zones
	z.Add(Zone{Name: "a.test.", Records: []ZoneRecord{{Name: "x", IP: ip("10.200.1.1")}, {Name: "y", IP: ip("10.200.1.2")}}, DefaultIP: ip("10.200.1.9")})
	z.Add(Zone{Name: "A.test", Records: []ZoneRecord{{Name: "x", IP: ip("10.200.1.3")}}})
	for name, want := range map[string][]netip.Addr{"x.a.test.": addrs("10.200.1.3"), "y.a.test.": addrs("10.200.1.2"), "z.a.test.": nil} {
		if got, _ := z.Lookup(name); cmp.Diff(want, got.Addrs, compare) != "" {
			t.Errorf("%s: %v, want %v", name, got.Addrs, want)
		}
	}
	all := z.All()
	if len(all) != 1 || len(all[0].Records) != 3 || all[0].Name != "a.test." || all[0].Records[0].IP != ip("10.200.1.3") {
		t.Errorf("zones: %+v", all)
	}
}

// The root as a zone takes everything.
func TestZoneOfAll(t *testing.T) {
	var z Zones
	z.Add(Zone{Name: ".", DefaultIP: netip.MustParseAddr("10.200.1.2")})
	if a, ok := z.Lookup("example.com."); !ok || len(a.Addrs) != 1 || a.Zone != "." {
		t.Errorf("%+v %v", a, ok)
	}
}
