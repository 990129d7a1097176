package cni

import (
	"encoding/json"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/control"
)

// FuzzRequest reads whatever comes, and what it accepts has to be something that can be asked of the daemon. What it refuses has a
// code that is not that of a defect.
func FuzzRequest(f *testing.F) {
	f.Add(`{"name": "web", "subnet": "10.1.0.5/24", "gateway": "10.1.0.1", "subnets": [{"subnet": "::ffff:10.0.0.0/112"}, {}], "mtu": -1}`, "IP=::,1.2.3.4/;MAC=", "")
	f.Add(`{"name": "web", "runtimeConfig": {"portMappings": [{"hostPort": -1}, {"hostPort": 1, "containerPort": 65536, "protocol": "ſctp", "hostIP": "::%eth0"}],
		"aliases": {"web": [""]}, "ips": ["/", "::1/128"], "ipRanges": [[], [{"subnet": "0.0.0.0/0", "rangeStart": "::"}]], "bandwidth": {"ingressRate": 18446744073709551615}}}`, "IgnoreUnknown=1;=;", "")
	f.Add(`{"name": "web", "cniVersion": "1.1.0", "ipam": {"type": "x", "subnet": "fd00::/127", "ranges": [[{"subnet": "10.0.0.0/31"}]], "addresses": [{"address": "255.255.255.255/32"}]}}`, "",
		`{"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/31"}, {"address": "::ffff:10.0.0.1/104", "gateway": "::"}], "routes": [{"dst": "::/0"}, {"dst": "0.0.0.0/0", "priority": -1}]}`)
	f.Add(`{"name": "web", "cniVersion": "0.4.0", "prevResult": {"cniVersion": "0.4.0", "ips": [null]}}`, "", `{"cniVersion": "1.0.0", "routes": [null]}`)
	f.Add(`{"name": "web", "cniVersion": "0.4.0", "prevResult": {"cniVersion": "0.4.0", "interfaces": [{}], "ips": [{"version": "4", "interface": 9}]}, "a/b": 1, "isGateway": true, "dns": {"domain": "x"}}`, "", "{}")
	f.Fuzz(func(t *testing.T, text, args, lease string) {
		w, err := decode([]byte(text))
		var result *types100.Result
		if err == nil {
			result, err = w.previous()
		}
		a := &skel.CmdArgs{ContainerID: "c", IfName: "eth0", Netns: "/proc/self/ns/net", Args: args}
		var req control.AttachRequest
		if err == nil {
			req, err = request(w, a)
		}
		if err == nil {
			if given, lerr := create.CreateFromBytes([]byte(lease)); lerr == nil && whole([]byte(lease)) == nil {
				got, _ := types100.NewResultFromResult(given)
				err = w.take(got, &req)
			}
		}
		if err != nil {
			if e, ok := coded(err).(*types.Error); !ok || e.Code == types.ErrInternal || e.Msg == "" {
				t.Errorf("error %#v", e)
			}
			return
		}
		for _, p := range req.Ports {
			if p.ContainerPort == 0 || p.HostPort == 0 || p.Proto != usernet.TCP && p.Proto != usernet.UDP && p.Proto != usernet.SCTP {
				t.Errorf("port %+v", p)
			}
		}
		for _, a := range req.Addresses {
			if !a.IsValid() || a.Is4In6() {
				t.Errorf("address %v", a)
			}
		}
		for _, r := range req.Routes {
			if !r.Destination.IsValid() || !r.NextHop.IsValid() {
				t.Errorf("route %+v", r)
			}
		}
		if _, err := json.Marshal(req); err != nil {
			t.Error(err)
		}
		extend(result, a, req, control.Attached{})
		if i := indexOf(result, a); i < 0 {
			t.Errorf("result %+v", result)
		}
	})
}
