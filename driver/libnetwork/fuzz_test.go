package libnetwork

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
)

func FuzzCreateNetwork(f *testing.F) {
	f.Add([]byte(`{"NetworkID":"n","Options":{"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{"mode":"bridge","mtu":"1400"}},"IPv4Data":[{"Pool":"10.0.0.0/24","Gateway":"10.0.0.1/24","AuxAddresses":{"a":"10.0.0.9/24","b":"<nil>"}}],"IPv6Data":[{"Pool":"fd00::/64"}]}`))
	f.Add([]byte(`{"NetworkID":"n","Options":{"com.docker.network.generic":{"subnet":"10.0.0.0/24","gateway":"10.0.0.1"}},"IPv4Data":[{"Pool":"0.0.0.0/0"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var req CreateNetworkRequest
		if json.Unmarshal(body, &req) != nil {
			return
		}
		n, err := networkOf(req, map[string]string{"mtu": "1300"})
		if err != nil {
			wantInvalid(t, err)
			return
		}
		if checkID("network", n.ID) != nil || strings.ContainsAny(n.ID, "/\x00") {
			t.Errorf("ID %q", n.ID)
		}
		if err := config.Network(n); err != nil {
			t.Errorf("a network that is none: %v", err)
		}
	})
}

func FuzzCreateEndpoint(f *testing.F) {
	f.Add([]byte(`{"NetworkID":"n","EndpointID":"e","Interface":{"Address":"10.0.0.2/24","AddressIPv6":"fd00::2/64","MacAddress":"02:42:00:00:00:01"},"Options":{"com.docker.network.endpoint.ifname":"lan0","com.docker.network.portmap":[{"Proto":6,"Port":80}]}}`))
	f.Add([]byte(`{"NetworkID":"n","EndpointID":"e","Interface":null,"Options":null}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var req CreateEndpointRequest
		if json.Unmarshal(body, &req) != nil {
			return
		}
		ep, err := endpointOf(req)
		if err != nil {
			wantInvalid(t, err)
			return
		}
		if ep.Addr4.IsValid() && !ep.Addr4.Addr().Is4() || ep.Addr6.IsValid() && !ep.Addr6.Addr().Is6() {
			t.Errorf("addresses %s and %s", ep.Addr4, ep.Addr6)
		}
		if ep.MAC != nil && len(ep.MAC) != 6 {
			t.Errorf("MAC %s", ep.MAC)
		}
		if len(ep.HostName()) > 15 || len(ep.PeerName()) > 15 || len(ep.IfName) > 15 {
			t.Errorf("link names %s, %s, %s", ep.HostName(), ep.PeerName(), ep.IfName)
		}
	})
}

func FuzzPorts(f *testing.F) {
	f.Add([]byte(`{"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"::1","HostPort":8080,"HostPortEnd":8090}]}`))
	f.Add([]byte(`{"com.docker.network.portmap":[{"Proto":17,"Port":53},{"Proto":132,"Port":1,"HostIP":"::1"}],"com.docker.network.driver.private.no_proxy_6to4":true}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var o Options
		if json.Unmarshal(body, &o) != nil {
			return
		}
		ports, err := portsOf(o)
		if err != nil {
			wantInvalid(t, err)
			return
		}
		for _, p := range ports {
			// A port that is read from Docker can be written as the argument that asks for it.
			want := p
			want.IPv4Only = false
			if got, err := config.Port(p.String()); err != nil || got != want {
				t.Errorf("%+v is written %s, which is %+v, %v", p, p, got, err)
			}
		}
	})
}

// FuzzHandler sends anything anywhere. The answer is always JSON, with Err unless the status is 200.
func FuzzHandler(f *testing.F) {
	for _, m := range []string{"/Plugin.Activate", "/NetworkDriver.GetCapabilities", "/NetworkDriver.GwAllocCheck", "/NetworkDriver.AllocateNetwork",
		"/NetworkDriver.FreeNetwork", "/NetworkDriver.CreateNetwork", "/NetworkDriver.DeleteNetwork", "/NetworkDriver.CreateEndpoint",
		"/NetworkDriver.DeleteEndpoint", "/NetworkDriver.EndpointOperInfo", "/NetworkDriver.Join", "/NetworkDriver.Leave",
		"/NetworkDriver.ProgramExternalConnectivity", "/NetworkDriver.RevokeExternalConnectivity", "/NetworkDriver.DiscoverNew",
		"/NetworkDriver.DiscoverDelete", "//x/../y", "/{a}"} {
		f.Add("POST", m, []byte(`{"NetworkID":"n","EndpointID":"e","SandboxKey":"/x","Options":{},"IPv4Data":[{"Pool":"10.0.0.0/24"}]}`))
		f.Add("GET", m, []byte(``))
	}
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		r, err := http.NewRequest(method, "http://plugin.moby.localhost/", strings.NewReader(string(body)))
		if err != nil {
			return // not HTTP
		}
		r.URL.Path = path
		d := newFake()
		h := Handler(d, nil, quiet())
		post(t, h, "NetworkDriver.CreateNetwork", `{"NetworkID":"n","IPv4Data":[{"Pool":"10.0.0.0/24","Gateway":"10.0.0.1/24"}]}`)
		post(t, h, "NetworkDriver.CreateEndpoint", `{"NetworkID":"n","EndpointID":"e"}`)
		for range 2 { // every call may come twice
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if ct := w.Header().Get("Content-Type"); ct != contentType {
				t.Fatalf("content type %q", ct)
			}
			answer, ok := parse(t, w.Body.String()).(map[string]any)
			if !ok || w.Code != http.StatusOK && answer["Err"] == nil {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
			r.Body, _ = r.GetBody()
		}
	})
}

func wantInvalid(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, usernet.ErrInvalid) {
		t.Errorf("%v does not wrap ErrInvalid", err)
	}
}
