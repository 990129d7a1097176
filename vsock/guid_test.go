package vsock

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestServiceGUID(t *testing.T) {
	for port, want := range map[uint32]string{
		1024:       "00000400-FACB-11E6-BD58-64006A7986D3", // gvproxy's default
		0x3049197c: "3049197C-FACB-11E6-BD58-64006A7986D3",
		0xffffffff: "FFFFFFFF-FACB-11E6-BD58-64006A7986D3",
	} {
		g := ServiceGUID(port)
		if g.String() != want {
			t.Errorf("port %d: %s, want %s", port, g, want)
		}
		if back, ok := g.Port(); !ok || back != port {
			t.Errorf("%s: port %d, %v, want %d", g, back, ok, port)
		}
		if again := guid(t, want); again != g {
			t.Errorf("%s is read as %s", want, again)
		}
	}
	if port, ok := guid(t, "00000400-FACB-11E6-BD58-64006A7986D4").Port(); ok {
		t.Errorf("another template has port %d", port)
	}
}

func TestParseGUIDErrors(t *testing.T) {
	for _, s := range []string{
		"", "1024", "00000400-FACB-11E6-BD58-64006A7986D", "00000400FACB-11E6-BD58-64006A7986D3-",
		"{00000400-FACB-11E6-BD58-64006A7986D3}", "0000040G-FACB-11E6-BD58-64006A7986D3",
	} {
		if g, err := ParseGUID(s); err == nil {
			t.Errorf("%q is read as %s", s, g)
		}
	}
}

func TestRegistration(t *testing.T) {
	if _, ok := mustParse(t, "vsock://2:1024").Registration("x"); ok {
		t.Error("a registration for AF_VSOCK")
	}
	r, ok := mustParse(t, "hvsock://wildcard/1024").Registration(`use"r\net`)
	if !ok {
		t.Fatal("no registration")
	}
	want := "Windows Registry Editor Version 5.00\r\n\r\n" +
		`[HKEY_LOCAL_MACHINE\SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices\` +
		"00000400-FACB-11E6-BD58-64006A7986D3]\r\n" + `"ElementName"="use\"r\\net"` + "\r\n"
	if diff := cmp.Diff(want, r.File()); diff != "" {
		t.Error("-want +got\n" + diff)
	}
}
