package libnetwork

import (
	"encoding/json"
	"testing"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"
)

// Every message of ours that is not one of go-plugins-helpers' own types says the same as theirs: what they write we read
// and what we write they read, without a loss in either direction. Messages that they do not have, or have with fields
// missing (which is why they are ours), are compared in what they have.
func TestWireCompatible(t *testing.T) {
	options := map[string]any{"com.docker.network.generic": map[string]any{"mtu": "1500"}, "n": 1.0, "null": nil}
	pool := &network.IPAMData{AddressSpace: "LocalDefault", Pool: "10.0.0.0/24", Gateway: "10.0.0.1/24", AuxAddresses: map[string]any{"a": "10.0.0.9/24"}}
	t.Run("CreateNetworkRequest", func(t *testing.T) {
		both[network.CreateNetworkRequest, CreateNetworkRequest](t,
			network.CreateNetworkRequest{NetworkID: "n", Options: options, IPv4Data: []*network.IPAMData{pool}, IPv6Data: []*network.IPAMData{pool}})
	})
	t.Run("CreateEndpointRequest", func(t *testing.T) {
		both[network.CreateEndpointRequest, CreateEndpointRequest](t,
			network.CreateEndpointRequest{NetworkID: "n", EndpointID: "e", Options: options,
				Interface: &network.EndpointInterface{Address: "10.0.0.2/24", AddressIPv6: "fd00::2/64", MacAddress: "02:00:00:00:00:01"}})
	})
	t.Run("JoinRequest", func(t *testing.T) {
		both[network.JoinRequest, JoinRequest](t,
			network.JoinRequest{NetworkID: "n", EndpointID: "e", SandboxKey: "/run/netns/x", Options: options})
	})
	t.Run("JoinResponse", func(t *testing.T) {
		both[network.JoinResponse, JoinResponse](t,
			network.JoinResponse{
				InterfaceName: network.InterfaceName{SrcName: "uc0", DstPrefix: "eth"}, Gateway: "10.0.0.1", GatewayIPv6: "fd00::1",
				StaticRoutes: []*network.StaticRoute{{Destination: "192.0.2.0/24", RouteType: 1, NextHop: "10.0.0.1"}}, DisableGatewayService: true})
	})
	t.Run("ProgramExternalConnectivity", func(t *testing.T) {
		both[network.ProgramExternalConnectivityRequest, ConnectivityRequest](t,
			network.ProgramExternalConnectivityRequest{NetworkID: "n", EndpointID: "e", Options: options})
	})
	t.Run("InfoResponse", func(t *testing.T) {
		both[network.InfoResponse, InfoResponse](t, network.InfoResponse{Value: map[string]string{"a": "b"}})
	})
	t.Run("GetCapabilities", func(t *testing.T) {
		both[network.CapabilitiesResponse, Capabilities](t, network.CapabilitiesResponse{Scope: network.LocalScope, ConnectivityScope: network.GlobalScope})
	})
}

// both sends v, which must have every field set, from theirs to ours and back.
func both[Theirs, Ours any](t *testing.T, v Theirs) {
	t.Helper()
	there, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(there, &fields); err != nil {
		t.Fatal(err)
	}
	for name, value := range fields {
		if s := string(value); s == "null" || s == `""` || s == "false" || s == "[]" || s == "{}" {
			t.Fatalf("field %s is not set: its loss would not be seen", name)
		}
	}
	var ours Ours
	if err := json.Unmarshal(there, &ours); err != nil {
		t.Fatal(err)
	}
	back, err := json.Marshal(ours)
	if err != nil {
		t.Fatal(err)
	}
	var got Theirs
	if err := json.Unmarshal(back, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(v, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// The fields that go-plugins-helpers lacks, as moby spells them.
func TestWireBeyondHelpers(t *testing.T) {
	for _, tt := range []struct {
		v    any
		want string
	}{
		{Capabilities{"local", "local", true}, `{"Scope":"local","ConnectivityScope":"local","GwAllocChecker":true}`},
		{GwAllocCheckResponse{true, false}, `{"SkipIPv4":true,"SkipIPv6":false}`},
		{InterfaceName{"uc0", "lan0", "eth"}, `{"SrcName":"uc0","DstName":"lan0","DstPrefix":"eth"}`},
		{JoinResponse{}, `{"InterfaceName":null,"Gateway":"","GatewayIPv6":"","StaticRoutes":null,"DisableGatewayService":false}`},
		{Manifest{[]string{"NetworkDriver"}}, `{"Implements":["NetworkDriver"]}`},
		{ErrorResponse{Err: "x"}, `{"Err":"x"}`},
		{PortBinding{6, "", 80, "::1", 8080, 8090}, `{"Proto":6,"IP":"","Port":80,"HostIP":"::1","HostPort":8080,"HostPortEnd":8090}`},
	} {
		got, err := json.Marshal(tt.v)
		if err != nil || string(got) != tt.want {
			t.Errorf("%T\nwant %s\n got %s, %v", tt.v, tt.want, got, err)
		}
	}
}
