package cli

import (
	"errors"
	"strings"
	"testing"

	"github.com/usernet/usernet"
)

// sound holds for whatever is taken.
func sound(t *testing.T, g Gvproxy) {
	t.Helper()
	n := g.Network
	for _, a := range []struct {
		name string
		ok   bool
	}{
		{"mtu", n.MTU >= minMTU && n.MTU <= maxMTU},
		{"subnet", n.Subnet.IsValid() && n.Subnet == n.Subnet.Masked() && n.Subnet.Bits() <= maxBits},
		{"addresses", n.Subnet.Contains(n.Gateway) && n.Subnet.Contains(n.Device) && n.Subnet.Contains(n.Host)},
		{"distinct", n.Gateway != n.Device && n.Gateway != n.Host && n.Device != n.Host},
		{"aliases", len(n.NAT) > 0 && len(n.VirtualIPs) > 0},
	} {
		if !a.ok {
			t.Errorf("%s: %+v", a.name, n)
		}
	}
	for _, s := range g.Sockets {
		if s.SSH == nil || s.Local == "" || s.SSH.KeyFile == "" {
			t.Errorf("socket %+v", s)
		}
	}
}

// refused holds for whatever is not.
func refused(t *testing.T, err error) {
	t.Helper()
	if _, ok := errors.AsType[*UsageError](err); !ok && !errors.Is(err, usernet.ErrInvalid) {
		t.Errorf("%v is no fault of the text", err)
	}
}

func FuzzFile(f *testing.F) {
	f.Add(whole)
	f.Add("stack: {forwards: {':1': '192.168.127.2:1'}}")
	f.Add("a: &a [x, x]\nb: &b [*a, *a]\nlisten: [*b, *b]")
	f.Add("log-level: !!binary aGk=\n---\nlisten: [x]")
	f.Fuzz(func(t *testing.T, text string) {
		g, err := withFile(text)
		if err != nil {
			refused(t, err)
			return
		}
		sound(t, g)
	})
}

func FuzzFlags(f *testing.F) {
	f.Add("-mtu\n1500\n-ssh-port\n33445\n-listen-qemu\nunix:///run/vm.sock\n-forward-sock\na\n-forward-dest\n/b\n-forward-user\nc\n-forward-identity\nd")
	f.Add("-subnet=10.0.0.0/29\n--hostIP=10.0.0.3\n-debug=true\n-version=false\n-listen\nvsock://:1024")
	f.Add("-url\nstdio:/x?a=b&a=c\n-iface\ntap1\n-mac=\n-preexisting")
	f.Fuzz(func(t *testing.T, text string) {
		args := strings.Split(text, "\n")
		g, err := ParseGvproxy(args, func(string) ([]byte, error) { return []byte(whole), nil })
		switch {
		case err != nil:
			refused(t, err)
		case !g.Version:
			sound(t, g)
		}
		if _, err := ParseGvforwarder(args); err != nil {
			refused(t, err)
		}
	})
}
