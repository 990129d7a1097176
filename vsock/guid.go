package vsock

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// GUID is a machine or a service of Hyper-V, its bytes in the order of its text.
type GUID [16]byte

// template is the service that Hyper-V makes of port 0 of a Linux guest; other ports stand in the first four bytes
// (Linux, net/vmw_vsock/hyperv_transport.c).
var template = GUID{0, 0, 0, 0, 0xfa, 0xcb, 0x11, 0xe6, 0xbd, 0x58, 0x64, 0x00, 0x6a, 0x79, 0x86, 0xd3}

// The machines that have a name (hvsocket.h).
var machines = []struct {
	name string
	many bool // there is no dialling it
	id   GUID
}{
	{"wildcard", true, GUID{}},
	{"children", true, GUID{0x90, 0xdb, 0x8b, 0x89, 0x0d, 0x35, 0x4f, 0x79, 0x8c, 0xe9, 0x49, 0xea, 0x0a, 0xc8, 0xb7, 0xcd}},
	{"loopback", false, GUID{0xe0, 0xe1, 0x61, 0x97, 0xdd, 0x56, 0x4a, 0x10, 0x91, 0x95, 0x5e, 0xe7, 0xa1, 0x55, 0xa8, 0x38}},
	{"parent", false, GUID{0xa4, 0x2e, 0x7c, 0xda, 0xd0, 0x3f, 0x48, 0x0c, 0x9c, 0xc2, 0xa4, 0xde, 0x20, 0xab, 0xb8, 0x78}},
}

// ServiceGUID is the Hyper-V service that AF_VSOCK's port is on a Linux guest.
func ServiceGUID(port uint32) GUID {
	g := template
	binary.BigEndian.PutUint32(g[:], port)
	return g
}

// Port is the reverse of ServiceGUID; false if g is not the service of a port.
func (g GUID) Port() (port uint32, ok bool) {
	if [12]byte(g[4:]) != [12]byte(template[4:]) {
		return 0, false
	}
	return binary.BigEndian.Uint32(g[:]), true
}

// ParseGUID reads 00000400-FACB-11E6-BD58-64006A7986D3, in either case and without braces.
func ParseGUID(s string) (g GUID, err error) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return GUID{}, fmt.Errorf("GUID %q: want 8-4-4-4-12 hexadecimal digits", s)
	}
	if _, err := hex.Decode(g[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return GUID{}, fmt.Errorf("GUID %q: %w", s, err)
	}
	return g, nil
}

// String writes g in upper case, as gvproxy and Podman do.
func (g GUID) String() string {
	return fmt.Sprintf("%X-%X-%X-%X-%X", g[:4], g[4:6], g[6:8], g[8:10], g[10:])
}

func parseHV(a *Addr, p parts) (err error) {
	if a.vm, err = parseMachine(p.host); err != nil {
		return err
	}
	service, ok := strings.CutPrefix(p.path, "/")
	if !ok || service == "" {
		return errors.New("the service is missing: want hvsock://VMID/SERVICE")
	}
	if port, err := strconv.ParseUint(service, 10, 32); err == nil {
		a.service = ServiceGUID(uint32(port))
		return nil
	}
	if a.service, err = ParseGUID(service); err != nil {
		return fmt.Errorf("service %q: want a port or a GUID", service)
	}
	return nil
}

func parseMachine(s string) (GUID, error) {
	for _, m := range machines {
		if m.name == s {
			return m.id, nil
		}
	}
	g, err := ParseGUID(s)
	if err != nil {
		return GUID{}, fmt.Errorf("machine %q: want a GUID, wildcard, children, loopback or parent", s)
	}
	return g, nil
}

func writeHV(a Addr) string {
	vm, service := a.vm.String(), a.service.String()
	for _, m := range machines {
		if m.id == a.vm {
			vm = m.name
		}
	}
	if port, ok := a.service.Port(); ok {
		service = strconv.FormatUint(uint64(port), 10)
	}
	return "hvsock://" + vm + "/" + service
}

// A Registration is the entry of the registry by which a Hyper-V host lets its machines and a service talk. Whatever
// listens or is dialled by hvsock needs one; writing it takes an administrator.
type Registration struct {
	Service GUID
	Name    string // for people, one line
}

// Registration is the entry that a needs, under a name for people; false if a is not of the scheme hvsock.
func (a Addr) Registration(name string) (Registration, bool) {
	return Registration{a.service, name}, a.Scheme() == "hvsock"
}

const (
	services    = `SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices`
	elementName = "ElementName"
)

// Key is the entry's key below HKEY_LOCAL_MACHINE. Its only value is the string ElementName, which is Name.
func (r Registration) Key() string { return services + `\` + r.Service.String() }

// File is the entry as a file that regedit and `reg import` take.
func (r Registration) File() string {
	value := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\r", " ", "\n", " ").Replace(r.Name)
	return fmt.Sprintf("Windows Registry Editor Version 5.00\r\n\r\n[HKEY_LOCAL_MACHINE\\%s]\r\n\"%s\"=\"%s\"\r\n", r.Key(), elementName, value)
}
