package cli

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
)

func TestGvforwarder(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want func(g *Gvforwarder)
	}{
		{"none", nil, nil},
		{"Hyper-V's unit", []string{"-preexisting", "-iface", "vsock0", "-url", "vsock://2:1025/connect"}, func(g *Gvforwarder) {
			g.Preexisting, g.Interface, g.Gateway.Addr = true, "vsock0", at(t, "vsock://2:1025/connect")
		}},
		{"WSL", []string{"-url=stdio:/mnt/c/gvproxy.exe?listen-stdio=accept&debug=true", "-iface=eth1", "-stop-if-exist="}, func(g *Gvforwarder) {
			g.Gateway = Remote{Command: []string{"/mnt/c/gvproxy.exe", "-debug=true", "-listen-stdio=accept"}}
			g.Interface, g.StopIfExist = "eth1", nil
		}},
		{"unix", []string{"-url", "unix:///run/gw.sock", "-mac", "", "-mtu", "65520", "-debug"}, func(g *Gvforwarder) {
			g.Gateway = Remote{Addr: at(t, "unix:///run/gw.sock"), Path: "/connect"}
			g.MAC, g.MTU, g.Debug = gvproxy.MAC{}, 65520, true
		}},
		{"vsock without a path", []string{"-url", "vsock://2:1024"}, func(g *Gvforwarder) {
			g.Gateway = Remote{Addr: at(t, "vsock://2:1024")}
		}},
		{"no query", []string{"-url", "stdio:/gvproxy"}, func(g *Gvforwarder) { g.Gateway = Remote{Command: []string{"/gvproxy"}} }},
		{"version", []string{"-version"}, func(g *Gvforwarder) { *g = Gvforwarder{Version: true} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := Gvforwarder{
				Gateway:   Remote{Addr: at(t, "vsock://2:1024/connect"), Path: "/connect"},
				Interface: "tap0", StopIfExist: []string{"eth0", "ens3", "enp0s1"}, MAC: deviceHW, MTU: 4000,
			}
			if tt.want != nil {
				tt.want(&want)
			}
			got, err := ParseGvforwarder(tt.args)
			if err != nil {
				t.Fatal(err)
			}
			if len(got.StopIfExist) == 0 {
				got.StopIfExist = nil
			}
			if diff := cmp.Diff(want, got, values); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestGvforwarderRefused(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"-mac 5a:94", `-mac: invalid MAC address "5a:94": want six bytes as 5a:94:ef:e4:0c:ee`},
		{"-mtu 10", "invalid -mtu 10: want 68 to 65535"},
		{"-iface a-name-of-16-chars", `invalid -iface "a-name-of-16-chars": want the name of an interface`},
		{"-iface a/b", `invalid -iface "a/b": want the name of an interface`},
		{"-url stdio:", `-url: invalid "": want stdio:/PROGRAM?FLAG=VALUE`},
		{"-url stdio:/x?a=%zz", `-url: invalid "/x?a=%zz": invalid URL escape "%zz"`},
		{"-url nonsense", ""},
		{"-url vsock://2", ""},
	} {
		_, err := ParseGvforwarder(strings.Fields(tt.args))
		if !errors.Is(err, usernet.ErrInvalid) || tt.want != "" && err.Error() != tt.want {
			t.Errorf("%s: %v, want %s", tt.args, err, tt.want)
		}
	}
	_, err := ParseGvforwarder([]string{"-nope"})
	if usage, ok := errors.AsType[*UsageError](err); !ok || !strings.HasPrefix(usage.Text, "flag provided but not defined: -nope\nUsage of gvforwarder:\n") {
		t.Errorf("-nope: %v", err)
	}
}
