package doctor

import (
	"testing"
	"testing/fstest"
)

func TestOlder(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"20.10.24", "20.10", false}, {"19.03.1", "20.10", true}, {"20.9", "20.10", true}, {"4.5.0-dev", "4.5", false}, {"v1.5", "1.6", true},
		{"28.0.0-rc.1", "20.10", false}, {"1.20~ds1", "1.6", false}, {"", "1", true}, {"unknown", "1", true},
	} {
		if got := older(tt.a, tt.b); got != tt.want {
			t.Errorf("older(%q, %q) = %t", tt.a, tt.b, got)
		}
	}
}

// What others print or write may be anything.
func FuzzDecoders(f *testing.F) {
	f.Add("Id=usernet.service\nLoadState=loaded\nActiveState=active\n\nId=x\n")
	f.Add(rejectIPv6 + routeIPv6)
	f.Add("v1.2.3-rc4")
	f.Add("[network]\nnetavark_plugin_dirs = [\"/a\", {append=true}, 3]\n")
	f.Add("[network]\nnetavark_plugin_dirs = {a=1}\n")
	f.Fuzz(func(t *testing.T, text string) {
		for id := range parseUnits(text) {
			if id == "" {
				t.Error("a unit without a name")
			}
		}
		hasDefaultRoute(text)
		if older(text, text) {
			t.Errorf("%q is older than itself", text)
		}
		m := world{}.machine()
		m.root = fstest.MapFS{"etc/containers/containers.conf": {Data: []byte(text)}}
		if dirs, err := m.pluginDirs(); err != nil && dirs != nil {
			t.Errorf("both %q and %v", dirs, err)
		}
		fold(text, 10)
	})
}
